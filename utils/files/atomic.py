"""A file that exists is whole: written to `<name>.part`, then renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Write bytes; an interrupted write leaves the old file as it was."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


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
