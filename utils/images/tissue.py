"""Where on a slide is tissue, and where on it spots go.

Shapes: h, w thumbnail pixels; S spots. Otsu's threshold: N. Otsu, IEEE Trans. Syst. Man Cybern. 9, 62 (1979).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from utils.images import tiff
from utils.images.checks import reading

# Saturation, (max - min) / max of red, green, blue: clear glass is below 0.05, pale connective tissue from 0.12
UNSTAINED, STAINED = 0.06, 0.12
SMALL = 1 / 100  # holes and specks smaller than a square with this fraction of the longest side
BLUR = 1 / 500  # of the longest side: gaps in loose tissue that are narrower than a spot
# Ink, in grey levels of 255. Dense haematoxylin (99.9 % of the pixels of six real sections) stays below both of COLOUR,
# that is blue - red, and (green - red) / (max - min)
BLACK, GREY = 100, 40  # brightest channel, and its distance to the darkest one
COLOUR = 100, 0.3
MOST_SPOTS = 10_000_000


def tissue_mask(thumbnail: np.ndarray) -> np.ndarray:
    """Stained tissue on a thumbnail (h, w, 3) uint8: (h, w) bool.

    Otsu's threshold on saturation, pen marks left out; small holes are filled, small specks removed. Where there are
    not two kinds of pixels, all are tissue if they are stained, else none is.
    """
    from scipy import ndimage

    colours = ndimage.gaussian_filter(thumbnail.astype(np.float32), (1, 1, 0))  # the noise of glass
    red, green, blue = np.moveaxis(colours, 2, 0)
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    longest = max(high.shape)
    clean = ~_pen(colours, high, high - low)
    saturation = ndimage.gaussian_filter(clean * (high - low) / np.maximum(high, 1), BLUR * longest)
    if not clean.any():
        return clean
    area = (SMALL * longest) ** 2
    stained = clean & (saturation > _threshold(saturation[clean]))
    filled = ~_without_specks(~stained, area) & clean
    return _without_specks(filled, area)


def _threshold(saturation: np.ndarray) -> float:
    """Otsu's, between the limits of what can be glass and what can be tissue."""
    counts, edges = np.histogram(saturation, 256, (0, 1))
    middles = (edges[1:] + edges[:-1]) / 2
    below, weighted = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    means = weighted / np.maximum(below, 1), (weighted[-1] - weighted) / np.maximum(above, 1)
    best = np.argmax(below.astype(float) * above * (means[0] - means[1]) ** 2)
    return float(np.clip(edges[best + 1], UNSTAINED, STAINED))


def _pen(colours: np.ndarray, high: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Strokes of black, blue and green ink, and the black beyond the scanned part: (h, w) bool."""
    from scipy import ndimage

    red, green, blue = np.moveaxis(colours, 2, 0)
    black = (high < BLACK) & (chroma < GREY)
    coloured = (chroma > GREY) & ((blue - red > COLOUR[0]) | (green - red > COLOUR[1] * chroma))
    longest = max(high.shape)
    strokes = _without_specks(black | coloured, (SMALL * longest) ** 2 / 4)
    return ndimage.binary_dilation(strokes, iterations=math.ceil(2 * BLUR * longest))  # their blurred edges


def _without_specks(mask: np.ndarray, area: float) -> np.ndarray:
    """Only the connected parts of at least so many pixels."""
    from scipy import ndimage

    parts, _ = ndimage.label(mask)
    large = np.asarray(np.bincount(parts.ravel()) >= area)
    large[0] = False
    return large[parts]


def read_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A mask drawn elsewhere, any value but zero being tissue, on a thumbnail of `shape` (h, w): (h, w) bool.

    Raises ValueError where it cannot be read, its sides are not in the thumbnail's ratio (2 %), or it marks nothing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a mask (png, tif), found no such file; correct the path")
    with reading(path):
        values, n_colours = _mask_values(path)
        marks = np.asarray(values[..., :n_colours].any(2) & values[..., n_colours:].all(2))
    height, width = marks.shape
    if abs(width * shape[0] / (height * shape[1]) - 1) > 0.02:
        raise ValueError(
            f"{path}: expected the slide's ratio of sides, {shape[1] / shape[0]:.3f} (width / height), found "
            f"{width} x {height} px, {width / height:.3f}; draw the mask on the whole slide"
        )
    if not marks.any():
        raise ValueError(f"{path}: expected tissue marked by values above zero, found zeros only; draw the mask anew")
    rows, cols = ((np.arange(n) + 0.5) * side / n for n, side in zip(shape, marks.shape, strict=True))
    return marks[np.ix_(rows.astype(int), cols.astype(int))]


def _mask_values(path: Path) -> tuple[np.ndarray, int]:
    """Stored values (h, w, C), of a palette the indices, as label images mean them, and how many are no alpha."""
    with path.open("rb") as file:
        is_tiff = file.read(4) in tiff.MAGIC
    if is_tiff:  # Pillow would follow its Orientation
        import tifffile

        with tifffile.TiffFile(path) as pages:
            page = pages.pages.first
            values = page.asarray()
            values = np.moveaxis(values, 0, -1) if page.planarconfig == 2 and values.ndim == 3 else values
            values = np.atleast_3d(values)
            return values, values.shape[2] - sum(extra in (1, 2) for extra in page.extrasamples)
    with Image.open(path) as image:
        values, bands = np.asarray(image), image.getbands()
    return values.reshape(*values.shape[:2], len(bands)), len(bands) - ("A" in bands)


def grid(width: int, height: int, pitch_px: float, kind: str = "hexagonal") -> tuple[np.ndarray, np.ndarray]:
    """Spots in the middle of a slide, row by row.

    Parameters
    ----------
    width, height : of the slide, px
    pitch_px : distance between neighbouring spots
    kind : "hexagonal", as Visium's: rows are sqrt(3)/2 pitch apart, a step of the column is half a pitch, and row and
        column are both even or both odd; "square": a step is one pitch

    Returns
    -------
    centres (S, 2) float, x and y in px, and array places (S, 2) int, row and column

    Raises
    ------
    ValueError for a pitch that gives no sensible number of spots.
    """
    if kind not in ("hexagonal", "square"):
        raise ValueError(f"expected a hexagonal or square grid, found {kind!r}")
    hexagonal = kind == "hexagonal"
    steps = np.array([math.sqrt(3) / 2, 0.5]) * pitch_px if hexagonal else np.array([pitch_px, pitch_px])
    sides = np.array([height, width])
    if not 0 < pitch_px < math.inf or np.prod(sides / steps) > MOST_SPOTS * (2 if hexagonal else 1):
        raise ValueError(
            f"expected a spot pitch that gives at most {MOST_SPOTS:,} spots, found {pitch_px:g} px on {width:,} x "
            f"{height:,} px; check --um_per_px"
        )
    numbers = np.maximum(sides // steps, 1).astype(int)
    places = np.stack(np.meshgrid(*map(np.arange, numbers), indexing="ij"), axis=-1).reshape(-1, 2)
    if hexagonal:
        places = places[places.sum(1) % 2 == 0]
    centres = (sides - (numbers - 1) * steps) / 2 + places * steps
    return centres[:, ::-1].copy(), places


def on_tissue(centres_px: np.ndarray, mask: np.ndarray, scale: float, radius_px: float) -> np.ndarray:
    """Which spots (S,) have at least half of their disc on tissue; what lies off the slide is no tissue.

    Parameters
    ----------
    centres_px, radius_px : (S, 2) and of all spots, level-0 pixels
    mask, scale : ndarray (h, w) bool, and its pixels per level-0 pixel

    The disc is sampled two points to a pixel of the mask, nine across at least.
    """
    across = int(np.clip(math.ceil(4 * radius_px * scale), 9, 41))
    line = (np.arange(across) + 0.5) / across * 2 - 1
    offsets = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    offsets = offsets[np.square(offsets).sum(1) <= 1] * radius_px
    height, width = mask.shape
    hits = np.zeros(len(centres_px), int)
    for offset in offsets:
        x, y = np.floor((centres_px + offset) * scale).astype(int).T
        inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        hits[inside] += mask[y[inside], x[inside]]
    return 2 * hits >= len(offsets)
