"""Features of the frozen encoder: computed batch by batch, kept on disk."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spaceranger_folders import refused
from tiny_runs import data_flags, row

from model.image_encoder import ImageEncoder
from utils import distributed
from utils.evaluation import baselines
from utils.features import cache, dataset
from utils.files.arrays import ArrayStore


def one_slice(rng, n, name="slice"):
    """A slice as far as keeping looks at it, and features (S, 1 + 4, D)."""
    one = SimpleNamespace(name=name, barcodes=np.arange(n).astype(str))
    return one, rng.normal(size=(n, 5, 6)).astype(np.float16)


# ---- kept on disk


def by_batch(made, size=7):
    return (made[i : i + size].astype(np.float32) for i in range(0, len(made), size))


def kept(folder, key, one, made, calls):
    def compute():
        calls.append(key)
        return by_batch(made)

    return cache.kept_features(folder, key, one, compute)


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
        patch.setattr(cache, "write_record", stop)
        with pytest.raises(KeyboardInterrupt):
            kept(tmp_path, "new", one, made + 1, calls)
    np.testing.assert_array_equal(kept(tmp_path, "old", one, made, calls), made)
    assert calls == ["old", "new", "old"]
    assert json.loads((tmp_path / "slice.json").read_text())["key"] == "old"


CORRUPT = ["", "{", '{"key": "k"', "[]", "\x00\x01", "null"]


@pytest.mark.parametrize("text", CORRUPT)
def test_a_corrupt_or_foreign_note_is_none(rng, tmp_path, text):
    (one, made), calls = one_slice(rng, 20), []
    kept(tmp_path, "k", one, made, calls)
    (tmp_path / "slice.json").write_text(text)
    np.testing.assert_array_equal(kept(tmp_path, "k", one, made + 1, calls), made + 1)
    (tmp_path / "slice.json").write_bytes(b"\xff\xfe" + text.encode())
    np.testing.assert_array_equal(kept(tmp_path, "k", one, made, calls), made)
    assert calls == ["k"] * 3


@pytest.mark.parametrize("fraction", [0, 0.03, 0.5, 0.99])
def test_corrupt_features_are_none(rng, tmp_path, fraction):
    (one, made), calls = one_slice(rng, 20), []
    kept(tmp_path, "k", one, made, calls)
    path = tmp_path / "slice.npy"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    np.testing.assert_array_equal(kept(tmp_path, "k", one, made, calls), made)
    assert calls == ["k"] * 2


def test_features_are_written_as_they_come(rng, tmp_path):
    """The file grows with the batches, and holds what numpy.save would have written of all at once."""
    (one, made), sizes = one_slice(rng, 1000), []

    def watched():
        for batch in by_batch(made, 300):
            yield batch
            sizes.append((tmp_path / "slice.npy.part").stat().st_size)
            assert not (tmp_path / "slice.npy").exists()

    cache.kept_features(tmp_path, "k", one, watched)
    np.save(tmp_path / "whole.npy", made)
    assert (tmp_path / "slice.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert 0 < sizes[0] < sizes[-1]


def test_an_encoder_that_stops_half_way_leaves_the_old_features_without_a_note(rng, tmp_path):
    (one, made), calls = one_slice(rng, 20), []
    kept(tmp_path, "old", one, made, calls)

    def stop():
        yield made[:7].astype(np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.kept_features(tmp_path, "new", one, stop)
    assert not (tmp_path / "slice.json").exists()
    np.testing.assert_array_equal(kept(tmp_path, "new", one, made + 1, calls), made + 1)
    assert calls == ["old", "new"]


@pytest.mark.parametrize("gib", [1.0, 1e-9])
def test_batches_put_together_in_memory_or_beyond_it(rng, tmp_path, gib):
    made = one_slice(rng, 20)[1]
    found = cache.in_budget(by_batch(made), 20, ArrayStore(gib, tmp_path))
    assert isinstance(found, np.memmap) == (gib < 1) and found.dtype == np.float16
    np.testing.assert_array_equal(found, made)


def encoder(encode, **changed):
    same = {"size": 32, "device": torch.device("cpu"), "batch_size": 32, "workers": 0}
    return cache.TileEncoder(encode, **same | changed)


# ---- from tiles


@pytest.fixture(scope="module")
def tiled(prepared):
    return dataset.load_slice(row("P01_1"), data_flags(prepared), ("target",), val_strip=True)


@pytest.mark.parametrize(("batch_size", "workers"), [(32, 0), (7, 2)])
def test_encode_slice_is_in_the_order_of_the_slice(tiled, batch_size, workers):
    def encode(tiles):
        return torch.cat([tiles.mean((2, 3)), tiles[:, :, 0, 0]], 1)

    batches = list(cache.encode_slice(encoder(encode, batch_size=batch_size, workers=workers), tiled))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (70 // batch_size - (70 % batch_size == 0))
    found = np.concatenate(batches)
    pixels = tiled.pack.read(tiled.tile_rows) / 255
    np.testing.assert_allclose(found, np.hstack([pixels.mean((1, 2)), pixels[:, 0, 0]]), atol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5)])
def test_the_pretrained_encoder_sees_the_tile_as_stage_one_does(tiled, scales):
    """Without pretrained weights it is the random one of the seed."""
    distributed.seed_everything(3)
    fresh = ImageEncoder("test_vit", 32, 16, crop_scales=scales).eval()
    sizes = {"image_encoder": "test_vit", "image_size": 32, "width": 16, "crop_scales": list(scales)}
    settings = {"seed": 3, "image_weights": "none"}
    here = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    (found,) = cache.pretrained_features({"sizes": sizes}, settings, [tiled], cache.Inference(here, 32, 0), None)
    with torch.no_grad():
        expected = fresh.features(cache.to_float(torch.from_numpy(tiled.pack.read(tiled.tile_rows)), 32))[0]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_features_beyond_half_precision_are_refused(tmp_path):
    made = np.ones((3, 2, 4), np.float32)
    made[1, 0, 2] = 70_000
    refused("found 70000; use --precision fp32", cache.in_budget, iter([made]), 3, ArrayStore(1.0, tmp_path))
    refused("found 70000", cache.write_features, tmp_path / "f.npy", iter([made]), 3)
    assert not list(tmp_path.glob("f.npy*")), "no half a file is left"


def test_what_the_baselines_read(tiled, rng):
    """Spots beside the strip keep all their neighbours."""
    made = rng.random((70, 4))
    whole = baselines.ring_features(made, tiled.xy_fullres_px, tiled.pitch_fullres_px)
    for part in ("train", "val", "all"):
        rows = tiled.rows_of(part)
        found = baselines.images_of(made, tiled.xy_fullres_px, tiled.pitch_fullres_px, rows)
        np.testing.assert_array_equal(found["features"], made[rows])
        np.testing.assert_array_equal(found["rings"], whole[rows])


def test_names_of_image_weights(tmp_path):
    assert cache.read_image_weights("timm", "--image_weights") == "timm"
    assert cache.read_image_weights("none", "--image_weights") is None
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "w.pth")
    found = cache.read_image_weights(str(tmp_path / "w.pth"), "--image_weights")
    assert list(found["model"]) == ["a"] and found.source == str(tmp_path / "w.pth")
    torch.save([torch.ones(2)], tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"--image_weights: expected named tensors in .*w.pth, found list"):
        cache.read_image_weights(str(tmp_path / "w.pth"), "--image_weights")
