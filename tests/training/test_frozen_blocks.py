"""A gene encoder with released weights keeps its frozen blocks; compiled encoders train alike."""

import pytest
import torch
from small_stage_one import batch_of, stage_one
from tiny_runs import Work

from model import scbert
from model.gene_encoder import GeneEncoder
from utils.genes import panels as gene_panels


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


def test_frozen_blocks_keep_the_released_weights(prepared, tmp_path):
    panel = gene_panels.read_panel(gene_panels.panel_path(prepared.data, prepared.panels, "P01_1", "input")).genes
    weights = released_scbert(tmp_path, panel)
    work = Work(prepared.data, prepared.tiles, prepared.panels, tmp_path)
    work.run("train_mymodel", "--Epoch", 1, "--Init_lr", 1e-2, "--gene_depth", 2, "--tune_block", 1, *weights)
    trained = torch.load(work.encoder, weights_only=True)["model"]
    released = torch.load(tmp_path / "panglao.pth", weights_only=True)["model_state_dict"]
    for ours, theirs in scbert._scbert_names(2).items():
        same = torch.equal(trained[f"gene_encoder.{ours}"], released[theirs])
        assert same == (not ours.startswith(("blocks.1.", "norm.")) or ours.endswith("projection")), ours


@pytest.mark.slow
def test_compiled_encoders_train_alike():
    model, batch = stage_one(), batch_of()

    def slopes():
        model.zero_grad()
        out = model(**batch, alpha=0.4, generator=torch.Generator().manual_seed(0))
        out.loss.backward()
        return [out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected, names = slopes(), list(model.state_dict())
    model.compile_encoders(len(batch["bins"]))
    for ours, plain in zip(slopes(), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
    assert list(model.state_dict()) == names
