"""What a step would take if a compiler fused all work between its matrix products, from the operators that ran.

A fused kernel reads each tensor from outside once and writes those that are read elsewhere; what lies between stays on
the chip. Operators are fused that are neither matrix products, convolutions nor attention, that follow one another, and
that have the same depth: the largest number of times that a product was followed by other work on the way to them. No
kernel then waits for itself. Compilers come near to this, not to it: some keep the kernel of a norm or a sum apart.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Key = tuple[int, int]  # a storage, and how often it had been written
Place = tuple[Any, ...]  # of a view: offset, shape, strides


def size_of(x: Tensor) -> int:
    """Bytes that reading it touches: an expanded tensor is as large as what lies behind it."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


@dataclass(frozen=True)
class Operator:
    """`product`: a matrix product, convolution or attention; `seconds` count for these alone. `reads` and `writes` have
    the bytes of each part of a storage."""

    product: bool
    seconds: float
    depth: int
    reads: dict[Key, dict[Place, int]]
    writes: dict[Key, int]

    def depth_after(self, product: bool) -> int:
        """Least depth of an operator that must wait for this one."""
        return self.depth + (self.product and not product)


class Graph:
    """Operators in the order in which they ran."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.maker: dict[Key, int] = {}  # operator that wrote it
        self.readers: dict[Key, list[int]] = {}
        self.changed: set[Key] = set()  # written into what was there before
        self.nbytes: dict[int, int] = {}  # of a storage
        self.number = itertools.count()
        self.versions: weakref.WeakKeyDictionary[Any, Key] = weakref.WeakKeyDictionary()
        self.last: dict[int, int] = {}  # version of a storage

    def _key(self, x: Tensor) -> Key:
        storage = x.untyped_storage()
        if storage not in self.versions:
            self.versions[storage] = (next(self.number), 0)
            self.nbytes[self.versions[storage][0]] = storage.nbytes()
        return self.versions[storage]

    def note(
        self, product: bool, seconds: float, read: list[Tensor], fresh: list[Tensor], changed: list[Tensor]
    ) -> None:
        """An operator that ran, with the tensors that it read, made, and wrote into."""
        reads: dict[Key, dict[Place, int]] = {}
        for x in read:
            place = x.storage_offset(), tuple(x.shape), x.stride()
            reads.setdefault(self._key(x), {})[place] = size_of(x)
        before = [self.maker[key] for key in reads if key in self.maker]
        before += [reader for x in changed for reader in self.readers.get(self._key(x), ())]
        depth = max((self.operators[i].depth_after(product) for i in before), default=0)
        for x in changed:
            number, version = self._key(x)
            self.versions[x.untyped_storage()] = (number, version + 1)
            self.last[number] = version + 1
            self.changed.add((number, version + 1))
        writes = {self._key(x): size_of(x) for x in (*fresh, *changed)}
        self.maker |= dict.fromkeys(writes, len(self.operators))
        for key in reads:
            self.readers.setdefault(key, []).append(len(self.operators))
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
        index = {id(operator): i for i, operator in enumerate(self.operators)}
        for kernel in self.kernels():
            inside = {index[id(operator)] for operator in kernel}
            made = {key: n for operator in kernel for key, n in operator.writes.items()}
            read: dict[Key, dict[Place, int]] = {}
            for operator in kernel:
                for key, places in operator.reads.items():
                    read.setdefault(key, {}).update(places)
            n_read = sum(min(sum(p.values()), self.nbytes[key[0]]) for key, p in read.items() if key not in made)
            yield n_read + sum(n for key, n in made.items() if self._leaves(key, inside))

    def _leaves(self, key: Key, inside: set[int]) -> bool:
        """Whether what a kernel of the operators `inside` made is read by others, or is a tensor that it updated."""
        updated = key in self.changed and self.last[key[0]] == key[1]
        return updated or not inside.issuperset(self.readers.get(key, ()))

    def product_seconds(self) -> float:
        return sum(operator.seconds for operator in self.operators if operator.product)
