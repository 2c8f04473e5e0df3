"""How a benchmark is written down: the machine, and its table in a page of the documentation."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path

from utils.files.atomic import write_whole
from utils.words import count_of

MARK = "<!-- table: {} -->"


def machine_name(device: str) -> str:
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return f"{count_of(torch.get_num_threads(), 'thread')}, {model[1] if model else platform.processor()}"


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def put_into(path: Path, name: str, text: str) -> None:
    """Replace the text between the two marks of `name`; a new pair of them is put at the end."""
    mark, whole = MARK.format(name), path.read_text()
    block = f"{mark}\n{text}\n{mark}"
    if whole.count(mark) == 2:
        before, _, after = whole.split(mark)
        whole = before + block + after
    else:
        whole += f"\n{block}\n"
    write_whole(path, whole.encode())
