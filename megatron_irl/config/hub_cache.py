"""The Hugging Face cache on this machine: which of a repository's snapshots a folder means."""

from pathlib import Path

from megatron_irl.errors import UserError

SNAPSHOTS, DEFAULT_REVISION = "snapshots", "main"


def hub_snapshot(folder: str | Path) -> Path:
    """The model folder itself: ``folder``, or a snapshot in it.

    A cached repository (``models--<owner>--<name>``) holds revisions under ``snapshots/``, whose
    files are links into ``blobs/``, and in ``refs/main`` the revision that was fetched last. That
    one is taken, or the only one. Anything else is returned as it is.

    Raises:
        UserError: There are several, and nothing says which one is meant; or none.
    """
    folder = Path(folder)
    if not (folder / SNAPSHOTS).is_dir() or (folder / "config.json").exists():
        return folder
    held = sorted(path for path in (folder / SNAPSHOTS).iterdir() if path.is_dir())
    reference = folder / "refs" / DEFAULT_REVISION
    if reference.is_file():
        wanted = folder / SNAPSHOTS / reference.read_text(encoding="utf-8").strip()
        if wanted in held:
            return wanted
    if len(held) == 1:
        return held[0]
    names = ", ".join(path.name for path in held) or "none"
    raise UserError(
        f"{folder} is a repository of the Hugging Face cache, and refs/{DEFAULT_REVISION} names "
        f"none of its snapshots ({names}). Give the folder of one, {folder / SNAPSHOTS}/<revision>."
    )
