"""Which weights a folder holds, without reading all of them."""

import hashlib
from pathlib import Path

BLOCKS = 64  # of each weight file that are read
BLOCK_BYTES = 4096


def weights_digest(hf_dir: Path) -> str:
    """Sixteen hex digits that change when a model's weights or configuration are others.

    Files may have hundreds of gigabytes: read are the names, the sizes, and blocks spread evenly
    over each file. Training changes every tensor, and so what lies in any block. Times play no
    part: a copy of the folder is the same model.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*hf_dir.glob("*.safetensors"), hf_dir / "config.json"]):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(BLOCKS):
                file.seek(block * max(size - BLOCK_BYTES, 0) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
