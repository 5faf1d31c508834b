"""Submit the real job script to a real Slurm: ``python -m tests.slurm``. Needs root, and minutes.

Two nodes, a time limit, a node that dies. The last line says PASS or FAIL.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.cluster import CREDENTIAL_SECONDS, Cluster

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 900.0


class Trial:
    """One job, from submission to its end.

    Args:
        root: Holds inputs and run folder.
    """

    def __init__(self, cluster: Cluster, root: Path, steps: int) -> None:
        self.cluster, self.root, self.run, self.steps = cluster, root, root / "run", steps
        self.begun = time.monotonic()
        self.job = ""

    def say(self, text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - self.begun:6.0f} s  {text}\n")
        sys.stdout.flush()

    def submit(self) -> None:
        self.job = self.cluster.call(
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1",
            "--gpus-per-node=0", "--time=60", "--signal=USR1@60", f"--output={self.root}/job.log",
            f"--chdir={self.root}", str(ROOT / "examples" / "slurm" / "job.slurm"),
            f"model.hf={self.root}/model", f"data.train={self.root}/train.jsonl",
            f"output_dir={self.run}", f"algorithm.steps_per_round={self.steps // 3}",
            RECIPE=str(ROOT / "examples" / "slurm" / "recipe.yaml"),
            COMMAND=f"{sys.executable} -m megatron_irl", PYTHONPATH=str(ROOT),
            MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", LOGS=str(self.root / "logs"),
        ).strip()
        self.say(f"job {self.job} is submitted: two nodes, {self.steps} steps")

    def wait(self, what: str, true) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            if time.monotonic() > deadline:
                raise SystemExit(f"not within {PATIENCE_SECONDS:.0f} s: {what}")
            time.sleep(0.5)
        self.say(what)

    def lines(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def starts(self) -> int:
        """Starts of the run, by what rank 0 said."""
        log = next(iter((self.root / "logs").glob("*-rank0.log")), None)
        return log.read_text(errors="replace").count("layers ") if log else 0

    def restarts(self) -> int:
        return int(self.cluster.job(self.job).get("Restarts", "0"))

    def state(self) -> str:
        return self.cluster.job(self.job).get("JobState", "")

    def start_now(self) -> None:
        """A requeued job waits two minutes by default; here until its old credential has expired.

        Earlier the nodes refuse it, and it fails.
        """
        time.sleep(CREDENTIAL_SECONDS + 3)
        self.cluster.ask("scontrol", "update", f"JobId={self.job}", "StartTime=now")

    def time_limit(self) -> None:
        """Bring the job's limit to where its signal is due; then the job must come again."""
        self.wait("the run has taken five steps", lambda: self.lines() >= 5)
        minutes = int(self.elapsed() // 60) + 1
        self.cluster.call("scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}")
        self.say(f"its time limit is set to {minutes} min")
        self.wait("it is back in the queue", lambda: self.restarts() >= 1)
        text = (self.root / "job.log").read_text()
        assert "exit code 75" in text, text
        assert "SIGUSR1 was received; stopped at step" in text, text
        self.cluster.call("scontrol", "update", f"JobId={self.job}", "TimeLimit=60")
        self.start_now()

    def elapsed(self) -> float:
        """Seconds that the job has run."""
        clock = self.cluster.job(self.job).get("RunTime", "0:0:0").rpartition("-")[2]
        hours, minutes, seconds = map(int, clock.split(":"))
        return 3600 * hours + 60 * minutes + seconds

    def lose_a_node(self) -> None:
        before = self.lines()
        self.wait("it goes on where it stood",
                  lambda: self.state() == "RUNNING" and self.lines() > before + 5)
        killed = self.cluster.kill_node("n2")
        self.say(f"node n2 is dead: slurmd and {len(killed) - 1} other processes killed")
        self.wait("it is back in the queue", lambda: self.restarts() >= 2)
        # Not before the node is whole again: a slurmd that comes back in the moment in which the
        # job starts does not know it, and Slurm takes the node out of the job.
        self.cluster.call("scontrol", "hold", self.job)
        self.cluster.start_node("n2")
        self.wait("node n2 is back", self.cluster.is_idle)
        self.cluster.call("scontrol", "release", self.job)
        self.start_now()

    def finish(self) -> None:
        self.wait("the job has ended",
                  lambda: self.state() in ("COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED", ""))
        assert self.state() == "COMPLETED", self.state() + (self.root / "job.log").read_text()
        assert json.loads((self.run / "run.json").read_text())["finished"]
        steps = [json.loads(line)["step"]
                 for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, self.steps + 1)), steps
        assert (self.run / "hf" / "model.safetensors").exists()
        logs = sorted(p.name for p in (self.root / "logs").glob("*.log"))
        assert len(logs) == 2, logs
        self.say(f"finished: {len(steps)} steps, each once; logs {', '.join(logs)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of the run; it must outlast both")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("FAIL: Slurm's daemons need root here")
    from tests.faults.cases import write_inputs

    root = Path(tempfile.mkdtemp(prefix="slurm_"))
    root.chmod(0o755)
    (root / "slurm").mkdir()
    cluster = Cluster(root / "slurm")
    passed = False
    try:
        write_inputs(root)
        cluster.start()
        trial = Trial(cluster, root, options.steps)
        trial.say("two nodes are idle: " + cluster.ask("sinfo", "-h", "-o", "%n %v").replace(
            "\n", ", ").strip(", "))
        trial.submit()
        trial.time_limit()
        trial.lose_a_node()
        trial.finish()
        passed = True
    except AssertionError as error:
        sys.stdout.write(f"{error}\n")
    finally:
        if not passed and (root / "job.log").exists():
            sys.stdout.write((root / "job.log").read_text()[-4000:] + "\n")
        if cluster.daemons and not passed:
            cluster.ask("scancel", "--full", "--user=root")
            time.sleep(3)
        cluster.stop()
        if options.keep or not passed:
            sys.stdout.write(f"kept {root}\n")
        else:
            shutil.rmtree(root, ignore_errors=True)
        sys.stdout.write(("PASS" if passed else "FAIL") + "\n")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
