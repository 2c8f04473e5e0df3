"""Whatever is kept is keyed by the content it was made from: each input is replaced in turn, and the cache notices.

The tiles themselves: test_tiles.py, "a second run".
"""

import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from spaceranger_folders import write_spatial
from tile_slices import INSIDE, SCALES, cut, grid_lines, write_slice

import predict_slide
import train_decoder
from utils.features import cache
from utils.files import hashing
from utils.files.hashing import content_hash
from utils.images.image import open_image
from utils.images.tiles import TilePack
from utils.prediction import layout, members
from utils.prediction.slide_features import kept_features
from utils.prediction.slides import Request

CPU = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", autocast=nullcontext)


def keep_size_and_time(path, data: bytes) -> None:
    """Other bytes under the same name, of the same length and time of change."""
    known = path.stat()
    path.write_bytes(data.ljust(known.st_size, b"\0"))
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))


def mirror(path) -> None:
    """Other pixels in a BMP: same size, name and time."""
    pixels = np.asarray(Image.open(path))[:, ::-1]
    known = path.stat()
    Image.fromarray(pixels).save(path, "BMP")
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert path.stat().st_size == known.st_size


def encode(tiles):
    """Tiles (B, 3, Z, Z) -> features (B, 2, 6) that say what the pixels are."""
    return tiles.flatten(2)[:, :2, :6]


# ---- the hash


def test_the_hash_is_sha256_of_all_bytes_up_to_its_limit(tmp_path, rng, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    assert content_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(hashing, "WHOLE", 3)
    assert content_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_of_a_larger_file_size_head_tail_and_blocks_between_are_hashed(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(hashing, "WHOLE", 1000)
    monkeypatch.setattr(hashing, "BLOCK", 10)
    monkeypatch.setattr(hashing, "BLOCKS", 11)
    data, path = rng.bytes(2010), tmp_path / "a.bin"
    path.write_bytes(data)
    first = content_hash(path)
    assert first.startswith("sampled-")
    seen = []
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if content_hash(path) != first:
            seen.append(place)
    assert seen == [start + i for start in range(0, 2001, 200) for i in range(10)]
    path.write_bytes(data + b"x")
    assert content_hash(path) != first
    (tmp_path / "b.bin").write_bytes(data)
    assert content_hash(tmp_path / "b.bin") == first, "neither name nor time count"


@pytest.mark.parametrize(
    ("index", "other"),
    [("s.mrxs", "s/Data0001.dat"), ("s.vms", "s_map2.jpg"), ("s.dcm", "level2.dcm")],
)
def test_a_slide_of_several_files_is_hashed_with_them(tmp_path, index, other):
    for name in (index, other, "alien.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"one")
    first = content_hash(tmp_path / index)
    (tmp_path / "alien.txt").write_bytes(b"two")
    assert content_hash(tmp_path / index) == first
    (tmp_path / other).write_bytes(b"two")
    second = content_hash(tmp_path / index)
    (tmp_path / index).write_bytes(b"two")
    assert len({first, second, content_hash(tmp_path / index)}) == 3


# ---- features that stage two keeps


@pytest.fixture
def slices(tmp_path):
    """A slice of six spots whose image is a BMP, cut into tiles."""
    data = write_slice(tmp_path / "data")
    path = data / "slice" / "he.png"
    Image.open(path).save(path, "BMP")
    (tmp_path / "encoder.pth").write_bytes(b"one encoder")
    return data


def stage_two(data, monkeypatch, *flags, precision="no", tta=1):
    """Features as train_decoder.py keeps them, and the slices that they were computed for."""
    pack, computed = TilePack(cut(data, *flags)), []
    one = SimpleNamespace(name="slice", pack=pack, barcodes=pack.barcodes, rows_of=lambda part: np.arange(6))

    def encode_slice(how, slice_):
        computed.append(slice_.name)
        yield how.encode(cache.to_float(torch.from_numpy(pack.read(np.arange(6))), how.size)).numpy()

    monkeypatch.setattr(cache, "encode_slice", encode_slice)
    model = SimpleNamespace(encode=encode, sizes=SimpleNamespace(image_size=8))
    args = SimpleNamespace(out=data.parent, encoder=data.parent / "encoder.pth", batch_size=6, workers=0, tta=tta)
    accelerator = SimpleNamespace(**vars(CPU) | {"mixed_precision": precision})
    found, _ = train_decoder.all_features(model, [one], accelerator, args)
    return np.array(found[0]), computed


def mirror_slice(data):
    """The image, and the hires image made of it."""
    mirror(data / "slice" / "he.png")
    hires = data / "slice" / "spatial" / "tissue_hires_image.png"
    Image.fromarray(np.asarray(Image.open(hires))[:, ::-1]).save(hires)


def move_spot(data):
    lines = grid_lines(INSIDE)
    write_spatial(data / "slice", [lines[0].replace("60.0,60.0", "66.0,60.0"), *lines[1:]], scales=SCALES)


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        (mirror_slice, ()),
        (move_spot, ()),
        (lambda data: None, ("--tile_um", 56)),
        (lambda data: keep_size_and_time(data.parent / "encoder.pth", b"two encoder"), ()),
    ],
    ids=["image", "spot", "cut", "encoder"],
)
def test_stage_twos_features_are_computed_anew_when_an_input_changes(slices, monkeypatch, change, flags):
    assert stage_two(slices, monkeypatch)[1] == ["slice"]
    assert stage_two(slices, monkeypatch)[1] == []
    change(slices)
    again, computed = stage_two(slices, monkeypatch, *flags)
    assert computed == ["slice"]
    shutil.rmtree(slices.parent / "features")
    np.testing.assert_array_equal(again, stage_two(slices, monkeypatch, *flags)[0])


@pytest.mark.parametrize("how", [{"precision": "bf16"}, {"tta": 2}])
def test_stage_twos_features_are_computed_anew_under_other_settings(slices, monkeypatch, how):
    stage_two(slices, monkeypatch)
    assert stage_two(slices, monkeypatch, **how)[1] == ["slice"]


# ---- features that a prediction keeps


def slide_features(path, out, xy, um_per_px=1.0, tile=(8, 1.0), encoder="e", precision="no"):
    """Features of spots on an image as predict_slide.py keeps them, and whether they were computed."""
    model = SimpleNamespace(encode=encode, sizes=SimpleNamespace(image_size=8, tta=1))
    member = members.Member(model, {"encoder_hash": encoder * 64, "tile_scale": tile, "scan_um_per_px": None}, "file")
    accelerator = SimpleNamespace(**vars(CPU) | {"mixed_precision": precision})
    run = members.Run([member], accelerator, "fp32", 4, 1, 1.0, False)
    names = np.array([f"s{i}" for i in range(len(xy))])
    spots = layout.SlideSpots(
        "slide", names, xy, np.zeros((len(xy), 2), int), 50.0, 30.0, um_per_px, 1.0, np.ones(len(xy))
    )
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.npy")}
    with open_image(path) as image:
        kept = np.array(kept_features(run, member, image, spots, out)[0])
    return kept, before != {file: file.stat().st_mtime_ns for file in out.rglob("*.npy")}


@pytest.mark.parametrize(
    "how",
    [
        {"xy": np.array([[60.0, 60.0], [90.0, 101.0]])},
        {"um_per_px": 0.5},
        {"tile": (8, 2.0)},
        {"encoder": "f"},
        {"precision": "bf16"},
        {},
    ],
    ids=["spot", "um per px", "tile scale", "encoder", "precision", "image"],
)
def test_a_predictions_features_are_computed_anew_when_an_input_changes(slices, tmp_path, how):
    path, out, same = slices / "slice" / "he.png", tmp_path / "out", {"xy": np.array([[60.0, 60.0], [90.0, 100.0]])}
    assert slide_features(path, out, **same)[1]
    assert not slide_features(path, out, **same)[1]
    if not how:
        mirror(path)
    again, computed = slide_features(path, out, **same | how)
    assert computed
    np.testing.assert_array_equal(again, slide_features(path, tmp_path / "fresh", **same | how)[0])


# ---- predictions that are done


@pytest.fixture
def request_of(simulated, tmp_path):
    """A slice folder with counts, positions of its own and a mask."""
    shutil.copytree(simulated / "P01_1", tmp_path / "P01_1")
    positions = next((tmp_path / "P01_1" / "spatial").glob("tissue_positions*"))
    shutil.copy(positions, tmp_path / "positions.csv")
    Image.new("L", (9, 9), 255).save(tmp_path / "mask.png")
    return Request(tmp_path / "P01_1", None, tmp_path / "positions.csv", tmp_path / "mask.png", None, "P01_1")


def done_key(request, decoder="hash"):
    run = SimpleNamespace(members=[SimpleNamespace(file_hash=decoder)])
    return predict_slide.result_key(layout.plan(request), run, predict_slide.parse_args(["slide", "--out", "out"]))


@pytest.mark.parametrize(
    "name",
    [
        *("P01_1/P01_1_he.jpg", "P01_1/filtered_feature_bc_matrix.h5", "positions.csv", "mask.png"),
        *(f"P01_1/spatial/{n}" for n in ("tissue_hires_image.png", "scalefactors_json.json", "tissue_positions.csv")),
    ],
)
def test_a_prediction_is_not_done_when_a_file_of_it_changes(request_of, tmp_path, name):
    first = done_key(request_of)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    assert done_key(request_of) == first, "time is no content"
    data = bytearray((tmp_path / name).read_bytes())
    place = data.index(b" ") if name.endswith("json") else len(data) - 1  # where JSON and CSV stay what they are
    data[place : place + 1] = b"\t" if name.endswith("json") else b"\r" if name.endswith("csv") else b"\xfe"
    keep_size_and_time(tmp_path / name, bytes(data))
    assert done_key(request_of) != first


def test_a_prediction_is_not_done_by_another_decoder(request_of):
    assert done_key(request_of) != done_key(request_of, "other")
