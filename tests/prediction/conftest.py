"""Fixtures of the tests of predict_slide.py: the tiny model's test slice, and its prediction."""

import pytest
from slide_runs import predict
from tiny_runs import snapshot


@pytest.fixture(scope="session")
def section(trained):
    """The slice that the tiny model was not trained on, and its image."""
    return trained.data / "P03_1", trained.data / "P03_1" / "P03_1_he.jpg"


@pytest.fixture(scope="session")
def measured(trained, section, tmp_path_factory):
    """Results of a slice folder with counts. Read-only."""
    before = snapshot(section[0])
    out = predict(section[0], trained.decoder, tmp_path_factory.mktemp("measured") / "deep" / "out")
    assert snapshot(section[0]) == before
    return out
