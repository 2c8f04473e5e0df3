"""Imports point one way: scripts -> model -> utils (docs: the layout of the code). Read from the sources, not run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
OURS = {"model", "utils", "tests", "benchmarks"}
# What a file may import of ours, by the longest beginning of its own dotted name; a script has none of these.
ALLOWED = {
    "model.layers": (),
    "model.losses": (),
    "model": ("model", "utils.training.distributed"),
    "utils.files": ("utils.files",),
    "utils.images": ("utils.images", "utils.files"),
    "utils.genes": ("utils.genes", "utils.files"),
    "utils.slices": ("utils.slices", "utils.genes", "utils.images", "utils.files"),
    "utils.importers": ("utils.importers", "utils.slices", "utils.genes", "utils.images", "utils.files"),
    "utils.evaluation": ("utils.evaluation", "utils.files"),
    "utils.training": ("utils.training", "utils.slices", "utils.genes", "utils.images", "utils.files"),
    "utils": ("utils",),
}
A_SCRIPT = ("model", "utils")


def dotted_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(path: str, source: str) -> list[tuple[int, str]]:
    """Line and full dotted name of everything that a source imports, inside functions too."""
    package = dotted_name(path).split(".")
    package = package if path.endswith("__init__.py") else package[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, node.module] if node.module else base
            found += [(node.lineno, ".".join([*module, alias.name])) for alias in node.names]
    return found


def is_under(name: str, beginnings) -> bool:
    return any(name == start or name.startswith(start + ".") for start in beginnings)


def departures(path: str, source: str) -> list[str]:
    """One line per import that the rule forbids to the file at `path` (relative to the root)."""
    own = dotted_name(path)
    kind = max((start for start in ALLOWED if is_under(own, [start])), key=len, default=None)
    allowed = A_SCRIPT if kind is None else ALLOWED[kind]
    return [
        f"{path}:{line} imports {name}"
        for line, name in imported(path, source)
        if is_under(name, OURS.union(SCRIPTS)) and not is_under(name, allowed)
    ]


def our_files() -> list[str]:
    paths = [*ROOT.glob("*.py"), *(ROOT / "model").rglob("*.py"), *(ROOT / "utils").rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def test_all_kinds_of_files_are_read():
    files = our_files()
    for known in ("train_mymodel.py", "model/layers.py", "model/losses.py", "utils/__init__.py"):
        assert known in files
    for wing in ("slices", "training", "evaluation"):
        assert sum(file.startswith(f"utils/{wing}/") for file in files) > 3


@pytest.mark.parametrize("path", our_files())
def test_imports_point_one_way(path):
    assert departures(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("utils/training/loop.py", "from model.stage_one import StageOne"),
        ("utils/doctor.py", "import model"),
        ("utils/slices/visium.py", "def f():\n    from model import losses"),
        ("model/fusion.py", "from utils.training import loop"),
        ("model/fusion.py", "from utils.training import distributed, loop"),
        ("model/fusion.py", "from utils import training"),
        ("model/fusion.py", "import utils.images.tiles as tiles"),
        ("utils/files/atomic.py", "from utils.images import tiles"),
        ("utils/images/tiles.py", "from utils.slices import visium"),
        ("utils/genes/panels.py", "from utils.slices import visium"),
        ("utils/slices/visium.py", "from utils.importers import base"),
        ("utils/training/loop.py", "from utils.prediction import layout"),
        ("model/fusion.py", "from ..utils.evaluation import metrics"),
        ("model/fusion.py", "from utils.training.distributed_more import x"),
        ("model/layers.py", "from model import losses"),
        ("model/layers.py", "from . import losses"),
        ("model/losses.py", "from utils.training import distributed"),
        ("model/decoder.py", "import train_decoder"),
        ("utils/training/loop.py", "from utils.evaluation import metrics"),
        ("utils/training/loop.py", "from ..evaluation.metrics import pearson_per_gene"),
        ("utils/training/__init__.py", "from ..evaluation import metrics"),
        ("utils/training/loop.py", "if TYPE_CHECKING:\n    from utils.evaluation import metrics"),
        ("utils/slices/visium.py", "from utils.training import checkpoint"),
        ("utils/slices/visium.py", "from utils.evaluation.metrics import to_scale"),
        ("utils/slices/visium.py", "from utils import training"),
        ("utils/evaluation/report.py", "from utils.slices import visium"),
        ("utils/evaluation/report.py", "import utils.training.loop"),
        ("utils/evaluation/report.py", "import get_accuracy_image"),
        ("train_decoder.py", "from train_mymodel import build_model"),
        ("train_decoder.py", "def main(args):\n    import train_mymodel"),
        ("train_decoder.py", "from tests import spaceranger_folders"),
    ],
)
def test_a_forbidden_import_is_found(path, source):
    assert len(departures(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "train_mymodel.py",
            "from model import losses\nfrom utils.training import loop\nimport torch, utils.slices.splits",
        ),
        ("model/fusion.py", "from model.layers import CrossBlock\nfrom . import losses"),
        ("model/contrastive.py", "from utils.training import distributed"),
        ("model/contrastive.py", "from utils.training.distributed import gather"),
        ("model/layers.py", "import torch.nn.functional as F\nfrom torch import nn"),
        (
            "utils/training/datasets.py",
            "from utils.slices import visium\nfrom . import augment\nfrom utils.images.tiles import x",
        ),
        ("utils/evaluation/report.py", "from utils.evaluation import metrics\nimport modelling\nfrom utilsx import a"),
        ("utils/doctor.py", "from utils.slices import visium\nfrom utils.evaluation import metrics"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert departures(path, source) == []
