"""What the tags of a TIFF page state: names, depth, size of a pixel. `key` is a tifffile.TiffPage."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from utils.images.units import RESOLUTION_UM

ORIENTATION, PAGE_NAME, MAX_SAMPLE_VALUE, RESOLUTION_UNIT = 274, 285, 281, 296
ASIDE = (  # what is never the scan: SlideLabel, label_image, macroimage, Thumbnail1, but not label-free, macrophages
    r"((label|ma[ck]ro|thumbnail|thumb|overview|preview|barcode)s?(image|img|pic|bild)?(?![a-z]|-free)"
    r"|(?<![a-z])(map|lbl)(?![a-z])"
    r"|(?<![a-z])(navigation|localizer|etikett|[uü]e?bersicht|vorschau|miniatur|[ée]tiquette|aper[çc]u|etiqueta"
    r"|etichetta)(s?(bild|karte|image))?(?![a-z])"
    r"|标签|缩略图|概览|ラベル|サムネイル)"
)
KINDS = ("name", "title", "type", "kind", "role", "imagetype")
# "Image type: label", of a line or between bars, with nothing behind the word
STATED = rf"(?:^|[|;])\W*(?:image[ _]?)?(?:name|type|kind|role)\W{{1,5}}({ASIDE})\W*?(?:$|[|;])"
OF_ROOT = (
    r"\A\s*(?:<\?[^>]*>\s*)?<\w+\b[^>]*?\b(?:image)?(?:type|kind|role)\s*=\s*[\"']([^\"']*)"  # <Image type="label">
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
    """What a description calls its image: a name in JSON, short text, lines that begin with such a word, its kind."""
    if text.startswith("{"):
        with suppress(ValueError):
            yield from (str(value) for key, value in json.loads(text).items() if key.lower() in KINDS)
    elif text.lstrip().startswith("<"):  # OME-XML describes all images of its file
        if "<OME" not in text:
            kinds = re.finditer(rf"<ImageType>([^<]*)</ImageType>|{OF_ROOT}", text, re.IGNORECASE)
            yield from (kind[1] or kind[2] or "" for kind in kinds)
    elif len(text) <= 60 and "=" not in text:
        yield text
    else:
        lines = re.IGNORECASE | re.MULTILINE
        yield from (found[0] for found in re.finditer(rf"^\W*{ASIDE}", text, lines))
        yield from (found[1] for found in re.finditer(STATED, text, lines))


def max_sample_depth(key: Any) -> tuple[int, str] | None:
    largest = key.tags.valueof(MAX_SAMPLE_VALUE)
    if isinstance(largest, tuple):  # a value per sample, the opacity's last
        largest = max(largest[:3] if len(largest) > 2 else largest[:1], default=None)
    if not isinstance(largest, int) or largest < 1:
        return None
    return max(1, (largest - 1).bit_length()), "MaxSampleValue"  # 4,095, and 4,096 as some write it, are of 12 bits


def tag_um_per_px(key: Any) -> float | None:
    unit = key.tags.valueof(RESOLUTION_UNIT, 2)
    return per_pixel(key, RESOLUTION_UM[unit]) if unit in RESOLUTION_UM else None


def per_pixel(key: Any, unit_um: float) -> float | None:
    """Micrometres per pixel by the tags XResolution and YResolution, pixels per unit."""
    per_unit = key.get_resolution()
    return unit_um / math.sqrt(per_unit[0] * per_unit[1]) if min(per_unit) > 0 else None
