"""memory.py: an encoder that takes few rows at a time gives what it would give of all of them."""

import errno

import numpy as np
import pytest
import torch

from utils.memory import WithinMemory, is_out_of_memory
from utils.settings import line_of

ALLOCATORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((10**9, 10**9), np.dtype("f8")),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def encoder(most: int, error: Exception, seen: list):
    """Twice the rows, as long as no more than `most` come at once."""

    def encode(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        if len(rows) > most:
            raise error
        return 2 * rows

    return encode


@pytest.mark.parametrize("error", ALLOCATORS, ids=lambda error: type(error).__name__)
def test_batches_are_halved_until_they_fit(error, capsys):
    seen: list[int] = []
    within = WithinMemory(encoder(4, error, seen), "P01")
    rows = torch.arange(26.0).view(13, 2)
    assert torch.equal(within(rows), 2 * rows)
    assert seen == [13, 6, 3, 3, 3, 3, 1]
    assert torch.equal(within(rows[:3]), 2 * rows[:3]) and seen[7:] == [3], "the next batch begins with what fitted"
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "warning: P01: out of memory by 13 spots at a time, going on by 6" and len(told) == 2


def test_a_row_that_does_not_fit_raises_what_it_raised():
    error, seen = torch.OutOfMemoryError("CUDA out of memory."), []
    with pytest.raises(torch.OutOfMemoryError) as raised:
        WithinMemory(encoder(0, error, seen), "P01")(torch.zeros(5, 2))
    assert raised.value is error and seen == [5, 2, 1]


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(28, "no space")])
def test_other_errors_are_not_taken_for_it(error):
    seen: list[int] = []
    with pytest.raises(type(error)):
        WithinMemory(encoder(4, error, seen), "P01")(torch.zeros(8, 2))
    assert seen == [8] and not is_out_of_memory(error)


def test_it_ends_a_script_in_a_line_that_says_what_to_lower():
    for error in ALLOCATORS:
        line = line_of(error)
        assert line is not None and "\n" not in line and "; fix: lower --batch_size" in line
    assert line_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert line_of(KeyError("a")) is None and line_of(ValueError("a\n b")) == "a b"
