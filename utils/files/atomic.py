"""A file that exists is whole: it is written to `<name>.part` and renamed when it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"


@contextmanager
def whole_file(path: Path, ending: str = "") -> Iterator[Path]:
    """The path `<name>.part` to write to, which is renamed to `path` at the end of the block.

    After an error it is removed, and the old file at `path` stays as it was. `ending` follows `.part` where a library
    decides by the name of a file how to write it.
    """
    part = path.with_name(path.name + PART + ending)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write bytes; an interrupted write leaves the old file as it was."""
    with whole_file(path) as part:
        part.write_bytes(data)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a mapping as JSON, one key a line."""
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def plain(value: Any) -> Any:
    """Paths become text, tuples lists: what `weights_only` reads back."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
