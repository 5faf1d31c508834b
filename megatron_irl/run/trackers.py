"""TensorBoard and Weights & Biases behind one small protocol.

Only the process that logs (rank 0) builds trackers. ``metrics.jsonl`` is the record of a run;
trackers are a view of it.
"""

import html
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import write_file

WANDB_ID_FILE = "run_id.txt"


class Tracker(Protocol):
    """Somewhere numbers and texts of a run are shown."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record ``values`` at an optimizer step; see ``flatten`` for what is taken."""
        ...

    def log_text(self, step: int, key: str, text: str) -> None:
        """Record a plain text, shown as it is."""
        ...

    def close(self) -> None:
        """Flush everything; nothing is logged afterwards."""
        ...


class TensorBoardTracker:
    """Event files in ``<run>/tensorboard``."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("logging.tensorboard=true but the package tensorboard cannot be "
                            f"imported ({error}). Run `pip install tensorboard`, or set "
                            "logging.tensorboard=false.") from error
        folder = run_dir / "tensorboard"
        has_events = folder.is_dir() and any(folder.glob("events.*"))
        # Steps from purge_step on were logged by the killed run and are about to be done again.
        purge_step = (resume_step + 1 if resume_step else 0) if has_events else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record ``values`` at an optimizer step."""
        for key, value in flatten(values):
            self._writer.add_scalar(key, value, step)

    def log_text(self, step: int, key: str, text: str) -> None:
        """Record a text; indented, since TensorBoard would render it as Markdown."""
        self._writer.add_text(key, "\n".join("    " + line for line in text.split("\n")), step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run with its files in ``<run>/wandb``.

    A resumed run continues under the same run id, kept in ``<run>/wandb/run_id.txt``. The step is
    logged as a value of its own and made the x axis: W&B drops what is logged under a step it has
    passed, which is what a run resumed from an older checkpoint does.
    """

    def __init__(self, run_dir: Path, recipe: Mapping[str, Any], project: str | None,
                 mode: Literal["online", "offline", "disabled"] | None) -> None:
        try:
            import wandb
            from wandb.errors import Error
        except ImportError as error:
            raise UserError(f"logging.wandb=true but the package wandb cannot be imported ({error})"
                            ". Run `pip install wandb`, or set logging.wandb=false.") from error
        self._html = wandb.Html
        try:
            self._run = wandb.init(project=project or "megatron-irl", id=_wandb_run_id(run_dir),
                                   name=run_dir.resolve().name, dir=str(run_dir), mode=mode,
                                   resume="allow", config=dict(recipe))
        except Error as error:
            raise UserError(f"logging.wandb=true but W&B did not start a run: {error}. Run `wandb "
                            "login`, set logging.wandb_mode=offline, or set logging.wandb=false."
                            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """The id every session of this run folder shares."""
        return self._run.id

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record ``values`` at an optimizer step."""
        self._run.log({**dict(flatten(values)), "step": step})

    def log_text(self, step: int, key: str, text: str) -> None:
        """Record a text as preformatted HTML."""
        self._run.log({key: self._html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def close(self) -> None:
        """Finish this session of the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one, in the order given; none is fine."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record ``values`` at an optimizer step everywhere."""
        for tracker in self.trackers:
            tracker.log(step, values)

    def log_text(self, step: int, key: str, text: str) -> None:
        """Record a text everywhere."""
        for tracker in self.trackers:
            tracker.log_text(step, key, text)

    def close(self) -> None:
        """Close all of them."""
        for tracker in self.trackers:
            tracker.close()


def build_trackers(run_dir: str | Path, recipe_dict: Mapping[str, Any], *, tensorboard: bool,
                   wandb: bool, wandb_project: str | None,
                   wandb_mode: Literal["online", "offline", "disabled"] | None,
                   resume_step: int | None, warn: Callable[[str], None]) -> Trackers:
    """Open the trackers a recipe asks for.

    Args:
        run_dir: The run folder; created where missing.
        recipe_dict: The resolved recipe, stored with a W&B run as its config.
        tensorboard: Write event files to ``<run>/tensorboard``.
        wandb: Log to Weights & Biases, with files in ``<run>/wandb``.
        wandb_project: None means ``megatron-irl``.
        wandb_mode: None leaves it to the WANDB_MODE environment variable.
        resume_step: Last optimizer step of the restored checkpoint; None or 0 at the beginning.
        warn: Told of a tracker that cannot be opened for any other reason; the run goes on without
            it.

    Raises:
        UserError: At the beginning of a run: a package is missing, or W&B refuses to start one.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = []

    def open_tracker(name: str, make: Callable[[], Tracker]) -> None:
        try:
            trackers.append(make())
        except Exception as error:  # noqa: BLE001  (a client, a disk, a network: all may fail)
            if isinstance(error, UserError) and not resume_step:
                raise
            warn(f"{name} cannot be opened, the run goes on without it: {error}")

    if tensorboard:
        open_tracker("TensorBoard", lambda: TensorBoardTracker(run_dir, resume_step))
    if wandb:
        open_tracker(
            "W&B", lambda: WandbTracker(run_dir, recipe_dict, wandb_project, wandb_mode)
        )
    return Trackers(trackers)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings, with ``outer/inner`` keys; the rest is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def _wandb_run_id(run_dir: Path) -> str:
    path = run_dir / "wandb" / WANDB_ID_FILE
    if path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = uuid.uuid4().hex[:8]
    write_file(path, run_id.encode() + b"\n")
    return run_id
