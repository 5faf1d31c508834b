"""Live console lines for phases that take long.

On a terminal one line is rewritten in place and stays when its phase ends. In a log file (slurm)
a phase writes a line at most every ten seconds, and one when it ends. Everything goes to
one stream, standard error unless told otherwise; standard output stays the user's.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

Advance = Callable[..., None]
"""``advance(done, tokens=0)``: totals so far, not increments."""

MUCH = 1 << 30  # bytes of weights whose reading is told
_REFRESH_SECONDS = 0.1
_CLEAR = "\r\x1b[2K"
_STEP_KEYS = (("loss", "loss", ".4f"), ("reward/margin", "margin", "+.3f"),
              ("reward/accuracy", "accuracy", ".2f"), ("policy/clip_fraction", "clipped", ".2f"),
              ("policy/entropy", "entropy", ".2f"), ("grad_norm", "grad norm", ".2f"),
              ("tokens_per_second", "tok/s", ",.0f"))
_HELD_OUT_KEYS = (("nll", "nll", ".4f"), ("greedy_exact_match", "greedy exact match", ".2f"),
                  ("exact_match", "exact match", ".2f"),
                  ("reward_accuracy", "reward accuracy", ".2f"))


class Console:
    """The console of a run; silent unless ``enabled`` (the main rank).

    Args:
        enabled: Write at all.
        stream: None is standard error as it is at each write.
        interval_seconds: Least time between two lines of a phase where there is no terminal.
        clock: Seconds, monotonic.
    """

    def __init__(self, enabled: bool, *, stream: TextIO | None = None,
                 interval_seconds: float = 10.0,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.enabled = enabled
        self._given_stream = stream
        self._interval = interval_seconds
        self._clock = clock
        self._last_write: dict[str, float] = {}
        self._about = ""
        self._live = ""  # what the terminal's unfinished line shows
        self._opened = clock()
        self._step_seconds = 0.0
        self._steps_seen = 0
        self._rounds_seen: set[int] = set()

    @contextmanager
    def about(self, what: str) -> Iterator[None]:
        """Within the block the lines of phases begin with whose records they are about."""
        before, self._about = self._about, f"{what}: "
        try:
            yield
        finally:
            self._about = before

    @contextmanager
    def generation(self, total: int) -> Iterator[Advance]:
        """Show a generation of ``total`` responses; yields ``advance(done, tokens)``."""
        with self._phase("generation", total, "responses") as advance:
            yield advance

    @contextmanager
    def reference(self, total: int) -> Iterator[Advance]:
        """Show a reference pass over ``total`` sequences; yields ``advance(done)``."""
        with self._phase("reference pass", total, "sequences") as advance:
            yield advance

    @contextmanager
    def rewards(self, total: int) -> Iterator[Advance]:
        """Show the scoring of ``total`` sequences by the reward; yields ``advance(done)``."""
        with self._phase("reward pass", total, "sequences") as advance:
            yield advance

    @contextmanager
    def scoring(self, total: int) -> Iterator[Advance]:
        """Show the scoring of ``total`` sequences of an evaluation; yields ``advance(done)``."""
        with self._phase("evaluation", total, "sequences") as advance:
            yield advance

    def step(self, line: Mapping[str, Any], *, total_steps: int, generation_share: float,
             total_rounds: int | None = None) -> None:
        """Show one optimizer step.

        Args:
            line: The step's metrics, as in ``metrics.jsonl``.
            total_steps: Of the run; 0 where unknown.
            generation_share: Share of the run's time spent generating, in [0, 1].
            total_rounds: Of the run. The remaining time then counts what the coming rounds
                spend outside of optimizer steps as well.
        """
        step = line["step"]
        self._steps_seen += 1
        self._step_seconds += line.get("time/step") or 0.0
        self._rounds_seen.add(line.get("round", 0))
        parts = [f"step {step}/{total_steps}" if total_steps else f"step {step}"]
        parts += [f"{label} {_shown(line[key], form)}" for key, label, form in _STEP_KEYS
                  if line.get(key) is not None]
        if generation_share > 0:
            parts.append(f"generating {generation_share:.0%} of the time")
        is_last = step == total_steps
        if total_steps and not is_last:
            seconds = self._remaining(step, line.get("round", 0), total_steps, total_rounds)
            parts.append(f"ETA {format_seconds(seconds)}")
        where = " ".join(filter(None, (f"round {line.get('round', 0)}", line.get("phase"))))
        self._show("train", f"[{where}] " + "  ".join(parts), ends=is_last)

    def round(self, record: Mapping[str, Any]) -> None:
        """Say what a round changed on held-out records, if it was evaluated.

        Args:
            record: The round's line, as in ``rounds.jsonl``.
        """
        before, after = record.get("evaluation_before") or {}, record.get("evaluation") or {}
        parts = []
        for key, label, form in _HELD_OUT_KEYS:
            if after.get(key) is not None:
                was = f"{before[key]:{form}} -> " if before.get(key) is not None else ""
                parts.append(f"{label} {was}{after[key]:{form}}")
        if parts:
            self.note(f"[round {record['round']}] held out: " + "  ".join(parts))

    def reading(self, folder: Path) -> None:
        """Say that the weights in a folder are read, before that, where it takes a while."""
        if self.enabled:
            size = sum(path.stat().st_size for path in folder.glob("*")
                       if path.suffix in (".safetensors", ".distcp"))
            if size >= MUCH:
                self.note(f"reading {size / 2**30:.1f} GiB of weights from {folder}")

    def note(self, text: str) -> None:
        """Write a line that stays."""
        self._write_line(text)

    def warn(self, text: str) -> None:
        """Write a warning that stays."""
        self._write_line(f"WARNING: {text}")

    def close(self) -> None:
        """Leave the terminal's unfinished line as it is; what comes next starts a new one."""
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
            self._live = ""

    @contextmanager
    def _phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        name, started = self._about + name, self._clock()
        latest = [0, 0]

        def text() -> str:
            done, tokens = latest
            elapsed = self._clock() - started
            shown = f"{name} {done}/{total} {unit}"
            if tokens and elapsed > 0:
                shown += f"  {tokens / elapsed:,.0f} tok/s"
            if 0 < done < total:
                return shown + f"  ETA {format_seconds(elapsed * (total - done) / done)}"
            return shown + (f"  {format_seconds(elapsed)}" if done else "")

        def advance(done: int, tokens: int = 0) -> None:
            latest[:] = done, tokens
            if self.enabled:
                self._show(name, text(), ends=False)

        self._last_write[name] = started
        try:
            yield advance
        except BaseException:
            self.close()
            raise
        latest[0] = max(latest[0], total)  # the phase returned, so all of it is done
        if self.enabled and total:
            self._show(name, text(), ends=True)

    def _remaining(self, step: int, round_index: int, total_steps: int,
                   total_rounds: int | None) -> float:
        """Remaining steps at their mean time, coming rounds at their mean time outside of steps."""
        seconds = (total_steps - step) * self._step_seconds / self._steps_seen
        if total_rounds:
            outside = max(0.0, self._clock() - self._opened - self._step_seconds)
            seconds += (total_rounds - 1 - round_index) * outside / len(self._rounds_seen)
        return seconds

    def _show(self, phase: str, text: str, *, ends: bool) -> None:
        """Rewrite the terminal's line, or write a line to the log if one is due."""
        if not self.enabled:
            return
        on_terminal = self._stream.isatty()
        now = self._clock()
        due = _REFRESH_SECONDS if on_terminal else self._interval
        last = self._last_write.get(phase)
        if not ends and last is not None and now - last < due:
            return
        self._last_write[phase] = now
        if not on_terminal or ends:
            self._stream.write((_CLEAR if self._live else "") + text + "\n")
            self._stream.flush()
            self._live = ""
            return
        self._live = text[: max(20, shutil.get_terminal_size().columns - 1)]
        self._stream.write(_CLEAR + self._live)
        self._stream.flush()

    def _write_line(self, text: str) -> None:
        """Write a whole line above the unfinished one."""
        if not self.enabled:
            return
        if self._live:
            self._stream.write(f"{_CLEAR}{text}\n{self._live}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._given_stream is None else self._given_stream


def _shown(value: float, form: str) -> str:
    """A number in a form; one that is rounded to zero has no sign."""
    text = f"{value:{form}}"
    return text if text.strip("+-0.,") else text.lstrip("+-")


def format_seconds(seconds: float) -> str:
    """Return ``45s``, ``3m05s`` or ``2h07m``."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
