"""Tensors on "cuda" in a machine without one. They have shapes, types and devices, no values: operations that mix
devices raise, and what a host would wait for, or compute in the wrong precision, is noted."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp32": None}
# their result has as many rows as the values ask for, or is checked on the host
READ = ("_local_scalar_dense", "item", "is_nonzero")
WAITING = {
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "multinomial",
    "equal",
    "bincount",
    "repeat_interleave",
}
IN_FP32 = {
    "_softmax", "_log_softmax", "_safe_softmax", "native_layer_norm", "linalg_vector_norm", "exp", "exp_", "log",
    "binary_cross_entropy_with_logits", "softplus", "var", "std", "var_mean",
}  # fmt: skip


def on(tensor, kind):
    return isinstance(tensor, torch.Tensor) and tensor.device.type == kind


def mixed_copy(name, args, kwargs):
    """Where a copy goes between host and device: its name if the host waits for it."""
    if name == "_to_copy":
        target = torch.device(kwargs.get("device") or args[0].device).type
        source = args[0].device.type
    else:
        target, source = args[0].device.type, args[1].device.type
    blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if {target, source} == {"cpu", "cuda"} and (target == "cpu" or blocking):
        return f"copy from {source} to {target}"
    return None


def wait(name, args, kwargs):
    """What the host waits for in an operation, None where it goes on at once."""
    if name in ("_to_copy", "copy_"):
        return mixed_copy(name, args, kwargs)
    if name in (*WAITING, *READ) and any(on(x, "cuda") for x in tree_leaves(args)):
        return name
    if name in ("index", "index_put", "index_put_") and on(args[0], "cuda"):
        places = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in places):
            return f"{name} by a mask"
        if any(on(x, "cpu") for x in places):
            return f"{name} by numbers of the host"
    return None


class Watch(TorchDispatchMode):
    """Notes of all operations: what the host waited for, and results of the wrong precision on the device."""

    def __init__(self):
        super().__init__()
        self.waits, self.wrong, self.names = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        waited = wait(name, args, kwargs)
        if waited:
            self.waits.append(waited)
        if name in READ and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else args[0].dtype.is_floating_point + 0
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if on(x, "cuda"):
                self.names.add(name)
                if x.dtype == torch.float64 or (name in IN_FP32 and x.dtype in (torch.bfloat16, torch.float16)):
                    self.wrong.append(f"{name} in {x.dtype}")
        return out


@contextmanager
def autocast(dtype):
    """torch.autocast itself asks for a card."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def accelerator(precision, parameters=()):
    """What the scripts ask of accelerate's. A backward pass, which fake tensors on CUDA cannot do, leaves gradients."""

    def backward(loss):
        assert loss.dtype == torch.float32 and loss.requires_grad
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    return SimpleNamespace(
        device=CUDA,
        mixed_precision={"fp32": "no"}.get(precision, precision),
        scaler=None,
        autocast=lambda: autocast(DTYPES[precision]),
        no_sync=lambda replica: nullcontext(),
        backward=backward,
    )


def zeros(tensor):
    """What a fake tensor on the host gives for NumPy."""
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def with_autocast(model, precision):
    """The model as accelerate prepares it."""

    def replica(*args, **kwargs):
        with autocast(DTYPES[precision]):
            return model(*args, **kwargs)

    return replica


@contextmanager
def fake_cuda(monkeypatch):
    """Within it, models are moved to CUDA and run there; gives the notes."""
    with monkeypatch.context() as patch:
        patch.setattr("utils.distributed.pinned", lambda rows: rows)
        patch.setattr(FakeTensor, "numpy", zeros, raising=False)
        with FakeTensorMode(allow_non_fake_inputs=True), Watch() as notes:
            yield notes
