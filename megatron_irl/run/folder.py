"""The run folder: who owns it, whether it is finished, and what it records about itself."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from megatron_irl.config import Recipe, fingerprint, to_yaml
from megatron_irl.errors import UserError
from megatron_irl.storage.commit import TEMPORARY_PATTERN, replacing

PACKAGES = ("megatron-irl", "megatron-core", "torch", "transformers", "transformer-engine", "numpy")


class RunFolder:
    """Paths and identity of one run; only the main rank writes.

    ``run.json`` holds the recipe's fingerprint and whether the run is finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hf = path / "hf"
        self.hf_reward = path / "hf_reward"
        self.ledger = path / "ledger"
        self.preference_references = path / "preference_references.json"
        self.checkpoints = path / "checkpoints"
        self.pairs = path / "pairs"
        self.heldout = path / "heldout"
        self.previous = path / "previous"
        self._identity = path / "run.json"

    @property
    def is_finished(self) -> bool:
        return bool(self._read().get("finished"))

    def check_place(self) -> None:
        """Raise UserError unless the folder can be written and is new, empty or a run's."""
        _check_writable(self.path)
        if not self._identity.exists():
            # A run killed while it claimed the folder leaves no more than a temporary file.
            found = [p for p in self.path.glob("*") if not p.match(TEMPORARY_PATTERN)]
            if found:
                raise UserError(
                    f"output_dir={self.path} is not empty and is not a run of megatron-irl. Set "
                    "output_dir to a new or empty folder."
                )

    def check(self, recipe: Recipe, data: str) -> None:
        """Raise UserError if the folder belongs to another recipe or to other data.

        Args:
            recipe: Resolved.
            data: Digest of what is trained on. Order and ordinals of records are a run's
                coordinates: after a change they would mean other records.
        """
        self.check_place()
        known = self._read()
        if not known:
            return
        if known.get("fingerprint") != fingerprint(recipe):
            raise UserError(
                f"output_dir={self.path} belongs to another recipe; its own is "
                f"{self.path / 'recipe.yaml'}. Set output_dir to a new folder, or start with that "
                "recipe to resume it."
            )

        if known.get("data", data) != data:
            raise UserError(
                f"output_dir={self.path} was begun with other records of data.train or "
                f"reward.preferences, or another tokenizer: their digest was {known['data']} and "
                f"is {data}. Restore the files to resume, or set output_dir to a new folder."
            )

    def claim(
        self, recipe: Recipe, data: str, argv: list[str], kernels: dict[str, Any] | None = None
    ) -> None:
        """Write ``run.json``, then ``recipe.yaml`` (resolved, with versions and revision).

        In this order, so that a folder with anything in it is known as a run's.

        Args:
            kernels: What the run computes with, for the record.
        """
        environment = {"environment": describe_environment(argv)}
        text = to_yaml(recipe) + yaml.safe_dump(environment, sort_keys=False)
        identity = {"fingerprint": fingerprint(recipe), "data": data, "finished": False}
        self._write(identity | ({"kernels": kernels} if kernels else {}))
        with replacing(self.path / "recipe.yaml") as file:
            file.write(text.encode())

    def finish(self) -> None:
        """Mark the run finished; nothing is done on it again."""
        self._write(self._read() | {"finished": True})

    def _read(self) -> dict[str, Any]:
        if not self._identity.exists():
            return {}
        try:
            return dict(json.loads(self._identity.read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(
                f"{self._identity} cannot be read: {error}. Set output_dir to a new folder."
            ) from error

    def _write(self, identity: dict[str, Any]) -> None:
        with replacing(self._identity) as file:
            file.write(json.dumps(identity, indent=2).encode())


def _check_writable(folder: Path) -> None:
    """Raise UserError unless the folder is, or can be made, a folder to write in."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written" if existing.is_dir() else "is not a folder"
        raise UserError(f"output_dir={folder}: {existing} {what}. Set output_dir elsewhere.")


def describe_environment(argv: list[str]) -> dict[str, Any]:
    """Versions, revision, host and command: what is needed to know how a run came about."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "git_revision": _git_revision(),
        "host": platform.node(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "command": argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git_revision() -> str | None:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
