"""What the planner knows of devices and of what connects them."""

from dataclasses import dataclass

from megatron_irl.errors import UserError

NEAR = 0.95  # an estimate of so much of a device's memory is near its limit
GIB = 1024**3


@dataclass(frozen=True)
class Machine:
    """A device, and the node it stands in.

    Attributes:
        name: As ``--gpu`` takes it.
        memory: Bytes of the device.
        bf16, fp8: Dense peak of the matrix units in FLOP/s; fp8 is 0 where there is none.
        bandwidth: Bytes a second of the device's memory.
        link: Bytes a second a device sends to another of its node.
        network: Bytes a second a device sends to another node.
        per_node: Devices of a node.
    """

    name: str
    memory: float
    bf16: float
    fp8: float
    bandwidth: float
    link: float
    network: float = 50e9
    per_node: int = 8


# Data sheets: dense figures, SXM boards. Memory is what the driver reports as total.
MACHINES = {
    machine.name: machine for machine in (
        Machine("h100", 79.1 * GIB, 989e12, 1979e12, 3.35e12, 450e9),
        Machine("h200", 139.8 * GIB, 989e12, 1979e12, 4.8e12, 450e9),
        Machine("h20", 95.6 * GIB, 148e12, 296e12, 4.0e12, 450e9),
        Machine("gh200", 94.5 * GIB, 989e12, 1979e12, 4.0e12, 450e9, per_node=4),
        Machine("a100", 79.1 * GIB, 312e12, 0.0, 2.04e12, 300e9, network=25e9),
        Machine("a100-40gb", 39.4 * GIB, 312e12, 0.0, 1.56e12, 300e9, network=25e9),
        Machine("b200", 178.4 * GIB, 2250e12, 4500e12, 8.0e12, 900e9),
        Machine("l40s", 44.4 * GIB, 362e12, 733e12, 0.864e12, 32e9, network=25e9),
    )
}


def machine_named(name: str) -> Machine:
    """The machine of a name, in any case.

    Raises:
        UserError: There is none.
    """
    if (found := MACHINES.get(name.lower())) is None:
        raise UserError(
            f"--gpu {name} is not a GPU that the planner knows. Give one of "
            f"{', '.join(MACHINES)}."
        )
    return found


def machine_of_device(device_name: str) -> Machine | None:
    """The machine of what CUDA calls the device (``NVIDIA H100 80GB HBM3``); None if unknown."""
    words = device_name.lower().replace("-", " ").split()
    if "a100" in words and "40gb" in words:
        return MACHINES["a100-40gb"]
    return next((m for name, m in MACHINES.items() if name in words), None)
