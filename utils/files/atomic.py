"""A file that exists is whole: it is written to `<name>.part` and renamed when it is complete."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def write_figure(path: Path, figure: Figure, dpi: int = 150) -> Path:
    """Write a figure of matplotlib in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, format=path.suffix.lstrip("."), dpi=dpi, facecolor="white")
    return path


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


def publishable(value: Any) -> Any:
    """The same for JSON that may be published: NaN and infinity become null, paths their last part."""
    if isinstance(value, Mapping):
        return {str(key): publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        path = PureWindowsPath(value)  # knows both kinds of slashes
        return path.name if path.root or ".." in path.parts or value.startswith("~") else value
    return value
