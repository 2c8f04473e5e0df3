"""utils.training.cross_validation: whose spots fit and whose are predicted, genes with and without signal."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decoder_initialisation import GENES, WIDTH, Bank

from model.decoder import GeneDecoder
from utils.features.dataset import SliceData
from utils.training import cross_validation, targets


@dataclass(frozen=True)
class Sizes:
    landmarks: int


PATIENTS = ("A", "B", "C", "V")  # the last one validates


def slice_of(patient, counts):
    n = len(counts)
    panel = SimpleNamespace(genes=[f"g{i}" for i in range(GENES)], measured=np.ones(GENES, bool))
    panel.read_counts = lambda: counts
    part = np.full(n, "val" if patient == "V" else "train")
    places = (np.arange(n).astype(str), np.zeros((n, 2)), 1.0)
    rest = {"pack": None, "tile_rows": np.arange(n), "panels": {"target": panel}, "root": None}
    return SliceData(patient, patient, *places, part, counts.sum(1) + 50_000, **rest)


@pytest.fixture
def made(rng):
    """Slices of 40 spots, the first four genes follow the features, the others nothing; and their features."""
    seen = rng.normal(size=(160, 1, WIDTH)).astype(np.float32)
    rate = np.exp(0.8 * seen[:, 0, :1] * (np.arange(GENES) < 4))
    counts = rng.poisson(20 * rate)
    slices = [slice_of(name, counts[40 * i : 40 * i + 40]) for i, name in enumerate(PATIENTS)]
    bank = Bank([SimpleNamespace(n_spots=40) for _ in PATIENTS], seen)
    bank.device = torch.device("cpu")
    return slices, bank


def test_the_spots_of_the_patient_are_set_apart_and_only_they(made):
    fold = cross_validation.without(made[0], "B")
    assert [set(slice_.part) for slice_ in fold] == [{"train"}, {"left_out"}, {"train"}, {"val"}]
    strips = [slice_ for slice_ in made[0] if slice_.patient in "AB"]
    strips[1].part[:5] = "val"
    assert [set(s.part) for s in cross_validation.without(strips, "B")] == [{"train"}, {"left_out", "val"}]
    strips[0].part[:5] = "val"
    assert [set(s.part) for s in cross_validation.without(strips, "B")] == [{"train", "val"}, {"left_out", "gap"}]


def test_left_out_patients_are_predicted_where_there_is_something_to_predict(made, monkeypatch, capsys):
    slices, bank = made
    predicted = []

    class Refit(SimpleNamespace):
        def __init__(self, sizes):
            decoder = GeneDecoder(WIDTH, GENES, 1, 16, n_landmarks=sizes.landmarks)
            super().__init__(decoder=decoder.eval(), set_target_scale=lambda *_: None)
            self.to = self.eval = lambda *_: self

    def predict(model, spots):
        predicted.append(spots)
        return model.decoder.ridge(bank.seen[spots]).detach().numpy()

    monkeypatch.setattr(cross_validation, "StageTwo", Refit)
    model = SimpleNamespace(sizes=Sizes(120), target_mean=None, target_sd=None)
    target = np.concatenate([targets.residuals(slice_) for slice_ in slices])
    found = cross_validation.left_out_pcc(model, bank, slices, target, predict, 16, 0)
    assert [spots.tolist() for spots in predicted] == [list(range(40 * i, 40 * i + 40)) for i in range(3)]
    assert found.shape == (GENES,) and (found[:4] > 0.5).all() and (np.abs(found[4:]) < 0.3).all()
    assert capsys.readouterr().out.count("without ") == 3
