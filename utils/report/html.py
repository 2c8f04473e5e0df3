"""`report.html`: one file with maps, genes, retrieval examples and tables, which opens anywhere and loads nothing.

Shapes: S spots of a slice, G genes, (h, w) pixels of a small image, z side of a tile.

The page is page.html with page.css and the scripts {page,tables,maps}.js written into it, then
plotly.js from the Python package, and the data as blocks of text that the browser does not run: a JSON, and one block
per map, which is decoded a gene at a time. A policy in the head admits these very scripts and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.report.data import cell, colour_range, jpeg, numbers, quantise

LEAST_VAL_PCC = 0.1  # of a gene that is not greyed
IMAGE_PX, TILE_PX = 2000, 128  # longest side that is embedded
BITS = {"measured": 16, "predicted": 16, "spread": 8}  # 300 genes of 5,000 spots and plotly.js stay below 15 MB
PACKAGES = ("magic-st", "numpy", "torch", "timm", "anndata", "scanpy", "plotly")
_BLOCK = re.compile(r'<script type="(?:text/plain|application/json)" id="([a-z0-9-]+)">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class SliceMaps:
    """What is drawn of one slice.

    image : (h, w, 3) uint8 or None, the H&E; `image_scale` is its pixels per full-resolution pixel
    spot_diameter_px : in full-resolution pixels
    predicted, measured, spread : (S, G)
        In one unit; `spread` is the uncertainty of the prediction. NaN where it is not known.
    domain_score : (S,)
        Out-of-domain score of the image, about 1 for what the model was trained on.
    um_per_fullres_px : for the scale bar
    """

    name: str
    image: np.ndarray | None
    image_scale: float
    xy_fullres_px: np.ndarray
    spot_diameter_px: float
    barcodes: Sequence[str]
    predicted: np.ndarray
    measured: np.ndarray | None = None
    spread: np.ndarray | None = None
    domain_score: np.ndarray | None = None
    um_per_fullres_px: float | None = None


@dataclass(frozen=True)
class Table:
    """Metrics: None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    note: str = ""


@dataclass(frozen=True)
class RetrievalExample:
    """A image (z, z, 3) uint8 and profiles, best first: (tile at the profile's spot, label, score, is it its own)."""

    tile: np.ndarray
    title: str
    candidates: Sequence[tuple[np.ndarray | None, str, float, bool]]


@dataclass(frozen=True)
class Report:
    """All that stands on the page; what is empty leaves its section out.

    unit : of the maps, such as "Pearson residual"
    gene_columns : name -> (G,), further columns of the table of genes
    val_pcc : (G,) or None
        Genes below `LEAST_VAL_PCC`, or with NaN, are greyed.
    settings : shown as a list; versions of packages are added
    """

    title: str
    unit: str
    genes: Sequence[str]
    slices: Sequence[SliceMaps]
    gene_columns: dict[str, np.ndarray]
    val_pcc: np.ndarray | None = None
    tables: Sequence[Table] = ()
    examples: Sequence[RetrievalExample] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    examples_note: str = ""


def write_report(path: Path, report: Report) -> None:
    """Write the page to `<name>.part` and rename it. Raises ValueError where shapes do not fit together.

    A file holds plotly.js (4.8 MB), 5.3 bytes for each spot and gene that is measured and predicted, and the images.
    """
    _check(report)
    blocks: dict[str, str] = {}
    columns = dict(report.gene_columns)
    if report.val_pcc is not None:
        columns.setdefault("validation PCC", report.val_pcc)
    content = {
        "title": report.title,
        "unit": report.unit,
        "genes": [str(gene) for gene in report.genes],
        "weak": None if report.val_pcc is None else (~(np.asarray(report.val_pcc) >= LEAST_VAL_PCC)).tolist(),
        "columns": {name: numbers(values) for name, values in columns.items()},
        "slices": [_slice(one, i, blocks) for i, one in enumerate(report.slices)],
        "tables": [
            {
                "title": t.title,
                "columns": list(t.columns),
                "rows": [list(map(cell, r)) for r in t.rows],
                "note": t.note,
            }
            for t in report.tables
        ],
        "examples": [_example(one) for one in report.examples],
        "examplesNote": report.examples_note,
        "settings": {str(key): str(value) for key, value in report.settings.items()},
        "versions": _versions(),
    }
    _write_page(path, content, blocks)


def join_reports(path: Path, title: str, pages: dict[str, Path]) -> None:
    """One page of several that `write_report` wrote: name of the part -> file. At most one of them may have maps."""
    joined: dict[str, Any] = {}
    blocks: dict[str, str] = {}
    for name, page in pages.items():
        found = dict(_BLOCK.findall(page.read_text(encoding="utf-8")))
        if "report" not in found:
            raise ValueError(f"{page}: expected a page written by write_report, found another; make it again")
        content = json.loads(found.pop("report"))
        if content["slices"] and joined.get("slices"):
            raise ValueError(f"{page}: expected maps in one of the pages, found them in a second")
        content["settings"] = {f"{name}: {key}": value for key, value in content["settings"].items()}
        blocks |= found
        for key, value in content.items():
            if isinstance(value, dict):
                joined[key] = joined.get(key, {}) | value
            elif isinstance(value, list) and isinstance(joined.get(key, []), list):
                joined[key] = joined.get(key, []) + value
            else:
                joined[key] = value or joined.get(key)
    _write_page(path, joined | {"title": title}, blocks)


def _slice(one: SliceMaps, number: int, blocks: dict[str, str]) -> dict[str, Any]:
    """What JSON holds of a slice; its image and maps go to `blocks`."""
    maps = {kind: values for kind in BITS if (values := getattr(one, kind)) is not None}
    shared = colour_range([values for kind, values in maps.items() if kind != "spread"])
    found: dict[str, Any] = {
        "name": str(one.name),
        "x": np.round(one.xy_fullres_px[:, 0], 1).tolist(),
        "y": np.round(one.xy_fullres_px[:, 1], 1).tolist(),
        "diameter": float(one.spot_diameter_px),
        "umPerPx": one.um_per_fullres_px and float(one.um_per_fullres_px),
        "barcodes": [str(barcode) for barcode in one.barcodes],
        "domain": None if one.domain_score is None else numbers(one.domain_score),
        "shared": {"low": shared[0], "high": shared[1]},
        "maps": {},
    }
    if one.image is not None:
        blocks[f"image-{number}"] = jpeg(one.image, IMAGE_PX)
        height, width = (side / one.image_scale for side in one.image.shape[:2])
        found["image"] = {"block": f"image-{number}", "width": width, "height": height}
    for kind, values in maps.items():
        block = f"{kind}-{number}"
        blocks[block], low, high = quantise(np.asarray(values), BITS[kind])
        own = dict(zip(("low", "high"), colour_range([values]), strict=True))
        found["maps"][kind] = {"block": block, "bits": BITS[kind], "low": low, "high": high, "own": own}
    return found


def _example(one: RetrievalExample) -> dict[str, Any]:
    candidates = [
        {
            "tile": None if tile is None else jpeg(tile, TILE_PX),
            "label": str(label),
            "score": cell(score),
            "own": bool(own),
        }
        for tile, label, score, own in one.candidates
    ]
    return {"tile": jpeg(one.tile, 2 * TILE_PX), "title": one.title, "candidates": candidates}


def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata

    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # torch is not needed to draw
            continue
    return found


def _check(report: Report) -> None:
    n_genes = len(report.genes)
    per_gene = report.gene_columns | ({} if report.val_pcc is None else {"val_pcc": report.val_pcc})
    for name, values in per_gene.items():
        if np.shape(values) != (n_genes,):
            raise ValueError(f"report: {name}: expected a value for each of {n_genes} genes, found {np.shape(values)}")
    for one in report.slices:
        n_spots = len(one.barcodes)
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(BITS, (n_spots, n_genes))
        expected |= {"xy_fullres_px": (n_spots, 2), "domain_score": (n_spots,)}
        for kind, shape in expected.items():
            values = getattr(one, kind)
            if values is not None and np.shape(values) != shape:
                raise ValueError(f"report: slice {one.name}: {kind}: expected {shape}, found {np.shape(values)}")


def _write_page(path: Path, content: dict[str, Any], blocks: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(_page(content, blocks)), encoding="utf-8", newline="\n")
    part.replace(path)


def _page(content: dict[str, Any], blocks: dict[str, str]) -> Iterator[str]:
    """The text of the page, piece by piece: the template's marks are replaced once, never inside what was put in."""
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    template, style = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css"))
    own = {part: (here / f"{part.lower()}.js").read_text(encoding="utf-8") for part in ("PAGE", "TABLES", "MAPS")}
    scripts = own | {"PLOTLY": get_plotlyjs()}
    # "<" never occurs in a block, so that no name can end it or begin an element
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    held = {name: f'<script type="text/plain" id="{name}">{text}</script>\n' for name, text in blocks.items()}
    put = {name: f"<script>{text}</script>" for name, text in scripts.items()} | {
        "TITLE": html.escape(content["title"]),
        "STYLE": style,
        "ADMITTED": " ".join(_hash(text) for text in scripts.values()),
        "DATA": f'<script type="application/json" id="report">{data}</script>\n' + "".join(held.values()),
    }
    for i, piece in enumerate(re.split(r"\{\{([A-Z]+)\}\}", template)):
        yield put[piece] if i % 2 else piece


def _hash(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"
