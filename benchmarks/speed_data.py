"""The parts of speed.py around the models: tiles cut and read, and the search of a large gallery.

Their plain references open, cut and augment one tile at a time, by Pillow and NumPy.
"""

from __future__ import annotations

import atexit
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.speed_setting import Machine, Setting, Work

if TYPE_CHECKING:
    from torch import Tensor


def temporary_folder() -> Path:
    """A folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="magic_speed_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tiling(setting: Setting) -> Work:
    """The published tiles, 40 px of the hires image, of a slice of 4,992 spots: image opened, JPEGs written."""
    return cut_slice(setting, plain_tiles, "--crop_size", "40")


def packing(setting: Setting) -> Work:
    """Tiles of 112 um in 64 px of the same slice into the store that training reads, without JPEGs."""
    return cut_slice(setting, plain_pack, "--tile_um", "112", "--tile_px", "64", "--spot_pitch_um", "100")


def cut_slice(setting: Setting, plain: Callable[[Path, np.ndarray, Path], None], *flags: str) -> Work:
    import image_tilling

    folder, n = temporary_folder(), setting.sizes.tiled
    centres = simulated_slice(folder / "data" / "slice", n, setting.seed)
    numbers = itertools.count()  # each time into a new folder

    def cut() -> float:
        out = folder / f"tiles{next(numbers)}"
        start = setting.now()
        if setting.plain:
            plain(folder / "data/slice/spatial/tissue_hires_image.png", centres, out)
        else:
            places = ["--data", str(folder / "data"), "--tiles", str(out), "--source", "hires"]
            image_tilling.main(image_tilling.parse_args([*places, *flags]))
        return setting.now() - start

    return Work(cut, n, "spots")


def simulated_slice(folder: Path, n_spots: int, seed: int) -> np.ndarray:
    """A slice folder with a hires image of 2,000 px and spots on it, without counts: centres (S, 2) in its pixels."""
    rng = np.random.default_rng(seed)
    spatial = folder / "spatial"
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


def plain_tiles(image_file: Path, centres: np.ndarray, out: Path) -> None:
    """The published tiles: 40 x 40 px around each centre (S, 2) of the hires image, one JPEG each."""
    out.mkdir(parents=True)
    with Image.open(image_file) as opened:
        image = opened.convert("RGB")
    for spot, (x, y) in enumerate(centres):
        image.crop((x - 20, y - 20, x + 20, y + 20)).save(out / f"{spot}.jpeg")


def plain_pack(image_file: Path, centres: np.ndarray, out: Path) -> None:
    """Squares of 112 um, resampled to 64 px, written one by one to rows of a chunked HDF5 set; centres (S, 2)."""
    import h5py

    out.mkdir(parents=True)
    half = 0.56 * np.median(np.diff(np.unique(centres[:, 0])))  # 56 um at the pitch of 100 um
    with Image.open(image_file) as opened, h5py.File(out / "tiles.h5", "w") as file:
        image = opened.convert("RGB")
        img = file.create_dataset("img", (len(centres), 64, 64, 3), "uint8", chunks=(1, 64, 64, 3))
        for spot, (x, y) in enumerate(centres):
            box = (x - half, y - half, x + half, y + half)
            img[spot] = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box=box))
        file["coords"] = centres


def loading(setting: Setting) -> Work:
    """Augmented tiles of 224 px in batches of 32, as training reads them: plain from JPEGs, ours from the pack."""
    from torch.utils.data import DataLoader

    from utils.features import dataset
    from utils.images import tiles
    from utils.training import augment, loop

    machine, folder = Machine(setting), temporary_folder()
    n, size, seed = setting.sizes.tiles, setting.sizes.image_size, setting.seed
    paths = write_tiles(folder, n, size, seed)

    def read_ours() -> None:
        slice_: Any = SimpleNamespace(pack=tiles.TilePack(folder), tile_rows=np.arange(n))
        spots = np.column_stack([np.zeros(n, int), np.arange(n)])
        order = loop.EpochOrder(n, 32, seed)
        for batch in dataset.loader(dataset.TileBatches([slice_], spots), order, workers=None):
            augment.augment(batch["tiles"].to(machine.device), batch["spot"].numpy(), seed, 0, size)

    def read_plain() -> None:
        files: Any = TileFiles(paths, seed)
        context = dataset.reading_context()
        for batch in DataLoader(files, batch_size=32, shuffle=True, num_workers=2, multiprocessing_context=context):
            batch.to(machine.device)

    return Work(lambda: machine.timed(read_plain if setting.plain else read_ours), n, "tiles")


def write_tiles(folder: Path, n: int, size: int, seed: int) -> list[Path]:
    """Tiles as image_tilling.py leaves them: JPEGs, their pack, and the record of it."""
    from utils.images import tiles
    from utils.images.image import open_image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 255, (64, 64, 3), dtype=np.uint8))
    coarse.resize((4 * size, 4 * size)).save(folder / "image.png")
    barcodes, centres = np.array([f"SPOT{i}-1" for i in range(n)]), rng.uniform(size, 3 * size, (n, 2))
    cut = tiles.Cut("fullres", "image.png", 0.5, float(size), size, True)
    with open_image(folder / "image.png") as image:
        blocks = tiles.cut_tiles(image, centres, cut, batch_size=64)
        tiles.write_tiles(folder, blocks, cut, barcodes, centres, {}, np.arange(n), jpeg=True)
    return [Path(file) for file in tiles.tile_files(folder, barcodes)]


class TileFiles:
    """Tiles by file, each opened and augmented alone by NumPy, with the draws of utils/training/augment.py."""

    def __init__(self, paths: list[Path], seed: int):
        self.paths, self.seed = paths, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, spot: int) -> Tensor:
        """(3, Z, Z) float32 in 0..1"""
        import torch

        from utils.training import augment

        with Image.open(self.paths[spot]) as image:
            tile = np.asarray(image.convert("RGB"))
        draws = augment.uniforms(self.seed, 0, np.array([spot]), 10)[0]
        restained = restain(flip_and_shift(tile, draws[:4]), draws[4:])
        return torch.from_numpy(restained.astype(np.float32).transpose(2, 0, 1))


def flip_and_shift(tile: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Shifted, rotated by quarters and flipped: (Z, Z, 3), draws (4,) in [0, 1) -> (Z, Z, 3)."""
    from utils.training import augment

    size = len(tile)
    most = int(augment.SHIFT * size)
    dx, dy = (int(draw * (2 * most + 1)) for draw in draws[2:])
    padded = np.pad(tile, ((most, most), (most, most), (0, 0)), mode="symmetric")
    rotated = np.rot90(padded[dy : dy + size, dx : dx + size], int(draws[0] * 4))
    return rotated[:, ::-1] if draws[1] < 0.5 else rotated


def restain(tile: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Stains taken apart, changed and mixed again: (Z, Z, 3) uint8, draws (6,) in [0, 1) -> (Z, Z, 3) in 0..1."""
    from utils.training import augment

    stains = augment.STAINS.numpy() / np.linalg.norm(augment.STAINS.numpy(), axis=1, keepdims=True)
    density = -np.log(np.maximum(tile, 1) / 255)
    strength = density @ np.linalg.inv(stains)
    changed = strength * (1 + augment.JITTER * (2 * draws[:3] - 1)) + augment.JITTER / 3 * (2 * draws[3:] - 1)
    return np.exp(-changed @ stains).clip(0, 1)


def gallery(setting: Setting) -> Work:
    """Ten nearest of a large gallery for 1,000 queries; the plain side is the bare matrix product, in equal blocks."""
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

    search = multiply if setting.plain else lambda: top_k(queries, rows, 10, block=4096)
    return Work(lambda: machine.timed(search), n_queries, "queries")
