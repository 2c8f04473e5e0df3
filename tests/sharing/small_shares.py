"""Trained tiny models as folders to share, and how both stages are named."""

from pathlib import Path

from tiny_runs import Work

from utils.sharing import export
from utils.training import checkpoint

STAGES = {"stage_one": ("encoder", "get_accuracy_image"), "stage_two": ("decoder", "decoder_similarity")}
KINDS = list(STAGES)


def exported(trained: Work, out: Path) -> dict[str, Path]:
    """Both stages of a run as folders below `out`, by kind."""
    for kind, (flag, _) in STAGES.items():
        export.export(getattr(trained, flag), out / kind)
    return {kind: out / kind for kind in KINDS}


def load(path: Path, kind: str | None) -> dict:
    return checkpoint.load(path, kind, "--weights")
