"""pretrain.py: what trains, what is held out, scores against slow references, and a run below the marginal."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import data_flags, row

from model.gene_encoder import GeneEncoder
from model.masked_bins import MaskedBins
from utils.features import dataset
from utils.genes.panels import HIGHEST_BIN
from utils.training import pretrain
from utils.training.count_tables import CountTable
from utils.training.pretrain import Spots

ACCELERATOR = SimpleNamespace(autocast=nullcontext, device=torch.device("cpu"))
GENES = 14


def settings(**changed):
    same = {"pretrain_epochs": 2, "pretrain_lr": 1e-2, "batch_size": 16, "seed": 0, "precision": "fp32"}
    stage_one = {"Init_lr": 1e-4, "Min_lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-2, "lr_decay_type": "cos"}
    return SimpleNamespace(**same | stage_one | changed)


def small(n_genes=GENES):
    torch.manual_seed(0)
    return MaskedBins(GeneEncoder(n_genes, 1, 16, heads=1, n_tokens=2, width=16))


def two_kinds(n, rng):
    """Spots of two kinds, in which genes go up together: (n, GENES)."""
    kind = rng.integers(2, size=(n, 1)) == np.arange(GENES) % 2
    noise = rng.random((n, GENES)) < 0.1
    return np.where(noise, rng.integers(0, 6, (n, GENES)), np.where(kind, 0, 3)).astype(np.uint8)


def a_slice(name, parts, measured=None):
    """What pretraining looks at of a slice."""
    measured = np.ones(GENES, bool) if measured is None else measured
    return SimpleNamespace(
        name=name,
        rows_of=lambda part: np.flatnonzero(np.array(parts) == part),
        panels={"input": SimpleNamespace(measured=measured)},
    )


@pytest.fixture
def planted(rng):
    """A train slice and one that is a validation strip, a gap, and train spots."""
    slices = [a_slice("A", ["train"] * 60), a_slice("B", ["val"] * 30 + ["gap"] * 10 + ["train"] * 20)]
    return slices, [two_kinds(60, rng), two_kinds(60, rng)]


# ---- the marginal and the scores


def test_each_spot_meets_the_marginal_of_the_other_spots(rng):
    bins = rng.integers(0, 6, size=(9, 4)).astype(np.uint8)
    found = pretrain.marginal_without_self(bins, pretrain.numbers_of_bins(bins))
    for spot in range(9):
        others = np.delete(bins, spot, axis=0)
        for gene in range(4):
            numbers = np.bincount(others[:, gene], minlength=HIGHEST_BIN + 1) + pretrain.SMOOTHING
            np.testing.assert_allclose(found[spot, gene], np.log(numbers / numbers.sum()), rtol=1e-6)


def test_cross_entropies_by_hand():
    log_p = np.log([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    every, expressed = pretrain.cross_entropies(log_p, np.array([0, 1, 2]))
    assert every == pytest.approx(-np.log([0.5, 0.25, 0.6]).sum())
    assert expressed == pytest.approx(-np.log([0.25 / 0.5, 0.6 / 0.8]).sum())


class Constant:
    """Gives each gene one distribution, and records what it is asked."""

    def __init__(self, log_p):
        self.log_p, self.asked = torch.from_numpy(log_p), []

    def eval(self):
        pass

    def log_probabilities(self, bins, places):
        self.asked.append((bins.numpy().copy(), places.numpy().copy()))
        return self.log_p.expand(len(bins), -1, -1)


def test_all_rounds_hide_each_measured_place_once(rng):
    measured = np.arange(GENES) != 4
    bins, rows = two_kinds(40, rng), np.arange(5, 38)
    model = Constant(pretrain.log_marginal(rng.integers(1, 9, size=(GENES, 6))))
    held_out = [Spots("A", bins, rows, measured)]
    found = pretrain.score(model, held_out, pretrain.ROUNDS, ACCELERATOR, settings())
    times = np.zeros(GENES)
    for _, places in model.asked:
        times += places.sum(0)
    np.testing.assert_array_equal(times, measured * len(rows))
    terms = np.array([[-model.log_p[g, bins[s, g]].item() for g in np.flatnonzero(measured)] for s in rows])
    assert found["model"] == pytest.approx(terms.mean(), rel=1e-5)
    zero = np.array([model.log_p[g, 0].item() for g in np.flatnonzero(measured)])
    expressed = bins[rows][:, measured] > 0
    given = (terms + np.log1p(-np.exp(zero)))[expressed].mean()
    assert found["model_expressed"] == pytest.approx(given, rel=1e-5)
    marginal = pretrain.marginal_without_self(bins[rows], pretrain.numbers_of_bins(bins[rows]))
    own = np.take_along_axis(marginal, bins[rows].astype(int)[..., None], axis=2)[..., 0]
    assert found["marginal"] == pytest.approx(-own[:, measured].mean(), rel=1e-5)


def test_the_same_places_are_asked_for_in_every_epoch_and_slices_count_alike(rng):
    held_out = [
        Spots(name, two_kinds(n, rng), np.arange(n), np.ones(GENES, bool)) for name, n in (("A", 40), ("B", 10))
    ]
    model = Constant(pretrain.log_marginal(np.ones((GENES, 6))))
    both = pretrain.score(model, held_out, 2, ACCELERATOR, settings())
    again = pretrain.score(model, held_out, 2, ACCELERATOR, settings())
    assert both == again
    half = len(model.asked) // 2
    for (_, one), (_, other) in zip(model.asked[:half], model.asked[half:], strict=True):
        np.testing.assert_array_equal(one, other)
    rng_of = [np.random.default_rng((0, i)) for i in range(2)]
    alone = [
        pretrain.score_slice(
            model, one, np.sort(own.choice(one.rows, len(one.rows), False)), 2, own, ACCELERATOR, settings()
        )
        for one, own in zip(held_out, rng_of, strict=True)
    ]
    assert both["marginal"] == pytest.approx(np.mean([one["marginal"] for one in alone]))


def test_many_held_out_spots_are_drawn_from(rng, monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT_SPOTS", 20)
    held_out = [Spots("A", two_kinds(60, rng), np.arange(60), np.ones(GENES, bool))]
    model = Constant(pretrain.log_marginal(np.ones((GENES, 6))))
    pretrain.score(model, held_out, 1, ACCELERATOR, settings())
    assert sum(len(bins) for bins, _ in model.asked) == 20


# ---- who teaches


def test_spots_are_gathered_from_slices_and_tables(rng):
    a, b = two_kinds(10, rng), two_kinds(8, rng)
    lacking = np.arange(GENES) > 3
    trained_on = [Spots("A", a, np.array([7, 2, 5]), np.ones(GENES, bool)), Spots("B", b, np.arange(8), lacking)]
    bins, measured = pretrain.batch_of(trained_on, np.array([3, 0, 10, 2]))
    np.testing.assert_array_equal(bins, np.stack([b[0], a[7], b[7], a[5]]))
    np.testing.assert_array_equal(measured, np.stack([lacking, ~lacking | lacking, lacking, ~lacking | lacking]))


def test_only_train_spots_and_tables_teach(planted, rng):
    slices, bins = planted
    bins[1][:40] = 5  # validation and gap: not one of them may be seen
    bins[0][bins[0] == 5], bins[1][40:][bins[1][40:] == 5] = 4, 4
    table = CountTable("T", np.full((20, GENES), 4, np.uint8), np.ones(GENES, bool), "hash")
    seen, masked = [], small()
    loss = masked.loss
    masked.loss = lambda own, *rest: (seen.append(own.clone()), loss(own, *rest))[1]
    pretrain.pretrain(masked, slices, bins, [table], ACCELERATOR, settings(pretrain_epochs=1))
    trained_on = torch.cat(seen)
    assert len(trained_on) == (60 + 20 + 20) // 16 * 16
    assert not (trained_on == 5).any()
    assert 10 <= (trained_on == 4).all(1).sum() <= 20


def test_genes_that_a_table_lacks_are_not_taught_as_zeros(planted, rng):
    slices, bins = planted
    measured = np.arange(GENES) > 5
    table = CountTable("T", np.zeros((200, GENES), np.uint8), measured, "hash")
    masked = small()
    pretrain.pretrain(masked, slices, bins, [table], ACCELERATOR, settings(pretrain_epochs=1, pretrain_lr=1e-12))
    with torch.no_grad():
        zero = masked.gene_bias.softmax(-1)[:, 0].numpy()
    of_train = (np.concatenate([bins[0], bins[1][40:]]) == 0).mean(0)
    np.testing.assert_allclose(zero[~measured], of_train[~measured], atol=0.02)
    assert (zero[measured] > 0.7).all()


# ---- the run


def test_fp16_gives_way_to_fp32(rng):
    def autocast():
        raise AssertionError("no gradient would be scaled")

    slices, bins = [a_slice("A", ["train"] * 20 + ["val"] * 10)], [two_kinds(30, rng)]
    fp16 = SimpleNamespace(autocast=autocast, device=torch.device("cpu"))
    assert len(pretrain.pretrain(small(), slices, bins, [], fp16, settings(precision="fp16", pretrain_epochs=1))) == 2


def test_a_run_goes_below_the_marginal_and_keeps_its_best_epoch(planted, capsys):
    slices, bins = planted
    masked = small()
    before = {name: p.clone() for name, p in masked.encoder.state_dict().items()}
    log = pretrain.pretrain(masked, slices, bins, [], ACCELERATOR, settings(pretrain_epochs=12))
    assert [one["epoch"] for one in log] == list(range(-1, 12))
    best = min(log, key=lambda one: one["model"])
    assert best["model"] < 0.9 * best["marginal"]
    assert len({one["marginal"] for one in log}) == 1
    found = pretrain.score(masked, pretrain.spots_of(slices, bins, "val"), 2, ACCELERATOR, settings())
    assert found["model"] == pytest.approx(best["model"], rel=1e-6)
    changed = {name for name, p in masked.encoder.state_dict().items() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in changed} == {"token_embedding", "gene_embedding", "blocks", "norm"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 and all("held-out cross entropy" in line and "marginal" in line for line in lines)


def test_where_nothing_helps_the_encoder_stays_as_it_was(planted):
    slices, bins = planted
    masked = small()
    before = {name: p.clone() for name, p in masked.encoder.state_dict().items()}
    monstrous = settings(pretrain_epochs=1, pretrain_lr=30.0)
    log = pretrain.pretrain(masked, slices, bins, [], ACCELERATOR, monstrous)
    assert log[1]["model"] > log[0]["model"]
    assert all(torch.equal(p, before[name]) for name, p in masked.encoder.state_dict().items())


def test_a_run_repeats_itself_and_another_seed_does_not(planted):
    slices, bins = planted
    found = []
    for seed in (0, 0, 1):
        masked = small()
        pretrain.pretrain(masked, slices, bins, [], ACCELERATOR, settings(seed=seed, pretrain_epochs=1))
        found.append(masked.encoder.token_embedding.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_simulated_slices_teach(prepared):
    flags, rows = data_flags(prepared), (row("P01_1"), row("P02_1", "val"))
    slices = [dataset.load_slice(one, flags, ("input",), val_strip=False) for one in rows]
    bins = [one.bins() for one in slices]
    log = pretrain.pretrain(small(50), slices, bins, [], ACCELERATOR, settings(pretrain_epochs=6))
    assert min(one["model"] for one in log) < log[0]["model"]
