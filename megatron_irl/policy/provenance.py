"""What a run began with: named when it starts, compared when it resumes and when it is scored."""

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_irl.config.run_files import IDENTITY, RECIPE
from megatron_irl.convert.weights_digest import weights_digest
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError


def today() -> datetime:
    """The date that a run starting now keeps; without the time, which differs between ranks."""
    return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)


def describe_start(
    hf_dir: Path, tokenizer: Tokenizer, date: datetime, adapter: str | None = None
) -> dict[str, str]:
    """Return what must not change under a run that is not finished, each by a digest.

    Args:
        hf_dir: ``model.hf``.
        tokenizer: As loaded, its template included.
        date: What the template takes for the present.
        adapter: ``adapter.path``.
    """
    template = tokenizer.template
    written = [template.text, dict(template.arguments)] if template is not None else []
    return {
        "model.hf": weights_digest(hf_dir),
        "tokenizer": _digest([
            tokenizer.vocab_size, tokenizer.stop_ids, tokenizer.bos_id, tokenizer.adds_bos,
            # Spelt out ids: the same vocabulary in another order is another tokenizer.
            [tokenizer.codec.decode_all([i]) for i in range(0, tokenizer.vocab_size, 97)],
        ]),
        "chat template": _digest(written),
        "date": date.isoformat(),
    } | ({"adapter.path": weights_digest(Path(adapter))} if adapter else {})


def identity_of(run: Path) -> dict[str, Any]:
    """What a run's ``run.json`` says, or what its ``recipe.yaml`` does where that is cut or gone.

    Raises:
        UserError: There is a ``run.json``, and neither can be read.
    """
    path = run / IDENTITY
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return said_in_recipe(run)
    except (ValueError, TypeError, OSError) as error:
        if known := said_in_recipe(run):
            return known
        raise UserError(
            f"{path} cannot be read: {error}. Set output_dir to a new folder, or restore it."
        ) from error


def said_in_recipe(run: Path) -> dict[str, Any]:
    """The identity as ``recipe.yaml`` repeats it; of a run of 0.1.0 only that it is one."""
    try:
        written = yaml.safe_load((run / RECIPE).read_text())
        environment = written["environment"]
        return environment.get("run") or {"restored_from": f"{environment['versions']}"}
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, UnicodeDecodeError):
        return {}


def start_of(run: Path) -> dict[str, str]:
    """What a run began with, see ``describe_start``; empty before it has, and for runs of earlier
    versions.
    """
    start = identity_of(run).get("start")
    return dict(start) if isinstance(start, dict) else {}


def date_of(start: dict[str, str]) -> datetime | None:
    """The date that chat templates print in a run; None where it is not known."""
    return datetime.fromisoformat(start["date"]) if "date" in start else None


def check_weights(run: Path, hf_dir: Path) -> None:
    """Raise UserError if a run began with other weights than those now in a folder."""
    digest = weights_digest(hf_dir)
    known = start_of(run).get("model.hf", digest)
    if known != digest:
        raise UserError(
            f"{hf_dir} is not what {run} began with: the digest of its weights and config.json was "
            f"{known} and is {digest}. Put the files back, or give a folder that has them as "
            "--reference."
        )


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
