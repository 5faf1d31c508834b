"""``certificate.json``: what was compared with what, how far apart it was, and of which files.

``tools/verify_checkpoint.py`` writes it beside the weights it is about.
"""

import datetime
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_irl

CERTIFICATE, NOTE = "certificate.json", "conversion.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.distcp", ".metadata")
PACKAGES = ("torch", "transformers", "megatron-core", "safetensors")


def write_certificate(folder: Path, files_of: Path, findings: dict[str, Any]) -> None:
    """Write ``folder/certificate.json`` about the weight files of ``files_of``.

    Args:
        files_of: ``folder`` itself or a folder inside it; every weight file is read and hashed.
        findings: What was measured, merged into the certificate.
    """
    certificate = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **findings,
        "versions": {
            "python": platform.python_version(), "megatron_irl": megatron_irl.__version__,
            **{name: version(name) for name in PACKAGES},
        },
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in weight_files(files_of)
        },
    }
    text = json.dumps(certificate, indent=2, sort_keys=False) + "\n"
    temporary = folder / f".{CERTIFICATE}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / CERTIFICATE)


def certificate_notes(hf_dir: Path) -> list[str]:
    """A warning about a converted HF folder that nobody verified; nothing to say otherwise.

    Cheap enough for the start of every run: sizes are compared, hashes are not.
    """
    if not (hf_dir / NOTE).exists():
        return []
    path = hf_dir / CERTIFICATE
    advice = f"Run: python tools/verify_checkpoint.py --hf {hf_dir}"
    if not path.exists():
        return [f"warning: model.hf={hf_dir} was converted and never verified. {advice}"]
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        recorded = {name: entry["bytes"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"warning: {path} cannot be read. {advice}"]
    present = {p.name: p.stat().st_size for p in weight_files(hf_dir)}
    if recorded != present:
        return [f"warning: {path} is about other weights than those in its folder. {advice}"]
    return []


def weight_files(folder: Path) -> list[Path]:
    """The files that make up a model in a folder, sorted."""
    return sorted({p for pattern in WEIGHTS for p in folder.glob(pattern) if p.is_file()})


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
