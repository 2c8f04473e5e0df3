"""No code forks a process that may have threads: the child may wait for ever for a lock that one of them held.

Processes are started by spawn or forkserver, or as commands. Read from the sources, not run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("model", "utils", "benchmarks", "tests")


def keywords(call: ast.Call) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def is_fork(call: ast.Call) -> bool:
    """os.fork, a context of forks (or the default one), or what starts processes without naming a context."""
    name, given = ast.unparse(call.func), keywords(call)
    last = name.rpartition(".")[2]
    if last in ("get_context", "set_start_method"):
        method = call.args[0] if call.args else given.get("method", ast.Constant("fork"))
        return isinstance(method, ast.Constant) and method.value in ("fork", None)
    if last == "ProcessPoolExecutor":
        return "mp_context" not in given
    if last == "DataLoader":
        workers = given.get("num_workers", ast.Constant(0))
        alone = isinstance(workers, ast.Constant) and workers.value == 0
        return not alone and "multiprocessing_context" not in given
    return last in ("fork", "forkpty") or name in ("multiprocessing.Pool", "multiprocessing.Process", "Pool", "Process")


def forks(source: str) -> list[int]:
    """Lines of the calls that fork."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and is_fork(node)]


def test_nothing_forks():
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    assert [f"{path}:{line}" for path in files for line in forks(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "os.fork()",
        "multiprocessing.get_context('fork').Pool(2)",
        "multiprocessing.get_context()",
        "multiprocessing.set_start_method('fork')",
        "multiprocessing.Pool(2)",
        "from multiprocessing import Process\nProcess(target=f).start()",
        "ProcessPoolExecutor(3)",
        "DataLoader(data, num_workers=2)",
        "torch.utils.data.DataLoader(data, num_workers=workers)",
    ],
)
def test_a_fork_is_found(source):
    assert len(forks(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "multiprocessing.get_context('spawn').Pool(2)",
        "ProcessPoolExecutor(3, mp_context=get_context('forkserver'))",
        "DataLoader(data)",
        "DataLoader(data, num_workers=0)",
        "DataLoader(data, num_workers=2, multiprocessing_context=context)",
        "ThreadPoolExecutor(4)\nsubprocess.run(['ls'])",
    ],
)
def test_other_ways_pass(source):
    assert forks(source) == []
