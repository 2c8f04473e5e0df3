"""Draws a made-up piece of tumour as it looks under the microscope in haematoxylin and eosin (H&E).

Smooth random fields divide the piece into tumour nests, lymphoid aggregates, fibrous stroma, fat and ducts. The regions
determine where nuclei of which kind lie and how much eosin the ground between them takes; nuclei and ground are painted
as optical density and turned into colour by the law of Beer and Lambert. The scene keeps what was drawn, so that
`measure_tiles` can measure what a tile shows.

Shapes: H, W pixels of the image; h, w cells of the coarse maps (MAP_UM each); N nuclei; S spots.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from scipy.special import expit

MAP_UM = 4.0  # regions vary slowly: painting them on a coarse grid is what keeps a slice at a few seconds
TUMOUR, LYMPHOCYTE, FIBROBLAST = 0, 1, 2


@dataclass
class Recipe:
    """What one slice is made of; jittered between patients (composition) and slices (stain).

    Fractions are of the area of the tissue. Stain vectors are optical densities of red, green and blue; `background`
    is the colour of the empty glass, 0 to 255.
    """

    tumour_fraction: float
    lymphoid_fraction: float
    fat_fraction: float
    nuclear_scale: float
    haematoxylin: np.ndarray
    eosin: np.ndarray
    background: np.ndarray


@dataclass
class Tissue:
    """One piece of tissue, not yet painted.

    `size_um` height and width of the image; `maps` coarse (h, w) float32 maps by name (see `grow_regions`); `nuclei`
    one row per nucleus: `x_um`, `y_um`, `length_um`, `width_um`, `angle` (radians), `kind`, `darkness` (optical
    density), `bend` (0: an ellipse, else a kidney), `blur` (width of its edge, um).
    """

    recipe: Recipe
    size_um: tuple[float, float]
    maps: dict[str, np.ndarray]
    nuclei: pd.DataFrame


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Standard normal random field (h, w), float32, that varies over about `scale` cells."""
    step = max(scale / 4, 1.0)
    margin = 16  # the filter's reach: without it the field would be livelier near the border
    size = [int(np.ceil(n / step)) + 2 * margin for n in shape]
    noise = gaussian_filter(rng.standard_normal(size, dtype=np.float32), scale / step)
    noise = noise[margin:-margin, margin:-margin]
    field = np.asarray(Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC))
    return (field - field.mean()) / field.std()


def fraction_mask(level: np.ndarray, fraction: float, inside: np.ndarray, sharpness: float) -> np.ndarray:
    """Soft mask (h, w), 0..1, that covers a fraction of the cells `inside` (h, w, bool), those of highest level."""
    return expit(sharpness * (level - np.quantile(level[inside], 1 - fraction))).astype(np.float32)


def tissue_level(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Field (h, w) that falls from the middle outwards; any contour of it is an outline with some straight parts.

    Biopsies are cut with a blade: the outline is a polygon of five random sides, made wavy and ragged.
    """
    y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    turns = (np.arange(5) + rng.uniform(-0.3, 0.3, 5)) * 2 * np.pi / 5 + rng.uniform(0, 2 * np.pi)
    sides = [(np.cos(t) * x + np.sin(t) * y) / rng.uniform(0.85, 1.1) for t in turns]
    # The second term, nothing but near the border of the image, keeps the tissue off it.
    level = -np.max(sides, axis=0) - 4 * np.clip(np.maximum(abs(x), abs(y)) - 0.88, 0, None)
    wavy = 0.07 * smooth_field(rng, shape, 180 / MAP_UM) + 0.02 * smooth_field(rng, shape, 30 / MAP_UM)
    return level + wavy + 0.008 * smooth_field(rng, shape, 7 / MAP_UM)


def at(field: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    """Value of a coarse map (h, w) at positions (N, 2) in um, x first."""
    column, row = (np.clip(xy_um / MAP_UM, 0, np.array(field.shape[::-1]) - 1)).astype(int).T
    return field[row, column]


def grow_regions(
    rng: np.random.Generator, size_um: tuple[float, float], spots_um: np.ndarray, n_inside: int, recipe: Recipe
) -> dict[str, np.ndarray]:
    """Coarse maps of the slice.

    Parameters
    ----------
    size_um
        Height and width of the image.
    spots_um
        (S, 2) spot centres, x first.
    n_inside
        How many of them shall lie on tissue.

    Returns
    -------
    (h, w) float32 maps: `level`, above 0 on tissue; `tissue`, `tumour`, `lymphoid`, `fat`, `duct_wall`, `lumen`,
    `stroma`, `collagen` in 0..1; `along` and `across`, the fibres' own coordinates in um; `size`, `cells`, `eosin`,
    multipliers around 1 of the tumour's nuclei, of the number of cells, of the dye.
    """
    shape = (int(size_um[0] / MAP_UM), int(size_um[1] / MAP_UM))

    def field(scale_um: float) -> np.ndarray:
        return smooth_field(rng, shape, scale_um / MAP_UM)

    level = tissue_level(rng, shape)
    ranked = np.sort(at(level, spots_um))[::-1]
    cut = (ranked[n_inside - 1] + ranked[n_inside]) / 2
    inside = level > cut
    macro, fat_field, duct_field = field(220), field(150), field(36)
    nests = 0.9 * macro + 0.75 * field(30) + 0.35 * field(12)
    tumour = fraction_mask(nests, recipe.tumour_fraction, inside, 5)
    fat = fraction_mask(fat_field - 0.9 * macro, recipe.fat_fraction, inside, 6) * (1 - tumour)
    lymphoid = fraction_mask(field(60) - 0.5 * (macro - 0.3) ** 2, recipe.lymphoid_fraction, inside, 5) * (1 - fat)
    duct_level = duct_field + 0.2 * field(10) - 0.6 * abs(macro) - 2 * fat - 2 * lymphoid
    lumen = fraction_mask(duct_level, 0.016, inside, 14)
    duct_wall = fraction_mask(duct_level, 0.055, inside, 9) * (1 - lumen)
    collagen = fraction_mask(field(90) + 0.3 * field(15), 0.5, inside, 1.6)
    maps = {"level": level - cut, "tissue": inside.astype(np.float32), "tumour": tumour * (1 - lumen), "fat": fat}
    maps |= {"lymphoid": lymphoid, "lumen": lumen, "duct_wall": duct_wall, "collagen": collagen}
    maps["stroma"] = np.clip(1 - np.maximum.reduce([tumour, fat, lymphoid, lumen, duct_wall]), 0, 1)
    y, x = (MAP_UM * axis for axis in np.meshgrid(*map(np.arange, shape), indexing="ij"))
    turn = rng.uniform(0, np.pi)
    maps["across"] = np.cos(turn) * x + np.sin(turn) * y + 90 * field(130) + 12 * field(35)
    maps["along"] = np.cos(turn) * y - np.sin(turn) * x + 60 * field(130)
    maps |= {"size": np.exp(0.22 * field(130)), "cells": np.exp(0.35 * field(110)), "eosin": np.exp(0.5 * field(120))}
    return {name: np.asarray(values, np.float32) for name, values in maps.items()}


def scatter(rng: np.random.Generator, per_mm2: np.ndarray) -> np.ndarray:
    """Points (N, 2) in um, x first, of a Poisson process with the intensities (h, w) given per square millimetre."""
    weights = np.cumsum(per_mm2.ravel().astype(np.float64))
    count = rng.poisson(weights[-1] * (MAP_UM / 1000) ** 2)
    cells = np.searchsorted(weights, rng.uniform(0, weights[-1], count), side="right")
    row, column = np.divmod(cells, per_mm2.shape[1])
    return (np.column_stack([column, row]) + rng.uniform(0, 1, (count, 2))) * MAP_UM


def push_apart(xy: np.ndarray, radius: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Positions (N, 2) after nuclei of these radii (N,) have shoved each other aside: cells are packed, not strewn."""
    xy = xy.copy()
    for _ in range(rounds):
        i, j = cKDTree(xy).query_pairs(2 * radius.max(), output_type="ndarray").T
        delta = xy[i] - xy[j]
        distance = np.linalg.norm(delta, axis=1) + 1e-6
        shift = delta * (0.5 * np.clip(radius[i] + radius[j] - distance, 0, None) / distance)[:, None]
        for axis in (0, 1):
            xy[:, axis] += np.bincount(i, shift[:, axis], len(xy)) - np.bincount(j, shift[:, axis], len(xy))
    return xy


def place_nuclei(rng: np.random.Generator, maps: dict[str, np.ndarray], nuclear_scale: float) -> pd.DataFrame:
    """The nuclei (columns as in `Tissue`), as many and of the kind, size and darkness that their region asks for."""
    solid, cells = maps["tissue"] * (1 - maps["lumen"]), maps["cells"]
    rates = [
        (5200 * maps["tumour"] * cells / maps["size"] ** 1.5 + 11000 * maps["duct_wall"]) * solid,
        (9500 * maps["lymphoid"] + 350 * cells**2 * (1 - maps["fat"])) * solid,
        (1500 * maps["stroma"] * cells + 1500 * maps["fat"] + 300 * maps["tumour"]) * solid,
    ]
    points = [scatter(rng, rate) for rate in rates]
    kind = np.repeat([TUMOUR, LYMPHOCYTE, FIBROBLAST], [len(p) for p in points])
    xy = np.concatenate(points)
    wobble = rng.normal(size=(2, len(kind)))
    grade = nuclear_scale * at(maps["size"], xy)
    # um: tumour nuclei large and of uneven size, lymphocytes small, round and even, fibroblasts long and thin
    length = np.choose(kind, [10.0 * grade * np.exp(0.14 * wobble[0]), 6.6 + 0.4 * wobble[0], 12 + 2 * wobble[0]])
    ratio = np.choose(kind, [0.76 + 0.1 * wobble[1], 0.92 + 0.05 * wobble[1], 0.34 + 0.07 * wobble[1]])
    width = length * np.clip(ratio, 0.22, 1)
    xy = push_apart(xy, np.where(kind == FIBROBLAST, 0.9 * width, 0.43 * (length + width) / 2 + 0.3))
    down, right = np.gradient(maps["across"])
    fibre = np.arctan2(at(right, xy), -at(down, xy)) + rng.normal(0, 0.25, len(kind))
    angle = np.where(kind == FIBROBLAST, fibre, rng.uniform(0, np.pi, len(kind)))
    # Large tumour nuclei have loose, pale chromatin; that of lymphocytes is dense.
    darkness = np.choose(kind, [1.05 / grade, 1.35, 0.95]) * np.exp(rng.normal(0, 0.2, len(kind)))
    nuclei = pd.DataFrame({"x_um": xy[:, 0], "y_um": xy[:, 1], "length_um": length, "width_um": width, "angle": angle})
    nuclei = nuclei.assign(
        kind=kind, darkness=darkness, bend=rng.normal(0, 0.22, len(kind)), blur=rng.gamma(4, 0.25, len(kind))
    )
    return nuclei[at(solid, xy) > 0.5].reset_index(drop=True)


def grow_tissue(
    rng: np.random.Generator, size_um: tuple[float, float], spots_um: np.ndarray, n_inside: int, recipe: Recipe
) -> Tissue:
    """A piece of tissue under exactly `n_inside` of the spots (S, 2; x first) on an image of this height and width."""
    maps = grow_regions(rng, size_um, spots_um, n_inside, recipe)
    return Tissue(recipe, size_um, maps, place_nuclei(rng, maps, recipe.nuclear_scale))
