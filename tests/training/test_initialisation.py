"""Warm start of stage one: both sides start as ridge on components of expression, against scikit-learn."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from small_stage_one import SIDE, stage_one
from tiny_runs import LAST, Work, data_flags, row, stderr_line

from utils.evaluation import ridge
from utils.features import dataset
from utils.features.cache import Inference, to_float
from utils.genes import panels as gene_panels
from utils.training import checkpoint, initialisation, targets

RANK = 4
ACCELERATOR = SimpleNamespace(autocast=nullcontext, device=torch.device("cpu"))
PARTS = ("train", "val")


@pytest.fixture(scope="module")
def slices(prepared):
    """One that trains and validates, one that trains, one that validates."""
    rows = row("P01_1"), row("P02_1"), row("P03_1", "val")
    flags, roles = data_flags(prepared), ("input", "target")
    return [dataset.load_slice(one, flags, roles, val_strip=one.slice == "P01_1") for one in rows]


def begun(slices, seed=0):
    """A model after its warm start, its components and the report; bins were measured before, as in training."""
    model = stage_one(n_genes=50, n_components=RANK)
    bins = [one.bins() for one in slices]
    train = torch.from_numpy(np.concatenate(of_part(slices, bins, "train"))).float()
    model.gene_encoder.linear_path[0].measure(train.mean(0), train.std(0, correction=0))
    components, inference = targets.components(slices, RANK), Inference(ACCELERATOR, 16, 0)
    report = initialisation.warm_start_stage_one(model, slices, bins, components, inference, seed)
    return model, components, report


def of_part(slices, values, part):
    """Rows of a part, per slice that has any."""
    return [own[one.rows_of(part)] for one, own in zip(slices, values, strict=True) if len(one.rows_of(part))]


@torch.no_grad()
def inputs(model, slices):
    """Per slice: pooled features (S, C) of the images as the model is, standardised bins (S, G)."""
    model.eval()
    tiles = [to_float(torch.from_numpy(one.pack.read(one.tile_rows)), SIDE) for one in slices]
    images = [model.image_encoder.features(some)[0] for some in tiles]
    profiles = [model.gene_encoder.linear_path[0](torch.from_numpy(one.bins()).float()) for one in slices]
    return images, profiles


def slow_ridge(slices, x, of):
    """Scikit-learn's with the least squared error on validation: (its PCC, its predictions of each slice)."""
    scores = [of.scores(targets.residuals(one)) for one in slices]
    y_train, y_val = (of_part(slices, scores, part) for part in PARTS)
    found = []
    for penalty in ridge.PENALTIES:
        fitted = Ridge(alpha=penalty).fit(np.concatenate(of_part(slices, x, "train")), np.concatenate(y_train))
        seen = [fitted.predict(part) for part in of_part(slices, x, "val")]
        error = np.mean([np.mean((p - y) ** 2) for p, y in zip(seen, y_val, strict=True)])
        found.append((error, -penalty, ridge.validation_pcc(seen, y_val), [fitted.predict(part) for part in x]))
    return min(found, key=lambda one: one[:2])[2:]


@torch.no_grad()
def test_both_sides_read_the_components_as_ridge_does(slices):
    model, of, said = begun(slices)
    images, profiles = inputs(model, slices)
    seen = np.concatenate(of_part(slices, images, "train"))
    standardised = [(one.numpy().astype(float) - seen.mean(0)) / np.maximum(seen.std(0), 1e-3) for one in images]
    expected = slow_ridge(slices, standardised, of), slow_ridge(slices, [one.double().numpy() for one in profiles], of)
    layers = model.image_encoder.to_vector, model.gene_encoder.linear_path[1]
    for layer, x, (_, predicted) in zip(layers, (images, profiles), expected, strict=True):
        for own, slow in zip(x, predicted, strict=True):
            np.testing.assert_allclose(layer(own)[:, :RANK], slow, atol=1e-3)
    told = [float(text) for text in re.findall(r"\d\.\d+", said)]
    assert told == pytest.approx([pcc for pcc, _ in expected], abs=2e-3)


@torch.no_grad()
def test_the_other_dimensions_are_small_and_centred(slices):
    fresh, (model, _, _) = stage_one(n_genes=50, n_components=RANK), begun(slices)
    images, _ = inputs(model, slices)
    rest = model.image_encoder.to_vector(torch.cat(of_part(slices, images, "train")))[:, RANK:]
    torch.testing.assert_close(rest.mean(0), torch.zeros(rest.shape[1]), atol=1e-4, rtol=0)
    expected = initialisation.REST * fresh.image_encoder.to_vector.weight[RANK:]
    torch.testing.assert_close(model.image_encoder.to_vector.weight[RANK:], expected)
    assert not model.gene_encoder.linear_path(torch.from_numpy(slices[0].bins()).float())[:, RANK:].any()
    gathered, before = model.gene_encoder.gather.to_vector, fresh.gene_encoder.gather.to_vector
    torch.testing.assert_close(gathered.weight, initialisation.REST * before.weight)
    assert not gathered.bias.any()


@torch.no_grad()
def test_the_expression_that_is_read_off_is_that_of_the_components(slices):
    """As train_scores has it: what both sides are trained on is where they are."""
    model, of, _ = begun(slices)
    images, _ = inputs(model, slices)
    vector = model.image_encoder.to_vector(images[0])
    torch.testing.assert_close(model.to_expression(vector), vector[:, :RANK] * torch.from_numpy(of.weights).float())


def test_the_linear_path_is_solved_and_frozen(slices):
    model, _, _ = begun(slices)
    frozen = {name for name, p in model.gene_encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"linear_path.1.weight", "linear_path.1.bias"}
    assert all(p.requires_grad for p in model.image_encoder.parameters())
    assert all(p.requires_grad for p in model.to_expression.parameters())


def test_images_and_profiles_are_aligned_before_the_first_step(slices):
    """Cosines of the spots' own pairs are above those of other pairs, where an untrained model has no such order."""
    rows = slices[1].rows_of("train")
    tiles = to_float(torch.from_numpy(slices[1].pack.read(slices[1].tile_rows[rows])), SIDE)
    bins = torch.from_numpy(slices[1].bins()[rows])
    margins = []
    for model in (stage_one(n_genes=50, n_components=RANK), begun(slices)[0]):
        with torch.no_grad():
            cosine = model.eval().encode_images(tiles)[0] @ model.encode_genes(bins)[0].T
        margins.append((cosine.diagonal().mean() - cosine.mean()).item())
    assert margins[1] > 0.1 > abs(margins[0])


def test_many_spots_are_drawn_from_by_the_seed(slices, monkeypatch):
    monkeypatch.setattr(initialisation, "START_SPOTS", 60)
    weights = [begun(slices, seed)[0].image_encoder.to_vector.weight[:RANK] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-4)


def test_every_slice_is_drawn_from_however_few_its_spots(slices, monkeypatch):
    monkeypatch.setattr(initialisation, "START_SPOTS", 1)
    seen, pooled = [], initialisation.pooled

    def recorded(model, slices, spots, *rest):
        seen.append(spots[:, 0].tolist())
        return pooled(model, slices, spots, *rest)

    monkeypatch.setattr(initialisation, "pooled", recorded)
    begun(slices)
    assert sorted(seen) == [[0], [0], [1], [2]]


def test_a_regression_is_placed_in_the_units_of_the_layers_inputs(rng):
    mean, sd = rng.normal(size=5) * 10, rng.uniform(0.5, 3, size=5)
    of = ridge.Ridge(rng.normal(size=5), rng.normal(size=2), rng.normal(size=(5, 2)), 1.0, 0.5)
    x = rng.normal(size=(7, 5)) * sd + mean
    layer = torch.nn.Linear(5, 6, dtype=torch.double)
    rest = layer.weight[2:].detach().clone()
    with torch.no_grad():
        initialisation.place(layer, of, (mean, sd))
        found = layer(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(found[:, :2], of.predict((x - mean) / sd))
        np.testing.assert_allclose(found[:, 2:], (x - mean) @ (initialisation.REST * rest).numpy().T, atol=1e-12)
    weight, bias = initialisation.weight_and_bias(of)
    np.testing.assert_allclose(x @ weight.T + bias, of.predict(x))


# ---- in a run of stage one


def last_epoch(work):
    return checkpoint.load(work.encoder.with_name(LAST), "stage_one", "--encoder")


def test_without_expression_stage_one_needs_no_target_genes(work):
    for path in work.panels.rglob(gene_panels.FILES["target"]):
        path.unlink()
    work.run("train_mymodel", "--Epoch", 1, "--expression_weight", 0)
    found = last_epoch(work)
    assert found["sizes"]["n_components"] == 0 and not [name for name in found["model"] if "to_expression" in name]


def test_no_more_components_are_learnt_than_there_are_target_genes(prepared, tmp_path):
    work = Work(prepared.data, prepared.tiles, prepared.panels, tmp_path)
    work.run("train_mymodel", "--Epoch", 1, "--components", 25)
    assert last_epoch(work)["sizes"]["n_components"] == 20


def test_more_components_than_the_shared_space_is_wide_are_refused(prepared, tmp_path, capsys):
    work = Work(prepared.data, prepared.tiles, prepared.panels, tmp_path)
    capsys.readouterr()
    assert work.exit_code("train_mymodel", "--Epoch", 1, "--components", 20, "--width", 16) == 2
    stderr_line(capsys, "--components: expected at most --width 16, found 20")
