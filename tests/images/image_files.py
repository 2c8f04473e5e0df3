"""Files of every format that utils.images.image reads or refuses, written from one RGB array: all cases together."""

import layout_cases  # noqa: F401 (each module adds its cases)
import refused_cases  # noqa: F401
import sample_cases  # noqa: F401
import tiff_cases  # noqa: F401
from image_cases import CASES, HEIGHT, WIDTH, coded

__all__ = ["CASES", "HEIGHT", "WIDTH", "coded"]
