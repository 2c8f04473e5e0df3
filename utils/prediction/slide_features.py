"""Features of a slide's tiles: each tile is cut, encoded and dropped; what is kept lies on disk, by content.

Shapes: S spots, R views of a tile (as the model sees it, then, if asked for, its eight flips and quarter turns),
V vectors and T tokens of a view, D feature width, B batch, Z tile side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.features import cache, domain
from utils.features.cache import TileEncoder, to_float
from utils.files.hashing import content_hash
from utils.images import tiles
from utils.images.image import TissueImage
from utils.memory import WithinMemory
from utils.prediction.layout import SlideSpots
from utils.prediction.members import Member, Run

SYMMETRIES = 8
ENLARGED = 1.02  # an image that is coarser than what the model was trained on by more is warned of
FINER = 1.5  # and one that is finer by more, where the model was trained on enlarged tiles


def fingerprint(paths: Iterable[Path]) -> list[list[str]]:
    """Name and content of files, wherever they lie."""
    return [[path.name, content_hash(path)] for path in paths]


def spots_hash(spots: SlideSpots) -> str:
    """Of the places and the names of the spots."""
    digest = hashlib.sha256("\n".join(spots.barcodes.tolist()).encode())
    digest.update(np.ascontiguousarray(spots.xy_fullres_px, "<f8").tobytes())
    return digest.hexdigest()


def kept_features(
    run: Run, member: Member, image: TissueImage, spots: SlideSpots, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Features (S, R, V + T, D) mapped from `folder`: those of an interrupted run where they are there, or computed;
    and statistics of the tiles (S, K)."""
    side_px = member.tile_px * member.um_per_px * spots.image_scale / spots.um_per_fullres_px

    def compute() -> Iterator[np.ndarray]:
        warn_of_detail(member, spots.name, spots.um_per_fullres_px / spots.image_scale)
        cut = tiles.Cut("fullres", image.path.name, member.um_per_px, side_px, member.tile_px, resampled=True)
        batches = tiles.cut_tiles(image, spots.xy_image_px, cut, run.batch_size, run.workers)
        return encode_stream(tile_encoder(run, member), batches, len(spots.barcodes), spots.name)

    source = f"{side_px:.9g} px of {fingerprint([image.path])} at {spots_hash(spots)}"
    precision = run.accelerator.mixed_precision
    key = f"{member.encoder} {precision} prediction_std {run.prediction_std}, {domain.CONTENT}, {source}"
    tta = member.model.sizes.tta
    place = folder / f"{member.state['encoder_hash'][:16]}_{member.tile_px}_{tta}"
    return domain.split_statistics(cache.kept_features(place, key, spots, compute))


def warn_of_detail(member: Member, name: str, um_per_px: float) -> None:
    """Compare the detail of an image with that of the train tiles: their scale, or that of the scans that they were cut
    from where these were coarser."""
    scan = member.state["scan_um_per_px"] or member.um_per_px
    train = max(member.um_per_px, scan)
    if um_per_px > ENLARGED * train:
        print(
            f"warning: {name}: {um_per_px:.3g} um per px, the model was trained on {train:.3g} (tiles of "
            f"{member.um_per_px:.3g} from scans of {scan:.3g}): {um_per_px / train:.1f} times coarser, which lacks "
            "detail that it was trained on"
        )
    elif um_per_px < train / FINER and train > ENLARGED * member.um_per_px:
        print(
            f"warning: {name}: {um_per_px:.3g} um per px, the model was trained on scans of {scan:.3g}, enlarged to "
            f"tiles of {member.um_per_px:.3g}: {train / um_per_px:.1f} times finer, detail that it was not trained on"
        )


def tile_encoder(run: Run, member: Member) -> TileEncoder:
    """Tiles (B, 3, Z, Z) -> features (B, R, V + T, D) and, as last rows, statistics."""
    model = member.model

    def views(batch: Tensor) -> Tensor:
        symmetries = range(SYMMETRIES) if run.prediction_std else ()
        with run.accelerator.autocast():
            features = torch.stack(
                [model.encode(batch), *(model.encode_transformed(batch, symmetry) for symmetry in symmetries)], 1
            )
        return domain.with_statistics(features, batch)

    return TileEncoder(views, model.sizes.image_size, run.accelerator.device, run.batch_size, run.workers)


@torch.no_grad()
def encode_stream(how: TileEncoder, batches: Iterable[np.ndarray], n_spots: int, name: str) -> Iterator[np.ndarray]:
    """Batches of tiles (B, Z, Z, 3) uint8 -> (B, ...) float32, in their order."""
    encode = WithinMemory(how.encode, name)
    with tqdm(total=n_spots, desc=f"{name}: features", unit="spot", disable=None) as bar:
        for batch in batches:
            float_tiles = to_float(distributed.to_device(torch.from_numpy(batch), how.device), how.size)
            yield encode(float_tiles).float().cpu().numpy()
            bar.update(len(batch))
