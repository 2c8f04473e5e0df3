"""One section or several: which column of obs tells joined sections apart, and which library is whose."""

import anndata
import numpy as np
import pandas as pd
import pytest
from spaceranger_folders import refused

from utils.importers import anndata_sections as sections

PLACES = np.array([(row, column) for row in range(6) for column in range(row % 2, 16, 2)])
PIXELS = np.column_stack([PLACES[:, 1] * 50.0, PLACES[:, 0] * 50 * np.sqrt(3)]) + 100
N = len(PLACES)
TWO = np.repeat(["a", "b"], N)


def joined(shift=(0.0, 0.0), **columns):
    """obs, pixels and places of two sections, the second of which is shifted; some columns of one section each."""
    obs = pd.DataFrame(columns, index=[f"{i}" for i in range(2 * N)])
    return obs, np.vstack([PIXELS, PIXELS + shift]), np.vstack([PLACES, PLACES])


INTERLEAVED = np.resize(["x", "y", "z"], 2 * N)


@pytest.mark.parametrize("shift", [(0, 0), (3.3, 1.2), (50, 28.9), (5000.5, 13.1)])
@pytest.mark.parametrize("name", ["library_id", "Library ID", "sample", "batch", "orig.ident", "anything"])
def test_the_column_that_separates_joined_sections(shift, name):
    obs, xy_px, array = joined(shift, cluster=INTERLEAVED, **{name: TWO})
    assert sections.separating_column(obs, {}, xy_px, array) == name
    message = refused("x.h5ad: expected one section", sections.check_one_section, "x.h5ad", obs, {}, xy_px, array)
    assert f"found 2 that obs['{name}'] tells apart (a, b); split them with --library_key {name}" in message


@pytest.mark.parametrize("shift", [(0, 0), (3.3, 1.2), (50, 28.9)])
def test_without_places_pixels_tell(shift):
    obs, xy_px, _ = joined(shift, cluster=INTERLEAVED, sample=TWO)
    assert sections.separating_column(obs, {}, xy_px, None) == "sample"
    obs = obs.rename(columns={"sample": "Sample ID"})
    assert sections.separating_column(obs, {}, xy_px, None) == "Sample ID"


def test_sections_side_by_side_on_no_lattice():
    obs, xy_px, _ = joined(cluster=INTERLEAVED, sample=TWO)
    xy_px[N:] = PIXELS @ np.array([[0.8, 0.6], [-0.6, 0.8]]) + (3000, 40)
    assert sections.separating_column(obs, {}, xy_px, None) == "sample"
    assert sections.separating_column(obs.rename(columns={"sample": "annotation"}), {}, xy_px, None) is None


def test_the_surest_and_coarsest_column_is_named():
    each = np.array([f"{section}{cluster}" for section, cluster in zip(TWO, INTERLEAVED, strict=True)])
    obs, xy_px, array = joined(cluster=INTERLEAVED, fine=each, coarse=TWO)
    assert sections.separating_column(obs, {}, xy_px, array) == "coarse"
    assert sections.separating_column(obs.assign(batch=TWO), {}, xy_px, array) == "batch"
    assert sections.separating_column(obs.assign(batch=TWO, library_id=TWO), {}, xy_px, array) == "library_id"


def test_a_column_of_libraries_is_believed_wherever_the_sections_lie():
    obs, xy_px, array = joined((1600, 0), library_id=TWO)
    array[N:, 1] += 32  # as if it were one wide array
    assert sections.separating_column(obs, {}, xy_px, array) == "library_id"
    obs = obs.rename(columns={"library_id": "unusual"})
    assert sections.separating_column(obs, {}, xy_px, array) is None
    assert sections.separating_column(obs, {"a": {}, "b": {}}, xy_px, array) == "unusual"


@pytest.mark.parametrize("name", ["sample", "batch", "section", "patient", "leiden"])
def test_columns_within_one_section_are_none(name):
    for labels in (np.resize(["x", "y", "z"], N), np.where(PLACES[:, 0] < 3, "x", "y"), np.full(N, "x"), np.arange(N)):
        obs = pd.DataFrame({name: labels})
        assert sections.separating_column(obs, {}, PIXELS, PLACES) is None
        assert sections.separating_column(obs, {}, PIXELS, None) is None


def test_sections_that_no_column_separates():
    obs, xy_px, array = joined((3.3, 1.2), cluster=INTERLEAVED, score=np.linspace(0, 1, 2 * N))
    assert sections.separating_column(obs, {}, xy_px, array) is None
    labels = np.where(np.arange(2 * N) < N - 5, "a", "b")  # leaves spots on each other
    assert sections.separating_column(obs.assign(sample=labels), {}, xy_px, array) is None


def test_chosen_spots_of_one_section_are_one_section():
    """Every second place, numbered on: neighbours in a column are one pitch apart, in a row two."""
    places = np.array([(row, column) for row in range(12) for column in range(row % 2, 12, 2)])[3:]
    numbers = np.arange(len(places))
    obs = pd.DataFrame({"array_row": numbers // 9, "array_col": numbers % 9, "stripe": places[:, 0] % 3})
    for xy_px in (places * 100.0, places * (100.0, 200.0)):
        assert sections.separating_column(obs, {}, xy_px, obs[["array_row", "array_col"]].to_numpy()) is None


@pytest.mark.parametrize("values", [(0, 1), (0.0, 1.0), (False, True), ("0", "1")])
def test_a_column_of_numbers_separates_sections(values):
    obs, xy_px, array = joined(batch=np.repeat(values, N))
    message = refused("expected one section", sections.check_one_section, "x", obs, {}, xy_px, array)
    assert "split them with --library_key batch" in message and ".0" not in message
    names = [name for name, _ in sections.split("x", anndata.AnnData(np.ones((2 * N, 1)), obs=obs), "batch", "a")]
    assert names == (["False", "True"] if values[0] is False else ["a_0", "a_1"])


def test_sections_without_any_column_are_refused():
    obs, xy_px, array = joined()
    refused("found two spots at one pixel and no column", sections.check_one_section, "x", obs, {}, xy_px, array)
    obs.index = [f"{i}" for i in range(N)] * 2
    xy_px[N:] += (3.3, 1.2)
    refused("found the barcode 0 again and no column", sections.check_one_section, "x", obs, {}, xy_px, array)


def entry(width):
    return {"images": {"hires": np.zeros((width, width, 3))}, "scalefactors": {"tissue_hires_scalef": 1.0}}


def adata_with(uns):
    return anndata.AnnData(np.ones((2, 2)), uns={"spatial": uns})


def test_libraries_of_uns():
    one = entry(9)
    uns = {"is_single": np.True_, "A": one, "empty": {}, "note": "text"}
    assert list(sections.libraries("x", adata_with(uns))) == ["A"]
    assert sections.libraries("x", adata_with(one)) == {"": one}, "without a library's name"
    assert sections.libraries("x", anndata.AnnData(np.ones((2, 2)))) == {}
    refused("x: expected one section, found .*is_single", sections.libraries, "x", adata_with({"is_single": np.False_}))


@pytest.mark.parametrize(
    ("columns", "fitting", "wanted"),
    [
        ({"library_id": "B"}, [], "B"),
        ({"sample": "B", "patient": "P"}, ["A", "B"], "B"),
        ({"library_id": "B", "sample": "A"}, ["A"], "B"),
        ({"library_id": "0"}, ["A"], "A"),
        ({}, ["B"], "B"),
        ({"in_tissue": 1, "array_row": 0, "batch": 1}, [], "1"),  # of 0 and 1, as batches are numbered
        ({"in_tissue": 1, "batch": 0.0}, ["1"], "0"),
    ],
)
def test_the_library_of_the_section(columns, fitting, wanted):
    found = {"A": {"images": 1}, "B": {"images": 2}} if wanted in "AB" else {"0": {"images": 1}, "1": {"images": 2}}
    obs = pd.DataFrame(columns, index=["s", "t"])
    assert sections.choose_library("x", found, obs, fitting) is found[wanted]


def test_the_column_that_sections_were_split_by_names_the_library():
    found = {"A": {"images": 1}, "B": {"images": 2}}
    obs = pd.DataFrame({"library_id": "A", "mine": "B"}, index=["s", "t"])
    assert sections.choose_library("x", found, obs, ["A"], "mine") is found["B"]
    obs = pd.DataFrame({"library_id": "A", "sample": "S1"}, index=["s", "t"])
    assert sections.choose_library("x", found, obs, ["A", "B"], "sample") is found["A"], "another column names it"


def test_a_library_that_cannot_be_told_is_refused():
    found = {"A": {}, "B": {}}
    for columns, fitting in (({}, []), ({}, ["A", "B"]), ({"library_id": ["A", "B"]}, ["A", "B"])):
        obs = pd.DataFrame(columns, index=["s", "t"])
        refused("x.h5ad: .*found A, B and no column", sections.choose_library, "x.h5ad", found, obs, fitting)
    assert sections.choose_library("x", {"A": found}, pd.DataFrame({"library_id": ["Z", "Z"]}), []) is found
    assert sections.choose_library("x", {}, pd.DataFrame(), []) == {}


def test_split_names_and_spots():
    adata = anndata.AnnData(np.ones((6, 2)), obs=pd.DataFrame({"key": ["S1", "2", "S1", "a/b", "2", "S1"]}))
    parts = sections.split("x", adata, "key", "joined")
    assert [(name, np.flatnonzero(spots).tolist()) for name, spots in parts] == [
        ("S1", [0, 2, 5]),
        ("joined_2", [1, 4]),
        ("a_b", [3]),
    ]
    refused("x: expected the column nope of --library_key in obs, found key", sections.split, "x", adata, "nope", "j")
    adata.obs["key"] = ["a/b", "a b", None, "c", "c", "c"]
    refused("x: expected a section for each spot in obs.*found 1 without", sections.split, "x", adata, "key", "j")
    adata.obs["key"] = ["a/b", "a b", "d", "c", "c", "c"]
    refused("names of their own, found .* for a_b", sections.split, "x", adata, "key", "j")


@pytest.mark.parametrize(
    ("stated", "columns", "wanted"),
    [
        ("P 1", {}, "P 1"),
        (3, {}, "3"),
        (3.0, {}, "3"),
        (float("nan"), {}, "slice"),
        ("   ", {}, "slice"),
        ("nan", {}, "slice"),
        (None, {"patient": "P2"}, "P2"),
        (None, {"donor_id": "D7"}, "D7"),
        (None, {"Patient_ID": 4.0}, "4"),
        *[(None, {name: "P3"}, "P3") for name in ("Patient ID", "patient.id", "donorID", "Donor ID", "subject.id")],
        *[(None, {name: "P3"}, "P3") for name in ("participant_id", "case_id", "patient-0")],
        (None, {"donor_id": "D7", "Patient ID": "P3"}, "P3"),
        (None, {"case": "control", "patients": "P3", "patient_age": 60}, "slice"),
        (None, {"donor_id": "unknown"}, "slice"),
        (None, {"patient": ["P1", "P2"]}, "slice"),
    ],
)
def test_the_patient(stated, columns, wanted):
    assert sections.patient_of(pd.DataFrame(columns, index=["s", "t"]), stated, "slice") == wanted
