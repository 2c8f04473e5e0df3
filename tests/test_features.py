"""Features of the frozen encoder: standardised per slice, kept on disk, given out with the spots around."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import data_flags, row

from utils.training import datasets, features

PITCH_PX = 20.0


def one_slice(rng, n, name="slice"):
    """Spots on a jittered square grid, in a shuffled order, and their features (S, 1 + 4, D), tokens unlike vectors."""
    side = int(np.ceil(np.sqrt(n)))
    places = np.indices((side, side)).reshape(2, -1).T[rng.permutation(side * side)[:n]]
    xy = places * PITCH_PX + rng.normal(0, 2.0, (n, 2))
    own = rng.normal(rng.normal(0, 2), rng.uniform(1, 3), (n, 5, 6)) + np.arange(5)[:, None] + np.arange(6)
    one = SimpleNamespace(name=name, xy_fullres_px=xy, pitch_fullres_px=PITCH_PX, barcodes=np.arange(n).astype(str))
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
    index, offset, present = features.neighbours(xy, PITCH_PX, n)
    assert index.shape == present.shape == (60, n) and offset.shape == (60, n, 2)
    for i, expected in enumerate(slow_neighbours(xy, PITCH_PX, n)):
        k = len(expected)
        assert present[i].tolist() == [True] * k + [False] * (n - k)
        assert index[i, :k].tolist() == [j for _, j in expected]
        np.testing.assert_allclose(offset[i, :k], [(xy[j] - xy[i]) / PITCH_PX for _, j in expected], atol=1e-6)
        assert not offset[i, k:].any() and not index[i, k:].any()
    assert n < 18 or (~present).any(), "the case of too few neighbours occurs"


def test_no_context(rng):
    index, offset, present = features.neighbours(rng.random((7, 2)), 1.0, 0)
    assert index.shape == present.shape == (7, 0) and offset.shape == (7, 0, 2)


def test_a_lonely_spot_has_no_neighbour():
    xy = np.array([[0.0, 0], [2.5, 0], [5.2, 0]])
    index, offset, present = features.neighbours(xy, 1.0, 4)
    assert present.sum(1).tolist() == [1, 1, 0] and index[:2, 0].tolist() == [1, 0]
    assert offset[:2, 0].tolist() == [[2.5, 0], [-2.5, 0]]


def test_spots_on_top_of_one_another_are_neighbours_but_not_their_own():
    """Twelve spots at one place: a query for the nearest 4 + 1 may not hold the spot itself."""
    xy = np.vstack([np.zeros((12, 2)), [[1.0, 0]]])
    index, offset, present = features.neighbours(xy, 1.0, 4)
    assert present.all() and not (index == np.arange(13)[:, None]).any()
    assert all(len(set(line)) == 4 for line in index)
    assert not offset[:12].any() and (offset[12] == [-1, 0]).all()


# ---- standardising


def test_moments_of_vectors_and_of_tokens(rng):
    several = [one_slice(rng, n)[1] for n in (30, 50)]
    found = features.moments(several)
    whole = np.concatenate(several).astype(float)
    assert found.mean.shape == found.sd.shape == (2, 6)
    np.testing.assert_allclose(found.mean[0], whole[:, 0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.sd[0], whole[:, 0].std(0), rtol=1e-5)
    np.testing.assert_allclose(found.mean[1], whole[:, 1:].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found.sd[1], whole[:, 1:].std((0, 1)), rtol=1e-5)


def test_a_constant_feature_has_a_deviation_all_the_same():
    flat = np.ones((70, 5, 3), np.float16)
    assert features.moments([flat]).sd.tolist() == [[np.float32(1e-3)] * 3] * 2


def test_a_slice_under_64_tiles_uses_the_train_statistics_and_says_so(rng, capsys):
    train = features.moments([one_slice(rng, 80)[1]])
    small, enough = one_slice(rng, 63)[1], one_slice(rng, 64)[1]
    assert features.slice_moments(small, "few", train) is train
    assert (
        "warning: few has 63 tiles, under 64: standardised by the train slices' statistics" in capsys.readouterr().out
    )
    own = features.slice_moments(enough, "many", train)
    np.testing.assert_array_equal(own.mean, features.moments([enough]).mean)
    assert own is not train and not capsys.readouterr().out


@pytest.fixture
def bank(rng):
    """A large and a small slice, as much context as the published models have: spots at the edge have less."""
    several = [one_slice(rng, 70, "large"), one_slice(rng, 40, "small")]
    slices, kept = zip(*several, strict=True)
    train = features.moments([kept[0]])
    found = features.FeatureBank(list(slices), list(kept), train, 18, torch.device("cpu"))
    return SimpleNamespace(bank=found, slices=slices, kept=kept, train=train)


def slow_batch(made, number):
    """One spot of the bank, looked up by hand."""
    i, at = (0, number) if number < 70 else (1, number - 70)
    kept = made.kept[i].astype(np.float32)
    own = features.moments([made.kept[0]]) if i == 0 else made.train
    one = made.slices[i]
    around = slow_neighbours(one.xy_fullres_px, PITCH_PX, 18)[at]
    context, offsets = np.zeros((18, 6)), np.zeros((18, 2))
    for place, (_, j) in enumerate(around):
        context[place] = (kept[j, 0] - own.mean[0]) / own.sd[0]
        offsets[place] = (one.xy_fullres_px[j] - one.xy_fullres_px[at]) / PITCH_PX
    return {
        "vector": (kept[at, 0] - own.mean[0]) / own.sd[0],
        "tokens": (kept[at, 1:] - own.mean[1]) / own.sd[1],
        "context": context,
        "offsets": offsets,
        "present": np.arange(18) < len(around),
    }


def test_a_batch_is_what_a_slow_look_up_gives(bank):
    assert bank.bank.first.tolist() == [0, 70, 110]
    numbers = [69, 0, 70, 109, 33, 70]
    found = bank.bank.batch(torch.tensor(numbers))
    for i, number in enumerate(numbers):
        expected = slow_batch(bank, number)
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][i].numpy(), value, atol=1e-5, err_msg=f"{name} of spot {number}")
    assert found["vector"].dtype == torch.float32 and not found["present"].all()


def test_a_slice_is_standardised_by_itself(bank):
    """Mean 0, deviation 1 over the large slice; the small one keeps its distance from the train slices."""
    everything = bank.bank.batch(torch.arange(110))
    for name in ("vector", "tokens"):
        values = everything[name].flatten(0, -2) if name == "tokens" else everything[name]
        large = values[: 70 * (4 if name == "tokens" else 1)]
        torch.testing.assert_close(large.mean(0), torch.zeros(6), atol=1e-2, rtol=0)
        torch.testing.assert_close(large.std(0), torch.ones(6), atol=2e-2, rtol=0)
    assert everything["vector"][70:].mean(0).abs().max() > 0.1


def test_masked_context_is_zero(bank):
    found = bank.bank.batch(torch.arange(110))
    missing = ~found["present"]
    assert missing.any() and not found["context"][missing].any() and not found["offsets"][missing].any()


# ---- kept on disk


def kept(folder, key, one, made, calls):
    def compute():
        calls.append(key)
        return made.astype(np.float32)

    return features.kept_features(folder, key, one, compute)


def test_features_are_computed_once(rng, tmp_path):
    (one, made), calls = one_slice(rng, 20, "A/outs"), []
    first = kept(tmp_path, "k", one, made, calls)
    again = kept(tmp_path, "k", one, made + 1, calls)
    assert calls == ["k"] and first.dtype == again.dtype == np.float16
    np.testing.assert_array_equal(first, made)
    np.testing.assert_array_equal(again, made)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["outs.json", "outs.npy"]


def test_features_of_another_key_or_other_spots_are_computed_anew(rng, tmp_path):
    (one, made), calls = one_slice(rng, 20), []
    kept(tmp_path, "k", one, made, calls)
    np.testing.assert_array_equal(kept(tmp_path, "other", one, made + 1, calls), made + 1)
    fewer = SimpleNamespace(**vars(one) | {"barcodes": one.barcodes[:19]})
    assert len(kept(tmp_path, "other", fewer, made[:19], calls)) == 19
    assert len(kept(tmp_path, "other", fewer, made[:19], calls)) == 19
    assert calls == ["k", "other", "other"]


@pytest.mark.parametrize("lost", ["slice.npy", "slice.json"])
def test_half_of_the_kept_files_is_none(rng, tmp_path, lost):
    (one, made), calls = one_slice(rng, 20), []
    kept(tmp_path, "k", one, made, calls)
    (tmp_path / lost).unlink()
    np.testing.assert_array_equal(kept(tmp_path, "k", one, made, calls), made)
    assert calls == ["k", "k"]


def test_features_stopped_half_way_are_not_taken(rng, tmp_path, monkeypatch):
    """The note goes first and comes last, so that old features never stand under a new key."""
    (one, made), calls = one_slice(rng, 20), []
    kept(tmp_path, "old", one, made, calls)

    def stop(path, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_record", stop)
        with pytest.raises(KeyboardInterrupt):
            kept(tmp_path, "new", one, made + 1, calls)
    np.testing.assert_array_equal(kept(tmp_path, "old", one, made, calls), made)
    assert calls == ["old", "new", "old"]
    assert json.loads((tmp_path / "slice.json").read_text())["key"] == "old"


# ---- from tiles


@pytest.fixture(scope="module")
def tiled(prepared):
    return datasets.load_slice(row("P01_1"), data_flags(prepared), ("target",), val_strip=True)


@pytest.mark.parametrize(("batch_size", "workers"), [(32, 0), (7, 2)])
def test_encode_slice_is_in_the_order_of_the_slice(tiled, batch_size, workers):
    def encode(tiles):
        return torch.cat([tiles.mean((2, 3)), tiles[:, :, 0, 0]], 1)

    found = features.encode_slice(encode, tiled, 32, torch.device("cpu"), batch_size, workers)
    pixels = tiled.pack.read(tiled.tile_rows) / 255
    np.testing.assert_allclose(found, np.hstack([pixels.mean((1, 2)), pixels[:, 0, 0]]), atol=1e-5)
    assert found.dtype == np.float32


def test_what_the_cheap_rows_read(tiled, rng):
    made = rng.random((70, 4))
    for part in ("train", "val", "all"):
        rows = tiled.rows_of(part)
        found = features.as_pictures(tiled, made, part)
        np.testing.assert_array_equal(found["features"], made[rows])
        np.testing.assert_array_equal(found["xy"], tiled.xy_fullres_px[rows])
        np.testing.assert_allclose(found["log_depth"], np.log(tiled.total_counts[rows]))
        assert found["pitch"] == tiled.pitch_fullres_px


def test_vectors_for_the_out_of_domain_score_are_not_standardised(tiled, rng):
    made = rng.random((70, 5, 4)).astype(np.float16)
    found = features.domain_vectors([tiled, tiled], [made, made + 1], "val")
    rows = tiled.rows_of("val")
    np.testing.assert_array_equal(found.numpy(), np.concatenate([made[rows, 0], (made + 1)[rows, 0]]).astype("f4"))


def test_predictions_do_not_depend_on_the_batch(bank):
    class Model:
        def predict(self, batch):
            return batch["vector"][:, :2] + batch["context"].sum((1, 2))[:, None]

    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=torch.no_grad)
    spots = np.array([3, 105, 70, 8, 69])
    whole = features.predict(Model(), bank.bank, spots, accelerator, 32)
    np.testing.assert_allclose(features.predict(Model(), bank.bank, spots, accelerator, 2), whole, rtol=1e-6)
    assert whole.shape == (5, 2)


def test_names_of_image_weights(tmp_path):
    assert features.read_image_weights("timm", "--image_weights") == "timm"
    assert features.read_image_weights("none", "--image_weights") is None
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "w.pth")
    found = features.read_image_weights(str(tmp_path / "w.pth"), "--image_weights")
    assert list(found) == ["a"]
