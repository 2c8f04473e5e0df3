"""Scores of a gallery in get_accuracy_image.py, each row against a loop, and what it keeps of images and profiles."""

import contextlib
import json
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import torch

import get_accuracy_image
from model.fusion import Fusion
from utils.features.cache import EncodedPairs, Inference, encode_pairs, room_for
from utils.files.arrays import ArrayStore

SCALE, WEIGHT = 7.0, 0.35
ACCELERATOR = SimpleNamespace(autocast=contextlib.nullcontext, device=torch.device("cpu"))


torch.manual_seed(0)
FUSION = Fusion(8, blocks=2, heads=2, hidden=16)  # which side is which, and every token, matters
torch.nn.init.normal_(FUSION.to_logit.weight)  # no longer zero, as before the first step


@pytest.fixture
def made(rng):
    """Eleven spots, galleries of four candidates, some of them padding."""

    def random(*shape):
        return rng.normal(size=(11, *shape)).astype(np.float32)

    candidates = np.stack([rng.permutation(11)[:4] for _ in range(11)])
    candidates[[2, 5, 5], [3, 1, 2]] = -1
    model = SimpleNamespace(fusion=FUSION, contrast=SimpleNamespace(logit_scale=torch.tensor(SCALE).log()))
    encoded = EncodedPairs(random(5), random(5), *map(torch.from_numpy, (random(3, 8), random(2, 8))))
    depths = rng.normal(size=(2, 11))
    found = get_accuracy_image.gallery_scores(model, encoded, depths[0], depths[1], candidates, WEIGHT, ACCELERATOR)
    return SimpleNamespace(encoded=encoded, candidates=candidates, depths=depths, found=found)


def valid(made):
    return [(s, k, c) for s, line in enumerate(made.candidates) for k, c in enumerate(line) if c >= 0]


def similarity(made, spot, candidate):
    image, gene = made.encoded.vectors()
    return SCALE * float(image[spot] @ gene[candidate])


def logit(made, spot, candidate):
    image, gene = made.encoded.image_tokens, made.encoded.gene_tokens
    return FUSION(gene[[candidate]], image[[spot]]).item()


def test_contrast_is_the_scaled_product_of_the_two_vectors(made):
    for s, k, c in valid(made):
        assert made.found["contrastive"][s, k] == pytest.approx(similarity(made, s, c), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("at_once", [256, 11, 3])
def test_matching_is_the_logit_of_the_pair(made, monkeypatch, at_once):
    monkeypatch.setattr(get_accuracy_image, "SPOTS_AT_ONCE", at_once)
    model = SimpleNamespace(fusion=FUSION)
    found = get_accuracy_image.match_scores(model, made.encoded, made.candidates, ACCELERATOR)
    for s, k, c in valid(made):
        assert found[s, k] == pytest.approx(logit(made, s, c), rel=1e-4, abs=1e-4)
        assert made.found["matching"][s, k] == pytest.approx(found[s, k], rel=1e-4, abs=1e-4)


def test_padding_has_no_score(made):
    found = get_accuracy_image.match_scores(SimpleNamespace(fusion=FUSION), made.encoded, made.candidates, ACCELERATOR)
    assert (found[made.candidates < 0] == 0).all() and (found[made.candidates >= 0] != 0).all()


def test_the_re_ranker_adds_the_weighted_logit_to_the_log_share_among_the_candidates(made):
    """Padding takes no share."""
    for s, k, c in valid(made):
        shown = [similarity(made, s, other) for other in made.candidates[s] if other >= 0]
        share = np.exp(similarity(made, s, c)) / np.exp(shown).sum()
        assert made.found["reranked"][s, k] == pytest.approx(
            WEIGHT * logit(made, s, c) + np.log(share), rel=1e-3, abs=1e-3
        )


def test_depth_is_nearness_to_the_predicted_depth(made):
    predicted, measured = made.depths
    for s, k, c in valid(made):
        assert made.found["depth"][s, k] == pytest.approx(-abs(predicted[s] - measured[c]))


# ---- the most similar profiles


def slow_nearest(image, gene, n=10):
    return np.argsort(-(image @ gene.T), axis=1, kind="stable")[:, :n]


@pytest.mark.parametrize("n_spots", [1, 4, 10, 30])
def test_the_nearest_profiles_of_a_small_slice_are_padded(rng, n_spots):
    image, gene = (rng.integers(-9, 10, (n_spots, 5)).astype(np.float32) for _ in range(2))
    found = get_accuracy_image.nearest_profiles(EncodedPairs(image, gene), "cpu")
    assert found.shape == (n_spots, 10) and np.issubdtype(found.dtype, np.integer)
    np.testing.assert_array_equal(found[:, :n_spots], slow_nearest(image, gene))
    assert (found[:, n_spots:] == -1).all()


@pytest.fixture(scope="module")
def retrieval_of_all(trained, tmp_path_factory):
    """get_accuracy_image.py on three slices, with tokens in memory and with every array on disk."""
    out = tmp_path_factory.mktemp("all")
    trained.run("get_accuracy_image", "--part", "all", "--out", out / "memory")
    trained.run("get_accuracy_image", "--part", "all", "--out", out / "disk", "--memory", 1e-9)
    return out


def test_the_file_names_the_ten_most_similar_profiles_of_the_slice_by_row(retrieval_of_all):
    adata = anndata.read_h5ad(retrieval_of_all / "memory" / "predictions.h5ad")
    found = adata.obsm["nearest_profiles"]
    assert found.shape == (210, 10) and np.issubdtype(found.dtype, np.integer)
    for name in adata.obs["slice"].unique():
        rows = np.flatnonzero(adata.obs["slice"] == name)
        image, gene = (adata.obsm[f"X_{kind}"][rows].astype(float) for kind in ("image", "gene"))
        assert np.isin(found[rows], rows).all() and all(len(set(line)) == 10 for line in found[rows])
        similarity = image @ gene.T
        shown = np.take_along_axis(similarity, found[rows] - rows[0], axis=1)
        np.testing.assert_allclose(shown, -np.sort(-similarity, axis=1)[:, :10], atol=1e-6)


def test_results_do_not_depend_on_where_the_arrays_lie(retrieval_of_all):
    one, two = (json.loads((retrieval_of_all / name / "metrics.json").read_text()) for name in ("memory", "disk"))
    assert one == two
    one, two = (anndata.read_h5ad(retrieval_of_all / name / "predictions.h5ad") for name in ("memory", "disk"))
    for key in ("X_image", "X_gene", "nearest_profiles"):
        np.testing.assert_array_equal(one.obsm[key], two.obsm[key])
    assert sorted(p.name for p in (retrieval_of_all / "disk").iterdir()) == sorted(
        p.name for p in (retrieval_of_all / "memory").iterdir()
    )


# ---- what is kept of images and profiles


class Encoders:
    """Vectors and tokens that tell the spot: tile mean and first bin. Tokens leave in `dtype`, as under autocast."""

    sizes = SimpleNamespace(image_size=4)

    def __init__(self, dtype):
        self.dtype = dtype

    def encode_images(self, tiles):
        mean = tiles.mean((1, 2, 3))[:, None]
        return mean.repeat(1, 3), (mean[:, :, None] + torch.arange(10.0).view(1, 2, 5) / 7).to(self.dtype)

    def encode_genes(self, bins):
        first = bins[:, :1].float()
        return first.repeat(1, 3), (first[:, :, None] - torch.arange(15.0).view(1, 3, 5) / 7).to(self.dtype)


@pytest.fixture
def encoded(monkeypatch, rng):
    """`encoded(dtype, store)`: rows 8, 2, 5, 0, 7 of a slice, two at a time, beside what the encoders give at once."""
    tiles = torch.from_numpy(rng.random((9, 3, 4, 4)).astype(np.float32))
    bins, rows = rng.integers(0, 9, (9, 6)), np.array([8, 2, 5, 0, 7])

    def batches(slices, spots, extra):
        of = np.asarray(spots)[:, 1]
        return [
            {"tiles": tiles[of[i : i + 2]], "bins": torch.from_numpy(extra["bins"][i : i + 2])}
            for i in range(0, len(of), 2)
        ]

    monkeypatch.setattr("utils.features.dataset.TileBatches", batches)
    monkeypatch.setattr("utils.features.dataset.loader", lambda batches, order, workers: batches)
    monkeypatch.setattr("utils.features.cache.to_float", lambda tiles, size: tiles)
    inference = Inference(SimpleNamespace(**vars(ACCELERATOR)), 2, 0)

    def run(dtype, store):
        model = Encoders(dtype)
        found = encode_pairs(model, None, bins, rows, inference, store)
        return found, (*model.encode_images(tiles[rows]), *model.encode_genes(torch.from_numpy(bins[rows])))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gib", [1, 1e-9])
def test_tokens_are_kept_in_their_precision_in_memory_or_on_disk(encoded, tmp_path, dtype, gib):
    found, (image, image_tokens, gene, gene_tokens) = encoded(dtype, ArrayStore(gib, tmp_path / "store"))
    assert found.image_tokens.dtype == found.gene_tokens.dtype == dtype
    assert torch.equal(found.image_tokens, image_tokens) and torch.equal(found.gene_tokens, gene_tokens)
    for vectors, expected in zip(found.vectors(), (image, gene), strict=True):
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, expected)
    assert (tmp_path / "store").exists() == (gib < 1)


def test_without_a_place_for_tokens_none_are_kept(encoded):
    found, (image, _, gene, _) = encoded(torch.float32, None)
    assert found.image_tokens is None and found.gene_tokens is None
    np.testing.assert_array_equal(np.stack(found.vectors()), np.stack([image, gene]))


def test_room_takes_the_bytes_of_its_precision(tmp_path):
    store = ArrayStore(1000 / 2**30, tmp_path)
    room = room_for(10, torch.empty(3, 5, 8, dtype=torch.bfloat16), store)
    assert room.shape == (10, 5, 8) and room.dtype == torch.bfloat16 and store.left == 200
