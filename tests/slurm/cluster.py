"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd in a folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CREDENTIAL_SECONDS = 10
_CONF = """
ClusterName=irl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire={credential}
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool_%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd_%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdTimeout=15
SlurmctldTimeout=10
KillWait=10
MessageTimeout=30
ReturnToService=2
JobRequeue=1
NodeName=DEFAULT CPUs=1 RealMemory=1000
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}]
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class Cluster:
    """Started by ``start``; ``stop`` ends its own processes and no others."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
        if missing:
            raise SystemExit(f"{', '.join(missing)}: not there. Debian: apt-get install "
                             "slurm-wlm munge")
        root, port = self.root, _free_ports(3)
        root.chmod(0o755)
        (root / "state").mkdir()
        for node in ("n1", "n2"):
            (root / f"spool_{node}").mkdir()
        (root / "slurm.conf").write_text(_CONF.format(
            credential=CREDENTIAL_SECONDS, host=socket.gethostname(), root=root, port=port,
            first=port + 1, second=port + 2))
        key = root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}",
                     f"--socket={root}/munge.socket", f"--pid-file={root}/munged.pid",
                     f"--log-file={root}/munged.log", f"--seed-file={root}/munged.seed")
        self._wait(lambda: (root / "munge.socket").exists(), 20, "munged has no socket")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        self._wait(self.is_idle, 90, "the nodes do not become idle")

    def is_idle(self) -> bool:
        """Whether both nodes wait for work."""
        return self.ask("sinfo", "-h", "-o", "%D %t").strip() == "2 idle"

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> list[int]:
        """SIGKILL a node's slurmd and everything of its jobs; returns what was killed."""
        slurmd = self.daemons[node].pid
        steps = [pid for pid in _all_pids()
                 if f"[{node}]" in _cmdline(pid) or f"SLURMD_NODENAME={node}" in _environ(pid)]
        steps += [pid for pid in _all_pids() if _cmdline(pid).startswith("slurmstepd")
                  and self._spool_of(pid) == node]
        killed = [slurmd, *{pid for pid in steps if pid not in (slurmd, os.getpid())}]
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[node].wait()
        return killed

    def _spool_of(self, pid: int) -> str:
        """The node whose spool folder a slurmstepd has open."""
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(entry)
                for node in ("n1", "n2"):
                    if f"spool_{node}" in target or target.endswith(f"slurmd_{node}.log"):
                        return node
        return ""

    def ask(self, *command: str) -> str:
        """What a Slurm command prints; "" if it fails."""
        done = subprocess.run(command, env=self.environment | {"PATH": _path()}, text=True,
                              capture_output=True, timeout=60, check=False)
        return done.stdout if done.returncode == 0 else ""

    def call(self, *command: str, **environment: str) -> str:
        """As ``ask``, but a failure is an error."""
        done = subprocess.run(
            command, env=self.environment | {"PATH": _path()} | environment, text=True,
            capture_output=True, timeout=60, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        words = self.ask("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """End the daemons, first those that were started last."""
        for process in reversed(list(self.daemons.values())):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _daemon(self, *command: str, name: str = "") -> None:
        name = name or command[0]
        with open(self.root / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment | {"PATH": _path()}, stdout=out, stderr=out,
                start_new_session=True)

    def _wait(self, true, seconds: float, text: str) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                logs = "".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}"
                               for p in sorted(self.root.glob("*.log")))
                raise SystemExit(f"{text}\n{logs}")
            time.sleep(0.3)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that are free."""
    for first in range(17000, 19000, 10):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first
    raise SystemExit("no free ports between 17000 and 19000")


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _cmdline(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def _environ(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().replace(b"\0", b"\n").decode()
    return ""
