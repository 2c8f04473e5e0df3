"""A cohort on a machine with little memory: batches are halved, and a slide that does not fit leaves the others."""

import re
import shutil

import numpy as np
import pytest
import torch
from slide_runs import exit_code, predict, read
from tiny_runs import stderr_line

from model.stage_two import StageTwo
from utils.prediction import predict as predicting


@pytest.fixture
def cohort(trained, tmp_path):
    """The test slice under three names."""
    for name in ("one", "two", "three"):
        shutil.copytree(trained.data / "P03_1", tmp_path / name)
    return [tmp_path / name for name in ("one", "two", "three")]


def test_batches_above_four_do_not_fit(cohort, trained, tmp_path, monkeypatch, capsys):
    whole = predict(cohort[0], trained.decoder, tmp_path / "whole")
    sizes = {"encode": set(), "predict": set()}

    def tight(name, n_rows):
        compute = getattr(StageTwo, name)

        def within(self, rows):
            sizes[name].add(n_rows(rows))
            if n_rows(rows) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return compute(self, rows)

        monkeypatch.setattr(StageTwo, name, within)

    tight("encode", len)
    tight("predict", lambda batch: len(batch["vector"]))
    out = predict(cohort, trained.decoder, tmp_path / "tight")
    assert all(4 in seen and max(seen) > 4 for seen in sizes.values())
    for slide in cohort:
        np.testing.assert_allclose(read(out / slide.name).X, read(whole).X, rtol=2e-3, atol=2e-3)
    assert "warning: two: out of memory by 8 spots at a time, going on by 4" in capsys.readouterr().out


def test_a_slide_that_does_not_fit_leaves_the_others(cohort, trained, tmp_path, monkeypatch, capsys):
    compute = predicting.predict_slide

    def tight(run, image, spots, out):
        if spots.name != "two":
            raise (
                MemoryError("Unable to allocate 30 GiB")
                if spots.name == "one"
                else RuntimeError("can't allocate memory")
            )
        return compute(run, image, spots, out)

    monkeypatch.setattr(predicting, "predict_slide", tight)
    assert exit_code(cohort, trained.decoder, tmp_path / "out") == 2
    line = stderr_line(capsys, "2 of 3 slides could not be predicted: one .*; three ")
    assert len(re.findall("found too little", line)) == 2 and "two (" not in line
    assert (tmp_path / "out" / "two" / "settings.json").exists() and read(tmp_path / "out" / "two").n_obs == 70
    assert not (tmp_path / "out" / "one").exists(), "nothing is left of one that failed"
