"""What a task of a Slurm step takes from its environment, and what it says where that is wrong."""

import os
import socket

import pytest

from megatron_irl.cli.ports import free_port
from megatron_irl.cli.ranks import adopt_environment
from megatron_irl.errors import UserError

STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]"}
SCONTROL = "#!/bin/sh\n{}\n"


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Set the environment of a task; ``scontrol`` runs the given shell text."""
    for name in list(os.environ):
        if name.startswith("SLURM") or name in (
                "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    # What adopt_environment sets is taken back at the end, since the names are known to the patch.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def enter(scontrol="echo node1; echo node2", **changes):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (STEP | changes).items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        if scontrol is not None:
            (tmp_path / "scontrol").write_text(SCONTROL.format(scontrol))
            (tmp_path / "scontrol").chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return adopt_environment()

    return enter


def test_a_task_of_a_step(step):
    assert step() == 4
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "node1"}


def test_an_interactive_shell_of_a_larger_allocation_is_one_task(step):
    """The allocation has four tasks, the step of the shell has one: it must not wait for three."""
    assert step(scontrol="exit 1", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0",
                SLURM_LOCALID="0") == 1
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_older_names_of_the_number_of_tasks(step):
    assert step(SLURM_STEP_NUM_TASKS=None) == 4
    assert step(SLURM_STEP_NUM_TASKS=None, SLURM_NTASKS=None, SLURM_NPROCS="2") == 2


def test_outside_a_step_nothing_is_taken(step):
    assert step(SLURM_STEP_ID=None) is None
    assert "RANK" not in os.environ


def test_ports_of_the_steps_of_a_job_differ(step):
    ports = []
    for number in range(40):
        step(SLURM_STEP_ID=str(number))
        ports.append(int(os.environ["MASTER_PORT"]))
    assert len(set(ports)) == 40 and all(1024 < port < 32768 for port in ports)
    step(SLURM_STEP_ID="3")
    assert int(os.environ["MASTER_PORT"]) == ports[3], "every rank of a step must find the same"


@pytest.mark.parametrize(("changes", "named"), [
    ({"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": None}, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS",
                                                            "not set", "srun")),
    ({"SLURM_LOCALID": None}, ("SLURM_LOCALID is not set",)),
    ({"SLURM_STEP_NUM_TASKS": "four"}, ("WORLD_SIZE=four", "whole numbers")),
    ({"scontrol": "echo no such node >&2; exit 1"}, ("scontrol show hostnames node[1-2]",
                                                     "no such node", "MASTER_ADDR")),
    ({"scontrol": "exit 3"}, ("exit code 3", "MASTER_ADDR")),
    ({"scontrol": "true"}, ("exit code 0", "MASTER_ADDR")),
])
def test_what_is_missing_is_one_message(step, changes, named):
    with pytest.raises(UserError) as raised:
        step(**changes)
    for word in named:
        assert word in str(raised.value)


def test_the_command_ends_with_code_2(step, capsys, monkeypatch, tmp_path):
    from megatron_irl.cli import main
    from tests.cli.harness import write_recipe

    (tmp_path / "d.jsonl").touch()
    recipe = write_recipe(tmp_path / "r.yaml", model={"hf": "m"}, algorithm={"name": "sft"},
                          data={"train": str(tmp_path / "d.jsonl")}, output_dir="o")
    with pytest.raises(UserError):
        step(scontrol="exit 1")
    assert main(["train", str(recipe)]) == 2
    assert "scontrol" in capsys.readouterr().err


def test_a_port_is_free_and_none_that_linux_deals_out():
    """Rank 0 listens on it only after it has read its libraries."""
    with socket.socket() as listening:
        taken = free_port()
        listening.bind(("127.0.0.1", taken))
        ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and taken not in ports and all(20000 <= port < 32768 for port in ports)
