"""benchmarks/domain.py: figures known by hand, and its scores on simulated slices in a small form."""

import anndata
import numpy as np
import pytest

from benchmarks import domain, domain_kinds


def test_an_interval_is_over_slices():
    units = [{"slice": name, "flagged": value} for name, value in (("a", 0.0), ("a", 0.0), ("b", 1.0), ("b", 1.0))]
    mean = lambda some: float(np.mean([u["flagged"] for u in some]))  # noqa: E731
    assert domain.by_slide(units, mean, 0) == [0.0, 1.0]
    assert domain.by_slide(units[:2], mean, 0) == [0.0, 0.0]


def test_each_section_is_held_out_once_from_models_that_never_saw_it():
    sections = [domain.Section(name, name[0], None, None, 1.0) for name in ("C2", "C3", "C4", "C5", "B4")]
    models = domain.real_models(sections)
    assert [model.held_out for model in models] == [("C2",), ("C3",), ("C4",), ("C5",)]
    assert (models[3].train, models[3].calibrate) == (("C3", "C4"), "C2")
    for model in models:
        assert len({*model.train, model.calibrate, *model.held_out}) == 4 and model.unseen == ("B4",)
    with pytest.raises(ValueError, match="four slices of one patient"):
        domain.real_models(sections[2:])


def test_pen_and_glass_are_where_they_are_said_to_be(rng):
    pixels = np.full((600, 600, 3), 240, np.uint8)
    pixels[200:400, 200:400] = rng.integers(60, 200, (200, 200, 3))
    inked = domain_kinds.pen(pixels, 4.0, rng)
    xy = np.array([[100.0, 100.0], [300.0, 300.0]])
    expected = [
        (pixels[y - 50 : y + 50, x - 50 : x + 50] != inked[y - 50 : y + 50, x - 50 : x + 50]) for x, y in xy.astype(int)
    ]
    np.testing.assert_allclose(
        domain_kinds.changed(pixels, inked, xy, 100.0), [tile.any(2).mean() for tile in expected]
    )
    glass = domain_kinds.glass_spots(pixels, 60.0)
    assert len(glass) and (np.abs(glass - 300).max(1) > 110).all()


def test_spoilt_simulated_slices_are_flagged_and_the_slice_itself_is_not(simulated, monkeypatch):
    """A model of one simulated patient, calibrated on the second, on the third: the small form of the benchmark."""
    monkeypatch.setattr(domain, "TILE_UM", 112.0)
    settings = domain.parse_args(["--tile_px", "64"])
    sections = {s.name: s for s in domain.sections_of(simulated)}
    clean = {name: domain.clean_statistics(s, 64) for name, s in sections.items()}
    fitted = domain.fit(domain.Model(("P01_1",), "P02_1", ("P03_1",), ()), clean, 0)
    rows = domain.crop_of(sections["P03_1"], 0)
    spoilt = domain.spoilt_statistics(sections["P03_1"], rows, settings)
    units = {kind: domain.unit(kind, "m", "P03_1", values, fitted) for kind, values in spoilt.items()}
    own = domain.unit("clean", "m", "P03_1", clean["P03_1"][rows], fitted)
    assert own["n_spots"] == 60
    for kind in ("swap", "grey", "blur", "hue", "noise", "glass"):
        assert units[kind]["flagged"] > 0.5 and units[kind]["slide_score"] > own["slide_score"], kind
        assert units[kind]["warned"]
    lines = domain.summarise([own, *units.values()], 0)
    assert domain.score_table(lines).count("\n") == 2 + len(spoilt)
    assert all(line["auroc"] == 1 for line in lines if line["kind"] in ("swap", "grey", "noise"))


def test_coverage_and_width_are_those_of_the_layers(rng):
    measured, predicted = rng.normal(size=(2, 80, 5))
    adata = anndata.AnnData(predicted)
    for name, values in (("measured", measured), ("interval_low", predicted - 1), ("interval_high", predicted + 1)):
        adata.layers[name] = values
    adata.obsm["spatial"] = np.stack(np.meshgrid(np.arange(8), np.arange(10)), -1).reshape(-1, 2) * 100.0
    ends = {"measured_low": np.full(5, -2.0), "measured_high": np.full(5, 2.0)}
    line = domain.interval_line(adata, ends, "a", 0)
    expected = (np.abs(measured - predicted) <= 1).mean()
    assert line["intervals"]["coverage"] == pytest.approx(expected)
    assert line["intervals"]["width"] == pytest.approx(2) and line["unconditional"]["width"] == 4
    low, high = line["intervals"]["interval"]
    assert low < expected < high
