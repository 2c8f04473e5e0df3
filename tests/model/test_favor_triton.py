"""favor_triton.py without a GPU: the kernels' numbers in Triton's interpreter, and that they compile for GPUs."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.performer import orthogonal_projection
from tests.model.test_performer import plain_attention

pytest.importorskip("triton", reason="torch for CPUs comes without Triton")
ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 99 * 1024  # of a program, on the cards that have least of it (compute capability 8.6 and 8.9)
NUMBERS = {"H": "i32", "N": "i32", "M": "i32", "n_blocks": "i32", "epsilon": "fp32"}
HEADS = ("q", "k", "v", "gradient", "out", "dq", "dk", "dv")  # in the precision of the layers; all else is fp32


def case(n_tokens, width, n_features, size=1.0, dtype=torch.float32, batch=2, heads=2):
    generator = torch.Generator().manual_seed(n_tokens)
    made = [torch.randn(batch, n_tokens, heads, width, generator=generator).transpose(1, 2) for _ in range(4)]
    made[0], made[1] = size * made[0], size * made[1] * torch.tensor([0.6, 1.6]).view(1, heads, 1, 1)
    return *(x.to(dtype) for x in made), orthogonal_projection(n_features, width, generator)


CASES = {
    "tokens and features that fill no block": case(70, 16, 40),
    "fewer than a block of both": case(5, 32, 20),
    "of the published size": case(130, 64, 266),
    "exponents that overflow fp32": case(70, 16, 40, size=6.0),
    "heads in bf16": case(70, 64, 40, dtype=torch.bfloat16),
    "heads that lie one after the other": tuple(x.contiguous() for x in case(70, 16, 40)),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    torch.save(CASES, folder / "inputs")
    command = [sys.executable, "-m", "tests.model.favor_interpreted", folder / "inputs", folder / "outputs"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return torch.load(folder / "outputs")


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_plain_form(interpreted, name):
    *heads, gradient, projection = CASES[name]
    plain = [x.double().requires_grad_() for x in heads]
    expected = plain_attention(*plain, projection.double())
    expected.backward(gradient.double())
    rounding = 1e-2 if heads[0].dtype == torch.bfloat16 else 1e-5
    for found, wanted in zip(interpreted[name], (expected, *(x.grad for x in plain)), strict=True):
        assert found.dtype == heads[0].dtype and found.isfinite().all()
        assert (found.double() - wanted).norm() <= rounding * (wanted.norm() + 0.1 * gradient.norm())


def test_the_count_of_operations_is_of_these_blocks():
    from benchmarks import device_count
    from model import favor_triton

    assert device_count.M_BLOCK == favor_triton.M_BLOCK


def test_the_result_lies_as_the_next_layer_reads_it(interpreted):
    for out in interpreted["heads that lie one after the other"]:
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("capability", "dtype", "precision"), [(80, "fp32", "ieee"), (90, "bf16", "tf32")])
def test_kernels_compile_for_gpus(capability, dtype, precision, tmp_path, monkeypatch):
    """To machine code, with the memory that every card has which `serves` admits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from model import favor_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    blocks = {"N_BLOCK": favor_triton.N_BLOCK, "M_BLOCK": favor_triton.M_BLOCK}
    constants = {"E": 64, **blocks, "PRECISION": precision}
    for name in ("key_context", "attend", "query_gradients", "context_gradients", "key_gradients"):
        kernel = getattr(favor_triton, name)
        pointers = {name: f"*{dtype}" if name in HEADS else "*fp32" for name in inspect.signature(kernel.fn).parameters}
        signature = (
            pointers | {n: t for n, t in NUMBERS.items() if n in pointers} | dict.fromkeys(constants, "constexpr")
        )
        compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY
