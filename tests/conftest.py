"""Fixtures that several test files share: tiny simulated slices, runs on them, and the real sections if at hand."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other stall a busy machine
os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])  # scanpy's numba sets torch's threads, too

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from tiny_runs import EVALUATION, ONE_EPOCH, Work, snapshot, stderr_line

settings.register_profile("default", deadline=None, max_examples=40)
settings.register_profile("torture", deadline=None, max_examples=2000)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def same_start():
    """torch draws alike whatever ran before; random and NumPy are seeded by pytest-randomly where it is installed. What
    a test leaves of accelerate, which keeps the first precision of a process, is forgotten after it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """In which order a run failed, which -q does not say."""
    seed = getattr(config.option, "randomly_seed", None)
    if exitstatus and seed is not None:
        terminalreporter.write_line(f"the same order again: pytest --randomly-seed={seed}")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that MAGIC_REAL_DATA names; tests of real data are skipped without it."""
    folder = os.environ.get("MAGIC_REAL_DATA")
    if not folder:
        pytest.skip("MAGIC_REAL_DATA is not set: no real sections at hand")
    return Path(folder)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Path:
    """Three simulated patients of 70 spots and 60 genes: train, val, test. Read-only: copy before changing."""
    from utils.simulation.slices import write_slices

    out = tmp_path_factory.mktemp("simulated") / "data"
    write_slices(out, n_patients=3, n_spots=70, n_genes=60, seed=1)
    return out


@pytest.fixture(scope="session")
def prepared(simulated, tmp_path_factory):
    """Tiles of 32 px and panels (50 input, 20 target genes) of the simulated slices. Read-only, too."""
    out = tmp_path_factory.mktemp("prepared")
    work = Work(simulated, out / "tiles", out / "panels", out)
    work.run("image_tilling")
    work.run("make_decoder_data")
    return work


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory):
    """Both stages trained for an epoch on the prepared slices, with the smallest models. Read-only."""
    work = Work(prepared.data, prepared.tiles, prepared.panels, tmp_path_factory.mktemp("trained"))
    work.run("train_mymodel", "--Epoch", 1, "--Init_lr", 1e-3)
    work.run("train_decoder", "--Epoch", 1, "--Init_lr", 1e-3)
    return work


@pytest.fixture(scope="session")
def evaluated(trained):
    """The trained models with their evaluations of the test slice, below out/results. Read-only."""
    for script in EVALUATION:
        trained.run(script)
    return trained


@pytest.fixture
def work(prepared, tmp_path):
    """The prepared slices with tiles and panels of their own, which a test may change."""
    for folder in ("tiles", "panels"):
        shutil.copytree(getattr(prepared, folder), tmp_path / folder)
    return Work(prepared.data, tmp_path / "tiles", tmp_path / "panels", tmp_path)


@pytest.fixture
def damaged(trained, tmp_path):
    """All that the six scripts read and wrote, but for images that they can do without: for a test to damage."""
    own = Work(*(tmp_path / name for name in ("data", "tiles", "panels", "out")))
    for name in ("data", "tiles", "panels"):
        unread = shutil.ignore_patterns("*.png", "*.jpeg", "truth.h5ad")
        shutil.copytree(getattr(trained, name), getattr(own, name), ignore=unread)
    for name in ("encoder_model", "decoder_model"):
        shutil.copytree(trained.out / name, own.out / name)
    return own


@pytest.fixture
def refused(damaged, evaluated, capsys):
    """`refused(script, flags, *what its line must hold)` runs a script on what a test has damaged.

    The control is `evaluated`: all six scripts ran on the undamaged folders.
    """

    def run(script, flags, *expected):
        before = snapshot(damaged.data, damaged.tiles, damaged.panels, damaged.out)
        capsys.readouterr()
        assert damaged.exit_code(script, *ONE_EPOCH.get(script, ()), *flags) == 2
        line = stderr_line(capsys, *expected)
        after = snapshot(damaged.data, damaged.tiles, damaged.panels, damaged.out)
        assert after == before, (
            f"changed: {sorted(path for path in {*after, *before} if after.get(path) != before.get(path))}"
        )
        return line

    return run


@pytest.fixture(scope="session")
def scbert_tensors():
    """Tensors of scBERT's released file, values drawn. Read-only."""
    from plain_scbert import released_tensors

    return released_tensors()


@pytest.fixture(scope="session")
def scbert_files(scbert_tensors, tmp_path_factory) -> Path:
    """A folder with the released file and its vocabulary. Read-only."""
    from plain_scbert import write_released, write_vocabulary

    folder = tmp_path_factory.mktemp("scbert")
    write_released(folder / "panglao_pretrain.pth", scbert_tensors)
    write_vocabulary(folder / "genes.tsv")
    return folder
