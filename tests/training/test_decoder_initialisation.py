"""Warm start of stage two: kernel ridge against a plain solution, landmarks, what is drawn and chosen."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.decoder import GeneDecoder
from utils.evaluation.ridge import validation_pcc
from utils.training import decoder_initialisation, initialisation

WIDTH, GENES, REACHES = 6, 8, 2


class Slice:
    """Spots of which the first `n_train` train and the others validate."""

    def __init__(self, n_train, n_val):
        self.parts = {"train": np.arange(n_train), "val": np.arange(n_train, n_train + n_val)}
        self.n_spots = n_train + n_val

    def rows_of(self, part):
        return self.parts[part]


class Bank:
    """What is seen of spots (S, P, D), given out by their numbers."""

    def __init__(self, slices, seen):
        self.first = np.cumsum([0, *(one.n_spots for one in slices)])
        self.seen = torch.from_numpy(seen)

    def spots_of(self, slices, part):
        return [start + slice_.rows_of(part) for slice_, start in zip(slices, self.first, strict=False)]

    def batch(self, spots):
        return {"vector": self.seen[spots, 0], "smoothed": self.seen[spots, 1:]}


def made(rng, linear=False, noise=0.3, n_parts=1 + REACHES):
    """Two slices, 45 and 40 train spots, 20 to validate on; genes follow a bent or linear map of the first parts."""
    slices = [Slice(45, 20), Slice(40, 0)]
    n_spots = sum(one.n_spots for one in slices)
    seen = rng.normal(size=(n_spots, 1 + REACHES, WIDTH)).astype(np.float32)
    hidden = seen[:, :n_parts].reshape(n_spots, -1) @ rng.normal(size=(n_parts * WIDTH, 3)) / 3
    target = (hidden if linear else hidden**2) @ rng.normal(size=(3, GENES))
    target += noise * rng.normal(size=target.shape)
    return slices, Bank(slices, seen), target, [target[45:65], target[:0]]


def solve(slices, bank, target, truth, n_landmarks=85):
    torch.manual_seed(0)
    model = SimpleNamespace(
        decoder=GeneDecoder(WIDTH, GENES, 1, 16, n_landmarks=n_landmarks, n_bandwidths=REACHES).eval()
    )
    said = decoder_initialisation.warm_start_decoder(model, bank, slices, target, truth, 7, 0)
    return model.decoder.ridge, said


def parts_seen(ridge):
    return int((ridge.scale > 0).sum())


@torch.no_grad()
def predicted(ridge, bank):
    return ridge(bank.seen).numpy()


def plain_kernel(seen, landmarks, sharpness, n_parts=1 + REACHES):
    """In double precision, part by part; the spot itself weighs twice."""
    total = np.zeros((len(seen), len(landmarks)))
    shares = np.array([2.0] + [1.0] * (n_parts - 1))
    for part, share in enumerate(shares / shares.sum()):
        apart = ((seen[:, None, part] - landmarks[None, :, part]) ** 2).sum(-1)
        total += share * apart / (2 * landmarks[:, part].var(0).sum())
    return np.exp(-sharpness * total)


@pytest.mark.parametrize("sharpness", [0.03, 1.0])
def test_the_start_is_the_kernel_ridge_of_a_plain_solution(rng, monkeypatch, sharpness):
    """With a landmark for every train spot: both sides centred, (K + penalty)^-1 solved as it stands, full rank."""
    monkeypatch.setattr(decoder_initialisation, "GAMMAS", (sharpness,))
    monkeypatch.setattr(decoder_initialisation, "PENALTIES", (0.2,))
    monkeypatch.setattr(decoder_initialisation.ridge, "RANKS", (None,))
    slices, bank, target, truth = made(rng)
    ridge, said = solve(slices, bank, target, truth)
    train = np.r_[0:45, 65:105]
    seen = bank.seen.numpy().astype(float)
    n_parts = parts_seen(ridge)
    kernel, everywhere = (plain_kernel(one, seen[train], sharpness, n_parts) for one in (seen[train], seen))
    centre = np.eye(85) - 1 / 85
    weights = np.linalg.solve(centre @ kernel @ centre + 0.2 * np.eye(85), target[train] - target[train].mean(0))
    expected = (everywhere - kernel.mean(0)) @ centre @ weights + target[train].mean(0)
    np.testing.assert_allclose(predicted(ridge, bank), expected, atol=2e-3)
    assert "penalty 0.2, full rank" in said


def test_the_score_that_is_told_is_that_of_the_model(rng):
    slices, bank, target, truth = made(rng)
    ridge, said = solve(slices, bank, target, truth)
    of_model = validation_pcc([predicted(ridge, bank)[45:65]], truth[:1])
    assert float(said.split()[-1]) == pytest.approx(of_model, abs=1e-4)


@pytest.mark.parametrize("linear", [True, False])
def test_a_curved_relation_needs_a_larger_gamma(rng, linear):
    ridge, _ = solve(*made(rng, linear, noise=0.01))
    assert (ridge.gamma.item() < 0.1) == linear


@pytest.mark.parametrize(("gain", "chosen"), [(0.011, 1.0), (0.009, 0.03), (0.0, 0.03)])
@pytest.mark.parametrize("linear", [0.4, -0.1])
def test_a_large_gamma_must_be_clearly_better(linear, gain, chosen):
    scores = [(linear - 0.2, 0.03), (linear, 0.03), (linear, 0.3), (linear + gain * abs(linear), 1.0)]
    found = [(SimpleNamespace(val_pcc=score), 1, sharpness, None) for score, sharpness in scores]
    best = decoder_initialisation.clearly_best(found)
    assert best[2] == chosen and best[0].val_pcc >= linear


@pytest.mark.parametrize("n_parts", [1, 2, 3])
def test_the_number_of_bandwidths_is_chosen_on_validation(rng, n_parts):
    ridge, said = solve(*made(rng, linear=True, n_parts=n_parts))
    assert parts_seen(ridge) == n_parts and ridge.scale[:n_parts].all()
    assert f"spot and {n_parts - 1} bandwidths around it" in said


def test_few_landmarks_come_near_to_all(rng):
    slices, bank, target, truth = made(rng)
    whole, most, few = (solve(slices, bank, target, truth, n)[0] for n in (85, 60, 5))
    expected = predicted(whole, bank)
    near, far = (np.corrcoef(predicted(one, bank).ravel(), expected.ravel())[0, 1] for one in (most, few))
    assert near > 0.9 > 0.8 > far


def test_a_gene_that_was_not_measured_stands_at_its_mean(rng):
    slices, bank, target, truth = made(rng)
    target[:, 3] = np.nan
    truth[0][:, 3] = np.nan
    ridge, _ = solve(slices, bank, target, truth)
    assert np.isfinite(predicted(ridge, bank)).all() and np.abs(predicted(ridge, bank)[:, 3]).max() < 1e-5


def test_the_same_fraction_of_each_slice_is_drawn(rng, monkeypatch):
    slices, bank, *_ = made(rng)
    monkeypatch.setattr(initialisation, "START_SPOTS", 17)
    first, second = decoder_initialisation.drawn(bank, slices, 0)
    assert (len(first), len(second)) == (9, 8) and first.max() < 45 and second.min() >= 65
    again, other = (decoder_initialisation.drawn(bank, slices, seed)[0].tolist() for seed in (0, 1))
    assert again == first.tolist() != other
    monkeypatch.undo()
    assert [one.tolist() for one in decoder_initialisation.drawn(bank, slices, 1)] == [[*range(45)], [*range(65, 105)]]


def test_axes_give_the_kernel_back(rng):
    points = rng.normal(size=(30, 4))
    kernel = plain_kernel(np.repeat(points[:, None], 1 + REACHES, 1), np.repeat(points[:, None], 1 + REACHES, 1), 1.0)
    placed = kernel @ decoder_initialisation.kernel_axes(kernel)
    np.testing.assert_allclose(placed @ placed.T, kernel, atol=1e-5)
