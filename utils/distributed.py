"""Device, precision, seeds and processes, through accelerate, from start to end; what processes gather from each other.

Of N processes each has an N-th of every batch. Losses and gradients are those of one process with the whole batch: what
a loss needs of the other processes' spots comes by `gather`, whose backward pass adds up what all of them ask for, and
the mean that is taken over the processes' gradients is the gradient of the mean of their losses. Letter: B rows.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from utils import words

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

TIMEOUT = timedelta(minutes=30)  # that a process waits for the others; the longest work of one alone is far shorter
END_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # by which queues announce the end of a job
TALKERS = ("gloo", "nccl")  # stand in the errors of what processes talk by
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def bf16_is_fast(device: torch.device) -> bool:
    """Does the hardware multiply in bf16? On a CPU that is avx512_bf16 or AMX."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(cpu_bf16().values())


@cache
def cpu_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, bool]:
    """By which instructions the CPU multiplies in bf16, as the Linux kernel lists them; elsewhere by none."""
    try:
        listed = re.search(r"(?m)^flags\s*:(.*)$", cpuinfo.read_text())
    except OSError:
        listed = None
    flags = listed[1].split() if listed else []
    return {"AMX": "amx_bf16" in flags, "avx512_bf16": "avx512_bf16" in flags}


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(*seed: int) -> None:
    """Seed Python, NumPy and torch from whole numbers, as (seed, epoch, step)."""
    import random

    import numpy as np
    import torch

    word = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)  # noqa: NPY002 (libraries still draw from it)
    torch.manual_seed(word)


def pick_device(name: str) -> torch.device:
    """--device auto|cpu|cuda. Raises ValueError where CUDA is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: expected a CUDA device, found none (python -m utils.doctor says why); use --device cpu"
        )
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
        raise ValueError("--precision fp16: expected a CUDA device, found a CPU; use bf16 or fp32")
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # Buffers (queues, momentum encoders) are the same in all processes. Without a search for unused parameters torch
    # puts the gradients into another order after the first step, and a sum over more than two processes would have
    # other last digits in the first step after a resume than in a run that was not interrupted.
    alike = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    return Accelerator(
        cpu=target.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[alike, InitProcessGroupKwargs(timeout=TIMEOUT)],
    )


@contextmanager
def running(device: str, precision: str) -> Iterator[Accelerator]:
    """The accelerator of a run (see `start`), whose process group is destroyed however the run ends.

    SIGTERM and SIGUSR1 end the block with SystemExit(128 + their number), as SIGINT does with KeyboardInterrupt. An
    error of this process closes its connections, which ends the others. Raises ConnectionError where another process
    is gone, or silent for TIMEOUT.
    """
    before = {number: signal.getsignal(number) for number in END_SIGNALS}
    try:
        accelerator = start(device, precision)
        for number in END_SIGNALS:
            signal.signal(number, _terminate)
        yield accelerator
    except BaseException as error:
        if n_processes() == 1:
            raise
        traceback.clear_frames(error.__traceback__)  # their variables refer to the group and would keep it alive
        if _is_lost_peer(error):
            reason = str(error).split("] ", 1)[-1]  # behind gloo's own line of source
            raise ConnectionError(
                f"process {rank()} of {n_processes()}: expected an answer of the others, found one of them gone, or "
                f"silent for {TIMEOUT} ({words.cut(reason)}); fix: read what it says and start again, a "
                "training with --resume"
            ) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end()


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _is_lost_peer(error: BaseException) -> bool:
    """An error of torch.distributed; that of gloo is a RuntimeError which its text alone tells from others."""
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error).lower() for name in TALKERS)


def _end() -> None:
    """Forget the accelerator's settings, which it keeps for a next one, and join the threads of the process group:
    those that still run when the interpreter ends abort the process."""
    from accelerate.state import AcceleratorState
    from torch import distributed

    AcceleratorState._reset_state(reset_partial_state=True)
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # what refers to the group in a circle
        distributed.destroy_process_group()


def conditions(accelerator: Accelerator, workers: int | None, compiled: bool) -> dict[str, Any]:
    """What the last digits of a training depend on beside its flags and data: the same weights bit for bit need all of
    it to be the same."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "processes": n_processes(),
        "workers": workers,
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "compile": compiled,
    }


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of the host on the device. The copy to a GPU is queued behind the work that it has, from memory that the
    system cannot move, so that the host waits for neither."""
    return (pinned(rows) if device.type == "cuda" else rows).to(device, non_blocking=True)


def pinned(rows: Tensor) -> Tensor:
    """The rows in page-locked memory, which is kept until no copy reads it any more."""
    return rows.pin_memory()


def rank() -> int:
    """Number of this process, 0 the first; also before torch is imported."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    return rank() == 0


def n_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def check_batch_size(batch_size: int) -> None:
    if batch_size % n_processes():
        raise ValueError(
            f"--batch_size: expected a multiple of the {n_processes()} processes, which share a batch equally, found "
            f"{batch_size}; use {-(-batch_size // n_processes()) * n_processes()}"
        )


def gather(rows: Tensor, dim: int = 0) -> Tensor:
    """Rows of all processes, in their order, put together along `dim`; all must have the same shape. Its gradient is
    the sum of what all processes ask of this one's rows."""
    return rows if n_processes() == 1 else _gather_function().apply(rows.transpose(0, dim)).transpose(0, dim)


@cache
def _gather_function() -> Any:
    import torch
    from torch import distributed

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor) -> Tensor:
            ctx.n_rows = len(rows)
            found = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(n_processes())]
            distributed.all_gather(found, rows.contiguous())
            return torch.cat(found)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            total = gradients[0].float().contiguous()  # a sum in bf16 would lose digits
            distributed.all_reduce(total)
            return total[rank() * ctx.n_rows : (rank() + 1) * ctx.n_rows].to(gradients[0].dtype)

    return Gather


def mean(values: dict[str, float]) -> dict[str, float]:
    """Of numbers that each process has, their mean over the processes."""
    if n_processes() == 1:
        return values
    import torch

    found = gather(_tensor([list(values.values())], torch.float64)).mean(0)
    return dict(zip(values, found.tolist(), strict=True))


def any_true(asked: bool) -> bool:
    """Whether it is true in any process."""
    return asked if n_processes() == 1 else bool(gather(_tensor([[asked]])).any())


def wait() -> None:
    """Until all processes are here."""
    any_true(False)


def go_on_alone() -> bool:
    """What is left is for one process: True in the first, which from here on is the only one; the others may return."""
    if n_processes() > 1:
        from torch import distributed

        wait()
        distributed.destroy_process_group()
        os.environ["WORLD_SIZE"] = "1"
    return is_main()


def _tensor(values: Sequence[Sequence[float]], dtype: torch.dtype | None = None) -> Tensor:
    """On the device that the processes communicate by."""
    import torch
    from torch import distributed

    return torch.tensor(values, dtype=dtype, device="cuda" if distributed.get_backend() == "nccl" else "cpu")


def own_batches(batches: Sequence[list[int]]) -> list[list[int]]:
    """Every N-th of the batches, the first one again where they do not come out even: what this process computes of
    them, for `in_order`."""
    rounds = -(-len(batches) // n_processes())
    numbers = (i * n_processes() + rank() for i in range(rounds))
    return [batches[i] if i < len(batches) else batches[0] for i in numbers]


def in_order(found: Iterator[tuple[Tensor, ...]], batches: Sequence[list[int]]) -> Iterator[tuple[Tensor, ...]]:
    """What all processes found for `own_batches`, in every one of them: tensors with a row per spot of each batch, the
    batches in order, without the padding that made them even."""
    if n_processes() == 1:
        yield from found
        return
    size = max(map(len, batches))
    for i, tensors in enumerate(found):
        padded = [t.repeat_interleave(_padding(len(t), size, t), dim=0) for t in tensors]
        gathered = [gather(t) for t in padded]
        for k, batch in enumerate(batches[i * n_processes() : (i + 1) * n_processes()]):
            yield tuple(t[k * size : k * size + len(batch)] for t in gathered)


def _padding(n: int, size: int, like: Tensor) -> Tensor:
    """How often each of n rows stands, so that there are `size` of them: the last one fills up."""
    import torch

    times = torch.ones(n, dtype=torch.long, device=like.device)
    times[-1] += size - n
    return times


def decoder_autocast(accelerator: Accelerator, precision: str) -> AbstractContextManager[None]:
    """The precision of the gene decoder: that of the encoders, but fp32 on a CPU with --precision auto, where the
    backward pass of attention is slower in bf16 than in fp32."""
    if precision == "auto" and accelerator.device.type == "cpu":
        return nullcontext()
    return accelerator.autocast()
