"""What a run began with: named when it starts, compared when it resumes and when it is scored."""

import hashlib
import json
from datetime import datetime
from pathlib import Path

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


def start_of(run: Path) -> dict[str, str]:
    """Return what a run's folder says it began with; empty for one of earlier versions."""
    try:
        return dict(json.loads((run / "run.json").read_text())["start"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # cut or gone: what it would tell is a check, and the run's date


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
