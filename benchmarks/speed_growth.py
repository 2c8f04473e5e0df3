"""How memory, start-up and time per spot grow with the number of slices: `speed.py --part growth`.

Slices of 1,000 spots with one hires image and 2,000 genes, all alike but for the order of the spots. The scripts cut
tiles of 16 px and choose and write the panels; training then reads its slices (start-up) and 200 batches of 32
augmented tiles. Stage two makes the bank of its features and trains ten batches of 32 spots. Each part runs in a
process of its own, without worker processes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from benchmarks.record import table_lines

SIZES, SMALL = (1, 10, 100, 1000), (1, 3)  # numbers of slices
SPOTS, GENES, GENES_A_SPOT = 1000, 2000, 100
N_BATCHES, BATCH, TILE_PX = 200, 32, 16
N_STEPS, N_TARGETS = 10, 300  # of stage two
LOOK_S = 0.02  # between two looks at the memory of the process


class Growth(NamedTuple):
    """A part at one size: `items` done in `seconds`, of which `cpu_s` were computed by all threads; `memory_mib` is the
    process's own, without mapped files."""

    part: str
    n_slices: int
    seconds: float
    cpu_s: float
    items: int
    memory_mib: float


class Watch:
    """Seconds since it was made, of the clock and of the processor."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def table(rows: Sequence[Growth]) -> str:
    heads = ("part", "slices", "spots", "seconds", "CPU seconds", "CPU ms an item", "memory, MiB")
    cells = []
    for part, n, seconds, cpu_s, items, memory in rows:
        times = (f"{value:.3g}" for value in (seconds, cpu_s, 1000 * cpu_s / items))
        cells.append((part, f"{n:,}", f"{n * SPOTS:,}", *times, f"{memory:,.0f}"))
    lines = [
        f"slices of {SPOTS:,} spots, each size measured once. Memory: highest resident memory of the process, without "
        "the pages of mapped files and libraries. Start-up: imports, reading all slices. Loading: 6,400 tiles. "
        "Bank: features of stage two, 18 kB a spot in sparse files, with neighbours. Decoder: ten steps of 32 spots.",
        "",
        *table_lines(heads, cells),
    ]
    return "\n".join(lines)


def measure_all(sizes: Sequence[int]) -> list[Growth]:
    rows: list[Growth] = []
    for n_slices in sizes:
        with tempfile.TemporaryDirectory(prefix="magic_growth_") as name:
            folder = Path(name)
            write_slices(folder, n_slices)
            for measure in (tiling, panels, training, stage_two):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    rows += process.submit(measure, folder, n_slices).result()
                print(rows[-1], flush=True)
    return sorted(rows, key=lambda row: list(dict.fromkeys(r.part for r in rows)).index(row.part))


def write_slices(folder: Path, n_slices: int) -> None:
    """Slice folders and slices.csv below data/: 8 of 10 slices to train, the others to validate."""
    import h5py
    from scipy.sparse import csr_matrix

    from benchmarks.speed_data import simulated_slice
    from utils.slices import splits
    from utils.slices.matrix import CountMatrix, write_matrix

    rng, first, data = np.random.default_rng(0), folder / "first", folder / "data"
    simulated_slice(first, SPOTS, seed=0)
    counts, rate = np.zeros((SPOTS, GENES), np.int32), rng.gamma(0.5, 10, GENES)
    step = GENES // GENES_A_SPOT  # each spot shows one gene of every 20
    seen = np.arange(GENES_A_SPOT) * step + rng.integers(step, size=(SPOTS, GENES_A_SPOT))
    np.put_along_axis(counts, seen, 1 + rng.poisson(rate[seen]), axis=1)
    barcodes, genes = (
        np.array([text.format(i) for i in range(n)]) for text, n in (("SPOT{}-1", SPOTS), ("G{}", GENES))
    )
    matrix = folder / "filtered_feature_bc_matrix.h5"
    write_matrix(matrix, CountMatrix(csr_matrix(counts), barcodes, genes, genes), {"library_ids": np.array([b"slice"])})
    rows = []
    for i in range(n_slices):
        name = f"slice{i:04d}"
        shutil.copytree(first, data / name, copy_function=os.link)
        with h5py.File(shutil.copy(matrix, data / name), "r+") as file:
            file["matrix/barcodes"][:] = np.roll(barcodes, i).astype(bytes)
        rows.append(
            splits.SliceRow(name, name, "val" if i % 10 == 9 or i == n_slices - 1 > 0 else "train", 100.0, None)
        )
    splits.write_table(rows, data / "slices.csv")


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """A function that gives the highest anonymous memory of this process so far, MiB, seen every 20 ms."""
    ended, peaks = threading.Event(), [0]

    def look() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            peaks[0] = max(peaks[0], sum(int(kib) for kib in re.findall(r"Rss(?:Anon|Shmem):\s*(\d+)", status)))
            if ended.wait(LOOK_S):
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield lambda: peaks[0] / 2**10
    finally:
        ended.set()
        watcher.join()


def flags(folder: Path) -> list[str]:
    names = ("data", "tiles", "panels")
    return ["--workers", "0", *(word for name in names for word in (f"--{name}", str(folder / name)))]


def tiling(folder: Path, n_slices: int) -> list[Growth]:
    import image_tilling

    cut = ["--source", "hires", "--tile_um", "60", "--tile_px", str(TILE_PX)]
    return [run_script("tiling", image_tilling, [*flags(folder), *cut], n_slices)]


def panels(folder: Path, n_slices: int) -> list[Growth]:
    import make_decoder_data

    return [run_script("panels", make_decoder_data, flags(folder), n_slices)]


def run_script(part: str, script: ModuleType, argv: list[str], n_slices: int) -> Growth:
    with peak_memory() as peak_mib, contextlib.redirect_stdout(None):
        watch = Watch()
        script.main(script.parse_args(argv))
        return Growth(part, n_slices, *watch.seconds(), n_slices * SPOTS, peak_mib())


def training(folder: Path, n_slices: int) -> list[Growth]:
    """What train_mymodel.py reads before its first step, and the batches of its first steps, augmented."""
    with peak_memory() as peak_mib, contextlib.redirect_stdout(None):
        watch = Watch()
        import train_mymodel
        from utils.features import dataset
        from utils.training import augment, loop, split

        settings = train_mymodel.parse_args([*flags(folder), *(["--val_strip"] if n_slices == 1 else [])])
        slices = split.load_training(split.read_split(settings)[0], settings, ("input", "target"))
        spots = dataset.spots_of(slices, "train")
        start_up = Growth("start-up", n_slices, *watch.seconds(), n_slices * SPOTS, peak_mib())
        watch, epochs = Watch(), (loop.EpochOrder(len(spots), BATCH, epoch) for epoch in itertools.count())
        order = list(itertools.islice(itertools.chain.from_iterable(epochs), N_BATCHES))
        for batch in dataset.loader(dataset.TileBatches(slices, spots), order, workers=0):
            augment.augment(batch["tiles"], batch["spot"].numpy(), 0, 0, TILE_PX)
        return [start_up, Growth("loading", n_slices, *watch.seconds(), N_BATCHES * BATCH, peak_mib())]


@dataclass(frozen=True)
class Places:
    """Spots of a slice on a square grid, 1 px apart, for their neighbours."""

    name: str
    barcodes: np.ndarray
    xy_fullres_px: np.ndarray
    pitch_fullres_px: float = 1.0


def stage_two(folder: Path, n_slices: int) -> list[Growth]:
    """What train_decoder.py makes of the features of all spots before its first step, and steps at published sizes."""
    with peak_memory() as peak_mib:
        watch = Watch()
        import torch

        from model import losses
        from model.decoder import GeneDecoder
        from utils import distributed
        from utils.features import neighbourhoods
        from utils.files.arrays import ArrayStore

        accelerator, (n_vectors, n_tokens, width) = distributed.start("cpu", "auto"), (2, 16, 512)
        xy = np.column_stack(np.divmod(np.arange(SPOTS), math.ceil(SPOTS**0.5))).astype(float)
        slices = [Places(f"slice{i}", np.arange(SPOTS).astype(str), xy) for i in range(n_slices)]
        (folder / "features").mkdir()
        shape = (SPOTS, n_vectors + n_tokens, width)
        files = [folder / "features" / slice_.name for slice_ in slices]
        features: list[np.ndarray] = [np.memmap(path, np.float16, "w+", shape=shape) for path in files]
        moments = neighbourhoods.Moments(*np.ones((2, n_vectors + 1, width), np.float32))
        bandwidths, store = (1.0, 2.0, 4.0), ArrayStore(4.0, folder)
        bank = neighbourhoods.FeatureBank(slices, features, moments, 18, bandwidths, accelerator.device, store)
        made = Growth("bank", n_slices, *watch.seconds(), n_slices * SPOTS, peak_mib())
        decoder = GeneDecoder(width, N_TARGETS, 6, 64, 0.1, n_vectors, 2000, len(bandwidths))
        optimizer, watch = torch.optim.AdamW(decoder.parameters(), lr=1e-4), Watch()
        spots = np.random.default_rng(0).integers(n_slices * SPOTS, size=(N_STEPS, BATCH))
        for chosen in spots:
            optimizer.zero_grad()
            with distributed.decoder_autocast(accelerator, "auto"):
                predicted = decoder(**bank.batch(chosen))
            losses.expression_loss(predicted, torch.zeros(BATCH, N_TARGETS)).backward()
            optimizer.step()
        return [made, Growth("decoder", n_slices, *watch.seconds(), N_STEPS * BATCH, peak_mib())]
