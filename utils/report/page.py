"""`report.html`: one file with maps, genes, retrieval examples and tables, which opens anywhere and loads nothing.

Shapes: S spots of a slice, G genes, (h, w) pixels of a small image, z side of a tile.

The page is the jinja2 template page.html, with page.css, the scripts {page,tables,maps,cards}.js, plotly.js from the
Python package, and the data as blocks of text that the browser does not run: a JSON, and one block per map, which is
decoded a gene at a time. A policy in the head admits these very scripts and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from utils.evaluation.metrics import PREDICTABLE_PCC, UNITS
from utils.files.atomic import plain, publishable, write_whole
from utils.report.explained import explanations
from utils.report.page_data import cell, colour_range, jpeg, numbers, quantise, shown
from utils.report.spots import SpotsOnImage

HERE = Path(__file__).parent
SCRIPTS = ("page", "tables", "maps", "cards")
IMAGE_PX, TILE_PX = 2000, 128  # longest side that is embedded
BITS = {"measured": 16, "predicted": 16, "prediction_std": 8}  # 5,000 spots of 300 genes and plotly.js: below 15 MB
PACKAGES = ("magic-st", "numpy", "torch", "timm", "anndata", "scanpy", "plotly")
_BLOCK = re.compile(r'<script type="(?:text/plain|application/json)" id="([a-z0-9_-]+)">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class SliceMaps(SpotsOnImage):
    """What is drawn of one slice.

    predicted, measured, prediction_std : (S, G)
        In one unit. NaN where it is not known.
    domain_score : (S,)
        Out-of-domain score of the image: above 1 a spot is unlike those that the model was trained on.
    """

    predicted: np.ndarray
    measured: np.ndarray | None = None
    prediction_std: np.ndarray | None = None
    domain_score: np.ndarray | None = None


@dataclass(frozen=True)
class Table:
    """Metrics: None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    note: str = ""


@dataclass(frozen=True)
class RetrievalExample:
    """An image (z, z, 3) uint8 and expression profiles, best first: tile of the profile's spot, label, score, and
    whether it is the image's own."""

    tile: np.ndarray
    title: str
    candidates: Sequence[tuple[np.ndarray | None, str, float, bool]]


@dataclass(frozen=True)
class Report:
    """All that the page shows; an empty part leaves its section out.

    unit : of the maps, such as "Pearson residuals"
    gene_columns : name -> (G,), further columns of the table of genes
    val_pcc : (G,) or None
        Genes below PREDICTABLE_PCC, or with NaN, are greyed.
    greys : whether they are: not where validation shares a patient with training
    banner : a warning that stands on top of the page
    settings : shown as a list, of absolute paths the last part; versions of packages are added
    """

    title: str
    unit: str = ""
    genes: Sequence[str] = ()
    slices: Sequence[SliceMaps] = ()
    gene_columns: dict[str, np.ndarray] = field(default_factory=dict)
    val_pcc: np.ndarray | None = None
    tables: Sequence[Table] = ()
    examples: Sequence[RetrievalExample] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    examples_note: str = ""
    greys: bool = True
    banner: str = ""


def write_report(path: Path, report: Report) -> None:
    """Write the page, whole or not at all. Raises ValueError where shapes do not fit together.

    A file holds plotly.js (4.8 MB), 5.3 bytes for each spot and gene that is measured and predicted, and the images.
    """
    _check_shapes(report)
    blocks: dict[str, str] = {}
    columns, greys = dict(report.gene_columns), report.greys and report.val_pcc is not None
    if report.val_pcc is not None:
        columns.setdefault("validation PCC", report.val_pcc)
    content = {
        "title": report.title,
        "unit": report.unit,
        "diverging": report.unit == UNITS["residuals"],
        "genes": [str(gene) for gene in report.genes],
        "leastPcc": PREDICTABLE_PCC,
        "weak": (~(np.asarray(report.val_pcc) >= PREDICTABLE_PCC)).tolist() if greys else None,
        "banner": report.banner or None,
        "columns": {name: numbers(values) for name, values in columns.items()},
        "slices": [_slice_content(slice_, i, blocks) for i, slice_ in enumerate(report.slices)],
        "geneNotes": explanations(columns),
        "tables": [vars(table) | {"rows": [list(map(cell, row)) for row in table.rows]} for table in report.tables],
        "tableNotes": explanations(word for table in report.tables for word in _words_of(table)),
        "examples": [_example_content(example) for example in report.examples],
        "examplesNote": report.examples_note,
        "settings": {str(key): _setting(value) for key, value in report.settings.items()},
        "versions": _versions(),
    }
    _render(path, content, blocks)


def join_reports(path: Path, title: str, pages: dict[str, Path]) -> None:
    """One page of several that `write_report` wrote: name of the part -> file. At most one of them may have maps."""
    joined: dict[str, Any] = {}
    blocks: dict[str, str] = {}
    for name, page in pages.items():
        page_blocks = dict(_BLOCK.findall(page.read_text(encoding="utf-8")))
        if "report" not in page_blocks:
            raise ValueError(f"{page}: expected a page written by write_report, found another; fix: make it again")
        content = json.loads(page_blocks.pop("report"))
        if content["slices"] and joined.get("slices"):
            raise ValueError(f"{page}: expected maps in one of the pages, found them in a second")
        content["settings"] = {f"{name}: {key}": value for key, value in content["settings"].items()}
        blocks |= page_blocks
        for key, value in content.items():
            if isinstance(value, dict):
                joined[key] = joined.get(key, {}) | value
            elif isinstance(value, list) and isinstance(joined.get(key, []), list):
                joined[key] = joined.get(key, []) + value
            else:
                joined[key] = value or joined.get(key)
    _render(path, joined | {"title": title}, blocks)


def _words_of(table: Table) -> list[str]:
    """Names of the columns and rows."""
    return [*table.columns, *(str(row[0]) for row in table.rows if row)]


def _setting(value: Any) -> str:
    """As the page lists it. A page is passed on: folders of the machine that made it stay out of it."""
    value = publishable(plain(value))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _slice_content(slice_: SliceMaps, number: int, blocks: dict[str, str]) -> dict[str, Any]:
    """What JSON holds of a slice; its image and maps go to `blocks`."""
    maps = {kind: np.asarray(values) for kind in BITS if (values := getattr(slice_, kind)) is not None}
    shared = colour_range([values for kind, values in maps.items() if kind != "prediction_std"])
    content: dict[str, Any] = {
        "name": str(slice_.name),
        "x": np.round(slice_.xy_fullres_px[:, 0], 1).tolist(),
        "y": np.round(slice_.xy_fullres_px[:, 1], 1).tolist(),
        "diameter": float(slice_.spot_diameter_px),
        "umPerPx": slice_.um_per_fullres_px and float(slice_.um_per_fullres_px),
        "barcodes": [str(barcode) for barcode in slice_.barcodes],
        "domain": None if slice_.domain_score is None else numbers(slice_.domain_score),
        "shared": {"low": shared[0], "high": shared[1]},
        "maps": {},
    }
    if slice_.image is not None:
        blocks[f"image-{number}"] = jpeg(slice_.image, IMAGE_PX)
        height, width = (side / slice_.image_scale for side in slice_.image.shape[:2])
        content["image"] = {"block": f"image-{number}", "width": width, "height": height}
    for kind, values in maps.items():
        block = f"{kind}-{number}"
        blocks[block], low, high = quantise(values, BITS[kind])
        own = dict(zip(("low", "high"), colour_range([values]), strict=True))
        content["maps"][kind] = {"block": block, "bits": BITS[kind], "low": low, "high": high, "own": own}
    return content


def _example_content(example: RetrievalExample) -> dict[str, Any]:
    candidates = [
        {
            "tile": None if tile is None else jpeg(tile, TILE_PX),
            "label": str(label),
            "score": cell(score),
            "own": bool(own),
        }
        for tile, label, score, own in example.candidates
    ]
    return {"tile": jpeg(example.tile, 2 * TILE_PX), "title": example.title, "candidates": candidates}


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # magic-st is rarely installed
            continue
    return versions


def _check_shapes(report: Report) -> None:
    n_genes = len(report.genes)
    per_gene = report.gene_columns | ({} if report.val_pcc is None else {"val_pcc": report.val_pcc})
    for name, values in per_gene.items():
        if np.shape(values) != (n_genes,):
            raise ValueError(f"report: {name}: expected a value for each of {n_genes} genes, found {np.shape(values)}")
    for slice_ in report.slices:
        n_spots = len(slice_.barcodes)
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(BITS, (n_spots, n_genes))
        expected |= {"xy_fullres_px": (n_spots, 2), "domain_score": (n_spots,)}
        for kind, shape in expected.items():
            values = getattr(slice_, kind)
            if values is not None and np.shape(values) != shape:
                raise ValueError(f"report: slice {slice_.name}: {kind}: expected {shape}, found {np.shape(values)}")


def _render(path: Path, content: dict[str, Any], blocks: dict[str, str]) -> None:
    """Fill the template. Whatever comes from data is escaped; JSON has no "<", so no name can end its block."""
    from jinja2 import Environment, FileSystemLoader
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["shown"] = shown
    page, tables, maps, cards = ((HERE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    scripts = [page, tables, get_plotlyjs(), maps, cards]
    text = environment.get_template("page.html").render(
        content=content,
        blocks=blocks,
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        admitted=[_policy_hash(script) for script in scripts],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def _policy_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
