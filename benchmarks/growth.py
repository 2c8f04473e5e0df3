"""How do time and memory grow with spots, genes and batch on this machine?

    python benchmarks/growth.py                          # all parts up to 10^6 spots, under 20 minutes on one thread
    python benchmarks/growth.py --part tiling            # measures one part anew, the other rows stay
    python benchmarks/growth.py --largest 1e4 --out DIR  # smaller sizes, into a folder of its own

Each size is measured once, in a process of its own; its files lie in a temporary folder that is removed afterwards.
Writes benchmarks/growth.json, docs/growth.png and the table in benchmarks/RESULTS.md, or the first two into --out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import growth_parts
from benchmarks.speed import machine_name, put_into
from utils import settings
from utils.evaluation import plotting
from utils.files.atomic import write_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
SIZES = {"spots": (10**3, 10**4, 10**5, 10**6), "genes": (500, 2000, 5000, 16906), "batch": (2, 8, 32)}
AGAINST = {
    **dict.fromkeys(("tiling", "panels", "loading", "stage_two", "gallery"), "spots"),
    **dict.fromkeys(("gene_forward", "gene_backward"), "genes"),
    **dict.fromkeys(("gene_batch", "image_batch"), "batch"),
}
LABELS = {
    "tiling": "tiling",
    "panels": f"panels, {growth_parts.PANEL_GENES:,} genes",
    "loading": f"loading, {growth_parts.N_LOADED * growth_parts.BATCH:,} tiles",
    "stage_two": f"stage two, {growth_parts.N_STEPS} steps",
    "gallery": f"gallery, {growth_parts.N_QUERIES:,} queries",
    "gene_forward": "forward",
    "gene_backward": "forward and backward",
    "gene_batch": "gene encoder, 500 genes",
    "image_batch": "ViT-B/16, 224 px",
}
X_LABELS = {"spots": "Spots", "genes": "Genes of 2 spots", "batch": "Batch (spots, forward and backward)"}
DISK_BYTES = {"tiling": 8_000, "panels": 4_000, "loading": 5_000, "stage_two": 20_000, "gallery": 1_100}  # a spot
LIMIT_MIB = 8 * 2**10
LOOK_S = 0.02  # between two looks at the memory of a process


def parse_args(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=AGAINST, help="this one alone")
    parser.add_argument("--largest", type=settings.positive, default=1e6, help="no size above this one")
    parser.add_argument("--out", type=Path, help="folder for the results and the temporary files")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def sizes_of(part: str, largest: float) -> list[int]:
    """What a part is measured at; `largest` itself where all its sizes are above that."""
    return [size for size in SIZES[AGAINST[part]] if size <= largest] or [max(int(largest), 2)]


def own_kib(pid: int) -> int:
    """Memory of a process and those below it that no file stands behind; 0 where it has ended."""
    folder = Path(f"/proc/{pid}")
    try:
        status, below = (folder / "status").read_text(), (folder / f"task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+)", status, re.MULTILINE))
    return own + sum(own_kib(int(child)) for child in below)


def watch(future: Future) -> float:
    """Wait for a process; the highest of its own memory, MiB, as seen every 20 ms."""
    highest = 0
    while not future.done():
        highest = max(highest, *(own_kib(child.pid) for child in multiprocessing.active_children() if child.pid), 0)
        time.sleep(LOOK_S)
    return highest / 2**10


def one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def measure(part: str, size: int, out: Path | None) -> dict[str, Any] | None:
    """One row; None, with a line that says so, where the disk has no room for its files."""
    with tempfile.TemporaryDirectory(prefix="magic_growth_", dir=out) as folder:
        needed, free = 1.1 * size * DISK_BYTES.get(part, 0), shutil.disk_usage(folder).free
        if needed > free:
            print(f"{part} {size:,}: left out, expected {needed / 1e9:.1f} GB of disk, found {free / 1e9:.1f} GB free")
            return None
        setting = growth_parts.Setting(size, Path(folder))
        prepare = growth_parts.PARTS[part][0]
        if prepare is not None:
            with one_process() as process:
                process.submit(prepare, setting).result()
        with one_process() as process:
            future = process.submit(growth_parts.measure, part, setting)
            own_mib = watch(future)
            found = future.result()
    return {"part": part, "against": AGAINST[part], "size": size, **found, "own_mib": own_mib}


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by part and size, in order; those measured now stand in for the same of before."""
    found = {(row["part"], row["size"]): row for row in (*old, *new)}
    return sorted(found.values(), key=lambda row: (list(AGAINST).index(row["part"]), row["size"]))


def kept_rows(path: Path, machine: str) -> list[dict[str, Any]]:
    """Rows of an earlier run on the same machine."""
    if not path.exists():
        return []
    try:
        earlier = json.loads(path.read_text())
        return earlier["rows"] if earlier["machine"] == machine else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the rows of an earlier run, found {error!r}; delete it") from error


def table(results: dict[str, Any]) -> str:
    """Markdown of all rows."""
    heads = ("part", "against", "size", "seconds", "rate", "peak, MiB", "of it its own, MiB")
    lines = [
        f"`python benchmarks/growth.py`, {results['date']}, {results['machine']}, each size measured once. Peak: "
        "highest resident memory, with the pages of mapped files and libraries, which the system takes back when it "
        "needs them; its own: without them, seen every 20 ms. Workers of tiling are counted in full.",
        "",
        f"| {' | '.join(heads)} |",
        f"| {' | '.join('---' for _ in heads)} |",
    ]
    for row in results["rows"]:
        rate = f"{row['per_s']:,.3g} {row['unit']}/s"
        memory = f"{row['peak_mib']:,.0f} | {row['own_mib']:,.0f}"
        lines.append(
            f"| {row['part']} | {row['against']} | {row['size']:,} | {row['seconds']:.3g} | {rate} | {memory} |"
        )
    return "\n".join(lines)


def image(rows: Sequence[dict[str, Any]]) -> Figure:
    """Seconds above, peak memory below, a column for each of spots, genes and batch; both axes are logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    panels = figure.subplots(2, len(SIZES), sharex="col", sharey="row")
    for (time_axes, memory_axes), against in zip(panels.T, SIZES, strict=True):
        for i, part in enumerate(part for part in AGAINST if AGAINST[part] == against):
            draw(time_axes, memory_axes, i, part, [row for row in rows if row["part"] == part])
        memory_axes.axhline(LIMIT_MIB, color=plotting.INK, lw=1, ls=":")
        memory_axes.set_xlabel(X_LABELS[against], color=plotting.INK)
        memory_axes.set_ylim(50, 40_000)
        if against != "spots":  # whose sizes are powers of ten
            memory_axes.set_xticks(SIZES[against], [f"{size:,}" for size in SIZES[against]])
            memory_axes.set_xticks([], minor=True)
        time_axes.legend(frameon=False, fontsize=8, labelcolor=plotting.INK, loc="lower left", bbox_to_anchor=(0, 1))
    panels[0, 0].set_ylabel("Seconds", color=plotting.INK)
    panels[1, 0].set_ylabel("Memory at its peak (MiB)", color=plotting.INK)
    panels[1, 0].text(0.02, LIMIT_MIB * 1.1, "8 GiB", transform=panels[1, 0].get_yaxis_transform(), fontsize=8)
    panels[1, 2].plot([], [], color=plotting.FAINT, lw=1.8, label="its own")
    panels[1, 2].plot([], [], color=plotting.FAINT, lw=1, ls="--", label="with mapped files")
    panels[1, 2].legend(frameon=False, fontsize=8, labelcolor=plotting.INK, loc="lower right")
    return figure


def draw(time_axes: Axes, memory_axes: Axes, i: int, part: str, rows: Sequence[dict[str, Any]]) -> None:
    """One part in both panels of its column; memory of its own solid, all that is resident dashed."""
    size = [row["size"] for row in rows]
    style: dict[str, Any] = {"color": plotting.COLOURS[i], "marker": plotting.MARKERS[i], "markersize": 4.5}
    time_axes.loglog(size, [row["seconds"] for row in rows], lw=1.8, label=LABELS[part], **style)
    memory_axes.loglog(size, [row["own_mib"] for row in rows], lw=1.8, **style)
    memory_axes.loglog(size, [row["peak_mib"] for row in rows], lw=1, ls="--", color=plotting.COLOURS[i])
    for axes in (time_axes, memory_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(plotting.FAINT)
        axes.tick_params(which="both", labelcolor=plotting.INK, labelsize=9, color=plotting.FAINT)


def main(args: argparse.Namespace) -> None:
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    new = []
    for part in AGAINST if args.part is None else [args.part]:
        for size in sizes_of(part, args.largest):
            row = measure(part, size, args.out)
            if row is not None:
                new.append(row)
                print(
                    "{part} {size:,}: {seconds:.3g} s, {peak_mib:,.0f} MiB, own {own_mib:,.0f}".format(**row),
                    flush=True,
                )
    machine, path = machine_name("cpu"), (args.out or FOLDER) / "growth.json"
    rows = merged(kept_rows(path, machine), new)
    results = {"machine": machine, "date": date.today().isoformat(), "rows": rows}
    write_record(path, results)
    plotting.save(image(rows), (args.out or FOLDER.parent / "docs") / "growth.png")
    if args.out is None:
        put_into(FOLDER / "RESULTS.md", "growth", table(results))
    print(table(results))


if __name__ == "__main__":
    settings.run(main, parse_args())
