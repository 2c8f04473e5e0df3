"""Validation of stage two in train_decoder.py: its PCC of each gene against scipy, and genes that a slice lacks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from tiny_runs import data_flags, row

import train_decoder
from utils.features import dataset
from utils.features.neighbourhoods import FeatureBank
from utils.training import targets

N_GENES = 20


@pytest.fixture
def slices(prepared):
    """A slice with a validation strip, and one of which all is for validation; the second lacks gene 4."""
    rows = row("P01_1"), row("P03_1", "val")
    found = [dataset.load_slice(one, data_flags(prepared), ("target",), one.slice == "P01_1") for one in rows]
    found[1].panels["target"].measured[4] = False
    return found


def validated(slices):
    """PCC of each gene (G,), and truth and prediction per slice, (v, G) each; the predictions are noise."""
    predicted = torch.randn(sum(len(one.barcodes) for one in slices), N_GENES, generator=torch.manual_seed(0)).numpy()
    first = np.cumsum([0, *(len(one.barcodes) for one in slices)])
    bank = SimpleNamespace(first=first, spots_of=lambda *args: FeatureBank.spots_of(bank, *args))
    scale = {"target_mean": torch.zeros(N_GENES), "target_sd": torch.ones(N_GENES)}
    model = SimpleNamespace(eval=lambda: None, **scale)
    truth = targets.validation_residuals(slices)
    data = train_decoder.Data(slices, bank, np.zeros_like(predicted), np.zeros(0, int), truth)
    pcc, _ = train_decoder.validate(model, data, lambda _, spots: predicted[spots])
    return pcc, truth, [predicted[spots] for spots in bank.spots_of(slices, "val")]


def test_a_gene_is_judged_by_the_slices_that_measured_it(slices):
    pcc, truth, predicted = validated(slices)
    assert [len(one) for one in predicted] == [len(one.rows_of("val")) for one in slices]
    assert 0 < len(predicted[0]) < len(slices[0].barcodes), "a strip"
    for gene in range(N_GENES):
        of_slices = [pearsonr(p[:, gene], t[:, gene])[0] for p, t in zip(predicted, truth, strict=True)]
        expected = of_slices[0] if gene == 4 else np.mean(of_slices)
        assert pcc[gene] == pytest.approx(expected, abs=1e-5)


def test_a_gene_that_no_slice_measured_has_no_figure(slices):
    slices[0].panels["target"].measured[4] = False
    pcc, _, _ = validated(slices)
    assert np.flatnonzero(np.isnan(pcc)).tolist() == [4]


def test_a_validation_that_measured_no_target_gene_is_refused(slices):
    for one in slices:
        one.panels["target"].measured[:] = False
    with pytest.raises(ValueError, match=r"^P01_1, P03_1: expected target genes that validation measured, found none"):
        validated(slices)
