"""What the tags of a TIFF page state: names, depth, size of a pixel. `key` is a tifffile.TiffPage."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from utils.images.units import RESOLUTION_UM

ORIENTATION, PAGE_NAME, MAX_SAMPLE_VALUE, RESOLUTION_UNIT = 274, 285, 281, 296
ASIDE = (  # what is never the scan: SlideLabel, label_image, macroimage, Thumbnail1, but not label-free, macrophages
    r"((label|macro|thumbnail|thumb|overview|preview|barcode)s?(image|img|pic|image)?(?![a-z]|-free)"
    r"|(?<![a-z])(map|lbl)(?![a-z]))"
)
ONLY_ASIDE = rf"\W*(slide|the)?[\W_]*{ASIDE}[\W_]*(image)?[\W_]*\d*\W*"  # nothing but such a name


def page_name(key: Any) -> str:
    """The tag PageName, empty where there is none."""
    value = key.tags.valueof(PAGE_NAME, "")
    return value if isinstance(value, str) else ""


def titles(key: Any, name: str) -> tuple[str, ...]:
    """What an image is called by its name, its page's name and its descriptions."""
    texts = [name, page_name(key)]
    for text in (key.description, key.description1):
        texts += _description_names(text or "")
    return tuple(dict.fromkeys(text for text in texts if text))


def _description_names(text: str) -> Iterator[str]:
    """What a description calls its image: a name in JSON or XML, short text, lines that begin with such a word."""
    if text.startswith("{"):
        try:
            content = json.loads(text)
        except ValueError:
            return
        yield from (str(value) for key, value in content.items() if key.lower() in ("name", "title"))
    elif text.lstrip().startswith("<"):
        yield from re.findall(r"<ImageType>([^<]*)</ImageType>", text)
    elif len(text) <= 60 and "=" not in text:
        yield text
    else:
        yield from (found[0] for found in re.finditer(rf"^\W*{ASIDE}", text, re.IGNORECASE | re.MULTILINE))


def max_sample_depth(key: Any) -> tuple[int, str] | None:
    largest = key.tags.valueof(MAX_SAMPLE_VALUE)
    if isinstance(largest, tuple):  # a value per sample, the opacity's last
        largest = max(largest[:3] if len(largest) > 2 else largest[:1], default=None)
    return (largest.bit_length(), "MaxSampleValue") if isinstance(largest, int) and largest > 0 else None


def tag_um_per_px(key: Any) -> float | None:
    unit = key.tags.valueof(RESOLUTION_UNIT, 2)
    return per_pixel(key, RESOLUTION_UM[unit]) if unit in RESOLUTION_UM else None


def per_pixel(key: Any, unit_um: float) -> float | None:
    """Micrometres per pixel by the tags XResolution and YResolution, pixels per unit."""
    per_unit = key.get_resolution()
    return unit_um / math.sqrt(per_unit[0] * per_unit[1]) if min(per_unit) > 0 else None
