"""Does the encoder wait for the reader of whole slides? Tiles a second of each alone and of both at once, peak memory.

    python benchmarks/whole_slide.py --out results/whole_slide
    python benchmarks/whole_slide.py --out results/whole_slide --small     # does it run? Nothing is put into RESULTS.md

Writes a pyramidal slide of 40,000 x 40,000 px (tests/big_slide.py), lays spots 100 um apart on its tissue and cuts
tiles of 112 um and 224 px; the encoder is ViT-B/16 in bf16 with random weights. Each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed import FOLDER, machine_name, peak_mib, put_into
from utils import settings
from utils.files.atomic import write_record

PITCH_UM, TILE_UM, TILE_PX = 100.0, 112.0, 224


def parse_args(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/whole_slide"), help="slide and figures go here")
    parser.add_argument("--n_read", type=settings.count, default=2000, help="tiles that the reader reads alone")
    parser.add_argument("--n_encode", type=settings.count, default=384, help="tiles that the encoder takes")
    parser.add_argument("--batch_size", type=settings.count, default=64)
    parser.add_argument("--note", default="", help="words for the table, such as what else the machine was doing")
    parser.add_argument("--small", action="store_true", help="a slide of 4,096 px and a tiny encoder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def find_spots(slide: Any, n: int) -> Any:
    """The n spots on tissue in the middle of the grid's order, and how many there are."""
    from utils.images import tissue

    thumbnail, scale = slide.thumbnail()
    centres, _ = tissue.grid(slide.width, slide.height, PITCH_UM / slide.um_per_px)
    radius_px = 55 / 2 / slide.um_per_px
    centres = centres[tissue.on_tissue(centres, tissue.tissue_mask(thumbnail), scale, radius_px)]
    start = max(0, (len(centres) - n) // 2)
    return centres[start : start + n], len(centres)


def build_encoder(small: bool) -> Any:
    """Tiles (B, Z, Z, 3) uint8 -> features, in bf16 by autocast as in training."""
    import timm
    import torch

    torch.manual_seed(0)
    name = "test_vit" if small else "vit_base_patch16_224"
    net = timm.create_model(name, pretrained=False, num_classes=0, img_size=TILE_PX).eval()

    def encode(batch):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return net(torch.from_numpy(batch).permute(0, 3, 1, 2) / 255)

    return encode


def measure(part: str, path: Path, args: argparse.Namespace) -> dict[str, float]:
    """One of `read`, `encode`, `both`: tiles, seconds, seconds waited for the reader, peak memory."""
    import numpy as np

    from utils.images import tiles
    from utils.images.image import open_image

    with open_image(path) as slide:
        n = args.n_read if part == "read" else args.n_encode
        centres, n_spots = find_spots(slide, n)
        cut = tiles.Cut("fullres", path.name, TILE_UM / TILE_PX, TILE_UM / slide.um_per_px, TILE_PX, resampled=True)
        encode = None if part == "read" else build_encoder(args.small)
        stream = tiles.cut_tiles(slide, centres, cut, args.batch_size)
        if part == "encode":
            stream = iter(list(stream))  # at hand before the clock starts
        if encode is not None:
            encode(np.zeros((args.batch_size, TILE_PX, TILE_PX, 3), np.uint8))  # warms up
        return {"spots": n_spots, **consume(stream, encode)}


def consume(stream: Any, encode: Any) -> dict[str, float]:
    n, waited, start = 0, 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(stream, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        n += len(batch)
        if encode is not None:
            encode(batch)
    seconds = time.perf_counter() - start
    return {"tiles": n, "seconds": seconds, "waited": waited, "peak_mib": peak_mib("cpu")}


def table(found: dict[str, dict[str, float]], about: dict[str, Any]) -> str:
    """Markdown of one run."""
    rate = {part: row["tiles"] / row["seconds"] for part, row in found.items()}
    names = {"read": "reader alone", "encode": "ViT-B/16 in bf16 alone", "both": "both at once"}
    note = about["note"] and f", {about['note']}"
    lines = [
        f"`{about['command']}`, {about['date']}, {about['machine']}{note}: a slide of "
        f"{about['side']:,} x {about['side']:,} px, {found['read']['spots']:,} spots {PITCH_UM:g} um apart on tissue, "
        f"tiles of {TILE_UM:g} um and {TILE_PX} px. The reader supplies **{rate['read'] / rate['encode']:.1f}** "
        "times what the encoder takes.",
        "",
        "| part | tiles | tiles/s | waited for tiles | peak memory, MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for part, row in found.items():
        waited = f"{row['waited'] / row['seconds']:.1%}" if part == "both" else ""
        lines.append(f"| {names[part]} | {row['tiles']:,} | {rate[part]:.1f} | {waited} | {row['peak_mib']:,.0f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    from tests.big_slide import write_big_slide

    side = 4096 if args.small else 40_000
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"slide_{side}.tif"
    write_big_slide(path, side=side)
    found = {}
    for part in ("read", "encode", "both"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[part] = pool.apply(measure, (part, path, args))
        print(f"{part}: {found[part]}", flush=True)
    about = {
        "command": " ".join(["python benchmarks/whole_slide.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": machine_name("cpu"),
        "note": args.note,
        "side": side,
    }
    write_record(args.out / "whole_slide.json", about | found)
    text = table(found, about)
    if not args.small:
        put_into(FOLDER / "RESULTS.md", "whole_slide", text)
    print(text)


if __name__ == "__main__":
    settings.run(main, parse_args())
