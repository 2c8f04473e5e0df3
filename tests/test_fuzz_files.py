"""Whatever stands in a file of positions, scale factors, slices or counts: it is read, or refused in one line. Nothing
else happens. `python tests/torture.py` tries many more examples."""

import json
import string
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.evaluation import metrics
from utils.images import tiles
from utils.images.flat import ArrayLevel
from utils.images.image import TissueImage
from utils.slices import splits, visium

CELL = st.one_of(
    st.integers(-5, 10**7).map(str), st.floats().map(str), st.sampled_from(["", "1", "0", "x", '"', "NaN", "1e999"])
)
NAME = st.text(string.ascii_letters + string.digits + "-_ ./\\äé\x00", max_size=12)
LINE = st.lists(st.one_of(CELL, NAME), min_size=0, max_size=8).map(",".join)
VALUE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def flat_image(pixels: np.ndarray) -> TissueImage:
    """An image of these pixels without a file."""
    height, width = pixels.shape[:2]
    source = SimpleNamespace(width=width, height=height, um_per_px=None, notes=(), close=lambda: None)
    source.load = lambda huge: ([ArrayLevel(pixels)], ())
    return TissueImage(Path("he.png"), source)


def read_or_refused(read, *args) -> None:
    try:
        read(*args)
    except ValueError as error:
        assert str(error).strip(), "an error says something"


@pytest.fixture(scope="module")
def root(simulated, tmp_path_factory) -> Path:
    """A slice folder whose files are overwritten by every example."""
    import shutil

    out = tmp_path_factory.mktemp("fuzz") / "P01_1"
    shutil.copytree(simulated / "P01_1", out)
    return out


@given(lines=st.lists(LINE, max_size=6), junk=st.binary(max_size=30), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_positions(root, lines, junk, end):
    (path,) = (root / "spatial").glob("tissue_positions*.csv")
    path.write_bytes(end.join(lines).encode("utf-8", "surrogatepass") + junk)
    read_or_refused(visium.read_positions, root)


@given(found=VALUE, known=st.dictionaries(st.sampled_from(["tissue_hires_scalef", "tissue_lowres_scalef"]), VALUE))
def test_scale_factors(root, found, known):
    path = root / "spatial" / "scalefactors_json.json"
    path.write_text(json.dumps(found | known if isinstance(found, dict) else found))
    read_or_refused(visium.read_scalefactors, root)


@given(content=st.binary(max_size=80))
def test_scale_factors_of_any_bytes(root, content):
    (root / "spatial" / "scalefactors_json.json").write_bytes(content)
    read_or_refused(visium.read_scalefactors, root)


@given(
    head=st.sampled_from(["slice,patient,part", "slice,patient,part,spot_pitch_um,image", "slice", ""]),
    lines=st.lists(LINE, max_size=5),
    junk=st.binary(max_size=20),
)
def test_slices(simulated, tmp_path_factory, head, lines, junk):
    path = tmp_path_factory.getbasetemp() / "fuzz_slices.csv"
    path.write_bytes("\n".join([head, *lines]).encode("utf-8", "surrogatepass") + junk)
    read_or_refused(splits.read_table, simulated, path)


@given(data=st.data())
def test_counts_with_bytes_changed(simulated, tmp_path_factory, data):
    """A file of HDF5 with some bytes of another value, or cut off."""
    whole = bytearray((simulated / "P01_1" / "filtered_feature_bc_matrix.h5").read_bytes())
    for place in data.draw(st.lists(st.integers(0, min(len(whole), 6000) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    stop = data.draw(st.sampled_from([len(whole), len(whole) // 2, 2000]))
    path = tmp_path_factory.getbasetemp() / "fuzz.h5"
    path.write_bytes(bytes(whole[:stop]))
    read_or_refused(visium.read_matrix, path)


@given(
    x=st.floats(-500, 500),
    y=st.floats(-500, 500),
    crop=st.floats(1, 300),
    size=st.integers(1, 64),
    side=st.integers(1, 90),
)
def test_a_tile_of_anywhere_has_its_size_and_is_white_outside(x, y, crop, size, side):
    image = flat_image(np.full((side + 7, side, 3), (10, 20, 30), np.uint8))
    cut = tiles.Cut(source="fullres", image="he.png", um_per_px=1.0, crop=crop, size=size, resampled=True)
    tile = tiles.cut_tile(image, np.array([x, y]), cut)
    assert tile.shape == (size, size, 3)
    if abs(x - side / 2) > crop / 2 + side / 2 + 4 * max(crop / size, 1):
        assert (tile == 255).all()


@given(data=st.data())
def test_correlations_are_those_of_numpy_and_nan_where_flat(data):
    n = data.draw(st.integers(2, 12))
    values = st.lists(st.integers(-4, 4), min_size=n, max_size=n)
    one, other = (np.array(data.draw(values), float) for _ in range(2))
    found = metrics.pearson_per_gene(one[:, None], other[:, None])[0]
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-12)
