"""Packages: all that are imported stand in requirements.txt or an extra, all that stand there are used."""

import ast
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# What nothing of ours imports: why it is asked for all the same
INDIRECT = {
    "torchvision": "timm imports it",
    "pyarrow": "pandas reads and writes tissue_positions.parquet by it",
    "openslide-bin": "the library behind openslide-python",
    "tensorboard": "torch.utils.tensorboard writes events by it",
    "ruff": "make lint",
    "mypy": "make types",
    "pandas-stubs": "make types",
    "types-tqdm": "make types",
    "pytest-timeout": "ends a test that hangs (pyproject.toml)",
    "pytest-randomly": "draws the order of the tests, and seeds each of them",
    "pytest-xdist": "make test runs the files of tests in two processes",
    "codespell": "make lint spells README, docs and code",
}
BROUGHT = {"httpx2": "huggingface_hub, whose own errors a test raises"}  # by what is asked for, for tests alone
OPTIONAL = {"triton": "comes with torch for CUDA; without it FAVOR+ runs in chunks"}
SHIPPED = ("model", "utils", "benchmarks")


def name_of(line: str) -> str:
    return canonicalize_name(Requirement(line).name)


def asked_for(*extras: str) -> set[str]:
    """Names in requirements.txt and in these extras."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {name_of(line) for line in (*filter(None, lines), *(line for extra in extras for line in optional[extra]))}


def extras() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def imported(files) -> dict[str, str]:
    """Top names of the packages that files import, inside functions too, each with one of the files; none of ours."""
    ours = {path.stem for path in (*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py"))} | {*SHIPPED, "tests"}
    found: dict[str, str] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (name.partition(".")[0] for name in names):
                if top not in sys.stdlib_module_names and top not in ours:
                    found.setdefault(top, path.relative_to(ROOT).as_posix())
    return found


def shipped_files() -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py"))]


def files_of_tests() -> list[Path]:
    return list((ROOT / "tests").rglob("*.py"))


@cache
def distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def distributions_of(top: str) -> set[str]:
    """What gives a package, by name; several for those that are shared, such as mpl_toolkits."""
    return {canonicalize_name(name) for name in distributions().get(top, [])}


@pytest.mark.parametrize("kind", ["shipped", "tests"])
def test_every_import_is_asked_for(kind):
    files, brought = (shipped_files(), OPTIONAL) if kind == "shipped" else (files_of_tests(), BROUGHT | OPTIONAL)
    allowed = asked_for(*(extra for extra in extras() if kind == "tests" or extra != "test"))
    lacking = {top: path for top, path in imported(files).items() if not distributions_of(top) & allowed}
    assert lacking.keys() == brought.keys(), lacking


def test_everything_asked_for_is_imported_or_has_a_reason():
    used = {name for top in imported([*shipped_files(), *files_of_tests()]) for name in distributions_of(top)}
    wanted = asked_for(*extras())
    assert not wanted - used - INDIRECT.keys(), "neither imported nor listed with a reason"
    assert INDIRECT.keys() <= wanted, "listed with a reason, but not asked for"
    assert not INDIRECT.keys() & {name for top in imported(shipped_files()) for name in distributions_of(top)}


def test_an_import_that_nothing_asks_for_is_found():
    """packaging is in most environments, brought by others: were it not asked for, the doctor would lean on that."""
    assert "packaging" in imported([ROOT / "utils" / "doctor" / "environment.py"])
    assert not distributions_of("packaging") & (asked_for() - {"packaging"})


def test_every_script_package_and_page_is_installed():
    """`pip install -e .` makes them importable anywhere; an import of a script that is not listed fails."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    files = [path for name in ("model", "utils") for path in (ROOT / name).rglob("*") if path.is_file()]
    assert {path.parent for path in files if path.suffix == ".py"} == {
        path.parent for path in files if path.name == "__init__.py"
    }
    data = {
        ROOT / package.replace(".", "/") / pattern
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
    }
    others = {path.parent / f"*{path.suffix}" for path in files if path.suffix not in (".py", ".pyc")}
    assert others == data
