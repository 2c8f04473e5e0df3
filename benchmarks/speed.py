"""How fast is each part, beside a plain twin of it (benchmarks/plain.py), on this machine?

    python benchmarks/speed.py                          # all parts at the published sizes, on a CPU under 25 minutes
    python benchmarks/speed.py --part gene_encoder      # one part; nothing is written
    python benchmarks/speed.py --part stage_one_step --profile
    python benchmarks/speed.py --device cuda --batch_size 32
    python benchmarks/speed.py --small                  # tiny sizes: does it run?

Each side of a part runs in a process of its own, and the two take turns. Writes benchmarks/speed.json (--out) and the
table in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import platform
import re
import resource
import statistics
import sys
import time
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed_setting import SMALL, Machine, Setting, Sizes
from utils import settings
from utils.files.atomic import write_record, write_whole

PARTS = {  # and where each is written down
    **dict.fromkeys(
        ("gene_encoder", "stage_one_step", "stage_one_eval", "retrieval", "stage_two", "prediction"), "speed_models"
    ),
    **dict.fromkeys(("loading", "tiling", "gallery"), "speed_data"),
}
FOLDER = Path(__file__).parent
LONG_S = 60  # a side that takes longer is not repeated
MARK = "<!-- speed: {} -->"


def parse_args(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch_size", type=settings.count, default=8, help="of the encoders and of training")
    parser.add_argument("--small", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--part", choices=PARTS, help="this one alone, nothing is written")
    parser.add_argument("--profile", action="store_true", help="with --part: where our side's time goes, by operator")
    parser.add_argument("--rounds", type=settings.count, default=3, help="turns of each side, of which the median")
    parser.add_argument("--out", type=Path, default=FOLDER / "speed.json", help="where the figures of a whole run go")
    parser.add_argument("--seed", type=settings.count_or_zero, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def peak_mib(device: str) -> float:
    """Highest memory so far: of the GPU where there is one, else of this process."""
    if "torch" in sys.modules and device != "cpu" and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def prepare(part: str, setting: Any) -> Any:
    """The Work of a part; modules are imported as late as this, so that cutting tiles is timed without torch."""
    return getattr(importlib.import_module(f"benchmarks.{PARTS[part]}"), part)(setting)


def serve(pipe: Connection, part: str, setting: Any) -> None:
    """One side of a part in its own process: a first run to warm up, then one whenever it is asked to."""
    work = prepare(part, setting)
    flop = None
    if work.flop_of is not None and setting.plainly:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            work.flop_of()
        flop = counter.get_total_flops() / work.items
    start = time.perf_counter()
    first = work.run()  # seconds of the whole part, scaled where only a sample of it is run
    pipe.send(
        {
            "took": time.perf_counter() - start,
            "items": work.items,
            "unit": work.unit,
            "note": work.note,
            "flop": flop,
            "seconds": first,
        }
    )
    while pipe.recv():
        pipe.send(work.run())
    pipe.send(peak_mib(setting.device))


class Side:
    """A process that measures one side of a part."""

    def __init__(self, part: str, setting: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, part, setting))
        self.process.start()
        theirs.close()
        self.about = self.hear()
        self.seconds = [self.about["seconds"]]

    def hear(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.process.name}: ended without an answer, see above") from None

    def run(self) -> None:
        self.pipe.send(True)
        self.seconds.append(self.hear())

    def close(self) -> dict[str, Any]:
        self.pipe.send(False)
        peak = self.hear()
        self.process.join()
        timed = self.seconds[1:] or self.seconds  # without the first, which warmed up
        return {"s": statistics.median(timed), "low": min(timed), "high": max(timed), "peak": peak, **self.about}


def measure(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides of a part in turn: medians, spread, ratio, peak memory of ours."""
    sizes = SMALL if args.small else Sizes()
    plain, ours = (
        Side(part, Setting(sizes, side, args.device, args.batch_size, args.seed)) for side in ("plain", "ours")
    )
    for _ in range(args.rounds):
        for side in (plain, ours):
            if side.about["took"] < LONG_S:
                side.run()
    plain, ours = plain.close(), ours.close()
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
        "flop_per_item": plain["flop"],
    }


def profile(part: str, args: argparse.Namespace) -> str:
    """The costliest operators of our side, after two runs to warm up."""
    import torch

    work = prepare(part, Setting(SMALL if args.small else Sizes(), "ours", args.device, args.batch_size, args.seed))
    work.run(), work.run()
    kinds = list(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=kinds) as profiled:
        work.run()
    return profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50)


def matrix_peak(device: str) -> dict[str, float]:
    """FLOP/s of the machine's square matrix product, in fp32 and bf16."""
    import torch

    machine = Machine(Setting(Sizes(), "plain", device, 1, 0))
    n = 2048 if machine.device.type == "cpu" else 8192
    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, n, n, device=machine.device).to(kind)
        product = torch.empty_like(a)

        def multiply(a=a, b=b, product=product) -> None:
            torch.matmul(a, b, out=product)

        found[name] = 2 * n**3 / min(machine.timed(multiply) for _ in range(10))
    return found


def machine_name(device: str) -> str:
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return f"{torch.get_num_threads()} threads, {model[1] if model else platform.processor()}"


def row_of(part: str, found: dict[str, Any], peak: dict[str, float]) -> str:
    rate = f"{found['items'] / found['ours_s']:,.3g} {found['unit']}/s"
    flop = found["flop_per_item"]
    share = "" if flop is None else f"{flop * found['items'] / found['ours_s'] / peak['bf16']:.0%}"
    plain_share = "" if flop is None else f"{flop * found['items'] / found['plain_s'] / peak['fp32']:.0%}"
    cells = [
        part,
        f"{found['plain_s']:.3g} ({found['plain_range_s'][0]:.3g} to {found['plain_range_s'][1]:.3g})",
        f"{found['ours_s']:.3g} ({found['ours_range_s'][0]:.3g} to {found['ours_range_s'][1]:.3g})",
        f"**{found['ratio']:.2f}**",
        rate,
        "" if flop is None else f"{flop / 1e9:.0f}",
        plain_share,
        share,
        f"{found['plain_peak_mib']:,.0f}",
        f"{found['peak_mib']:,.0f}",
        found["note"],
    ]
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, Any]) -> str:
    """Markdown of one run."""
    peak = results["matrix_peak"]
    heads = ["part", "plain, s", "ours, s", "ratio", "ours", "GFLOP a spot", "plain, share of fp32 peak"]
    heads += ["ours, share of bf16 peak", "plain, MiB", "ours, MiB", "timed"]
    lines = [
        f"`{results['command']}`, {results['date']}, {results['machine']}, seed {results['seed']}: batch "
        f"{results['batch_size']}, medians of {results['rounds']} turns (lowest to highest); a square matrix product "
        f"reaches {peak['fp32'] / 1e9:,.0f} GFLOP/s in fp32 and {peak['bf16'] / 1e9:,.0f} in bf16.",
        "",
        f"| {' | '.join(heads)} |",
        f"| {' | '.join('---' for _ in heads)} |",
        *(row_of(part, found, peak) for part, found in results["parts"].items()),
    ]
    return "\n".join(lines)


def put_into(path: Path, name: str, text: str) -> None:
    """Replace what stands between the two marks of `name`; a new pair of them is put at the end."""
    mark, whole = MARK.format(name), path.read_text()
    block = f"{mark}\n{text}\n{mark}"
    if whole.count(mark) == 2:
        before, _, after = whole.split(mark)
        whole = before + block + after
    else:
        whole += f"\n{block}\n"
    write_whole(path, whole.encode())


def main(args: argparse.Namespace) -> None:
    import torch

    if args.profile:
        if args.part is None:
            raise ValueError("--profile: expected --part as well, found none; name one")
        print(profile(args.part, args))
        return
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/speed.py", *sys.argv[1:]]),
        "machine": machine_name(args.device),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "matrix_peak": matrix_peak(args.device),
        **{name: getattr(args, name) for name in ("seed", "batch_size", "rounds")},
        "parts": {},
    }
    for part in PARTS if args.part is None else [args.part]:
        found = results["parts"][part] = measure(part, args)
        print(f"{part}: plain {found['plain_s']:.3g} s, ours {found['ours_s']:.3g} s, {found['note']}", flush=True)
        print(f"{part} ratio {found['ratio']:.2f}", flush=True)
    if args.part is None and not args.small:
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        name = f"{'gpu' if on_gpu else 'cpu'}, batch {args.batch_size}"
        write_record(args.out, results)
        put_into(FOLDER / "RESULTS.md", name, table(results))
    print(table(results))
    if args.part is not None:
        print(f"{args.part} ratio {results['parts'][args.part]['ratio']:.2f}")


if __name__ == "__main__":
    settings.run(main, parse_args())
