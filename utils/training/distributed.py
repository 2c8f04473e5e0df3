"""Device, precision and processes, through accelerate. One process for now; what gathers comes here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def bf16_is_fast(device: torch.device) -> bool:
    """Does the hardware multiply in bf16? On a CPU that is avx512_bf16 or AMX."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_device(name: str) -> torch.device:
    """--device auto|cpu|cuda. Raises ValueError where CUDA is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA device, torch finds none; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Tell glibc to keep large blocks that were freed for the next that is asked for, in place of giving them back to
    the system: each page of a new one is a fault, and with them a step costs up to 1.75 times as much. Other C
    libraries have no mallopt and are left alone."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28)):
            libc.mallopt(option, value)


def start(device: str, precision: str) -> Accelerator:
    """The accelerator of a run. `precision` auto is bf16 where the hardware multiplies in it, else fp32."""
    from accelerate import Accelerator

    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory()
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(target) else "fp32"
    if precision == "fp16" and target.type == "cpu":
        raise ValueError("--precision fp16 needs a CUDA device; use bf16 or fp32")
    accelerator = Accelerator(cpu=target.type == "cpu", mixed_precision="no" if precision == "fp32" else precision)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"expected one process, found {accelerator.num_processes}; start the script without a launcher"
        )
    return accelerator


def decoder_autocast(accelerator: Accelerator, precision: str) -> AbstractContextManager[None]:
    """The precision of the gene decoder: that of the encoders, but fp32 on a CPU with --precision auto, where the
    backward pass of attention is slower in bf16 than in fp32."""
    if precision == "auto" and accelerator.device.type == "cpu":
        return nullcontext()
    return accelerator.autocast()
