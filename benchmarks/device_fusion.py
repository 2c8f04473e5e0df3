"""What a step would take if a compiler fused all work between its matrix products, from the operators that ran.

A fused kernel reads each tensor from outside once and writes those that are read elsewhere; what lies between stays on
the chip. Operators are fused that are neither matrix products, convolutions nor attention, that follow one another, and
that have the same number of such products before them: so no kernel waits for itself.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Key = tuple[int, int]  # a storage, and how often it had been written


def size_of(x: Tensor) -> int:
    """Bytes that reading it touches: an expanded tensor is as large as what lies behind it."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


@dataclass(frozen=True)
class Operator:
    """`product`: a matrix product, convolution or attention; `seconds` count for these alone."""

    product: bool
    seconds: float
    depth: int  # products that must be done before it
    reads: dict[Key, int]  # bytes
    writes: dict[Key, int]


class Graph:
    """Operators in the order in which they ran."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.maker: dict[Key, int] = {}  # operator that wrote it
        self.changed: set[Key] = set()  # written into what was there before
        self.number = itertools.count()
        self.versions: weakref.WeakKeyDictionary[Any, Key] = weakref.WeakKeyDictionary()

    def _key(self, x: Tensor) -> Key:
        storage = x.untyped_storage()
        if storage not in self.versions:
            self.versions[storage] = (next(self.number), 0)
        return self.versions[storage]

    def note(
        self, product: bool, seconds: float, read: list[Tensor], fresh: list[Tensor], changed: list[Tensor]
    ) -> None:
        """An operator that ran, with the tensors that it read, made, and wrote into."""
        reads: dict[Key, int] = {}
        for x in read:
            key = self._key(x)
            reads[key] = max(reads.get(key, 0), size_of(x))
        makers = (self.operators[self.maker[key]] for key in reads if key in self.maker)
        depth = max((maker.depth + (maker.product and not product) for maker in makers), default=0)
        for x in changed:
            number, version = self._key(x)
            self.versions[x.untyped_storage()] = (number, version + 1)
            self.changed.add((number, version + 1))
        writes = {self._key(x): size_of(x) for x in (*fresh, *changed)}
        self.maker |= dict.fromkeys(writes, len(self.operators))
        self.operators.append(Operator(product, seconds, depth, reads, writes))

    def kernels(self) -> list[list[Operator]]:
        """Operators but products, those of a fused kernel together."""
        first = list(range(len(self.operators)))  # of the kernel that an operator belongs to

        def find(i: int) -> int:
            while first[i] != i:
                first[i] = first[first[i]]
                i = first[i]
            return i

        others = [(i, operator) for i, operator in enumerate(self.operators) if not operator.product]
        for i, operator in others:
            for maker in {self.maker[key] for key in operator.reads if key in self.maker}:
                before = self.operators[maker]
                if not before.product and before.depth == operator.depth:
                    first[find(i)] = find(maker)
        kernels: dict[int, list[Operator]] = {}
        for i, operator in others:
            kernels.setdefault(find(i), []).append(operator)
        return list(kernels.values())

    def kernel_bytes(self) -> Iterator[int]:
        """What each fused kernel reads and writes."""
        readers: dict[Key, list[int]] = {}
        for i, operator in enumerate(self.operators):
            for key in operator.reads:
                readers.setdefault(key, []).append(i)
        place = {id(operator): i for i, operator in enumerate(self.operators)}
        for kernel in self.kernels():
            inside = {place[id(operator)] for operator in kernel}
            made = {key: n for operator in kernel for key, n in operator.writes.items()}
            read = {key: n for operator in kernel for key, n in operator.reads.items() if key not in made}
            left = {key for key in made if key in self.changed and key not in readers}  # an updated weight
            written = {key: n for key, n in made.items() if key in left or not inside.issuperset(readers.get(key, ()))}
            yield sum(read.values()) + sum(written.values())

    def product_seconds(self) -> float:
        return sum(operator.seconds for operator in self.operators if operator.product)
