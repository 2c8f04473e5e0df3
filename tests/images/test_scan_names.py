"""Images of a TIFF that are named label, macro, overview and the like are never the scan, however it is written."""

import numpy as np
import pytest
import tifffile

from utils.images.image import open_image


def write(path, *named):
    """An OME-TIFF of (name, width, height, grey level) images."""
    with tifffile.TiffWriter(path, ome=True) as file:
        for name, width, height, level in named:
            pixels = np.full((height, width, 3), level, np.uint8)
            file.write(pixels, photometric="rgb", metadata={"axes": "YXS", "Name": name})


NAMES = (
    *"label LabelImage SlideLabel slide_label labels MacroImage macroimage Macro1 ThumbnailImage Thumbnail1".split(),
    *"overviewImage OVERVIEW SlidePreview slidepreview preview_img barcode LBL map".split(),
    *("Barcode image", "Series 0: label"),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_named_aside_is_not_the_scan(tmp_path, name):
    write(tmp_path / "a.ome.tif", (name, 90, 90, 10), ("Scan", 70, 50, 200))
    with open_image(tmp_path / "a.ome.tif") as image:
        assert (image.width, image.height) == (70, 50) and (image.crop(0, 0, 70, 50) == 200).all()


@pytest.mark.parametrize("name", ["Label-free H&E", "Macrophages 20x", "Mapping_1", "unlabelled", "sample 3"])
def test_a_scan_with_such_letters_in_its_name_is_one(tmp_path, name):
    write(tmp_path / "a.ome.tif", ("overview", 30, 20, 10), (name, 70, 50, 200))
    with open_image(tmp_path / "a.ome.tif") as image:
        assert (image.width, image.height) == (70, 50)


SCANS = (
    "Sample type: macro-dissected tumour, H&E, Hamamatsu S360, scanned at 20x in 2024",
    "File name: Overview_S12.mrxs, Sample type: label free, stain H&E, scanner P1000, 20x",
    "Miniature pig skin, H&E",
    '{"associated": [{"name": "macro", "type": "macro"}], "stain": "H&E"}',
    '{"slide": {"label": {"type": "barcode", "text": "S12"}}, "name": "S12"}',
    '<Slide><Barcode type="label">S12</Barcode><Stain>H&amp;E</Stain></Slide>',
)


@pytest.mark.parametrize("description", SCANS)
def test_a_scan_whose_description_speaks_of_such_images_is_one(tmp_path, description):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.full((50, 70, 3), 200, np.uint8), photometric="rgb", description=description, metadata=None)
        file.write(np.full((40, 30, 3), 10, np.uint8), photometric="rgb", metadata=None)
    with open_image(tmp_path / "a.tif") as image:
        assert (image.width, image.height) == (70, 50)


def test_annotations_of_an_ome_tiff_are_not_of_its_first_image(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        about = {"axes": "YXS", "Name": "scan", "MapAnnotation": {"Type": "macro"}}
        file.write(np.full((50, 70, 3), 200, np.uint8), photometric="rgb", metadata=about)
        file.write(np.full((40, 30, 3), 10, np.uint8), photometric="rgb", metadata={"axes": "YXS", "Name": "other"})
    with open_image(tmp_path / "a.ome.tif") as image:
        assert (image.width, image.height) == (70, 50)
