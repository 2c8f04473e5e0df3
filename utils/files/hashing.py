"""The content of a file as a short text, which names no place and no time.

Up to WHOLE bytes it is the SHA-256 of all bytes, as sha256sum gives it. Of a larger file the size and BLOCKS evenly
spaced blocks of BLOCK bytes are hashed, the first at its head, the last at its tail ("sampled-..."): a change that
keeps the size and touches none of these is not noticed. A slide that is an index beside other files is hashed with
them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE = 2**30
BLOCK, BLOCKS = 2**20, 256


def content_hash(path: Path) -> str:
    """Hash of the content of a file and of the files that belong to it."""
    path = Path(path)
    others = companions(path)
    if not others:
        return _sampled_hash(path)
    lines = [_sampled_hash(path), *(f"{other.relative_to(path.parent)} {_sampled_hash(other)}" for other in others)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def companions(path: Path) -> list[Path]:
    """Files that belong to a slide: those of an .mrxs in the folder of its name, those beside a .vms, .vmu or .dcm."""
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return sorted(file for file in path.with_suffix("").rglob("*") if file.is_file())
    if suffix in (".vms", ".vmu"):
        beside = [file for file in path.parent.iterdir() if file.name.startswith(path.stem) and file != path]
    elif suffix == ".dcm":
        beside = [file for file in path.parent.iterdir() if file.suffix.lower() == ".dcm" and file != path]
    else:
        return []
    return sorted(file for file in beside if file.is_file())


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for i in range(BLOCKS):
            file.seek((size - BLOCK) * i // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return f"sampled-{digest.hexdigest()}"


def file_hash(path: Path) -> str:
    """SHA-256 of all bytes of a file, however large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
