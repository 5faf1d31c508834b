"""Ports where the ranks of a run meet: rank 0 listens, the others connect."""

import contextlib
import os
import secrets
import socket
import zlib

_FIRST_PORT, _NUM_PORTS = 20000, 12000  # below Linux's ephemeral range, which begins at 32768


def slurm_port() -> int:
    """A port that the ranks of a step agree on and that another step on its node does not have.

    Steps of one job have ports of their own; jobs are spread, so that they rarely meet.
    """
    job, step = os.environ.get("SLURM_JOB_ID", "0"), os.environ["SLURM_STEP_ID"]
    number = int(step) if step.isdecimal() else zlib.crc32(step.encode())
    return _FIRST_PORT + (zlib.crc32(job.encode()) + number) % _NUM_PORTS


def free_port() -> int:
    """A port of this machine that nobody listens on.

    Rank 0 does so some seconds later, when it has read its libraries; a port of those that the
    kernel deals out would by then be another connection's once in a while.
    """
    while True:
        port = _FIRST_PORT + secrets.randbelow(_NUM_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
