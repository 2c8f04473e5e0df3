"""Peak memory of image_tilling.py on large TIFFs. With -s the figures of docs/images.md are printed.

python -m pytest -m slow -s tests/images/test_tiling_memory.py
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from big_slide import write_big_slide
from spaceranger_folders import write_spatial

SIDE, SPOTS, LIMIT_MIB = 30_000, 4992, 1000
SCALES = {"tissue_hires_scalef": 2000 / SIDE, "tissue_lowres_scalef": 600 / SIDE, "spot_diameter_fullres": 200.0}
CODE = """
import re, sys, time, image_tilling
from pathlib import Path
start = time.perf_counter()
image_tilling.main(image_tilling.parse_args(sys.argv[1:]))
peak_kib = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]  # not its parent's
print(time.perf_counter() - start, int(peak_kib) / 2**10)
"""


def write_slice(folder: Path) -> None:
    """4,992 spots of a Visium array over the whole image, in an order that has nothing to do with their places."""
    row, col = np.divmod(np.arange(SPOTS), 64)
    col = 2 * col + row % 2
    y, x = 300 + row * 376, 300 + col * 230
    shuffled = np.random.default_rng(0).permutation(SPOTS)
    lines = [f"S{i:04d}-1,1,{row[k]},{col[k]},{y[k]},{x[k]}" for i, k in enumerate(shuffled)]
    write_spatial(folder, lines, scales=SCALES)


@pytest.mark.slow
@pytest.mark.parametrize("jpeg", [True, False], ids=["JPEG", "uncompressed"])
def test_memory_of_tiling_is_below_a_gigabyte(tmp_path, jpeg):
    write_slice(tmp_path / "data" / "slice")
    write_big_slide(tmp_path / "data" / "slice" / "slide.tif", side=SIDE, shrink=(1,), jpeg=jpeg)
    flags = ["--data", tmp_path / "data", "--tiles", tmp_path / "tiles", "--spot_pitch_um", "100", "--tile_px", "224"]
    code = [sys.executable, "-c", CODE, *map(str, flags)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    seconds, peak_mib = map(float, done.stdout.splitlines()[-1].split())
    assert f"{SPOTS} tiles of 224 px from slide.tif" in done.stdout
    print(f"\n{'JPEG' if jpeg else 'uncompressed'}: {seconds:.0f} s, {peak_mib:.0f} MiB at the most")
    assert peak_mib < LIMIT_MIB
