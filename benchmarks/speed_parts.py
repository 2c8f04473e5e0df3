"""The parts of speed.py: what each measures, plainly and as the scripts do it, on the same inputs.

A part is a function of a Setting that prepares all it needs and gives a Work, whose `run` measures it once.
"""

from __future__ import annotations

import atexit
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import plain
from model import losses
from model.gene_encoder import GeneEncoder
from model.stage_one import StageOne, StageOneSizes
from model.stage_two import StageTwo, StageTwoSizes
from utils.evaluation.retrieval import neighbour_candidates
from utils.training import distributed

N_TARGETS, N_CONTEXT, N_EPOCHS, N_STAGE_TWO = 300, 18, 100, 1000


@dataclass(frozen=True)
class Sizes:
    """Of the models and of the sets measured."""

    image_encoder: str = "deit_base_patch16_224.fb_in1k"
    image_size: int = 224
    n_genes: int = 2000
    depth: int = 6
    gene_width: int = 200
    heads: int = 10
    spots: int = 1000  # of the slice that retrieval is evaluated on
    gallery: int = 1_000_000


SMALL = Sizes("vit_tiny_patch16_224", 96, 500, 2, 200, 10, 100, 50_000)


@dataclass(frozen=True)
class Setting:
    """One side, "plain" or "ours", of a measurement."""

    sizes: Sizes
    side: str
    device: str
    batch_size: int
    seed: int

    @property
    def plainly(self) -> bool:
        return self.side == "plain"


@dataclass(frozen=True)
class Work:
    """`run` gives the seconds of the whole part, `items` of `unit` in it; `note` says what was timed and scaled."""

    run: Callable[[], float]
    items: int
    unit: str
    note: str = ""
    flop_of: Callable[[], Any] | None = None  # what a FLOP counter watches: all items, plainly


class Machine:
    """Device and precision as the scripts choose them; the plain side is fp32, with the allocator as it comes."""

    def __init__(self, setting: Setting):
        torch.manual_seed(setting.seed)
        self.plainly = setting.plainly
        if setting.plainly:
            self.device = distributed.pick_device(setting.device)
        else:
            self.accelerator = distributed.start(setting.device, "auto")
            self.device = self.accelerator.device

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.plainly else self.accelerator.autocast()

    def decoder_autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.plainly else distributed.decoder_autocast(self.accelerator, "auto")

    def timed(self, work: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def tiles(self, n: int, size: int) -> Tensor:
        return torch.rand(n, 3, size, size).to(self.device)

    def bins(self, n: int, n_genes: int) -> Tensor:
        return torch.randint(0, 6, (n, n_genes), dtype=torch.uint8).to(self.device)


def stage_one(setting: Setting, machine: Machine) -> StageOne:
    s = setting.sizes
    sizes = StageOneSizes(
        s.n_genes, s.image_encoder, s.image_size, gene_depth=s.depth, gene_width=s.gene_width, gene_heads=s.heads
    )
    model = StageOne(sizes).to(machine.device)
    return plain.plain_model(model) if setting.plainly else model


def gene_encoder(setting: Setting) -> Work:
    """Forward pass of the gene encoder, a batch."""
    s, machine = setting.sizes, Machine(setting)
    model = GeneEncoder(s.n_genes, s.depth, s.gene_width, s.heads).to(machine.device).eval()
    model = plain.plain_gene_encoder(model) if setting.plainly else model
    bins = machine.bins(setting.batch_size, s.n_genes)

    @torch.no_grad()
    def forward(bins: Tensor) -> None:
        with machine.autocast():
            model.encode(bins)

    return Work(lambda: machine.timed(lambda: forward(bins)), len(bins), "spots", flop_of=lambda: model.encode(bins))


def stage_one_step(setting: Setting) -> Work:
    """Forward, backward and optimiser, everything trained; ours with twins, queue and distillation."""
    s, machine = setting.sizes, Machine(setting)
    model = stage_one(setting, machine).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    tiles, bins = machine.tiles(setting.batch_size, s.image_size), machine.bins(setting.batch_size, s.n_genes)
    draws = torch.Generator(machine.device).manual_seed(setting.seed)
    spots = torch.arange(len(tiles), device=machine.device)

    def step(tiles: Tensor, bins: Tensor) -> None:
        optimizer.zero_grad()
        if setting.plainly:
            plain.stage_one_loss(model, tiles, bins, draws).backward()
            optimizer.step()
            return
        with machine.autocast():
            out = model(tiles, bins, spots, 0.4, draws)
        out.loss.backward()
        optimizer.step()
        model.after_step(out.twin)

    return Work(
        lambda: machine.timed(lambda: step(tiles, bins)), len(tiles), "spots", flop_of=lambda: step(tiles, bins)
    )


def stage_one_eval(setting: Setting) -> Work:
    """Validation: plainly the whole model's loss batch by batch, as published; ours every side once, and ranks."""
    from utils.evaluation import retrieval

    s, machine = setting.sizes, Machine(setting)
    model = stage_one(setting, machine).eval()
    n = 4 * setting.batch_size
    tiles, bins = machine.tiles(n, s.image_size), machine.bins(n, s.n_genes)
    draws = torch.Generator(machine.device).manual_seed(setting.seed)

    @torch.no_grad()
    def evaluate() -> None:
        if setting.plainly:
            for some in torch.arange(n).split(setting.batch_size):
                plain.stage_one_loss(model, tiles[some], bins[some], draws)
            return
        image, gene = (x.cpu().numpy() for x in encode_all(model, tiles, bins, machine))
        retrieval.ranks_from_embeddings(image, gene)
        retrieval.ranks_from_embeddings(gene, image)

    return Work(lambda: machine.timed(evaluate), n, "spots")


@torch.no_grad()
def score_all(model: StageOne, tiles: Tensor, bins: Tensor, candidates: np.ndarray, machine: Machine) -> None:
    """All rows of a gallery as get_accuracy_image.py scores them."""
    import get_accuracy_image
    from utils.training.features import EncodedPairs

    found = []
    for start in range(0, len(tiles), 32):
        with machine.autocast():
            image, image_tokens = model.encode_images(tiles[start : start + 32])
            gene, gene_tokens = model.encode_genes(bins[start : start + 32])
        found.append((image.cpu(), gene.cpu(), image_tokens.cpu(), gene_tokens.cpu()))
    image, gene, image_tokens, gene_tokens = map(torch.cat, zip(*found, strict=True))
    encoded = EncodedPairs(image.numpy(), gene.numpy(), image_tokens, gene_tokens)
    depth = np.zeros(len(tiles))
    get_accuracy_image.gallery_scores(model, encoded, depth, depth, candidates, machine.accelerator)


@torch.no_grad()
def encode_all(model: StageOne, tiles: Tensor, bins: Tensor, machine: Machine) -> tuple[Tensor, Tensor]:
    """Unit vectors of pictures and profiles, 32 at a time as the scripts do."""
    image, gene = [], []
    for start in range(0, len(tiles), 32):
        with machine.autocast():
            image.append(model.encode_images(tiles[start : start + 32])[0])
            gene.append(model.encode_genes(bins[start : start + 32])[0])
    return torch.cat(image), torch.cat(gene)


def stage_two(setting: Setting) -> Work:
    """100 epochs of 1,000 spots: plainly the frozen encoder in every step, ours on features computed once."""
    machine, n = Machine(setting), 32
    model, around = stage_two_model(setting, machine, n)
    model.train()
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-4)
    tiles, target = machine.tiles(n, setting.sizes.image_size), torch.randn(n, N_TARGETS, device=machine.device)
    steps = N_STAGE_TWO // n * N_EPOCHS
    features = model.encode(tiles).float()

    def decode() -> None:
        with machine.decoder_autocast():
            predicted = model.decoder(features[:, 0], features[:, 1:], **around)
        optimizer.zero_grad()
        losses.expression_loss(predicted, target).backward()
        optimizer.step()

    def encode() -> None:
        with machine.autocast():
            model.encode(tiles)

    if setting.plainly:
        step = partial(plain.stage_two_step, model, tiles, around, target, optimizer)
        return Work(lambda: machine.timed(step) * steps, N_STAGE_TWO * N_EPOCHS, "spots", "one step of 32, scaled")
    return Work(
        lambda: (
            machine.timed(encode) * N_STAGE_TWO / n + machine.timed(lambda: [decode() for _ in range(5)]) / 5 * steps
        ),
        N_STAGE_TWO * N_EPOCHS,
        "spots",
        "one batch of 32 encoded and five steps, scaled",
    )


def stage_two_model(setting: Setting, machine: Machine, n: int) -> tuple[StageTwo, dict[str, Tensor]]:
    """The published sizes around a new encoder, and a context for n spots."""
    s = setting.sizes
    model = StageTwo(StageTwoSizes(N_TARGETS, s.image_encoder, s.image_size)).to(machine.device)
    around = {
        "context": torch.randn(n, N_CONTEXT, model.sizes.width, device=machine.device),
        "offsets": torch.randn(n, N_CONTEXT, 2, device=machine.device),
        "present": torch.ones(n, N_CONTEXT, dtype=torch.bool, device=machine.device),
    }
    return plain.plain_model(model) if setting.plainly else model, around


def prediction(setting: Setting) -> Work:
    """From tiles to genes: plainly one picture at a time, ours 32."""
    machine, n = Machine(setting), 8 if setting.plainly else 64
    model, around = stage_two_model(setting, machine, n)
    model.eval()
    tiles = machine.tiles(n, setting.sizes.image_size)

    @torch.no_grad()
    def predict() -> None:
        for start in range(0, n, 32):
            with machine.autocast():
                features = model.encode(tiles[start : start + 32]).float()
            own = {name: rows[start : start + 32] for name, rows in around.items()}
            with machine.decoder_autocast():
                model.predict({"vector": features[:, 0], "tokens": features[:, 1:], **own})

    if setting.plainly:
        return Work(
            lambda: machine.timed(lambda: plain.predict(model, tiles, around)) * 8, 64, "spots", "8 of 64 tiles"
        )
    return Work(lambda: machine.timed(predict), n, "spots")


def simulated_slice(folder: Path, n_spots: int, seed: int) -> np.ndarray:
    """A slice folder with a hires picture of 2,000 px and spots on it, without counts: centres (S, 2) in its pixels."""
    rng = np.random.default_rng(seed)
    spatial = folder / "slice" / "spatial"
    spatial.mkdir(parents=True)
    coarse = rng.integers(60, 255, (125, 125, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((2000, 2000), Image.Resampling.BICUBIC).save(spatial / "tissue_hires_image.png")
    side = int(np.ceil(n_spots**0.5))
    row, column = np.divmod(np.arange(n_spots), side)
    centres = 30 + np.column_stack([column, row]) * (1940 / side)
    y, x = (np.rint(centres / 0.1).astype(int).T)[::-1]
    lines = [f"SPOT{i}-1,1,{row[i]},{column[i]},{y[i]},{x[i]}" for i in range(n_spots)]
    (spatial / "tissue_positions_list.csv").write_text("\n".join(lines) + "\n")
    scales = {"tissue_hires_scalef": 0.1, "tissue_lowres_scalef": 0.03, "spot_diameter_fullres": 100.0}
    (spatial / "scalefactors_json.json").write_text(json.dumps(scales))
    return np.rint(centres / 0.1) * 0.1


def tiling(setting: Setting) -> Work:
    """The published tiles, 40 px of the hires picture, of a slice of 4,992 spots: picture opened, JPEGs written."""
    import image_tilling

    folder = Path(tempfile.mkdtemp(prefix="magic_speed_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    n = 4992 if setting.sizes != SMALL else 500
    centres = simulated_slice(folder / "data", n, setting.seed)
    numbers = itertools.count()  # each time into a new folder

    def cut() -> float:
        out = folder / f"tiles{next(numbers)}"
        start = time.perf_counter()
        if setting.plainly:
            plain.cut_tiles(folder / "data/slice/spatial/tissue_hires_image.png", centres, out)
        else:
            flags = ["--data", str(folder / "data"), "--tiles", str(out), "--source", "hires", "--crop_size", "40"]
            image_tilling.main(image_tilling.parse_args(flags))
        return time.perf_counter() - start

    return Work(cut, n, "spots")


def loading(setting: Setting) -> Work:
    """Augmented tiles of 224 px in batches of 32, as training reads them: plainly from JPEGs, ours from the pack."""
    from utils.slices import tiles
    from utils.training import augment, datasets

    s, machine = setting.sizes, Machine(setting)
    folder = Path(tempfile.mkdtemp(prefix="magic_speed_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    n = 4096 if setting.sizes != SMALL else 256
    paths = write_tiles(folder, n, s.image_size, setting.seed)

    def read_ours() -> None:
        one = SimpleNamespace(pack=tiles.TilePack(folder), tile_rows=np.arange(n))
        spots = np.column_stack([np.zeros(n, int), np.arange(n)])
        order = datasets.EpochOrder(n, 32, setting.seed)
        for batch in datasets.loader(datasets.TileBatches([one], spots), order, workers=None):
            augment.augment(batch["tiles"].to(machine.device), batch["spot"].numpy(), setting.seed, 0, s.image_size)

    def read_plainly() -> None:
        data = plain.TileFiles(paths, setting.seed)
        for batch in DataLoader(data, batch_size=32, shuffle=True, num_workers=2):
            batch.to(machine.device)

    return Work(lambda: machine.timed(read_plainly if setting.plainly else read_ours), n, "tiles")


def write_tiles(folder: Path, n: int, size: int, seed: int) -> list[Path]:
    """Tiles as image_tilling.py leaves them: JPEGs, their pack, and the record of it."""
    from utils.slices import tiles

    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(60, 255, (64, 64, 3), dtype=np.uint8)).resize((4 * size, 4 * size))
    paths, centres = [folder / f"SPOT{i}-1.jpeg" for i in range(n)], rng.uniform(size, 3 * size, (n, 2))
    cut = tiles.Cut("fullres", "picture.tif", 0.5, float(size), size, True)
    pixels = tiles.ensure_tiles(picture, centres, cut, paths, np.zeros(n, bool))
    tiles.write_pack(folder, np.array([path.stem for path in paths]), centres, [pixels], size)
    tiles.write_record(folder / tiles.RECORD, asdict(cut))
    return paths


def gallery(setting: Setting) -> Work:
    """Ten nearest of a large gallery for 1,000 queries; plainly the bare matrix product, by the same blocks."""
    from utils.evaluation.gallery import top_k

    machine, n_queries, width = Machine(setting), 1000, 512
    draws = torch.Generator().manual_seed(setting.seed)
    queries = torch.randn(n_queries, width, generator=draws).to(machine.device)
    rows = torch.randn(setting.sizes.gallery, width, generator=draws).to(machine.device)
    product = torch.empty(4096 * n_queries, device=machine.device)

    def multiply() -> None:
        for block in rows.split(4096):
            torch.mm(block, queries.T, out=product[: len(block) * n_queries].view(len(block), n_queries))

    search = multiply if setting.plainly else lambda: top_k(queries, rows, 10, block=4096)
    return Work(lambda: machine.timed(search), n_queries, "queries")


def retrieval(setting: Setting) -> Work:
    """Nine candidates of each of 1,000 spots, three rows of scores: plainly each profile anew for each picture."""
    s, machine = setting.sizes, Machine(setting)
    model = stage_one(setting, machine).eval()
    tiles, bins = machine.tiles(s.spots, s.image_size), machine.bins(s.spots, s.n_genes)
    side = int(np.ceil(s.spots**0.5))
    xy = np.column_stack(np.divmod(np.arange(s.spots), side)).astype(float)
    candidates = neighbour_candidates(xy, 8, setting.seed).candidates
    if setting.plainly:
        some = torch.from_numpy(candidates[:2])
        return Work(
            lambda: machine.timed(lambda: plain.retrieval_scores(model, tiles, bins, some)) * s.spots / len(some),
            s.spots,
            "spots",
            f"2 of {s.spots} spots",
        )
    return Work(lambda: machine.timed(lambda: score_all(model, tiles, bins, candidates, machine)), s.spots, "spots")
