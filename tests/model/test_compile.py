"""torch.compile takes both encoders whole, once for all batches; FAVOR+ is an operator that it takes as it is."""

import pytest
import torch
from small_stage_one import BATCH, batch_of, stage_one, step_of
from torch._dynamo.testing import CompileCounter

from model.performer import favor, orthogonal_projection
from model.tuning import tune


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@torch.no_grad()
def encoded(model, n):
    batch = batch_of(n)
    return *model.encode_images(batch["tiles"]), *model.encode_genes(batch["bins"])


def test_encoders_are_compiled_once_for_all_batches(counter):
    model = stage_one().eval()
    expected = {n: encoded(model, n) for n in (BATCH, 4, 1)}
    model.compile_encoders(BATCH, backend=counter, fullgraph=True)
    for n, plain in expected.items():
        for found, wanted in zip(encoded(model, n), plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 2, n


def test_a_training_step_has_no_graph_breaks(counter):
    model = stage_one()
    model.gene_encoder.freeze_trunk(1)
    tune(model.image_encoder, "last:5")
    model.reset_momentum_encoders()
    model.compile_encoders(BATCH, backend=counter, fullgraph=True)
    compiled = []
    for seed in range(3):
        out = step_of(model, batch_of(seed=seed))
        out.loss.backward()
        model.after_step(out.pair_m)
        compiled.append(counter.frame_count)
    assert compiled == [6] * 3  # a frozen block each, two encoders and their momentum encoders


@pytest.mark.parametrize("fast", [True, False])
def test_favor_is_an_operator_by_torchs_rules(fast):
    q, k, v = (torch.randn(2, 7, 3, 16, requires_grad=True).transpose(1, 2) for _ in range(3))  # as layers give them
    projection = orthogonal_projection(20, 16)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(favor, (q, k, v, projection, fast), test_utils=tests)
