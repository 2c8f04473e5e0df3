"""The size of a pixel as a picture's own file states it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from PIL import Image

from utils.images.image import open_slide

UM_PER_INCH = 25400.0
LEAST_DPI = 1000.0  # 72 or 300 dots per inch is what a program wrote that knew nothing of the microscope
DOTS = (".jpg", ".jpeg", ".png")


def stated_um_per_px(path: Path) -> float | None:
    """Size of a pixel in um; None where the file does not state it, or not credibly.

    TIFF and whole-slide files: OME-XML, the scanner's properties, resolution tags; other pictures: dots per inch.
    """
    if path.suffix.lower() not in DOTS:
        with suppress(ValueError), open_slide(path, huge=True) as slide:  # one it cannot open may still be a picture
            return slide.metadata_um_per_px
        return None
    with Image.open(path) as picture:
        dpi = float(picture.info.get("dpi", (0, 0))[0])
    return UM_PER_INCH / dpi if dpi > LEAST_DPI else None
