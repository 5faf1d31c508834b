"""The run folder: who owns it, whether it is finished, and what it records about itself."""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from megatron_irl.config import (
    Recipe,
    differences,
    fingerprint,
    load_recipe,
    resolve,
    to_yaml,
)
from megatron_irl.config.former import keep_former
from megatron_irl.config.run_files import CHECKPOINTS, HF, HF_REWARD, IDENTITY, LEDGER, RECIPE
from megatron_irl.data.token_store import is_token_store
from megatron_irl.errors import UserError
from megatron_irl.policy.provenance import date_of, identity_of, said_in_recipe, start_of
from megatron_irl.storage.commit import TEMPORARY_PATTERN, write_file
from megatron_irl.storage.lease import LEASE_PATTERN

SAMPLING = 2  # the way of drawing samples that a new run begins with
# Keys of trackers and the like come from the environment, but somebody may write one in a command.
_SECRET = re.compile(r"(?i)([\w.-]*(?:api_?key|secret|password|_token))=.*")
PACKAGES = ("megatron-irl", "megatron-core", "torch", "transformers", "transformer-engine", "numpy")


class RunFolder:
    """Paths and identity of one run; only the main rank writes.

    Example:
        folder = RunFolder(Path(recipe.output_dir))
        folder.check(resolved, corpus.digest, len(corpus.demonstrations), start)  # ours, or new
        on_main(lambda: folder.begin(resolved, inputs.identity, sys.argv), topology)
        folder.checkpoints, folder.pairs, folder.hf      # paths of what is kept there

    ``run.json`` holds the recipe's fingerprint, what the run began with, whether it ended, and what
    it computes with; the first two are in ``recipe.yaml`` too, from which they are restored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hf = path / HF
        self.adapter = path / "adapter"
        self.hf_reward = path / HF_REWARD
        self.ledger = path / LEDGER
        self.preference_references = path / "preference_references.json"
        self.checkpoints = path / CHECKPOINTS
        self.pairs = path / "pairs"
        self.heldout = path / "heldout"
        self.previous = path / "previous"
        self.tokens = path / "tokens"
        self._identity = path / IDENTITY

    def round_adapter(self, round_index: int) -> Path:
        """Where the adapter of a round is kept that is merged into the base."""
        return self.path / "adapters" / f"round_{round_index:04d}"

    @property
    def is_finished(self) -> bool:
        return bool(identity_of(self.path).get("finished"))

    def was_finished_by(self, recipe: Recipe) -> bool:
        """Whether this is the finished run of a recipe, as far as can be told without its data.

        Args:
            recipe: Not resolved. One that is another experiment is for ``check`` to refuse.
        """
        known = identity_of(self.path)
        if not known.get("finished") or "demonstrations" not in known:
            return False
        recipe, _ = self.as_begun(recipe)
        return known.get("fingerprint") == fingerprint(resolve(recipe, known["demonstrations"]))

    def as_begun(self, recipe: Recipe) -> tuple[Recipe, list[str]]:
        """The recipe with the defaults of the version that began the run, and what to say of them.

        Args:
            recipe: Not resolved; a new folder leaves it as it is.
        """
        identity = identity_of(self.path)
        if not identity:
            return recipe, []
        try:
            known = load_recipe(self.path / RECIPE, check_files=False)
        except UserError:  # ``check`` says what is wrong with it, where the run has another name
            kept = keep_former(recipe, recipe)
            count = identity.get("demonstrations")
            named = count and fingerprint(resolve(kept[0], count)) == identity.get("fingerprint")
            return kept if named else (recipe, [])
        return keep_former(recipe, known)

    def check_place(self) -> None:
        """Raise UserError unless the folder can be written and is new, empty or a run's."""
        _check_writable(self.path)
        if not self._identity.exists():
            # A run killed while it claimed the folder leaves no more than these.
            passing = (TEMPORARY_PATTERN, LEASE_PATTERN)
            found = [p for p in self.path.glob("*") if not any(map(p.match, passing))
                     and not (p == self.tokens and is_token_store(p))]
            if found and not said_in_recipe(self.path):
                raise UserError(
                    f"output_dir={self.path} is not empty and is not a run of megatron-irl. Set "
                    "output_dir to a new or empty folder."
                )

    @property
    def date(self) -> datetime | None:
        """The date that chat templates print in this run; None before it has begun."""
        return date_of(self.start)

    def check(
        self, recipe: Recipe, data: str, num_demonstrations: int, start: dict[str, str]
    ) -> None:
        """Raise UserError if the folder belongs to another recipe or to other data.

        Args:
            recipe: Resolved.
            data: Digest of what is trained on. Order and ordinals of records are a run's
                coordinates: after a change they would mean other records.
            num_demonstrations: What ``recipe`` was resolved with.
            start: What the run would begin with now, see ``provenance.describe_start``.
        """
        self.check_place()
        known = identity_of(self.path)
        if not known:
            return
        self._check_recipe(recipe, num_demonstrations, known)
        for name, began in self.start.items():
            if start.get(name, began) != began:
                raise UserError(
                    f"output_dir={self.path} was begun with another {name}: its digest was {began} "
                    f"and is {start[name]}. Put the files back to resume, or set output_dir to a "
                    "new folder."
                )
        if known.get("data", data) != data:
            raise UserError(
                f"output_dir={self.path} was begun with other records of data.train or "
                f"reward.preferences, or another tokenizer: their digest was {known['data']} and "
                f"is {data}. Restore the files to resume, or set output_dir to a new folder."
            )

    def begin(
        self, recipe: Recipe, began_with: dict[str, Any], argv: list[str],
        kernels: dict[str, Any] | None = None,
    ) -> None:
        """Write ``run.json``, then ``recipe.yaml`` (resolved, with versions and revision).

        In this order, so that a folder with anything in it is known as a run's.

        Args:
            recipe: Resolved.
            began_with: ``data``, ``demonstrations`` and ``start``, as of ``check``.
            kernels: What the run computes with, for the record.
        """
        # What the folder was begun with stays: how samples are drawn must not change on the way.
        known = identity_of(self.path)
        sampling = known.get("sampling", 1) if known else SAMPLING
        identity = {"fingerprint": fingerprint(recipe), "sampling": sampling, **began_with}
        environment = {"environment": describe_environment(argv) | {"run": identity}}
        text = to_yaml(recipe) + yaml.safe_dump(environment, sort_keys=False)
        pipeline = {k: v for k, v in known.items() if k == "pipeline"}  # until it samples again
        record = {"kernels": kernels} if kernels else {}
        self._write(identity | {"finished": False} | record | pipeline)
        write_file(self.path / RECIPE, text.encode())

    def note_pipeline(self, choice: dict[str, str]) -> None:
        """Record how the stages of a pipeline generated last, beside what the run computes with."""
        known = identity_of(self.path)
        if known.get("pipeline") != choice:
            self._write(known | {"pipeline": choice})

    def finish(self) -> None:
        """Mark the run finished; nothing is done on it again."""
        self._write(identity_of(self.path) | {"finished": True})

    @property
    def start(self) -> dict[str, str]:
        """What the run began with, see ``provenance.describe_start``; empty before it has, and for
        runs of earlier versions.
        """
        return start_of(self.path)

    @property
    def sampling(self) -> int:
        """How the run draws its samples: 1 as release 0.1.0 did, whose runs go on so; else 2."""
        known = identity_of(self.path)
        return known.get("sampling", 1) if known else SAMPLING

    def _check_recipe(self, recipe: Recipe, num_demonstrations: int, known: dict[str, Any]) -> None:
        """Raise UserError unless the run's own recipe is the same experiment, by key.

        The recipe of the folder is read as of today, so that keys which are younger than the run
        have their defaults in it. Where it cannot be read, the fingerprint decides.
        """
        path = self.path / RECIPE
        different: list[str] = []
        try:
            own = resolve(load_recipe(path, check_files=False), num_demonstrations)
        except UserError as error:
            if known.get("fingerprint") == fingerprint(recipe):
                return
            different = [str(error)]
        else:
            different = differences(own, recipe)
        if different:
            raise UserError(
                f"output_dir={self.path} belongs to another recipe; its own is {path}: "
                f"{'; '.join(different)}. Set output_dir to a new folder, or start with that "
                "recipe to resume it."
            )

    def _write(self, identity: dict[str, Any]) -> None:
        write_file(self._identity, json.dumps(identity, indent=2).encode())


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
        "command": [_SECRET.sub(r"\1=***", word) for word in argv],
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
