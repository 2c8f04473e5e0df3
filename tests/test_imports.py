"""The direction of imports: a package may import those of its own layer and below, and no file itself in a circle.

Read from the sources, not run; imports inside functions and for type checking count.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
OURS = {"model", "utils", "tests", "benchmarks"} | SCRIPTS
# The top layer first. A module belongs to the layer with the longest beginning of its dotted name.
LAYERS = (
    ("utils.doctor",),
    ("utils.prediction", "utils.report", "utils.sharing"),
    ("utils.training", "utils.evaluation", "utils.simulation"),
    ("utils.features", "utils.importers"),
    ("model", "utils.images", "utils.genes", "utils.slices"),
    ("utils.files", "utils.distributed", "utils.memory", "utils.settings", "utils.arguments", "utils.words"),
)
# What is stricter than the layers: tensors in and tensors out, arrays in and numbers out, images without slices.
NARROWER = {
    "model": ("model", "utils.distributed", "utils.words"),
    "model.layers": (),
    "model.losses": (),
    "utils.evaluation": ("utils.evaluation", "utils.words"),
    "utils.images": ("utils.images", "utils.files", "utils.words"),
    "utils.genes": ("utils.genes", "utils.files", "utils.words"),
    "utils.simulation": (
        *(
            "utils.simulation",
            "utils.evaluation.metrics",
            "utils.files",
            "utils.slices",
            "utils.settings",
            "utils.arguments",
            "utils.words",
        ),
    ),
}


def dotted_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_under(name: str, beginnings) -> bool:
    return any(name == start or name.startswith(start + ".") for start in beginnings)


def imported(path: str, source: str) -> list[tuple[int, str]]:
    """Line and full dotted name of everything that a source imports."""
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


def longest(name: str, beginnings) -> str | None:
    return max((start for start in beginnings if is_under(name, [start])), key=len, default=None)


def allowed(name: str) -> tuple[str, ...]:
    """Beginnings of the names that a module may import; of a script (in no layer) all of model and utils."""
    narrow = longest(name, NARROWER)
    if narrow:
        return NARROWER[narrow]
    for i, layer in enumerate(LAYERS):
        if longest(name, layer):
            return tuple(start for lower in LAYERS[i:] for start in lower)
    return ("model", "utils")


def departures(path: str, source: str) -> list[str]:
    """One line per import that the rule forbids to the file at `path` (relative to the root)."""
    may = allowed(dotted_name(path))
    return [
        f"{path}:{line} imports {name}"
        for line, name in imported(path, source)
        if is_under(name, OURS) and not is_under(name, may)
    ]


def circle(sources: dict[str, str]) -> set[str]:
    """Files that import each other, straight or through others, one such set; `sources` by path."""
    files, graph = {dotted_name(path) for path in sources}, {}
    for path, source in sources.items():
        targets = {longest(name, files) for _, name in imported(path, source)}
        if not path.endswith("__init__.py"):
            graph[dotted_name(path)] = targets - {None, "model", "utils"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return set(error.args[1])
    return set()


def our_files() -> list[str]:
    paths = [*ROOT.glob("*.py"), *(ROOT / "model").rglob("*.py"), *(ROOT / "utils").rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def test_all_packages_are_read_and_have_a_layer():
    files = our_files()
    for known in ("train_mymodel.py", "model/layers.py", "model/losses.py", "utils/__init__.py"):
        assert known in files
    assert all(any(is_under(dotted_name(file), [start]) for file in files) for layer in LAYERS for start in layer)
    in_layers = [start for layer in LAYERS for start in layer]
    assert [file for file in files if "/" in file and not is_under(dotted_name(file), in_layers)] == [
        "utils/__init__.py"
    ]


@pytest.mark.parametrize("path", our_files())
def test_imports_point_one_way(path):
    assert departures(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_no_file_imports_itself_in_a_circle():
    assert circle({path: (ROOT / path).read_text(encoding="utf-8") for path in our_files()}) == set()


def test_a_circle_is_found():
    there = {"utils/a.py": "from utils import b", "utils/b.py": "def f():\n    from utils.a import x", "utils/c.py": ""}
    assert circle(there) == {"utils.a", "utils.b"}
    assert circle(there | {"utils/b.py": "from utils import c"}) == set()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/fusion.py", "from utils.training import loop"),
        ("model/fusion.py", "from utils import training"),
        ("model/fusion.py", "import utils.images.tiles as tiles"),
        ("model/fusion.py", "from ..utils.evaluation import metrics"),
        ("model/fusion.py", "from utils.distributed_more import x"),
        ("model/layers.py", "from . import losses"),
        ("model/losses.py", "from utils import distributed"),
        ("model/decoder.py", "import train_decoder"),
        ("utils/files/atomic.py", "from utils.images import tiles"),
        ("utils/settings.py", "from utils.training import checkpoint"),
        ("utils/images/tiles.py", "from utils.slices import visium"),
        ("utils/genes/panels.py", "from utils.slices import visium"),
        ("utils/slices/visium.py", "from utils.importers import base"),
        ("utils/slices/visium.py", "def f():\n    from utils.training import checkpoint"),
        ("utils/features/cache.py", "from utils.training import augment"),
        ("utils/training/loop.py", "from utils.prediction import layout"),
        ("utils/training/loop.py", "if TYPE_CHECKING:\n    from utils.report import tables"),
        ("utils/evaluation/metrics.py", "from utils.slices import visium"),
        ("utils/evaluation/metrics.py", "from utils.training.loop import x"),
        ("utils/report/tables.py", "import get_accuracy_image"),
        ("utils/sharing/hub.py", "from utils import doctor"),
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
        ("train_mymodel.py", "from model import losses\nfrom utils.training import loop\nimport torch, utils.slices"),
        ("model/fusion.py", "from model.layers import CrossBlock\nfrom . import losses"),
        ("model/contrastive.py", "from utils import distributed\nfrom utils.distributed import gather"),
        ("model/layers.py", "import torch.nn.functional as F\nfrom torch import nn"),
        ("utils/features/dataset.py", "from utils.slices import visium\nfrom . import cache\nimport model.decoder"),
        ("utils/training/loop.py", "from utils.evaluation import metrics\nimport modelling\nfrom utilsx import a"),
        ("utils/doctor/data.py", "from utils.slices import visium\nfrom utils.evaluation import metrics"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert departures(path, source) == []
