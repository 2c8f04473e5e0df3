"""expression.py: what counts, what leaves, what is null, and how slices are put together."""

import json

import numpy as np
import pytest

from utils.evaluation import expression, metrics

ALL = {"errors": True, "per_gene": True, "per_spot": True}


def made_up_slice(name, n_spots, n_genes=60, seed=0):
    rng = np.random.default_rng(seed)
    depth = rng.uniform(500, 5000, size=n_spots)
    rates = rng.dirichlet(np.ones(n_genes), size=n_spots)
    counts = rng.poisson(0.5 * depth[:, None] * rates)
    return {
        "name": name,
        "counts": counts,
        "total_counts": counts.sum(axis=1) + rng.poisson(depth / 2),
        "rows": np.arange(n_spots),
        "measured": np.ones(n_genes, dtype=bool),
    }


def made_up_predictions(slices, seed=1):
    rng = np.random.default_rng(seed)
    truth = [metrics.log1p_cp10k(s["counts"], s["total_counts"]) for s in slices]
    profile = np.mean(np.concatenate(truth), axis=0)
    return {
        "model": [t + rng.normal(size=t.shape) for t in truth],
        "mean": [np.tile(profile, (len(t), 1)) for t in truth],
        "depth": [np.repeat(np.log(s["total_counts"])[:, None], 60, axis=1) for s in slices],
    }


@pytest.fixture(scope="module")
def two_slices():
    return [made_up_slice("A", 40, seed=0), made_up_slice("B", 90, seed=1)]


def test_a_perfect_prediction_has_perfect_figures():
    true = np.random.default_rng(0).normal(size=(30, 55))
    found = expression.figures(true, true, np.arange(30.0), defined=np.ones(55, bool), **ALL)
    ones = {key: value for key, value in found.items() if key not in ("mse", "mae", "undefined_genes")}
    assert all(value == pytest.approx(1) for value in ones.values()), found
    assert found["mse"] == found["mae"] == found["undefined_genes"] == 0


def test_flat_predictions_count_as_zero_flat_measurements_and_missing_genes_leave():
    base = np.random.default_rng(1).normal(size=(20, 1))
    true = np.concatenate([base, base, np.full((20, 1), 3.0), np.full((20, 1), np.nan), base], axis=1)
    pred = np.concatenate([-base, np.full((20, 1), 0.1), base, base, base * np.nan], axis=1)
    defined = np.array([True, True, True, False, True])
    found = expression.figures(pred, true, np.arange(20.0), defined=defined, **ALL)
    assert found["pcc_gene_mean"] == pytest.approx(-1 / 3), "signs are kept"
    assert found["spearman_gene_mean"] == pytest.approx(-1 / 3)
    assert found["pcc_gene_median"] == 0
    assert found["undefined_genes"] == 2
    assert found["mse"] is None, "an error of NaN is not hidden"


def test_top50_is_the_mean_of_the_best_fifty_or_of_all():
    rng = np.random.default_rng(2)
    pred, true = rng.normal(size=(2, 25, 70))
    r = np.sort(metrics.pearson_per_gene(pred, true))
    found = expression.figures(pred, true, rng.normal(size=25), defined=np.ones(70, bool), **ALL)
    assert found["pcc_gene_top50"] == pytest.approx(r[20:].mean())
    few = expression.figures(pred[:, :9], true[:, :9], rng.normal(size=25), defined=np.ones(9, bool), **ALL)
    assert few["pcc_gene_top50"] == pytest.approx(few["pcc_gene_mean"])


def test_depth_explains_away_what_is_only_depth():
    rng = np.random.default_rng(3)
    depth = rng.normal(size=400)
    true = depth[:, None] + rng.normal(size=(400, 30))
    pred = depth[:, None] + 0.3 * rng.normal(size=(400, 30))
    found = expression.figures(pred, true, depth, defined=np.ones(30, bool), **ALL)
    assert found["pcc_gene_mean"] > 0.6
    assert abs(found["pcc_gene_given_depth"]) < 0.05


def test_a_slice_without_a_usable_gene_has_no_figures():
    found = expression.figures(np.ones((5, 2)), np.ones((5, 2)), np.ones(5), defined=np.ones(2, bool), **ALL)
    assert found == dict.fromkeys(expression.FIGURES) | {"undefined_genes": 0}


def test_figures_do_not_depend_on_the_order_of_spots(two_slices):
    pred, s = made_up_predictions(two_slices)["model"][0], two_slices[0]
    true, depth, order = metrics.log1p_cp10k(s["counts"], s["total_counts"]), np.log(s["total_counts"]), np.arange(40)
    order = np.random.default_rng(0).permutation(order)
    first = expression.figures(pred, true, depth, defined=s["measured"], **ALL)
    second = expression.figures(pred[order], true[order], depth[order], defined=s["measured"], **ALL)
    assert first == pytest.approx(second)


def test_evaluate_means_over_slices_and_nulls_what_methods_cannot_have(two_slices):
    found = expression.evaluate(made_up_predictions(two_slices), two_slices, "lognorm")
    assert (found["n_spots"], found["n_genes"]) == (130, 60)
    a, b = (found["per_slice"][name]["lognorm"]["model"] for name in "AB")
    top = found["lognorm"]["model"]
    assert top["pcc_gene_mean"] == pytest.approx((a["pcc_gene_mean"] + b["pcc_gene_mean"]) / 2)
    assert top["mse"] == pytest.approx(1, rel=0.1)
    for scale in ("residuals", "counts"):
        model = found[scale]["model"]
        assert [key for key in expression.FIGURES if model[key] is None] == ["mse", "mae", "sd_ratio"]
    assert {key for key, value in found["lognorm"]["mean"].items() if value is None} == {
        *("pcc_gene_mean", "pcc_gene_median", "pcc_gene_top50", "pcc_gene_given_depth"),
        *("spearman_gene_mean", "sd_ratio"),
    }
    assert found["lognorm"]["mean"]["undefined_genes"] == 120, "a sum over slices"
    assert {key for key, value in found["lognorm"]["depth"].items() if value is None} == {
        *("pcc_gene_given_depth", "pcc_spot_mean", "mse", "mae", "sd_ratio")
    }
    json.dumps(found, allow_nan=False)


def test_pooled_figures_take_all_spots_and_the_genes_measured_everywhere(two_slices):
    predictions, (a, b) = made_up_predictions(two_slices), two_slices
    lacking = dict(b, measured=np.arange(60) != 7, counts=np.where(np.arange(60) == 7, np.nan, b["counts"]))
    found = expression.evaluate(predictions, [a, lacking], "lognorm")
    keep = np.arange(60) != 7
    true = np.concatenate([metrics.log1p_cp10k(s["counts"], s["total_counts"]) for s in two_slices])[:, keep]
    r = metrics.pearson_per_gene(np.concatenate(predictions["model"])[:, keep], true)
    assert found["pooled"]["lognorm"]["model"]["pcc_gene_mean"] == pytest.approx(r.mean())
    assert found["n_genes"] == 60
    json.dumps(found, allow_nan=False)


def test_residuals_of_some_spots_are_those_of_the_whole_slice():
    whole = made_up_slice("A", 90)
    rows = np.arange(20, 45)
    residuals = metrics.to_scale("residuals", whole["counts"], whole["total_counts"])
    found = expression.evaluate({"model": [residuals[rows]]}, [dict(whole, rows=rows)], "residuals")
    assert found["n_spots"] == 25
    assert found["residuals"]["model"]["mse"] == 0 and found["residuals"]["model"]["pcc_gene_mean"] == pytest.approx(1)
    table = expression.per_gene_table({"model": [residuals[rows]]}, [dict(whole, rows=rows)], ["G"] * 60)
    assert table["pcc_residuals_model"].to_numpy() == pytest.approx(np.ones(60))


def test_mean_over_slices_uses_the_slices_that_have_a_figure():
    empty = dict.fromkeys(expression.FIGURES) | {"undefined_genes": 0}
    full = dict.fromkeys(expression.FIGURES, 0.5) | {"undefined_genes": 3}
    mean = expression.mean_figures([empty, full, full])
    assert mean["mse"] == 0.5 and mean["undefined_genes"] == 6
    assert expression.mean_figures([empty])["mse"] is None


def test_per_gene_table_means_over_the_slices_that_measured_the_gene(two_slices):
    a, b = two_slices
    predictions = made_up_predictions(two_slices)
    lacking = dict(b, measured=np.arange(60) != 0)
    table = expression.per_gene_table(predictions, [a, lacking], [f"G{i}" for i in range(60)])
    assert list(table.columns[:3]) == ["gene", "n_slices", "counts_per_10k"]
    scales = ("lognorm", "residuals", "counts")
    assert list(table.columns[3:]) == [f"pcc_{s}_{row}" for s in scales for row in ("model", "depth")]
    truth = [metrics.log1p_cp10k(s["counts"], s["total_counts"]) for s in two_slices]
    r = [metrics.pearson_per_gene(p, t) for p, t in zip(predictions["model"], truth, strict=True)]
    assert table["pcc_lognorm_model"][0] == pytest.approx(r[0][0]) and table["n_slices"][0] == 1
    assert table["pcc_lognorm_model"][1] == pytest.approx((r[0][1] + r[1][1]) / 2)
    per_10k = metrics.counts_per_10k(a["counts"], a["total_counts"])[:, 0].mean()
    assert table["counts_per_10k"][0] == pytest.approx(per_10k)


def test_json_values_leave_nothing_json_cannot_say():
    values = {1: np.float32(0.5), "a": (np.nan, np.inf, np.int64(2)), "b": np.array([1.0, np.nan])}
    found = expression.json_values(values)
    assert found == {"1": 0.5, "a": [None, None, 2], "b": [1.0, None]}
    assert expression.json_values({"flag": np.bool_(True), "text": "x", "none": None})["flag"] is True


def test_wrong_input_is_named(two_slices):
    predictions = made_up_predictions(two_slices)
    with pytest.raises(ValueError, match="fitted_scale"):
        expression.evaluate(predictions, two_slices, "log")
    with pytest.raises(ValueError, match=r"model: expected .*\(90, 60\)"):
        expression.evaluate({"model": predictions["model"][:1]}, two_slices, "lognorm")
    with pytest.raises(ValueError, match="names of their own"):
        expression.evaluate(predictions, [two_slices[0]] * 2, "lognorm")
