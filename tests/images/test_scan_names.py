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
