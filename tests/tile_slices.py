"""A slice of six spots under a drawn image, for the tests of tiles: 50 px are 100 um."""

import json

import numpy as np
from PIL import Image
from spaceranger_folders import write_spatial

import image_tilling

PITCH_PX = 50.0  # 100 um: 2 um per full-resolution pixel
HIRES = 0.5
SIZE = (400, 300)
SCALES = {"tissue_hires_scalef": HIRES, "tissue_lowres_scalef": 0.1, "spot_diameter_fullres": 32.0}


def ramps(width, height):
    """Asymmetric: red grows by 0.5 per pixel to the right, green by 0.5 downwards, blue is 100."""
    y, x = np.indices((height, width))
    return Image.fromarray(np.stack([x / 2, y / 2, np.full_like(x, 100)], -1).astype(np.uint8))


def grid_lines(places, in_tissue=1):
    """Positions of (array_row, array_col) on a staggered array, array (0, 0) at x 60, y 60."""
    lines = []
    for row, col in places:
        y, x = 60 + row * PITCH_PX * np.sqrt(3) / 2, 60 + col * PITCH_PX / 2
        lines.append(f"S{row}x{col}-1,{in_tissue},{row},{col},{y},{x}")
    return lines


INSIDE = [(0, 0), (0, 2), (1, 1), (1, 3), (2, 4), (3, 5)]


def write_slice(data):
    """One slice of six spots and one position without tissue, with its full-resolution and hires images."""
    spatial = write_spatial(data / "slice", [*grid_lines(INSIDE), *grid_lines([(2, 0)], in_tissue=0)], scales=SCALES)
    ramps(*SIZE).save(data / "slice" / "he.png")
    ramps(*SIZE).resize((200, 150)).save(spatial / "tissue_hires_image.png")
    return data


def speckled(rng):
    """Squares of 10 px in the colours of stained tissue."""
    squares = rng.integers((150, 60, 110), (240, 140, 200), (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize(SIZE, Image.Resampling.NEAREST)


def put_image(data, image):
    """Another full-resolution image, and the hires image made of it."""
    image.save(data / "slice" / "he.png")
    image.resize((200, 150)).save(data / "slice" / "spatial" / "tissue_hires_image.png")


def cut(data, *flags):
    """Run image_tilling.py; gives the folder of the tiles."""
    argv = ["--data", data, "--tiles", data.parent / "tiles", "--tile_px", 28, "--workers", 1, *flags]
    image_tilling.main(image_tilling.parse_args([str(flag) for flag in argv]))
    return data.parent / "tiles" / "slice"


def pixels(path):
    return np.asarray(Image.open(path)).astype(float)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def record(folder):
    return json.loads((folder / "tiles.json").read_text())
