"""What a decoder's validation says: correlations as by hand, and the trade of error for variance."""

import json

import numpy as np
import pytest
from tiny_runs import Work


@pytest.fixture(scope="module")
def figures(trained, tmp_path_factory):
    """Test metrics of stage two trained alike but for --keep_variance."""
    found = {}
    for share in (0, 0.5, 1):
        work = Work(trained.data, trained.tiles, trained.panels, tmp_path_factory.mktemp("share"))
        flags = ("--encoder", trained.encoder, "--target", "residuals", "--Epoch", 1, "--keep_variance", share)
        work.run("train_decoder", *flags)
        work.run("decoder_similarity")
        metrics = json.loads((work.out / "results" / "similarity" / "metrics.json").read_text())
        found[share] = metrics["residuals"]["model"]
    return found


def test_variance_is_kept_at_the_cost_of_error(figures):
    ratio, error = ([figures[share][name] for share in (0, 0.5, 1)] for name in ("sd_ratio", "mse"))
    assert ratio == sorted(ratio) and error == sorted(error)
    assert ratio[0] < 0.7 and 0.6 < ratio[2] < 1.7, "what the validation slice tells of the test slice"


def test_correlations_do_not_change(figures):
    for name in ("pcc_gene_mean", "pcc_gene_median", "spearman_gene_mean"):
        np.testing.assert_allclose([one[name] for one in figures.values()], figures[0][name], atol=1e-6)
