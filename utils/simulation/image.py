"""Paints the tissue of `tissue.grow_tissue` in haematoxylin and eosin, and measures what a tile of the image shows.

Two layers of optical density are painted, one per stain; light that passes them fades by the law of Beer and Lambert,
I = I0 exp(-h H - e E), with the stain's absorption of red, green and blue in H and E.

Shapes: H, W pixels; h, w cells of the coarse maps (MAP_UM each); N nuclei; S spots.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

from utils.simulation.tissue import FIBROBLAST, LYMPHOCYTE, MAP_UM, TUMOUR, Recipe, Tissue, push_apart, smooth_field

TILE_UM = 112.0
FACTORS = ["density", "nuclear_size", "lymphocytes", "spindles", "tumour", "collagen", "eosin", "holes"]


@dataclass
class Scene:
    """One drawn slice: the image and all that can be measured on it.

    `image` (H, W, 3) uint8; `nuclei` those that were drawn; `maps` the tissue's coarse maps; `eosin` optical density of
    the ground between the nuclei, `white` 0..1 where glass shows, both (H, W) float32.
    """

    image: np.ndarray
    um_per_px: float
    nuclei: pd.DataFrame
    maps: dict[str, np.ndarray]
    eosin: np.ndarray
    white: np.ndarray


def box(low_um: np.ndarray, high_um: np.ndarray, um_per_cell: float) -> tuple[slice, slice]:
    """Index (rows, columns) of the rectangle between two corners (2,), x first, in an array of `um_per_cell`."""
    (left, top), (right, bottom) = (
        np.round(low_um / um_per_cell).astype(int),
        np.round(high_um / um_per_cell).astype(int),
    )
    return slice(max(top, 0), bottom), slice(max(left, 0), right)


def enlarge(field: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Coarse map (h, w) on the pixels of the image, (H, W) float32."""
    return np.asarray(Image.fromarray(field).resize(shape[::-1], Image.Resampling.BICUBIC))


def splat(canvas: np.ndarray, nuclei: pd.DataFrame, um_per_px: float, grow: float = 1.0, rim: float = 0.0) -> None:
    """Add every nucleus to `canvas` (H, W), in place, as a soft ellipse of optical density `darkness`.

    Parameters
    ----------
    grow
        Factor on the ellipse's axes: 1 for the nucleus, more for the cell around it.
    rim
        Fraction of the density that lies at the nuclear membrane rather than evenly.
    """
    if nuclei.empty:
        return
    x, y, length, width = (nuclei[c].to_numpy() / um_per_px for c in ("x_um", "y_um", "length_um", "width_um"))
    half_length, half_width = grow * length / 2, grow * width / 2
    window = np.arange(-(reach := int(np.ceil(half_length.max() + 2))), reach + 1)
    sine, cosine = np.sin(nuclei["angle"].to_numpy()), np.cos(nuclei["angle"].to_numpy())
    edge = 1.0 + nuclei["blur"].to_numpy() / um_per_px  # px
    columns = (
        x,
        y,
        half_length,
        half_width,
        cosine,
        sine,
        edge,
        nuclei["bend"].to_numpy(),
        nuclei["darkness"].to_numpy(),
    )
    values = np.stack(columns).astype(np.float32)
    for part in np.array_split(
        values, values.shape[1] * len(window) ** 2 // 1_000_000 + 1, axis=1
    ):  # bounds the memory
        x, y, a, b, c, s, soft, bend, dark = part[:, :, None, None]
        column, row = np.floor(x) + window, np.floor(y) + window[:, None]
        dx, dy = column - x + 0.5, row - y + 0.5
        along = (c * dx + s * dy) / a
        radius = np.hypot(along, (c * dy - s * dx) / b + bend * (along**2 - 0.5))
        body = np.clip((1 - radius) * b / soft + 0.5, 0, 1) * dark * (1 - rim + 1.5 * rim * np.minimum(radius, 1) ** 2)
        column, row = np.broadcast_arrays(column.astype(int), row.astype(int))
        seen = (body > 0) & (column >= 0) & (row >= 0) & (column < canvas.shape[1]) & (row < canvas.shape[0])
        np.add.at(canvas, (row[seen], column[seen]), body[seen].astype(canvas.dtype))


def streaks(
    rng: np.random.Generator, across: np.ndarray, along: np.ndarray, thick_um: float, long_um: float
) -> np.ndarray:
    """Standard normal texture of wavy bundles, `thick_um` by `long_um`, in the fibres' coordinates (any shape, um)."""
    texture = gaussian_filter(rng.standard_normal((2048, 256), dtype=np.float32), (2, 1.2), mode="wrap")
    where = np.stack([across / thick_um, along / long_um])
    return map_coordinates(texture / texture.std(), where, order=1, mode="grid-wrap")


def fat_vacuoles(rng: np.random.Generator, fat: np.ndarray, um_per_px: float) -> np.ndarray:
    """White of the fat cells (H, W), 0..1, where `fat` (H, W) has them: rounded polygons with thin walls between."""
    rows, columns = np.nonzero(fat > 0.05)
    pixels = np.column_stack([columns, rows]) * um_per_px
    count = int(len(rows) * um_per_px**2 / 2600)  # a fat cell covers about 2600 um^2
    white = np.zeros_like(fat)
    if count < 3:
        return white
    size = rng.uniform(18, 33, count)  # radius, um
    centres = push_apart(pixels[rng.integers(len(rows), size=count)], size, rounds=25)
    distance, cell = cKDTree(centres).query(pixels, k=3)
    # Where two cells are as near as each other stands their wall, where three are, a rounded corner.
    second, third = distance[:, 1] - distance[:, 0], distance[:, 2] - distance[:, 0]
    inner = second * third / (second + third + 1e-6)
    is_fat = map_coordinates(fat, centres.T[::-1] / um_per_px, order=1, mode="nearest") > 0.4
    wall = 1.2 + rng.gamma(1.2, 0.9, count)[cell[:, 0]]
    inner = np.minimum(inner - wall, 1.35 * size[cell[:, 0]] - distance[:, 0])
    white[rows, columns] = np.clip(inner / 1.5, 0, 1) * is_fat[cell[:, 0]]
    return white


def paint_ground(
    rng: np.random.Generator, tissue: Tissue, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eosin and haematoxylin between the nuclei, and the white of glass and holes, each (H, W)."""
    maps, um_per_px = tissue.maps, tissue.size_um[0] / shape[0]
    full = {
        name: enlarge(maps[name], shape)
        for name in ("level", "tumour", "fat", "lumen", "collagen", "eosin", "across", "along")
    }
    fine = streaks(rng, full["across"], full["along"], 1.0, 28)
    bundles = enlarge(streaks(rng, maps["across"], maps["along"], 5, 55), shape)
    dense = full["collagen"]
    cleft = np.clip(1.6 * bundles - 0.9 - 2.2 * (dense - 0.35), 0, 1) * np.clip(1 - 1.5 * full["tumour"], 0, 1)
    fat = np.clip(full["fat"], 0, 1)
    holes = np.maximum.reduce([full["lumen"], fat_vacuoles(rng, fat, um_per_px), 0.85 * cleft * (1 - fat)])
    on_tissue = np.clip(full["level"] * 60 + 0.5, 0, 1)
    fibres = full["eosin"] * (0.10 + 0.42 * dense) * np.exp(0.28 * fine + 0.15 * bundles)
    cytoplasm = 0.16 * full["eosin"]
    eosin = np.clip(full["tumour"], 0, 1) * (cytoplasm - fibres) + fibres
    granular = 1 + 0.18 * smooth_field(rng, shape, 1.5 / um_per_px)
    solid = on_tissue * (1 - np.clip(holes, 0, 1))
    haematoxylin = (0.05 + 0.12 * np.clip(full["tumour"], 0, 1)) * granular
    return eosin * granular * solid, haematoxylin * solid, 1 - solid


def develop(rng: np.random.Generator, haematoxylin: np.ndarray, eosin: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Colour (H, W, 3) uint8 of two layers of optical density (H, W), as a slide scanner would record it."""
    layers = [gaussian_filter(layer, 0.55) for layer in (haematoxylin, eosin)]
    shade = 1 + 0.012 * smooth_field(rng, haematoxylin.shape, haematoxylin.shape[0] / 4)
    image = np.empty((*haematoxylin.shape, 3), np.uint8)
    for channel in range(3):
        density = layers[0] * recipe.haematoxylin[channel] + layers[1] * recipe.eosin[channel]
        light = recipe.background[channel] * shade * np.exp(-density)
        light += rng.standard_normal(light.shape, dtype=np.float32) * 2.0
        image[..., channel] = np.clip(light + 0.5, 0, 255).astype(np.uint8)
    return image


def paint(rng: np.random.Generator, tissue: Tissue, um_per_px: float) -> Scene:
    """The tissue as an image. Nuclei that would float in a hole are neither drawn nor in `Scene.nuclei`."""
    shape = (round(tissue.size_um[0] / um_per_px), round(tissue.size_um[1] / um_per_px))
    eosin, ground, white = paint_ground(rng, tissue, shape)
    row, column = (
        np.clip(tissue.nuclei[c] / um_per_px, 0, n - 1).astype(int)
        for c, n in zip(("y_um", "x_um"), shape, strict=True)
    )
    nuclei = tissue.nuclei[white[row, column] < 0.5].reset_index(drop=True)
    kinds = [nuclei[nuclei["kind"] == kind] for kind in (TUMOUR, LYMPHOCYTE, FIBROBLAST)]
    chromatin, cells = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for of_kind, rim in zip(kinds, (0.35, 0.0, 0.15), strict=True):
        splat(chromatin, of_kind, um_per_px, rim=rim)
    splat(cells, kinds[TUMOUR], um_per_px, grow=1.7)
    chromatin *= 1 + 0.22 * smooth_field(rng, shape, 0.9 / um_per_px)
    cells = np.tanh(cells) * (1 - white)
    # Where nuclei overlap the section does not get thicker: density saturates.
    haematoxylin = ground + 1.7 * np.tanh(np.clip(chromatin, 0, None) / 1.7) + 0.10 * cells
    stained = eosin * (1 - 0.6 * np.clip(chromatin, 0, 1)) + 0.12 * cells
    return Scene(develop(rng, haematoxylin, stained, tissue.recipe), um_per_px, nuclei, tissue.maps, eosin, white)


def measure_tiles(scene: Scene, centres_um: np.ndarray, side_um: float = TILE_UM) -> pd.DataFrame:
    """What the square tiles around the spots (S, 2; x first) show: one row per spot, the columns of FACTORS.

    `density` nuclei per mm2; `nuclear_size` mean diameter in um (7 where there is none); `lymphocytes` and `spindles`
    fractions of the nuclei; `tumour` fraction of the area in nests; `collagen` amount of fibres, `eosin` optical
    density of the ground, both as the mean over the tile; `holes` fraction of the area that is white.
    """
    nuclei = scene.nuclei
    trees = cKDTree(nuclei[["x_um", "y_um"]].to_numpy()).query_ball_point(centres_um, side_um / 2, p=np.inf)
    length, width, kind = (nuclei[column].to_numpy() for column in ("length_um", "width_um", "kind"))
    diameter = np.sqrt(length * width)
    fibrous = scene.maps["stroma"] * scene.maps["collagen"] * scene.maps["eosin"]
    rows = []
    for inside, centre in zip(trees, centres_um, strict=True):
        count = max(len(inside), 1)
        low, high = centre - side_um / 2, centre + side_um / 2
        tile = box(low, high, scene.um_per_px)
        coarse = box(low, high, MAP_UM)
        row = [len(inside) / (side_um / 1000) ** 2, diameter[inside].mean() if inside else 7.0]
        row += [(kind[inside] == LYMPHOCYTE).sum() / count, (kind[inside] == FIBROBLAST).sum() / count]
        row += [
            scene.maps["tumour"][coarse].mean(),
            fibrous[coarse].mean(),
            scene.eosin[tile].mean(),
            scene.white[tile].mean(),
        ]
        rows.append(row)
    return pd.DataFrame(rows, columns=FACTORS)
