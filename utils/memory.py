"""Work on batches that must fit the memory: where it runs out, half as many rows are taken at a time.

Letter: B rows of a batch.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Rows = TypeVar("Rows", "Tensor", np.ndarray)
TEXTS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """MemoryError, torch's OutOfMemoryError, and the RuntimeErrors of its allocators, which their text alone tells."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in TEXTS)


class WithinMemory(Generic[Rows]):
    """`compute` of rows, as many at a time as fit: rows (B, ...) -> (B, ...).

    Where memory runs out, half as many are taken, of the batches after that one too; a single row that does not fit
    raises what `compute` raised.
    """

    def __init__(self, compute: Callable[[Rows], Tensor], name: str):
        self.compute: Callable[[Rows], Tensor] = compute
        self.name = name
        self.most: int | None = None

    def __call__(self, rows: Rows) -> Tensor:
        import torch

        results, start = [], 0
        while start < len(rows):
            part = rows[start : start + (self.most or len(rows))]
            done = self._try(part)
            if done is None:
                self.most = len(part) // 2
                print(f"warning: {self.name}: out of memory by {len(part)} spots at a time, going on by {self.most}")
                torch.cuda.empty_cache()  # nothing where CUDA is not in use
                continue
            results.append(done)
            start += len(part)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _try(self, part: Rows) -> Tensor | None:
        """None where it does not fit but fewer rows may; what the attempt held is free again then."""
        try:
            return self.compute(part)
        except (MemoryError, RuntimeError, OSError) as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
        return None
