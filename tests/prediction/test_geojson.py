"""Spots as GeoJSON: what QuPath's importer reads, nothing that JSON has no word for, a file that is whole or absent."""

import math
import uuid

import numpy as np
import pytest
from slide_runs import strict

from utils.prediction import geojson

OBJECT_TYPES = {"annotation", "detection", "cell", "tile", "tmaCore"}


def check_qupath(collection):
    """As QuPath 0.4 reads it (QuPathTypeAdapters.parseObject, ROITypeAdapters.parseGeometry); gives the features."""
    assert set(collection) == {"type", "features"} and collection["type"] == "FeatureCollection"
    for one in collection["features"]:
        assert set(one) <= {"type", "id", "geometry", "properties"} and one["type"] == "Feature"
        if "id" in one:
            uuid.UUID(one["id"])
        geometry, properties = one["geometry"], one["properties"]
        assert geometry["type"] == "Polygon" and set(geometry) <= {"type", "coordinates", "isEllipse"}
        for ring in geometry["coordinates"]:
            assert len(ring) >= 4 and ring[0] == ring[-1], "JTS refuses an open ring"
            assert all(len(point) == 2 and all(map(math.isfinite, point)) for point in ring)
        assert properties["objectType"] in OBJECT_TYPES and isinstance(properties["name"], str)
        assert all(isinstance(v, float) and math.isfinite(v) for v in properties["measurements"].values())
    return collection["features"]


def written(path, values, columns=("KRT8", "ERBB2")):
    n = len(values)
    xy = np.arange(2.0 * n).reshape(n, 2) * 100 + 0.125
    geojson.write_geojson(path, [f"{i}x{i}" for i in range(n)], xy, 55.0, columns, np.asarray(values))
    return strict(path.read_text())


def test_what_is_written_is_what_qupath_reads(tmp_path):
    first, second = check_qupath(written(tmp_path / "a.geojson", [[1.5, -2.25], [0.0, 123456.789]]))
    assert first["properties"]["name"] == "0x0" and first["properties"]["objectType"] == "detection"
    assert first["properties"]["measurements"] == {"KRT8": 1.5, "ERBB2": -2.25}
    assert second["properties"]["measurements"] == {"KRT8": 0.0, "ERBB2": 123460.0}, "five digits"
    assert [path.name for path in tmp_path.iterdir()] == ["a.geojson"]


@pytest.mark.parametrize("diameter", [55.0, 7.3])
def test_the_box_around_the_polygon_is_that_of_the_circle(diameter):
    ring = np.array(geojson.circle(1000.25, 20.5, diameter))
    np.testing.assert_allclose(ring.min(0), [1000.25 - diameter / 2, 20.5 - diameter / 2], atol=0.006)
    np.testing.assert_allclose(np.ptp(ring, axis=0), diameter, atol=0.011)
    assert len(ring) == geojson.CORNERS + 1


def test_a_value_that_json_cannot_hold_is_left_out(tmp_path):
    made = check_qupath(written(tmp_path / "a.geojson", [[np.nan, 1.0], [np.inf, -np.inf]]))
    assert [one["properties"]["measurements"] for one in made] == [{"ERBB2": 1.0}, {}]


def test_no_spots_and_odd_names(tmp_path):
    assert check_qupath(written(tmp_path / "a.geojson", np.zeros((0, 2)))) == []
    (only,) = check_qupath(written(tmp_path / "b.geojson", [[1.0]], columns=['µ"\\HLA-A']))
    assert only["properties"]["measurements"] == {'µ"\\HLA-A': 1.0}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.geojson"
    written(path, [[1.0, 2.0]])
    whole = path.read_bytes()
    monkeypatch.setattr(geojson, "feature", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        written(path, [[3.0, 4.0]])
    assert path.read_bytes() == whole
