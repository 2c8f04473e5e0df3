"""Fixtures that several test files share: tiny simulated slices, and the real sections where they are at hand."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other stall a busy machine
os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])  # scanpy's numba sets torch's threads, too

from pathlib import Path

import numpy as np
import pytest


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
    from utils.slices.simulate import write_slices

    out = tmp_path_factory.mktemp("simulated") / "data"
    write_slices(out, n_patients=3, n_spots=70, n_genes=60, seed=1)
    return out


@pytest.fixture(scope="session")
def prepared(simulated, tmp_path_factory):
    """Tiles of 32 px and panels (50 input, 20 target genes) of the simulated slices. Read-only, too."""
    from tiny_runs import Work

    out = tmp_path_factory.mktemp("prepared")
    work = Work(simulated, out / "tiles", out / "panels", out)
    work.run("image_tilling")
    work.run("make_decoder_data")
    return work


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory):
    """Both stages trained for an epoch on the prepared slices, with the smallest models. Read-only."""
    from tiny_runs import Work

    work = Work(prepared.data, prepared.tiles, prepared.panels, tmp_path_factory.mktemp("trained"))
    work.run("train_mymodel", "--Epoch", 1, "--Init_lr", 1e-3)
    work.run("train_decoder", "--Epoch", 1, "--Init_lr", 1e-3)
    return work


@pytest.fixture
def work(prepared, tmp_path):
    """The prepared slices with tiles and panels of their own, which a test may change."""
    import shutil

    from tiny_runs import Work

    for folder in ("tiles", "panels"):
        shutil.copytree(getattr(prepared, folder), tmp_path / folder)
    return Work(prepared.data, tmp_path / "tiles", tmp_path / "panels", tmp_path)
