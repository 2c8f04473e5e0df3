"""utils.prediction.trust: what is flagged and warned of, and when validation tells nothing of other patients."""

import numpy as np
import pandas as pd
import pytest

from utils.prediction import trust


def state(*rows, strip=False, encoder=()):
    keys = ("slice", "patient", "part")
    table, encoder_table = ([dict(zip(keys, row, strict=True)) for row in rows] for rows in (rows, encoder))
    about = {"settings": {"val_strip": strip}, "domain_calibration": "validation slices"}
    return {"table": table, "encoder_table": encoder_table} | about


APART = [("a", "A", "train"), ("b", "B", "val"), ("c", "C", "test")]


def test_spots_beyond_the_limit_or_on_glass_are_flagged():
    flagged = trust.out_of_domain(np.array([0.5, 1.5, 0.5]), np.array([0.9, 0.9, 0.05]))
    assert flagged.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("n_far", "slide", "warned"), [(5, 0.9, False), (6, 0.9, True), (0, 1.1, True), (0, 0.9, False)]
)
def test_a_slide_is_warned_of_above_five_percent_or_by_its_own_test(n_far, slide, warned):
    score = np.where(np.arange(100) < n_far, 2.0, 0.5)
    found = trust.domain_of(score, slide, np.ones(100), [state(*APART)])
    assert found["warned"] is warned and found["flagged"] == n_far / 100
    assert ("do not rely" in found["verdict"]) is warned
    assert found["calibrated_on"] == "validation slices"


def test_validation_tells_of_other_patients_only_where_it_has_others():
    assert trust.shared_patients(state(*APART)) == []
    assert trust.shared_patients(state(*APART, ("a2", "A", "val"))) == ["A"]
    assert trust.shared_patients(state(APART[0], strip=True)) == ["A"]
    assert trust.shared_patients(state(*APART, encoder=[("b", "B", "train")])) == ["B"]
    assert trust.shared_patients(state(*APART, encoder=[("a", "A", "val")])) == []
    (reason,) = trust.genes_of([state(*APART), state(*APART, ("a2", "A", "val"))]).values()
    assert reason.startswith("not known: validation shares A ")


def test_predictable_genes_are_a_nullable_boolean():
    val_pcc = np.array([0.3, 0.05, np.nan])
    assert pd.Series(trust.predictable(val_pcc, known=True)).tolist() == [True, False, pd.NA]
    assert pd.Series(trust.predictable(val_pcc, known=False)).isna().all()
