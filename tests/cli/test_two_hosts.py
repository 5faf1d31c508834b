"""torchrun on two hosts: an agent in each of two network namespaces, or two on this host."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.harness import read_jsonl, write_recipe
from tests.cli.test_ranks import assert_same_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hosts():
    """Per host: what a command is started with, its address, and its network interface."""
    names = [f"irl{os.getpid()}{letter}" for letter in "ab"]
    made = shutil.which("ip") and not subprocess.run(
        ["ip", "netns", "add", names[0]], capture_output=True, check=False).returncode
    if not made:
        yield [([], "127.0.0.1", "lo")] * 2
        return
    try:
        a, b = names
        links = [f"v{a[-6:]}", f"v{b[-6:]}"]
        for command in (
            f"ip netns add {b}", f"ip link add {links[0]} netns {a} type veth peer name {links[1]} "
            f"netns {b}", *(f"ip -n {n} addr add 10.77.0.{i}/24 dev {link}"
                            for i, (n, link) in enumerate(zip(names, links, strict=True), 1)),
            *(f"ip -n {n} link set {link} up" for n, link in zip(names, links, strict=True)),
            *(f"ip -n {n} link set lo up" for n in names),
        ):
            subprocess.run(command.split(), check=True)
        yield [(["ip", "netns", "exec", n], f"10.77.0.{i}", link)
               for i, (n, link) in enumerate(zip(names, links, strict=True), 1)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start_agents(hosts, recipe, folder):
    """torchrun on every host, as docs/slurm.md has it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for rank, (prefix, _, interface) in enumerate(hosts):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
        agents.append(subprocess.Popen(
            [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
             "--nproc-per-node", "1", "--node-rank", str(rank), "--master-addr", hosts[0][1],
             "--master-port", str(port), "-m", "megatron_irl", "train", str(recipe),
             "parallel.pipeline_model_parallel_size=2"],
            cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
            start_new_session=True))
    return agents


def end(agents):
    """Wait for both; their exit codes and what they said."""
    try:
        said = [agent.communicate(timeout=400)[1] for agent in agents]
        return [agent.returncode for agent in agents], "\n".join(said)
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)


def test_two_agents_stopped_and_resumed(hosts, sections, finished, tmp_path):
    """SIGTERM to one agent after the first step: both ranks save and stop, and then go on."""
    recipe = write_recipe(tmp_path / "recipe.yaml", **sections)
    agents = start_agents(hosts, recipe, tmp_path)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        if time.monotonic() > deadline or any(agent.poll() is not None for agent in agents):
            raise AssertionError(end(agents))
        time.sleep(0.02)
    agents[1].send_signal(signal.SIGTERM)
    codes, said = end(agents)
    steps = len(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert 0 not in codes, "an agent's own code says only that it did not finish"
    assert f"stopped at step {steps}" in said, said
    assert (tmp_path / "run" / "checkpoints" / f"step_{steps:06d}").exists(), said
    codes, said = end(start_agents(hosts, recipe, tmp_path))
    assert codes == [0, 0], said
    assert_same_run(tmp_path / "run", finished)
