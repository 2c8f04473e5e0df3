"""The parts of speed.py around the models: tiles cut and read, and the search of a large gallery."""

from __future__ import annotations

import atexit
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from benchmarks import plain_tiles
from benchmarks.speed_setting import SMALL, Machine, Setting, Work
from utils.training import loop


def tiling(setting: Setting) -> Work:
    """The published tiles, 40 px of the hires image, of a slice of 4,992 spots: image opened, JPEGs written."""
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
            plain_tiles.cut_tiles(folder / "data/slice/spatial/tissue_hires_image.png", centres, out)
        else:
            flags = ["--data", str(folder / "data"), "--tiles", str(out), "--source", "hires", "--crop_size", "40"]
            image_tilling.main(image_tilling.parse_args(flags))
        return time.perf_counter() - start

    return Work(cut, n, "spots")


def simulated_slice(folder: Path, n_spots: int, seed: int) -> np.ndarray:
    """A slice folder with a hires image of 2,000 px and spots on it, without counts: centres (S, 2) in its pixels."""
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


def loading(setting: Setting) -> Work:
    """Augmented tiles of 224 px in batches of 32, as training reads them: plainly from JPEGs, ours from the pack."""
    from torch.utils.data import DataLoader

    from utils.features import dataset
    from utils.images import tiles
    from utils.training import augment

    s, machine = setting.sizes, Machine(setting)
    folder = Path(tempfile.mkdtemp(prefix="magic_speed_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    n = 4096 if setting.sizes != SMALL else 256
    paths = write_tiles(folder, n, s.image_size, setting.seed)

    def read_ours() -> None:
        one = SimpleNamespace(pack=tiles.TilePack(folder), tile_rows=np.arange(n))
        spots = np.column_stack([np.zeros(n, int), np.arange(n)])
        order = loop.EpochOrder(n, 32, setting.seed)
        for batch in dataset.loader(dataset.TileBatches([one], spots), order, workers=None):
            augment.augment(batch["tiles"].to(machine.device), batch["spot"].numpy(), setting.seed, 0, s.image_size)

    def read_plainly() -> None:
        data = plain_tiles.TileFiles(paths, setting.seed)
        context = dataset.reading_context()
        for batch in DataLoader(data, batch_size=32, shuffle=True, num_workers=2, multiprocessing_context=context):
            batch.to(machine.device)

    return Work(lambda: machine.timed(read_plainly if setting.plainly else read_ours), n, "tiles")


def write_tiles(folder: Path, n: int, size: int, seed: int) -> list[Path]:
    """Tiles as image_tilling.py leaves them: JPEGs, their pack, and the record of it."""
    from utils.images import tiles
    from utils.images.image import open_image

    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(60, 255, (64, 64, 3), dtype=np.uint8)).resize((4 * size, 4 * size))
    image.save(folder / "image.png")
    barcodes, centres = np.array([f"SPOT{i}-1" for i in range(n)]), rng.uniform(size, 3 * size, (n, 2))
    cut = tiles.Cut("fullres", "image.png", 0.5, float(size), size, True)
    with open_image(folder / "image.png") as image:
        blocks = tiles.cut_tiles(image, centres, cut, batch_size=64)
        tiles.write_tiles(folder, blocks, cut, barcodes, centres, {}, np.arange(n), jpeg=True)
    return [Path(file) for file in tiles.tile_files(folder, barcodes)]


def gallery(setting: Setting) -> Work:
    """Ten nearest of a large gallery for 1,000 queries; plainly the bare matrix product, by the same blocks."""
    import torch

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
