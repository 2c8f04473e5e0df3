"""Operations, bytes and memory of a step, counted by running it on tensors without values: `device.py --count`.

Each operator that torch runs is noted: its floating-point operations by the formulas of torch's FlopCounterMode, the
bytes of what it reads and writes, and the memory that is held then. An operator takes max(operations / rate, bytes /
bandwidth) on its own. `fused_s` is the time if a compiler fused what lies between the matrix products
(device_fusion.py); `matrix_s`, that of the matrix products and attentions alone, is what it cannot go below.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.device_fusion import Graph, size_of
from benchmarks.device_work import PARTS, Sizes
from benchmarks.record import table_lines

SPOTS, EPOCHS = 75_760, 100  # of the published training
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # of a host; FlopCounterMode has those of a GPU
COHORTS = (  # what is done to them, the part that does it, spots or tiles
    ("HEST-1k, an epoch of stage one", "stage_one", 2_000_000),
    ("HEST-1k, 100 epochs of stage two on kept features", "stage_two", 200_000_000),
    ("TCGA, prediction of 30,000 slides of 23,000 tiles", "prediction", 690_000_000),
)
READ = ("_local_scalar_dense", "item", "is_nonzero")  # by the host
FAVOR_PRODUCTS = {"favor": 4, "favor_backward": 10}  # of N x E x M in a head, by model/favor_triton.py
M_BLOCK = 32  # random features are filled up to a multiple of it there
UNWRITTEN = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Card:
    """What a card does at most, and the fractions of it that an operator is taken to reach."""

    name: str = "H100 SXM, 80 GB"
    matrix: float = 989e12  # operations a second in bf16
    tf32: float = 494.5e12
    fp32: float = 67e12
    bandwidth: float = 3.35e12  # bytes a second
    of_matrix: float = 0.6
    of_bandwidth: float = 0.7

    def seconds(self, operations: float, nbytes: float, rate: float) -> float:
        return max(operations / (self.of_matrix * rate), nbytes / (self.of_bandwidth * self.bandwidth))


H100 = Card()


def tensors_in(values: object) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class Cost(TorchDispatchMode):
    """Adds up what the operators within it cost on a card; `held` are bytes that exist before."""

    def __init__(self, card: Card = H100, held: int = 0):
        super().__init__()
        self.card = card
        self.operations, self.nbytes, self.seconds = 0, 0, 0.0
        self.graph = Graph()
        self.live = self.peak = held
        self.by_name: Counter[str] = Counter()  # seconds
        self.storages: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in READ:
            return True
        if func._overloadpacket not in flop_counter.flop_registry and func.namespace == "aten":
            with self:  # an operator made of others is counted by them
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if func.namespace == "magic":
            self._favor(name, args, tensors_in(out))
        elif name not in UNWRITTEN:
            self._note(func, name, args, kwargs, out)
        self._hold(tensors_in(out))
        return out

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        read, results = tensors_in((args, kwargs)), tensors_in(out)
        known = {x.untyped_storage()._cdata for x in read}
        fresh = [x for x in results if x.untyped_storage()._cdata not in known]
        schema = func._schema.arguments
        given = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
        changed = [x for a, value in given if a.alias_info and a.alias_info.is_write for x in tensors_in(value)]
        if not fresh and not changed:  # a view
            return
        nbytes = sum(map(size_of, (*read, *fresh, *changed)))
        formula = flop_counter.flop_registry.get(func._overloadpacket)
        operations = formula(*args, **kwargs, out_val=out) if formula else 0
        low = any(x.dtype in (torch.bfloat16, torch.float16) for x in read)
        rate = self.card.matrix if low else self.card.fp32
        seconds = self._add(name, operations, nbytes, rate)
        self.graph.note(operations > 0, seconds, read, fresh, changed)

    def _add(self, name: str, operations: int, nbytes: int, rate: float) -> float:
        seconds = self.card.seconds(operations, nbytes, rate)
        self.operations += operations
        self.nbytes += nbytes
        self.seconds += seconds
        self.by_name[name] += seconds  # type: ignore[assignment]
        return seconds

    @property
    def matrix_s(self) -> float:
        return self.graph.product_seconds()

    @property
    def fused_s(self) -> float:
        return self.matrix_s + sum(self.card.seconds(0, nbytes, 1.0) for nbytes in self.graph.kernel_bytes())

    def _favor(self, name: str, args: Any, results: list[Tensor]) -> None:
        """FAVOR+ in kernels that keep its features on the chip: q, k, v and the like are read once."""
        q, _, _, projection = args[1:5] if name == "favor_backward" else args[:4]
        blocks = -(-len(projection) // M_BLOCK)
        operations = 2 * FAVOR_PRODUCTS[name] * q.numel() * blocks * M_BLOCK
        nbytes = sum(map(size_of, (*tensors_in(args), *results)))
        rate = self.card.tf32 if args[-1] else self.card.fp32
        self.graph.note(True, self._add(name, operations, nbytes, rate), tensors_in(args), results, [])

    def _hold(self, results: list[Tensor]) -> None:
        for x in results:
            storage = x.untyped_storage()
            if storage not in self.storages:
                self.storages[storage] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


@contextmanager
def counting() -> Iterator[None]:
    """Tensors without values on a host, attention as on a GPU."""
    registry = dict(flop_counter.flop_registry)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    registry[ATTENTION] = registry[torch.ops.aten._scaled_dot_product_flash_attention]
    registry[backward] = registry[torch.ops.aten._scaled_dot_product_flash_attention_backward]
    with (
        mock.patch.dict(flop_counter.flop_registry, registry),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def without_values(model: Any) -> Any:
    """A model of the meta device as one of tensors without values on the host; its numbers have values."""
    numbers = {
        (module, name): torch.zeros(module._buffers[name].shape, dtype=torch.long)
        for module in model.modules()
        for name in getattr(module, "ON_HOST", ())
    }
    with counting():
        model.to_empty(device="cpu")
    for (module, name), number in numbers.items():
        module._buffers[name] = number
        if name == "state":
            number[0] = module.capacity  # a full queue
    return model


def count(part: str, sizes: Sizes, card: Card = H100) -> Cost:
    """What one batch of a part costs."""
    build, work_of = PARTS[part]
    with torch.device("meta"):
        model = build(sizes)
    model = without_values(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(x.numel() * x.element_size() for x in {*model.parameters(), *model.buffers()}) + 8 * trained
    with counting():
        device = torch.device("cpu")
        work = work_of(model, sizes, device, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
        with Cost(card):
            work.run()  # makes what later batches find: the optimiser's moments
        with Cost(card, held) as cost:
            work.run()
    return cost


def hours(seconds: float, batch_size: int) -> float:
    """Of the published training, at so many seconds a step."""
    return SPOTS // batch_size * EPOCHS * seconds / 3600


def rows(batch_sizes: tuple[int, ...] = (32, 64, 256)) -> Iterator[list[str]]:
    deit, vit_l = "deit_base_patch16_224.fb_in1k", "vit_large_patch16_224"
    for name, tune in ((deit, "all"), (deit, "last:6"), (vit_l, "last:4")):
        for distil in (True, False):
            for batch_size in batch_sizes:
                cost = count("stage_one", Sizes(name, tune=tune, distil=distil, batch_size=batch_size))
                favor = sum(seconds for op, seconds in cost.by_name.items() if op.startswith("favor"))
                yield [
                    f"{name.split('.')[0]}, --tune {tune}",
                    "on" if distil else "off",
                    f"{batch_size}",
                    f"{cost.operations / 1e12:.1f}",
                    f"{cost.nbytes / 1e9:.0f}",
                    f"{cost.peak / 2**30:.1f}",
                    f"{1000 * cost.seconds:.0f}",
                    f"{favor / cost.seconds:.0%}",
                    f"{hours(cost.seconds, batch_size):.2f}",
                    f"{hours(cost.fused_s, batch_size):.2f}",
                    f"{hours(cost.matrix_s, batch_size):.2f}",
                ]


def table() -> list[str]:
    """Of docs/speed.md: a training step of stage one, and its cost in the published training."""
    heads = ("encoder", "distillation", "batch", "TFLOP", "GB moved", "peak, GiB", "ms a step", "FAVOR+")
    return table_lines((*heads, "hours", "fused", "at least"), list(rows()))


def parts_table(sizes: Sizes) -> list[str]:
    """Of docs/speed.md: what a batch of each part costs, per spot."""
    rows = []
    for part, (_, work_of) in PARTS.items():
        cost = count(part, sizes)
        name = f"{part.replace('_', ' ')}: {(work_of.__doc__ or '').strip().rstrip('.').lower()}"
        per_spot = (amount / sizes.batch_size for amount in (cost.operations / 1e9, cost.nbytes / 1e6))
        cells = [name, *(f"{amount:.1f}" for amount in (*per_spot, cost.peak / 2**30))]
        rows.append([*cells, f"{sizes.batch_size / cost.seconds:,.0f}"])
    return table_lines(("part", "GFLOP a spot", "MB moved a spot", "peak, GiB", "spots/s"), rows)


def operators_table(sizes: Sizes, most: int = 10) -> list[str]:
    """Of docs/speed.md: where the time of a training step of stage one goes, each operator on its own."""
    cost = count("stage_one", sizes)
    rows = [
        (f"`{name}`", f"{1000 * seconds:.1f}", f"{seconds / cost.seconds:.0%}")
        for name, seconds in cost.by_name.most_common(most)
    ]
    return table_lines(("operator", "ms", "of the step"), rows)


def cohorts_table(sizes: Sizes) -> list[str]:
    """Of docs/speed.md: hours of public cohorts on one GPU."""
    rows = []
    for name, part, n_spots in COHORTS:
        cost, n_batches = count(part, sizes), n_spots / sizes.batch_size
        hours_of = (n_batches * seconds / 3600 for seconds in (cost.seconds, cost.fused_s))
        operations = f"{n_batches * cost.operations / 1e18:.2f}"
        rows.append([name, f"{n_spots:,}", operations, *(f"{x:.1f}" for x in hours_of)])
    return table_lines(("work", "spots", "EFLOP", "hours", "fused"), rows)
