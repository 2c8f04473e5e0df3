"""The parts of growth.py: how each prepares its files, and what of it is timed.

PARTS names the two functions of each, which run in processes of their own, so that what is measured carries nothing of
what was prepared. Torch is imported where it is needed: tiling and panels do without.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from utils import settings
from utils.features import dataset
from utils.training import loop

SEED, SLICE_SPOTS, BATCH = 0, 5000, 32
N_LOADED, N_STEPS, N_QUERIES, WIDTH = 200, 20, 1000, 512
FEW_GENES, FEW_SPOTS = 500, 2  # of the parts that grow in something else
LOADED_PX, CUT_PX, N_TARGETS = 32, 16, 300
PANEL_GENES, SEEN_GENES, BLOCK = 2000, 100, 500  # genes of a slice, of a spot; rows prepared at a time


@dataclass(frozen=True)
class Setting:
    """`size`: spots, genes or batch, as the part grows; `folder`: where its files lie."""

    size: int
    folder: Path
    image_encoder: str = "deit_base_patch16_224"

    @property
    def slices(self) -> list[str]:
        return [f"slice{i:04d}" for i in range(max(self.size // SLICE_SPOTS, 1))]

    @property
    def slice_spots(self) -> int:
        return self.size // len(self.slices)

    @property
    def n_spots(self) -> int:
        return self.slice_spots * len(self.slices)


@dataclass(frozen=True)
class Work:
    """`run` does all of it once; `items` of `unit` are then done."""

    run: Callable[[], Any]
    items: int
    unit: str = "spots"


class Steps(loop.EpochOrder):
    """A fixed number of batches drawn from all spots, of as many epochs as that takes."""

    def __init__(self, n_spots: int, n_steps: int):
        super().__init__(n_spots, min(BATCH, n_spots), SEED)
        self.n_steps = n_steps

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[list[int]]:
        epochs = (loop.EpochOrder(self.n_spots, self.batch_size, epoch) for epoch in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), self.n_steps)


def prepare_images(setting: Setting) -> None:
    """Slice folders below data/ with one hires image and its positions, linked into all of them."""
    from benchmarks.speed_data import simulated_slice

    simulated_slice(setting.folder / "first", setting.slice_spots, SEED)
    for name in setting.slices:
        shutil.copytree(setting.folder / "first" / "slice", setting.folder / "data" / name, copy_function=os.link)


def tiling(setting: Setting) -> Work:
    """image_tilling.py: tiles of 16 px of the hires images, one JPEG per spot and their packs."""
    import image_tilling

    flags = ["--data", str(setting.folder / "data"), "--tiles", str(setting.folder / "tiles"), "--source", "hires"]
    work = partial(image_tilling.main, image_tilling.parse_args([*flags, "--crop_size", str(CUT_PX)]))
    return Work(work, setting.n_spots)


def some_counts(n_spots: int, rng: np.random.Generator) -> np.ndarray:
    """Counts (S, G) int32: each spot sees one gene of every 20, some genes much higher than others."""
    counts = np.zeros((n_spots, PANEL_GENES), np.int32)
    every = PANEL_GENES // SEEN_GENES
    seen = np.arange(SEEN_GENES) * every + rng.integers(every, size=(n_spots, SEEN_GENES))
    rate = rng.gamma(0.5, 10, PANEL_GENES)
    np.put_along_axis(counts, seen, 1 + rng.poisson(rate[seen]), axis=1)
    return counts


def prepare_counts(setting: Setting) -> None:
    """A 10x matrix beside each image, all alike but for one count, and slices.csv: 8 of 10 slices to train."""
    import h5py

    from utils.simulation import files
    from utils.slices import splits

    prepare_images(setting)
    counts = some_counts(setting.slice_spots, np.random.default_rng(SEED))
    barcodes = [f"SPOT{i}-1" for i in range(setting.slice_spots)]
    first, data = setting.folder / "first.h5", setting.folder / "data"
    files.write_matrix(first, counts, barcodes, [f"G{g}" for g in range(PANEL_GENES)], "slice", "growth.py")
    rows = []
    for i, name in enumerate(setting.slices):
        path = shutil.copy(first, data / name / "filtered_feature_bc_matrix.h5")
        with h5py.File(path, "r+") as file:
            file["matrix/data"][0] = 1 + i
        share = i / len(setting.slices)
        part = "train" if share < 0.8 else "val" if share < 0.9 else "test"
        rows.append(splits.SliceRow(name, name, part, None, None))
    splits.write_table(rows, data / "slices.csv")


def panels(setting: Setting) -> Work:
    """make_decoder_data.py: both panels chosen, both files of every slice written."""
    import make_decoder_data

    flags = ["--data", str(setting.folder / "data"), "--panels", str(setting.folder / "panels")]
    return Work(partial(make_decoder_data.main, make_decoder_data.parse_args(flags)), setting.n_spots)


def prepare_packs(setting: Setting) -> None:
    """Packed tiles of every slice, the same pixels again and again."""
    from utils.files.atomic import write_record
    from utils.images import tiles

    n = setting.slice_spots
    pixels = np.random.default_rng(SEED).integers(60, 255, (BLOCK, LOADED_PX, LOADED_PX, 3), dtype=np.uint8)
    barcodes, xy = np.array([f"SPOT{i}-1" for i in range(n)]), np.zeros((n, 2))
    for folder in (setting.folder / name for name in setting.slices):
        folder.mkdir()
        blocks = (pixels[: n - start] for start in range(0, n, BLOCK))
        tiles.write_pack(folder, barcodes, xy, blocks, LOADED_PX)
        write_record(folder / tiles.RECORD, {"size": LOADED_PX})


def loading(setting: Setting) -> Work:
    """200 batches of 32 augmented tiles of 32 px, drawn from all slices."""
    from utils import distributed
    from utils.images import tiles
    from utils.training import augment

    distributed.start("cpu", "auto")
    rows = np.arange(setting.slice_spots)
    slices: Any = [SimpleNamespace(pack=tiles.TilePack(setting.folder / s), tile_rows=rows) for s in setting.slices]
    spots = np.column_stack(np.divmod(np.arange(setting.n_spots), setting.slice_spots))
    order = Steps(setting.n_spots, N_LOADED)

    def read() -> None:
        for batch in dataset.loader(dataset.TileBatches(slices, spots), order, workers=None):
            augment.augment(batch["tiles"], batch["spot"].numpy(), SEED, 0, LOADED_PX)

    return Work(read, N_LOADED * order.batch_size, "tiles")


def prepare_features(setting: Setting) -> None:
    """A file of features (S, 17, 512) float16 per slice, as train_decoder.py keeps them."""
    rng, shape = np.random.default_rng(SEED), (setting.slice_spots, 17, WIDTH)
    features = rng.standard_normal(shape, np.float32).astype(np.float16)
    for name in setting.slices:
        np.save(setting.folder / f"{name}.npy", features)


def feature_bank(setting: Setting, memory: Any) -> Any:
    """Of the prepared files; neighbours, statistics and whatever --memory holds are made here, before the steps."""
    import torch

    from model.stage_two import StageTwoSizes
    from utils.features import neighbourhoods as banks

    features = [np.load(setting.folder / f"{name}.npy", mmap_mode="r") for name in setting.slices]
    xy = np.column_stack(np.divmod(np.arange(setting.slice_spots), 71)).astype(float)  # 71 x 71 hold 5,000 spots
    slices: Any = [SimpleNamespace(name=name, xy_fullres_px=xy, pitch_fullres_px=1.0) for name in setting.slices]
    around = (StageTwoSizes.context, StageTwoSizes.reaches)
    return banks.FeatureBank(slices, features, banks.moments(features[:1], 1), *around, torch.device("cpu"), memory)


def some_targets(setting: Setting, memory: Any) -> np.ndarray:
    """Standardised targets (S, G), in memory or beyond it as train_decoder.py keeps them."""
    target = memory.empty((setting.n_spots, N_TARGETS), np.float32)
    values = np.random.default_rng(SEED).standard_normal((setting.slice_spots, N_TARGETS), np.float32)
    for start in range(0, setting.n_spots, setting.slice_spots):
        target[start : start + setting.slice_spots] = values
    return target


def stage_two(setting: Setting) -> Work:
    """20 steps of train_decoder.py at the published sizes, a batch of 32 of all spots, --memory 4."""
    import train_decoder
    from model.stage_two import StageTwo, StageTwoSizes
    from utils import distributed
    from utils.files import arrays
    from utils.training import loop
    from utils.training.trainer import Trainer

    args = train_decoder.parse_args(["--device", "cpu"])
    settings.check_training(args)
    accelerator = distributed.start("cpu", args.precision)
    memory = arrays.ArrayStore(args.memory, setting.folder)
    target = some_targets(setting, memory)
    model = StageTwo(StageTwoSizes(N_TARGETS, setting.image_encoder, 224, width=WIDTH))
    bank = feature_bank(setting, memory)
    optimizer = loop.make_optimizer(model.decoder.parameters(), args)
    schedule = loop.schedule(optimizer, N_STEPS, args)
    data = train_decoder.Data([], bank, target, np.arange(setting.n_spots), [])

    def train(n_steps: int) -> None:
        trainer = Trainer(args, "stage_two", {}, accelerator, model, optimizer, schedule, setting.n_spots)
        train_decoder.train_one_epoch(trainer, model, data, Steps(setting.n_spots, n_steps), args)

    train(1)
    return Work(partial(train, N_STEPS), N_STEPS, "steps")


def prepare_gallery(setting: Setting) -> None:
    """Rows (S, 512) float16 in one file."""
    rows = np.random.default_rng(SEED).standard_normal((BLOCK, WIDTH), np.float32).astype(np.float16)
    with (setting.folder / "gallery.f16").open("wb") as file:
        for start in range(0, setting.size, BLOCK):
            rows[: setting.size - start].tofile(file)


def gallery(setting: Setting) -> Work:
    """The ten best of the gallery for 1,000 queries; the gallery is mapped from its file."""
    import torch

    from utils.evaluation.gallery import top_k

    rows = np.memmap(setting.folder / "gallery.f16", np.float16, "c", shape=(setting.size, WIDTH))
    queries = torch.randn(N_QUERIES, WIDTH, generator=torch.Generator().manual_seed(SEED))
    return Work(lambda: top_k(queries, torch.from_numpy(rows), min(10, len(rows))), N_QUERIES, "queries")


def forward_backward(model: Any, inputs: Any, backward: bool = True, method: str = "__call__") -> Work:
    """One pass in the precision of the scripts, after one that warms up; without `backward` as in evaluation."""
    import torch

    from utils import distributed

    accelerator = distributed.start("cpu", "auto")

    def work() -> None:
        model.zero_grad()
        with torch.set_grad_enabled(backward), accelerator.autocast():
            vector, tokens = getattr(model, method)(inputs)
        if backward:
            (vector.float().square().mean() + tokens.float().square().mean()).backward()

    work()
    return Work(work, len(inputs))


def gene_encoder(n_genes: int, batch: int, backward: bool) -> Work:
    import torch

    from model.gene_encoder import GeneEncoder

    bins = torch.randint(0, 6, (batch, n_genes), dtype=torch.uint8)
    return forward_backward(GeneEncoder(n_genes).train(backward), bins, backward, "encode")


def image_encoder(setting: Setting) -> Work:
    import torch

    from model.image_encoder import ImageEncoder

    return forward_backward(ImageEncoder(setting.image_encoder, 224, WIDTH), torch.rand(setting.size, 3, 224, 224))


PARTS: dict[str, tuple[Callable[[Setting], None] | None, Callable[[Setting], Work]]] = {
    "tiling": (prepare_images, tiling),
    "panels": (prepare_counts, panels),
    "loading": (prepare_packs, loading),
    "stage_two": (prepare_features, stage_two),
    "gallery": (prepare_gallery, gallery),
    "gene_forward": (None, lambda setting: gene_encoder(setting.size, FEW_SPOTS, False)),
    "gene_backward": (None, lambda setting: gene_encoder(setting.size, FEW_SPOTS, True)),
    "gene_batch": (None, lambda setting: gene_encoder(FEW_GENES, setting.size, True)),
    "image_batch": (None, image_encoder),
}


def measure(part: str, setting: Setting) -> dict[str, Any]:
    """Seconds and highest resident memory (MiB) of a part whose files are prepared, in a process of its own."""
    work = PARTS[part][1](setting)
    start = time.perf_counter()
    with contextlib.redirect_stdout(None):
        work.run()
    seconds = time.perf_counter() - start
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": seconds, "per_s": work.items / seconds, "unit": work.unit, "peak_mib": peak_mib}
