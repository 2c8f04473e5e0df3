"""Files of tensors that others wrote: read without running code in them."""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

from utils import words


def read_tensors(path: Path, flag: str) -> Any:
    """What a .pth, .pt, .bin or .safetensors file holds, on the CPU; code in it is refused, never run.

    Beside tensors and plain values it may hold flags (argparse.Namespace), as the checkpoints of timm, DINO and MAE do.
    """
    import torch

    if not path.is_file():
        raise ValueError(f"{flag}: expected the file {path}, found none; correct the path")
    if not path.stat().st_size:
        raise ValueError(f"{flag}: {path}: expected weights, found an empty file; copy or download it again")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write: the error below says it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a corrupt file makes the unpickler stumble over
        reason = " ".join(str(error).split()).split("WeightsUnpickler error: ")[-1]  # before that torch gives advice
        code = re.search(r"GLOBAL ([\w.]+)", reason)
        if code:
            raise ValueError(
                f"{flag}: {path}: expected tensors and plain values, found code ({code[1]}), which is never run; save "
                "the tensors alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise ValueError(
            f"{flag}: {path}: expected weights, found a corrupt or another file ({words.cut(reason)}); get it again"
        ) from error


class Tensors(dict[str, Any]):
    """What a file holds by name, and the file."""

    source: str = ""


def read_weights(path: Path, flag: str) -> Tensors:
    """The tensors of a foreign weights file, at the top or under model, state_dict, teacher, model_state_dict."""
    import torch

    state = read_tensors(path, flag)
    for key in ("model", "state_dict", "teacher", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{flag}: expected named tensors in {path}, found none; give a file of weights")
    named = Tensors({k.removeprefix("module."): v for k, v in tensors.items()})
    named.source = str(path)
    return named
