"""Watch a round's numbers for the known ways reward learning from demonstrations goes wrong.

The objective sees only the difference between demonstration and sample, so it can be lowered by
making the demonstration less likely as long as the sample becomes less likely still: the curves
look healthy while the model forgets the demonstrations. Pure: no clock, no files, no collectives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_SERIES = ("reward/margin", "reward/accuracy", "reward/demo", "logp/demo", "length/demo",
           "length/sample")


@dataclass
class CollapseGuard:
    """Collects one round's steps; ``check`` at the round's end, ``start_round`` before the next.

    Keys of a step it looks at, all optional: ``reward/margin``, ``reward/accuracy``,
    ``reward/demo``, ``logp/demo``, ``length/demo`` and ``length/sample``.
    """

    has_implicit_reward: bool = True
    """``reward/demo`` is the demonstration's log-ratio to the reference, not a head of its own."""
    min_steps: int = 10
    """Fewer steps in a round say nothing about a trend."""
    logp_drop_fraction: float = 0.02
    """Fall of the demonstrations' log-probability that counts, relative to where it began."""
    logp_drop_nats: float = 1.0
    """The same in nats per response; both must be exceeded."""
    noise_factor: float = 2.0
    """Standard errors of the difference the fall must exceed: batches differ in content."""
    saturated_accuracy: float = 0.99
    """Reward accuracy over the last quarter of the steps from which there is nothing to learn."""
    min_length_ratio: float = 0.25
    """Sample length over demonstration length below which samples have collapsed."""
    max_repetition: float = 0.3
    """Share of repeated 4-grams above which samples loop, unless demonstrations repeat as much."""
    max_truncated_share: float = 0.5
    """Share of samples ended by the length budget above which they are not whole responses."""
    step_interval: int = 10
    """``step_warnings`` looks every so many steps."""
    _steps: int = field(default=0, init=False, repr=False)
    _series: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False)

    def start_round(self) -> None:
        """Forget the previous round."""
        self._steps = 0
        self._series.clear()
        self._said.clear()

    def feed(self, metrics: Mapping[str, Any]) -> None:
        """Take one optimizer step's metrics; absent keys and nulls are skipped."""
        self._steps += 1
        for key in _SERIES:
            value = metrics.get(key)
            if value is not None and np.isfinite(value):
                self._series.setdefault(key, []).append(float(value))

    def step_warnings(self) -> list[str]:
        """Return warnings this round has not given yet; for the console, while it runs."""
        if self._steps < 2 * self.min_steps or self._steps % self.step_interval:
            return []
        found = self._find(None)
        new = {kind: text for kind, text in found.items() if kind not in self._said}
        self._said.update(new)
        return list(new.values())

    def check(self, generation: Mapping[str, Any] | None = None) -> list[str]:
        """Return every warning of the round, each with what was seen and what to set.

        Args:
            generation: The round's generation counts (``samples``, ``truncated``,
                ``mean_length``, ``demo_length``, ``repetition``, ``demo_repetition``); lengths are
                preferred over the steps' own keys.
        """
        return list(self._find(generation).values())

    def _find(self, generation: Mapping[str, Any] | None) -> dict[str, str]:
        found = {
            "forgetting": self._forgetting(),
            "saturated": self._saturated(),
            "short": self._short(generation or {}),
            "truncated": self._truncated(generation or {}),
            "repetitive": self._repetitive(generation or {}),
        }
        return {kind: text for kind, text in found.items() if text}

    def _forgetting(self) -> str | None:
        logp, margin = self._fifths("logp/demo"), self._fifths("reward/margin")
        if logp is None or margin is None:
            return None
        first, last = logp[0].mean(), logp[1].mean()
        noise = np.sqrt(sum(part.var(ddof=1) / len(part) for part in logp))
        threshold = max(self.logp_drop_nats, self.logp_drop_fraction * abs(first),
                        self.noise_factor * noise)
        if first - last <= threshold or margin[1].mean() <= margin[0].mean():
            return None
        reward = self._fifths("reward/demo") if self.has_implicit_reward else None
        # Against its own reference no demonstration lost anything: the batches just got harder.
        if reward is not None and reward[1].mean() >= reward[0].mean():
            return None
        return (
            f"logp/demo fell from {first:.4g} to {last:.4g} nats per response while reward/margin "
            f"grew from {margin[0].mean():.3g} to {margin[1].mean():.3g} (first and last fifth of "
            f"{self._steps} steps): the margin grows by making samples unlikely, and the "
            "demonstrations are being forgotten. Set algorithm.nll_coefficient higher, fewer "
            "algorithm.steps_per_round, or a lower optimizer.lr.")

    def _saturated(self) -> str | None:
        accuracy = self._series.get("reward/accuracy", [])
        if len(accuracy) < self.min_steps:
            return None
        tail = accuracy[-max(1, len(accuracy) // 4):]
        mean = float(np.mean(tail))
        if mean < self.saturated_accuracy:
            return None
        return (
            f"reward/accuracy was {mean:.4g} over the last {len(tail)} of {self._steps} steps: "
            "these samples no longer teach anything. Set fewer algorithm.steps_per_round (rft: "
            "algorithm.reward_steps) and more algorithm.rounds, so that fresh samples come sooner, "
            "or a lower optimizer.lr.")

    def _short(self, generation: Mapping[str, Any]) -> str | None:
        sample = generation.get("mean_length")
        demo = self._mean("length/demo") or generation.get("demo_length")
        sample = self._mean("length/sample") if sample is None else sample
        if sample is None or not demo or sample >= self.min_length_ratio * demo:
            return None
        return (
            f"Samples are {sample:.1f} tokens long on average, demonstrations {demo:.1f} (ratio "
            f"{sample / demo:.2f} < {self.min_length_ratio}): responses have collapsed. Set "
            "algorithm.nll_coefficient higher or optimizer.lr lower, and check that the prompts "
            "end with the assistant header.")

    def _repetitive(self, generation: Mapping[str, Any]) -> str | None:
        share, demo = generation.get("repetition"), generation.get("demo_repetition") or 0.0
        if share is None or share <= max(self.max_repetition, 2 * demo):
            return None
        return (
            f"{share:.0%} of the samples' 4-grams repeat an earlier one, against {demo:.0%} in "
            "demonstrations: the policy loops. Set a larger algorithm.beta or a lower "
            "optimizer.lr, or a higher algorithm.nll_coefficient.")

    def _truncated(self, generation: Mapping[str, Any]) -> str | None:
        samples, count = generation.get("samples"), generation.get("truncated")
        if not samples or count is None:
            return None
        share, seen = count / samples, f"{count} of {samples} samples"
        if share <= self.max_truncated_share:
            return None
        return (
            f"{seen} were ended by the length budget before EOS (share {share:.2f} > "
            f"{self.max_truncated_share}): they are told from demonstrations by their missing end. "
            "Set a larger generation.max_new_tokens, or start from a model that ends its answers.")

    def _fifths(self, key: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the first and the last fifth of a series, at least two steps each."""
        series = self._series.get(key, [])
        if len(series) < max(4, self.min_steps):
            return None
        size = max(2, len(series) // 5)
        return np.asarray(series[:size]), np.asarray(series[-size:])

    def _mean(self, key: str) -> float | None:
        series = self._series.get(key)
        return float(np.mean(series)) if series else None
