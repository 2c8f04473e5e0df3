"""What frozen blocks give, kept on disk: the same as running them in every step, within the budget."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_stage_one import batch_of, stage_one
from tiny_runs import Work

from model import scbert
from model.gene_encoder import GeneEncoder
from utils.genes import panels as gene_panels
from utils.training import frozen as frozen_blocks

ACCELERATOR = SimpleNamespace(autocast=nullcontext, device=torch.device("cpu"))


@pytest.fixture
def frozen():
    model = stage_one()
    model.gene_encoder.freeze_trunk(2)
    model.reset_momentum_encoders()
    return model


def flags(tmp_path, budget):
    return SimpleNamespace(frozen_budget=budget, gene_width=24, batch_size=4, out=tmp_path / "out")


def test_kept_outputs_are_those_of_the_frozen_blocks(frozen, tmp_path, capsys):
    bins = batch_of(11)["bins"].numpy()
    kept = frozen_blocks.outputs(frozen.gene_encoder, bins, ACCELERATOR, flags(tmp_path, 1.0))
    expected = frozen.gene_encoder.frozen_part(torch.from_numpy(bins))
    assert isinstance(kept, np.memmap) and kept.shape == (11, 20, 24)
    assert torch.equal(torch.from_numpy(np.array(kept)).view(torch.bfloat16), expected.bfloat16())
    assert "2 frozen blocks give for 11 spots is kept" in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == [], "the file has no name and goes with the process"


def test_what_the_budget_does_not_hold_is_run_anew(frozen, tmp_path, capsys):
    bins = np.zeros((2**20, 20), np.uint8)  # 0.94 GiB of outputs
    assert frozen_blocks.outputs(frozen.gene_encoder, bins, ACCELERATOR, flags(tmp_path, 0.9)) is None
    assert "needs a --frozen_budget of 0.9 GiB" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_without_frozen_blocks_or_a_budget_nothing_is_kept(frozen, tmp_path):
    bins = batch_of()["bins"].numpy()
    assert frozen_blocks.outputs(frozen.gene_encoder, bins, ACCELERATOR, flags(tmp_path, 0.0)) is None
    assert frozen_blocks.outputs(stage_one().gene_encoder, bins, ACCELERATOR, flags(tmp_path, 1.0)) is None


def released_scbert(folder, genes):
    """A scBERT file of two blocks, its gene2vec inside, and the vocabulary: names of the files."""
    encoder = GeneEncoder(len(genes), depth=2, gene_width=16, heads=1)
    own = encoder.state_dict()
    tensors = {theirs: own[ours] for ours, theirs in scbert._scbert_names(2).items()}
    tensors["pos_emb.emb.weight"] = torch.randn(len(genes) + 1, 16, dtype=torch.float64)
    tensors["pos_emb.emb.weight"][-1] = 0
    torch.save({"model_state_dict": tensors}, folder / "panglao.pth")
    (folder / "genes.txt").write_text("\n".join(genes))
    return "--gene_weights", folder / "panglao.pth", "--gene_vocab", folder / "genes.txt"


def test_training_on_kept_outputs_ends_where_training_on_bins_does(prepared, tmp_path, capsys):
    panel = gene_panels.read_panel(gene_panels.panel_path(prepared.data, prepared.panels, "P01_1", "input")).genes
    weights = released_scbert(tmp_path, panel)
    ends = []
    for budget in (0, 1):
        work = Work(prepared.data, prepared.tiles, prepared.panels, tmp_path / str(budget))
        work.run(
            *("train_mymodel", "--Epoch", 1, "--gene_depth", 2, "--tune_block", 1, *weights, "--frozen_budget", budget)
        )
        assert ("1 frozen blocks give" in capsys.readouterr().out) == (budget > 0)
        ends.append(torch.load(work.encoder, weights_only=True)["model"])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name].float(), tensor.float(), rtol=0.02, atol=5e-3)  # bf16 kept of fp32


@pytest.mark.slow
def test_compiled_encoders_train_alike():
    model, batch = stage_one(), batch_of()

    def slopes():
        model.zero_grad()
        out = model(**batch, alpha=0.4, generator=torch.Generator().manual_seed(0))
        out.loss.backward()
        return [out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected, names = slopes(), list(model.state_dict())
    model.compile_encoders()
    for ours, plain in zip(slopes(), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
    assert list(model.state_dict()) == names
