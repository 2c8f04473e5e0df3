"""Kept features as the decoder takes them: standardised per slice, with the spots around, in memory or from disk."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.features import neighbourhoods
from utils.files.arrays import ArrayStore

PITCH_PX = 20.0
REACHES = (1.0, 2.0, 4.0)
GIB = {"in memory": 1.0, "vectors in memory": 20_000 / 2**30, "on disk": 1e-9}


def one_slice(rng, n, name="slice"):
    """Spots on a jittered square grid, in a shuffled order, and their features (S, 1 + 4, D), tokens unlike vectors."""
    side = int(np.ceil(np.sqrt(n)))
    places = np.indices((side, side)).reshape(2, -1).T[rng.permutation(side * side)[:n]]
    xy = places * PITCH_PX + rng.normal(0, 2.0, (n, 2))
    own = rng.normal(rng.normal(0, 2), rng.uniform(1, 3), (n, 5, 6)) + np.arange(5)[:, None] + np.arange(6)
    one = SimpleNamespace(name=name, xy_fullres_px=xy, pitch_fullres_px=PITCH_PX)
    return one, own.astype(np.float16)


# ---- the spots around


def slow_neighbours(xy, pitch_px, n):
    """Of every spot: the others within 2.6 pitches as (distance, index), nearest first, at most n."""
    found = []
    for i in range(len(xy)):
        others = [(float(np.hypot(*(xy[j] - xy[i]))), j) for j in range(len(xy)) if j != i]
        found.append(sorted(other for other in others if other[0] < 2.6 * pitch_px)[:n])
    return found


@pytest.mark.parametrize("n", [1, 4, 18])
def test_neighbours_are_those_of_a_double_loop(rng, n):
    xy = one_slice(rng, 60)[0].xy_fullres_px
    index, offset, present = neighbourhoods.neighbours(xy, PITCH_PX, n)
    assert index.shape == present.shape == (60, n) and offset.shape == (60, n, 2)
    for i, expected in enumerate(slow_neighbours(xy, PITCH_PX, n)):
        k = len(expected)
        assert present[i].tolist() == [True] * k + [False] * (n - k)
        assert index[i, :k].tolist() == [j for _, j in expected]
        np.testing.assert_allclose(offset[i, :k], [(xy[j] - xy[i]) / PITCH_PX for _, j in expected], atol=1e-6)
        assert not offset[i, k:].any() and not index[i, k:].any()
    assert n < 18 or (~present).any(), "the case of too few neighbours occurs"


def test_a_spot_alone_has_no_means_around_and_no_context():
    """As of a core so small that one spot lies on it."""
    xy, features = np.zeros((1, 2)), np.ones((1, 2, 6), np.float16)
    ((block, values),) = neighbourhoods.smoothed(features, xy, PITCH_PX, REACHES)
    assert block == slice(0, 1) and values.shape == (1, len(REACHES), 2, 6) and np.isnan(values).all()
    _, _, present = neighbourhoods.neighbours(xy, PITCH_PX, 4)
    assert present.shape == (1, 4) and not present.any()


def test_no_context(rng):
    index, offset, present = neighbourhoods.neighbours(rng.random((7, 2)), 1.0, 0)
    assert index.shape == present.shape == (7, 0) and offset.shape == (7, 0, 2)


def slow_means_around(features, xy, pitch_px):
    """Of every spot and reach: (S, R, ...), NaN for a spot alone; spot by spot."""
    found = np.full((len(xy), len(REACHES), *features.shape[1:]), np.nan)
    for i in range(len(xy)):
        for k, reach in enumerate(REACHES):
            far = np.hypot(*(xy - xy[i]).T) / pitch_px / reach
            weight = {j: np.exp(-(d**2) / 2) for j, d in enumerate(far) if j != i and d <= 2.5}
            if weight:
                found[i, k] = sum(w * features[j].astype(float) for j, w in weight.items()) / sum(weight.values())
    return found


@pytest.mark.parametrize("at_once", [7, 1000])
def test_means_around_are_those_of_a_double_loop(rng, monkeypatch, at_once):
    """A gap, an edge, two spots in one place, one that has only the farthest reach, one alone."""
    monkeypatch.setattr(neighbourhoods, "ROWS_AT_ONCE", at_once)
    one, features = one_slice(rng, 130)
    xy = np.concatenate([one.xy_fullres_px, one.xy_fullres_px[:1], [[-9 * PITCH_PX, 0], [1e4, 1e4]]])
    features = np.concatenate([features, features[:3] + 1])
    expected = slow_means_around(features, xy, PITCH_PX)
    found = np.empty(expected.shape, np.float32)
    for block, values in neighbourhoods.smoothed(features, xy, PITCH_PX, REACHES):
        found[block] = values
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    alone = np.isnan(expected).all((2, 3)).tolist()
    assert alone[-2:] == [[True, True, False], [True] * 3] and not any(map(any, alone[:-2]))


def test_a_lonely_spot_has_no_neighbour():
    xy = np.array([[0.0, 0], [2.5, 0], [5.2, 0]])
    index, offset, present = neighbourhoods.neighbours(xy, 1.0, 4)
    assert present.sum(1).tolist() == [1, 1, 0] and index[:2, 0].tolist() == [1, 0]
    assert offset[:2, 0].tolist() == [[2.5, 0], [-2.5, 0]]


def test_spots_on_top_of_one_another_are_neighbours_but_not_their_own():
    """Twelve spots at one place: a query for the nearest 4 + 1 may not hold the spot itself."""
    xy = np.vstack([np.zeros((12, 2)), [[1.0, 0]]])
    index, offset, present = neighbourhoods.neighbours(xy, 1.0, 4)
    assert present.all() and not (index == np.arange(13)[:, None]).any()
    assert all(len(set(line)) == 4 for line in index)
    assert not offset[:12].any() and (offset[12] == [-1, 0]).all()


# ---- standardising


def test_moments_of_vectors_and_of_tokens(rng):
    several = [one_slice(rng, n)[1] for n in (30, 50)]
    found = neighbourhoods.moments(several, 1)
    whole = np.concatenate(several).astype(float)
    assert found.mean.shape == found.sd.shape == (2, 6)
    agree(found, whole)


def agree(found, whole):
    """With the plain formulas over all rows (S, V + T, D) in float64."""
    for kind, values in enumerate((whole[:, 0], whole[:, 1:].reshape(-1, whole.shape[-1]))):
        np.testing.assert_allclose(found.mean[kind], values.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.sd[kind], values.std(0), rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 7, 30, 1000])
def test_moments_of_some_rows_by_blocks_of_any_size(rng, monkeypatch, at_once):
    monkeypatch.setattr(neighbourhoods, "ROWS_AT_ONCE", at_once)
    several = [one_slice(rng, n)[1] for n in (30, 50, 20)]
    rows = [np.arange(3, 25), np.sort(rng.permutation(50)[:31]), np.zeros(0, int)]
    whole = np.concatenate([f[r] for f, r in zip(several, rows, strict=True)]).astype(float)
    agree(neighbourhoods.moments(several, 1, rows), whole)


def test_moments_far_from_zero(rng):
    """A deviation of a thousandth of the mean, about what float16 can tell apart."""
    far = (1000 + rng.integers(-2, 3, (300, 5, 6)) * 0.5).astype(np.float16)
    agree(neighbourhoods.moments([far], 1), far.astype(float))


def test_a_constant_feature_has_a_deviation_all_the_same():
    flat = np.ones((70, 5, 3), np.float16)
    assert neighbourhoods.moments([flat], 1).sd.tolist() == [[np.float32(1e-3)] * 3] * 2


def test_a_slice_under_64_tiles_uses_the_train_statistics_and_says_so(rng, capsys):
    train = neighbourhoods.moments([one_slice(rng, 80)[1]], 1)
    small, enough = one_slice(rng, 63)[1], one_slice(rng, 64)[1]
    assert neighbourhoods.slice_moments(small, "few", train) is train
    assert (
        "warning: few has 63 tiles, under 64: standardised by the train slices' statistics" in capsys.readouterr().out
    )
    own = neighbourhoods.slice_moments(enough, "many", train)
    np.testing.assert_array_equal(own.mean, neighbourhoods.moments([enough], 1).mean)
    assert own is not train and not capsys.readouterr().out


def make_bank(made, tmp_path, kind="in memory", features=None):
    store = ArrayStore(GIB[kind], tmp_path)
    device = torch.device("cpu")
    return neighbourhoods.FeatureBank(made.slices, features or made.kept, made.train, 18, REACHES, device, store)


@pytest.fixture
def made(rng):
    """A large and a small slice, as much context as the published models have: spots at the edge have less."""
    several = [one_slice(rng, 70, "large"), one_slice(rng, 40, "small")]
    slices, kept = (list(part) for part in zip(*several, strict=True))
    return SimpleNamespace(slices=slices, kept=kept, train=neighbourhoods.moments([kept[0]], 1))


@pytest.fixture(params=GIB)
def bank(made, request, tmp_path):
    return make_bank(made, tmp_path, request.param)


def slow_batch(made, number):
    """One spot of the bank, looked up by hand."""
    i, at = (0, number) if number < 70 else (1, number - 70)
    kept = made.kept[i].astype(np.float32)
    own = neighbourhoods.moments([made.kept[0]], 1) if i == 0 else made.train
    one = made.slices[i]
    nearest = slow_neighbours(one.xy_fullres_px, PITCH_PX, 18)[at]
    around = slow_means_around(kept[:, 0], one.xy_fullres_px, PITCH_PX)[at]
    context, offsets = np.zeros((18, 6)), np.zeros((18, 2))
    for place, (_, j) in enumerate(nearest):
        context[place] = (kept[j, 0] - own.mean[0]) / own.sd[0]
        offsets[place] = (one.xy_fullres_px[j] - one.xy_fullres_px[at]) / PITCH_PX
    return {
        "vector": (kept[at, 0] - own.mean[0]) / own.sd[0],
        "tokens": (kept[at, 1:] - own.mean[1]) / own.sd[1],
        "context": context,
        "offsets": offsets,
        "present": np.arange(18) < len(nearest),
        "smoothed": (around - own.mean[0]) / own.sd[0],
    }


def test_a_batch_is_what_a_slow_look_up_gives(made, bank):
    assert bank.first.tolist() == [0, 70, 110]
    numbers = [69, 0, 70, 109, 33, 70]
    found = bank.batch(np.array(numbers))
    for i, number in enumerate(numbers):
        expected = slow_batch(made, number)
        assert set(found) == set(expected)
        for name, value in expected.items():
            atol = 1e-3 if name == "smoothed" else 1e-5  # kept in half precision
            np.testing.assert_allclose(found[name][i].numpy(), value, atol=atol, err_msg=f"{name} of spot {number}")
    assert found["vector"].dtype == torch.float32 and not found["present"].all()


def test_a_slice_is_standardised_by_itself(bank):
    """Mean 0, deviation 1 over the large slice; the small one keeps its distance from the train slices."""
    everything = bank.batch(np.arange(110))
    for name in ("vector", "tokens"):
        values = everything[name].flatten(0, -2) if name == "tokens" else everything[name]
        large = values[: 70 * (4 if name == "tokens" else 1)]
        torch.testing.assert_close(large.mean(0), torch.zeros(6), atol=1e-2, rtol=0)
        torch.testing.assert_close(large.std(0), torch.ones(6), atol=2e-2, rtol=0)
    assert everything["vector"][70:].mean(0).abs().max() > 0.1


def test_masked_context_is_zero(bank):
    found = bank.batch(np.arange(110))
    missing = ~found["present"]
    assert missing.any() and not found["context"][missing].any() and not found["offsets"][missing].any()


@pytest.mark.parametrize("kind", ["vectors in memory", "on disk"])
def test_a_batch_from_disk_is_that_from_memory_bit_for_bit(made, rng, tmp_path, kind):
    files = []
    for i, f in enumerate(made.kept):
        np.save(tmp_path / f"{i}.npy", f)
        files.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    fast, lean = (make_bank(made, tmp_path / "store", k, files) for k in ("in memory", kind))
    assert fast.tokens.whole is not None and lean.tokens.whole is None
    assert (lean.vectors.whole is None) == (kind == "on disk")
    spots = rng.integers(0, 110, 64)
    one, two = fast.batch(spots), lean.batch(spots)
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


def test_the_budget_is_shared_by_all_that_grows_with_the_spots(made, tmp_path):
    store = ArrayStore(1.0, tmp_path)
    neighbourhoods.FeatureBank(made.slices, made.kept, made.train, 18, REACHES, torch.device("cpu"), store)
    nearest = 110 * 18 * (4 + 2 * 4 + 1)  # number, offsets, present
    assert 2**30 - store.left == 110 * (5 + len(REACHES)) * 6 * 2 + nearest


def test_no_context_at_all(made, tmp_path):
    found = neighbourhoods.FeatureBank(
        made.slices, made.kept, made.train, 0, (), torch.device("cpu"), ArrayStore(1.0, tmp_path)
    ).batch(np.arange(5))
    assert found["context"].shape == (5, 0, 6) and found["offsets"].shape == (5, 0, 2)
    assert found["smoothed"].shape == (5, 0, 6)


def test_a_spot_alone_has_the_mean_of_its_slice_around(made, tmp_path):
    made.slices[0].xy_fullres_px[0] = 1e5
    found = make_bank(made, tmp_path).batch(np.array([0, 1]))
    assert not found["smoothed"][0].any() and found["smoothed"][1].all()


# ---- predictions


def test_predictions_do_not_depend_on_the_batch(bank):
    class Model:
        def predict(self, batch):
            return batch["vector"][:, :2] + batch["context"].sum((1, 2))[:, None]

    spots = np.array([3, 105, 70, 8, 69])
    whole = neighbourhoods.predict(Model(), bank, spots, torch.no_grad, 32)
    np.testing.assert_allclose(neighbourhoods.predict(Model(), bank, spots, torch.no_grad, 2), whole, rtol=1e-6)
    assert whole.shape == (5, 2)


def resident_kib():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc of Linux")
def test_what_was_read_of_a_mapped_file_is_let_go(tmp_path):
    """Else a run on a million spots would seem to hold all of their features."""
    np.save(tmp_path / "features.npy", np.ones((4000, 17, 256), np.float16))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    before = resident_kib()
    found = neighbourhoods.moments([mapped], 1)
    rows = neighbourhoods.Rows([mapped], ArrayStore(0, tmp_path), torch.device("cpu"))
    taken = rows.take(np.arange(0, 4000, 2))
    del taken
    assert (found.mean == 1).all() and resident_kib() - before < mapped.nbytes / 2 / 1024
    mapped.max()
    assert resident_kib() - before > mapped.nbytes / 2 / 1024, "read without letting go, it would be resident"
