"""How fast is each part, compared with a plain implementation of the same equations, on this machine?

    python benchmarks/speed.py                          # all parts at the published sizes, on a CPU under 25 minutes
    python benchmarks/speed.py --part gene_encoder      # one part; nothing is written without --keep
    python benchmarks/speed.py --device cuda --batch_size 32
    python benchmarks/speed.py --small                  # tiny sizes: does it run?
    python benchmarks/speed.py --part growth            # memory, start-up and time per spot up to 1,000 slices

Both sides of a part run in processes of their own and take turns. Writes benchmarks/speed.json (--out) and the table in
benchmarks/RESULTS.md; growth writes its own table there.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import speed_growth
from benchmarks.record import machine_name, put_into, table_lines
from benchmarks.speed_setting import SMALL, Setting, Sizes, Work
from utils import arguments
from utils import settings as shared_settings
from utils.files.atomic import write_record

PARTS = {  # part -> module of its function, which takes a Setting, prepares all it needs and returns a Work
    **dict.fromkeys(
        ("gene_encoder", "stage_one_step", "stage_one_eval", "retrieval", "stage_two", "prediction"), "speed_models"
    ),
    **dict.fromkeys(("loading", "tiling", "packing", "gallery"), "speed_data"),
}
FOLDER = Path(__file__).parent
LONG_S = 60  # a side that takes longer is not repeated


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of speed.py."""

    device: str
    batch_size: int
    small: bool
    part: str | None
    rounds: int
    keep: bool
    clock: str
    slices: list[int]
    out: Path
    seed: int
    debug: bool


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    count, count_or_zero = arguments.count, arguments.count_or_zero
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch_size", type=count, default=8, help="of the encoders and of training")
    parser.add_argument("--small", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--part", choices=[*PARTS, "growth"], help="this one alone; growth is only measured so")
    parser.add_argument("--keep", action="store_true", help="put the figures of --part into the table of a whole run")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: seconds computed, where others share the cores"
    )
    parser.add_argument("--rounds", type=count, default=3, help="turns of each side, of which the median")
    parser.add_argument(
        "--slices",
        type=count,
        nargs="+",
        default=speed_growth.SIZES,
        help="numbers of slices that growth is measured at",
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "speed.json", help="where the figures of a whole run go")
    parser.add_argument("--seed", type=count_or_zero, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


# ---- one side of a part in its own process


def peak_mib(device: str) -> float:
    """Highest memory so far: of the GPU where there is one, else of this process."""
    if "torch" in sys.modules and device != "cpu" and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def serve(pipe: Connection, part: str, setting: Setting) -> None:
    """A first run to warm up, then one whenever asked; modules are imported here, so that tiling runs without torch."""
    work: Work = getattr(importlib.import_module(f"benchmarks.{PARTS[part]}"), part)(setting)
    start = time.perf_counter()
    seconds = work.run()
    took = time.perf_counter() - start  # less than `seconds` where a sample of the part is run, and scaled
    pipe.send({"took": took, "items": work.items, "unit": work.unit, "note": work.note, "seconds": seconds})
    while pipe.recv():
        pipe.send(work.run())
    pipe.send(peak_mib(setting.device))


class Side:
    """A process that measures one side of a part."""

    def __init__(self, part: str, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=serve, args=(child_end, part, setting))
        self.process.start()
        child_end.close()
        self.work = self.receive()
        self.seconds = [self.work["seconds"]]

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.process.name}: ended without an answer, see above") from None

    def run(self) -> None:
        self.pipe.send(True)
        self.seconds.append(self.receive())

    def close(self) -> dict[str, Any]:
        self.pipe.send(False)
        peak = self.receive()
        self.process.join()
        timed = self.seconds[1:] or self.seconds  # without the first, which warmed up
        return {"s": statistics.median(timed), "low": min(timed), "high": max(timed), "peak": peak, **self.work}


def measure(part: str, settings: Settings) -> dict[str, Any]:
    """Both sides of a part in turn: medians, ranges, ratio, peak memory."""
    sizes = SMALL if settings.small else Sizes()
    sides = [
        Side(part, Setting(sizes, plain, settings.device, settings.batch_size, settings.seed, settings.clock))
        for plain in (True, False)
    ]
    for _ in range(settings.rounds):
        for side in sides:
            if side.work["took"] < LONG_S:
                side.run()
    plain, ours = (side.close() for side in sides)
    scale = ours["items"] / plain["items"]
    return {
        "plain_s": plain["s"] * scale,
        "ours_s": ours["s"],
        "ratio": plain["s"] * scale / ours["s"],
        "peak_mib": ours["peak"],
        "plain_peak_mib": plain["peak"],
        "plain_range_s": [plain["low"] * scale, plain["high"] * scale],
        "ours_range_s": [ours["low"], ours["high"]],
        "items": ours["items"],
        "unit": ours["unit"],
        "note": "; ".join(f"{name}: {x['note']}" for name, x in (("plain", plain), ("ours", ours)) if x["note"]),
    }


# ---- the table


def table_row(part: str, figures: dict[str, Any]) -> list[str]:
    return [
        part,
        "{plain_s:.3g} ({plain_range_s[0]:.3g} to {plain_range_s[1]:.3g})".format(**figures),
        "{ours_s:.3g} ({ours_range_s[0]:.3g} to {ours_range_s[1]:.3g})".format(**figures),
        f"**{figures['ratio']:.2f}**",
        f"{figures['items'] / figures['ours_s']:,.3g} {figures['unit']}/s",
        f"{figures['plain_peak_mib']:,.0f}",
        f"{figures['peak_mib']:,.0f}",
        figures["note"],
    ]


def table(results: dict[str, Any]) -> str:
    """Markdown of one run."""
    heads = ["part", "plain, s", "ours, s", "ratio", "ours", "plain, MiB", "ours, MiB", "timed"]
    lines = [
        "`{command}`, {date}, {machine}, seed {seed}: batch {batch_size}, medians of {rounds} turns (lowest to "
        "highest).".format(**results),
        "",
        *table_lines(heads, [table_row(part, figures) for part, figures in results["parts"].items()]),
    ]
    return "\n".join(lines)


def keep_part(settings: Settings, results: dict[str, Any]) -> None:
    """Replace a row of the whole run's table; the row states when and where it was measured."""
    whole = json.loads(settings.out.read_text())
    ((part, figures),) = results["parts"].items()
    figures["note"] = "; ".join(filter(None, [figures["note"], "{clock} s, {date}, {machine}".format(**results)]))
    whole["parts"][part] = figures
    whole["parts"] = {name: whole["parts"][name] for name in PARTS if name in whole["parts"]}
    write_record(settings.out, whole)
    put_into(FOLDER / "RESULTS.md", f"cpu, batch {whole['batch_size']}", table(whole))


def measure_growth(settings: Settings) -> None:
    sizes = speed_growth.SMALL if settings.small else settings.slices
    command = " ".join(["python benchmarks/speed.py", *sys.argv[1:]])
    text = f"`{command}`, {date.today().isoformat()}, {machine_name('cpu')}: "
    text += speed_growth.table(speed_growth.measure_all(sizes))
    if not settings.small:
        put_into(FOLDER / "RESULTS.md", "growth", text)
    print(text)


def main(settings: Settings) -> None:
    import torch

    if settings.part == "growth":
        measure_growth(settings)
        return
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/speed.py", *sys.argv[1:]]),
        "machine": machine_name(settings.device),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        **{name: getattr(settings, name) for name in ("seed", "batch_size", "rounds", "clock")},
        "parts": {},
    }
    for part in PARTS if settings.part is None else [settings.part]:
        figures = results["parts"][part] = measure(part, settings)
        print("{}: plain {plain_s:.3g} s, ours {ours_s:.3g} s, {note}".format(part, **figures), flush=True)
    if settings.part is not None and settings.keep:
        keep_part(settings, results)
    if settings.part is None and not settings.small:
        on_gpu = settings.device != "cpu" and torch.cuda.is_available()
        write_record(settings.out, results)
        put_into(FOLDER / "RESULTS.md", f"{'gpu' if on_gpu else 'cpu'}, batch {settings.batch_size}", table(results))
    print(table(results))
    if settings.part is not None:
        print(f"{settings.part} ratio {results['parts'][settings.part]['ratio']:.2f}")


if __name__ == "__main__":
    shared_settings.run(main, parse_args())
