"""What a GPU must confirm, in one run of at most eight minutes, and what can be counted without one.

    python -m benchmarks.device --count                   # the tables of docs/speed.md, without a GPU
    python -m benchmarks.device --check                   # on a GPU: right, and not slower than 1.5 times the count?
    python -m benchmarks.device --device cpu --quick      # does it run?

Needs torch, torchvision, timm and accelerate, no network and no data. Compares losses, gradients and parts with the
CPU, times a step of both stages, the evaluation's and the prediction's encoders, eager and compiled, and writes
benchmarks/device.json (--out).
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks import device_count, plain
from benchmarks.device_count import Card
from benchmarks.device_work import PARTS, RATES, SMALL, Sizes, Work, batch_of, of_batch, stage_one, stage_one_model
from model import performer
from model.stage_one import StageOne
from utils import arguments, distributed
from utils import settings as shared_settings
from utils.evaluation.gallery import top_k
from utils.files.atomic import write_record
from utils.training import loop
from utils.training.augment import augment

FOLDER = Path(__file__).parent
BUDGET_S = 480
SLOWER = 1.5  # than the count: --check fails
LARGEST = 256  # spots of a batch, which must fit
CHECKED = Sizes("vit_tiny_patch16_224", 96, "all", 500, 2, 200, 10, 128, 64, True, 16)
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
LIMITS = {"fp32": (1e-4, 2e-3), "bf16": (2e-2, 0.15)}  # relative error of the loss, of all gradients


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of device.py."""

    device: str
    count: bool
    check: bool
    quick: bool
    batch_size: int
    out: Path
    debug: bool


@dataclass(frozen=True)
class Check:
    """A figure that may be `limit` at most."""

    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # False for NaN


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--count", action="store_true", help="count, and write the tables into docs/speed.md")
    parser.add_argument("--check", action="store_true", help="fail where something is wrong, or slower than counted")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, neither compiled nor counted: does it run?")
    parser.add_argument("--batch_size", type=arguments.count, default=64, help="of what is timed")
    parser.add_argument("--out", type=Path, default=FOLDER / "device.json", help="where the figures go")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


# ---- right?


def step_on(model: StageOne, sizes: Sizes, device: torch.device, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Loss and all gradients of a batch."""
    model = copy.deepcopy(model).to(device)
    with autocast(device, dtype):
        out = model(**batch_of(sizes, device), alpha=0.4, generator=torch.Generator(), expression_weight=5.0)
    out.loss.backward()
    gradients = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return out.loss.detach().cpu(), torch.cat(gradients)


def check_steps(sizes: Sizes, device: torch.device) -> dict[str, Check]:
    """A step on the device against one on the CPU in fp32."""
    torch.manual_seed(0)
    model = stage_one_model(sizes)
    loss, gradients = step_on(model, sizes, torch.device("cpu"), None)
    checks = {}
    for name, dtype in DTYPES.items():
        found = step_on(model, sizes, device, dtype)
        for what, x, y, limit in zip(("loss", "gradients"), found, (loss, gradients), LIMITS[name], strict=True):
            checks[f"{what}, {name}"] = Check(relative_error(x, y), limit)
    return checks


def check_favor(device: torch.device) -> dict[str, Check]:
    """FAVOR+ and its gradients against one plain matrix of kernel values, in double precision."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 200, 64, generator=drawn) for _ in range(3))
    projection = performer.orthogonal_projection(performer.N_FEATURES, 64, drawn)
    found = [x.clone().to(device).requires_grad_() for x in (q, k, v)]
    expected = [x.double().requires_grad_() for x in (q, k, v)]
    out = performer.favor_attention(found[0], found[1], found[2], projection.to(device))
    slow = plain.favor_attention(expected[0], expected[1], expected[2], projection.double())
    checks = {"FAVOR+": Check(relative_error(out, slow), 1e-4)}
    gradients = (torch.autograd.grad(y.square().sum(), x) for y, x in ((out, found), (slow, expected)))
    for name, x, y in zip("qkv", *gradients, strict=True):
        checks[f"FAVOR+, gradient of {name}"] = Check(relative_error(x, y), 1e-3)
    return checks


def check_parts(device: torch.device) -> dict[str, Check]:
    """Augmentation, and the best matches in a gallery, as on the CPU."""
    drawn, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    tiles = torch.randint(0, 256, (8, 64, 64, 3), generator=drawn, dtype=torch.uint8)
    moved = [augment(tiles.to(d), np.arange(8), 0, 0, 48).cpu() for d in (device, cpu)]
    queries, gallery = (torch.randint(-9, 9, (n, 16), generator=drawn).float() for n in (50, 5000))  # exact products
    rows = [top_k(queries.to(d), gallery, 10)[1].cpu() for d in (device, cpu)]
    return {
        "augmentation": Check(float((moved[0] - moved[1]).abs().max()), 1e-3),
        "rows of a gallery that differ": Check(float((rows[0] != rows[1]).sum()), 0),
    }


def check_scaler(sizes: Sizes) -> dict[str, Check]:
    """fp16 with the scaler of gradients, as the scripts set it up: ten steps leave finite, changed weights."""
    accelerator = distributed.start("cuda", "fp16")
    model = stage_one_model(sizes).to(accelerator.device)
    before = model.image_encoder.to_vector.weight.detach().clone()
    optimizer: Any = accelerator.prepare(loop.make_optimizer(model.parameters(), RATES))
    batch, draws = batch_of(sizes, accelerator.device), torch.Generator()
    for _ in range(10):  # the first ones may but lower the scale
        with accelerator.autocast():
            loss = model(**batch, alpha=0.0, generator=draws).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after = model.image_encoder.to_vector.weight
    distributed._end()
    bad = sum(int((~torch.isfinite(p)).sum()) for p in model.parameters())
    return {"weights that fp16 broke": Check(bad + float(torch.equal(before, after)), 0)}


def check_waits(sizes: Sizes, device: torch.device) -> dict[str, Check]:
    """Whether CUDA itself sees the host wait within a step."""
    work = stage_one(stage_one_model(sizes).to(device), sizes, device, partial(autocast, device, torch.bfloat16))
    work.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work.run()
    except RuntimeError as error:
        print(f"warning: a step waits for the device: {' '.join(str(error).split())[:200]}")
        return {"waits of a step": Check(1, 0)}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits of a step": Check(0, 0)}


def check_all(sizes: Sizes, device: torch.device) -> dict[str, Check]:
    checks = check_steps(sizes, device) | check_favor(device) | check_parts(device)
    if device.type == "cuda":
        checks |= check_waits(sizes, device) | check_scaler(sizes)
    return checks


# ---- fast?


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Median of the times of a call, of as many as take `at_least` seconds, three or more; after one to warm up."""
    function()
    wait(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peaks(device: torch.device, quick: bool) -> dict[str, float]:
    """Operations a second of a bf16 matrix product, and bytes a second of a copy, read and written."""
    n, nbytes = (256, 2**20) if quick else (8192, 2**31)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (nbytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    matrix = 2 * n**3 / seconds_of(lambda: a @ b, device, 0.0 if quick else 1.0)
    return {"matrix": matrix, "bandwidth": 2 * nbytes / seconds_of(lambda: target.copy_(source), device, 0.0)}


def card_of(measured: dict[str, float]) -> Card:
    """The card of the count with this one's peaks."""
    h100, factor = device_count.H100, measured["matrix"] / device_count.H100.matrix
    return replace(
        h100,
        name="this one",
        matrix=measured["matrix"],
        tf32=h100.tf32 * factor,
        fp32=h100.fp32 * factor,
        bandwidth=measured["bandwidth"],
    )


def prepared(part: str, sizes: Sizes, device: torch.device) -> Work:
    torch.manual_seed(0)
    build, work_of = PARTS[part]
    return work_of(build(sizes).to(device), sizes, device, partial(autocast, device, torch.bfloat16))


def measure(part: str, sizes: Sizes, device: torch.device, compile_until: float) -> dict[str, Any]:
    """Times and memory of a part; compiled too where the time is before `compile_until`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    work = prepared(part, sizes, device)
    eager = seconds_of(work.run, device, 1.0 if device.type == "cuda" else 0.0)
    figures = {
        "batch_size": work.n_spots,
        "eager_s": eager,
        "spots_per_s": work.n_spots / eager,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    if time.monotonic() < compile_until:
        work.compiled()
        figures["compiled_s"] = seconds_of(work.run, device, 1.0)
    return figures


def beside_count(figures: dict[str, Any], part: str, sizes: Sizes, card: Card) -> dict[str, Any]:
    """Figures of a part with its count, and how many times as long the faster of eager and compiled takes."""
    counted = device_count.count(part, sizes, card)
    fastest = min(figures["eager_s"], figures.get("compiled_s", math.inf))
    count = {"counted_s": counted.seconds, "counted_peak_gib": counted.peak / 2**30}
    return figures | count | {"ratio": fastest / counted.seconds}


def run(settings: Settings) -> dict[str, Any]:
    began, device = time.monotonic(), distributed.pick_device(settings.device)
    small = settings.quick
    if device.type != "cuda" and not small:
        raise ValueError("--device: expected a CUDA device, found none; add --quick to try all of it at tiny sizes")
    sizes, checked = (SMALL, SMALL) if small else (of_batch(Sizes(), settings.batch_size), CHECKED)
    checks = check_all(checked, device)
    for name, check in checks.items():
        print(f"{name}: {check.value:.3g} (at most {check.limit:g})", flush=True)
    measured = peaks(device, small)
    card, parts = card_of(measured), {}
    for part in PARTS:
        parts[part] = measure(part, sizes, device, 0.0 if small else began + 0.7 * BUDGET_S)
        parts[part] = parts[part] if small else beside_count(parts[part], part, sizes, card)
        print(f"{part}: {parts[part]}", flush=True)
    if device.type == "cuda" and not small and time.monotonic() < began + 0.9 * BUDGET_S:
        largest = of_batch(Sizes(), LARGEST)
        figures = measure("stage_one", largest, device, 0.0)
        parts[f"stage_one, batch {LARGEST}"] = beside_count(figures, "stage_one", largest, card)
    return {
        "command": " ".join(["python -m benchmarks.device", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "seconds": time.monotonic() - began,
        "peaks": measured,
        "checks": {name: asdict(check) | {"passed": check.passed} for name, check in checks.items()},
        "parts": parts,
    }


def failures(results: dict[str, Any], timed: bool) -> list[str]:
    """Names of checks that failed, and of parts slower than the count allows."""
    failed = [f"{name} {check['value']:.3g}" for name, check in results["checks"].items() if not check["passed"]]
    ratios = {name: part["ratio"] for name, part in results["parts"].items()} if timed else {}
    return failed + [f"{name} {ratio:.2f} x its count" for name, ratio in ratios.items() if ratio > SLOWER]


def main(settings: Settings) -> None:
    if settings.count:
        from benchmarks.record import put_into

        for mark, lines in (
            ("parts", device_count.parts_table(Sizes(batch_size=settings.batch_size))),
            ("count", device_count.table()),
            ("operators", device_count.operators_table(of_batch(Sizes(), LARGEST))),
            ("cohorts", device_count.cohorts_table(of_batch(Sizes(), LARGEST))),
        ):
            text = "\n".join(lines)
            print(text, flush=True)
            put_into(FOLDER.parent / "docs" / "speed.md", mark, text)
        return
    results = run(settings)
    write_record(settings.out, results)
    failed = failures(results, timed=not settings.quick) if settings.check else []
    if failed:
        raise ValueError(
            f"{settings.out}: expected all checks to pass, found {'; '.join(failed)}; fix: see docs/speed.md"
        )
    print(f"results in {settings.out}")


if __name__ == "__main__":
    shared_settings.run(main, parse_args())
