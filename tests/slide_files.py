"""One image as a file of each format that whole_slide reads, and a region of it read in the plain way."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

MM = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}  # 0.25 um per px


def draw(height: int = 301, width: int = 417) -> np.ndarray:
    """Smooth colours and a few sharp edges: (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / 17), 128 + 100 * np.cos(y / 23), (x + y) % 256]
    image = np.stack(waves, axis=-1).astype(np.uint8)
    image[100:140, 200:260] = (90, 20, 130)
    return image


def write_ome(path: Path, image: np.ndarray, unit: str = "µm", size: float = 0.25, **options) -> None:
    """Two levels, the second one as a SubIFD."""
    options = {"photometric": "rgb", "tile": (64, 64), "compression": "zlib", **options}
    with tifffile.TiffWriter(path, ome=True) as file:
        names = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
        metadata = names | {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
        file.write(image, subifds=1, metadata=metadata, **options)
        half = np.asarray(Image.fromarray(image).reduce(2))
        file.write(half, subfiletype=1, **options)


WRITERS = {
    "png": lambda path, image: Image.fromarray(image).save(path),
    "jpg": lambda path, image: Image.fromarray(image).save(path, quality=100, subsampling=0),
    "plain.tif": lambda path, image: tifffile.imwrite(path, image, photometric="rgb", **MM),
    "strips.tif": lambda path, image: tifffile.imwrite(
        path, image, photometric="rgb", rowsperstrip=7, compression="lzw", **MM
    ),
    "tiled.tif": lambda path, image: tifffile.imwrite(
        path, image, photometric="rgb", tile=(64, 80), compression="zlib", **MM
    ),
    "ome.tif": write_ome,
}


def plain_region(image: np.ndarray, x: float, y: float, side: float, out_px: int) -> np.ndarray:
    """A region by way of the whole image on a white ground."""
    height, width = image.shape[:2]
    beyond = max(-x, -y, x + side - width, y + side - height, 0)
    margin = int(beyond + 4 * max(side / out_px, 1)) + 1
    ground = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)
    box = (x + margin, y + margin, x + margin + side, y + margin + side)
    return np.asarray(Image.fromarray(ground).resize((out_px, out_px), Image.Resampling.BICUBIC, box=box))


def furthest(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference in grey levels."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b).max())
