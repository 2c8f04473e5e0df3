"""scBERT's released weights (panglao_pretrain.pth, 91 tensors), loaded strictly into the gene encoder.

Yang et al. 2022, doi 10.1038/s42256-022-00534-z; tensors are named as in github.com/TencentAILabHealthcare/scBERT. The
file does not name its genes: gene positions are set separately, by name. Letters: V genes of the vocabulary, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.gene_encoder import GeneEncoder

POSITIONS = "pos_emb.emb.weight"  # (V + 1, W) float64: gene2vec, and a row of zeros for the token that scBERT appends
SKIPPED = {
    POSITIONS: "positions of genes, taken by name",
    "to_out.weight": "scBERT's head for masked tokens",
    "to_out.bias": "scBERT's head for masked tokens",
    "performer.calls_since_last_redraw": "a counter: projections are not redrawn",
}
LAYER = "performer.net.layers."
Outcome = dict[str, dict[str, str]]  # "loaded", "missing", "unexpected", "skipped": names of tensors, and why


def _scbert_names(depth: int) -> dict[str, str]:
    """Our parameter names to scBERT's."""
    names = {"token_embedding.weight": "token_emb.weight", "norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    for i in range(depth):
        attention, mlp = f"performer.net.layers.{i}.0.", f"performer.net.layers.{i}.1."
        theirs = {f"to_{p}.weight": f"{attention}fn.to_{p}.weight" for p in ("q", "k", "v", "out")}
        theirs["to_out.bias"] = f"{attention}fn.to_out.bias"
        theirs["projection"] = f"{attention}fn.fast_attention.projection_matrix"
        for kind in ("weight", "bias"):
            theirs[f"norm_attention.{kind}"] = f"{attention}norm.{kind}"
            theirs[f"norm_mlp.{kind}"] = f"{mlp}norm.{kind}"
            theirs[f"w1.{kind}"], theirs[f"w2.{kind}"] = f"{mlp}fn.fn.w1.{kind}", f"{mlp}fn.fn.w2.{kind}"
        names |= {f"blocks.{i}.{ours}": name for ours, name in theirs.items()}
    return names


def load_scbert(encoder: GeneEncoder, tensors: dict[str, Tensor]) -> Outcome:
    """Copy the trunk of a released scBERT checkpoint (the dict under "model_state_dict") into the encoder.

    Returns what became of every tensor, for `loading_table`. Gene positions stay as they are: `set_gene_positions` sets
    them from POSITIONS. Raises ValueError, before anything is copied, where a tensor of the trunk is missing, has
    another shape or is not finite.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    names, state = _scbert_names(len(encoder.blocks)), encoder.state_dict()
    _check_trunk(encoder, tensors, names)
    for ours, theirs in names.items():
        state[ours].copy_(tensors[theirs])
    trunk, depth = set(names.values()), len(encoder.blocks)
    outcome: Outcome = {"loaded": dict.fromkeys(names.values(), "the trunk")}
    outcome["missing"] = {name: f"not needed: {why}" for name, why in SKIPPED.items() if name not in tensors}
    beyond = [name for name in tensors if name.startswith(LAYER) and _layer(name) >= depth]
    outcome["skipped"] = {name: why for name, why in SKIPPED.items() if name in tensors}
    outcome["skipped"] |= dict.fromkeys(beyond, f"beyond --gene_depth {depth}")
    others = [name for name in tensors if name not in trunk and name not in outcome["skipped"]]
    outcome["unexpected"] = dict.fromkeys(others, "no part of scBERT")
    return outcome


def _layer(name: str) -> int:
    number = name.removeprefix(LAYER).split(".")[0]
    return int(number) if number.isdigit() else -1


def _check_trunk(encoder: GeneEncoder, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    missing = [theirs for theirs in names.values() if theirs not in tensors]
    if missing:
        raise ValueError(
            f"--gene_weights: expected scBERT's {len(names)} tensors, found {len(names) - len(missing)}, without "
            f"{missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f"; give panglao_pretrain.pth, or the file's number of layers as --gene_depth ({len(encoder.blocks)})"
        )
    state, width, heads = encoder.state_dict(), encoder.norm.weight.shape[0], encoder.blocks[0].heads
    for ours, theirs in names.items():
        expected, found = tuple(state[ours].shape), tuple(tensors[theirs].shape)
        if expected != found:
            raise ValueError(
                f"--gene_weights: expected {theirs} of shape {expected} by --gene_width {width} and --gene_heads "
                f"{heads}, found {found}; use the sizes that the file was trained with"
            )
        if not torch.isfinite(tensors[theirs]).all():
            raise ValueError(f"--gene_weights: {theirs}: expected numbers, found NaN or infinity; fetch the file again")


def loading_table(outcome: Outcome, shown: int = 3) -> str:
    """A line per kind of the outcome of `load_scbert`: number of tensors, and the first names of each reason."""
    lines = []
    for kind in ("loaded", "missing", "unexpected", "skipped"):
        reasons: dict[str, list[str]] = {}
        for name, why in outcome[kind].items():
            reasons.setdefault(why, []).append(name)
        notes = [
            ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "") + f" ({why})"
            for why, names in reasons.items()
        ]
        lines.append(f"  {kind:<10} {len(outcome[kind]):>3}  {'; '.join(notes)}".rstrip())
    return "\n".join(lines)


def set_gene_positions(encoder: GeneEncoder, table: Tensor, vocabulary: dict[str, int], genes: list[str]) -> int:
    """Set each panel gene's position to its gene2vec row, looked up by name; a gene outside the vocabulary gets zeros.

    Parameters
    ----------
    table : gene2vec (V, W), maybe with further rows
    vocabulary : row of each gene of the table
    genes : the panel's, in its order

    Returns
    -------
    the number of genes found; ValueError where none is, or widths differ
    """
    width = encoder.gene_embedding.weight.shape[1]
    if table.ndim != 2 or table.shape[1] != width:
        raise ValueError(
            f"gene2vec: expected rows of {width} numbers (--gene_width), found shape {tuple(table.shape)}; "
            "give the width of the file as --gene_width"
        )
    if len(vocabulary) > len(table):
        raise ValueError(
            f"--gene_vocab: expected at most {len(table)} genes, the rows of gene2vec, found {len(vocabulary)}; give "
            "the vocabulary that belongs to it"
        )
    found = [(row, vocabulary[gene]) for row, gene in enumerate(genes) if gene in vocabulary]
    if not found:
        example = next(iter(vocabulary), "-")
        raise ValueError(
            f"--gene_vocab: expected some of the {len(genes)} panel genes ({genes[0]}, ...), found none of them "
            f"({example}, ...); give a vocabulary of the same species and kind of names"
        )
    rows, sources = map(list, zip(*found, strict=True))
    with torch.no_grad():
        encoder.gene_embedding.weight.zero_()
        encoder.gene_embedding.weight[rows] = table[sources].float()
    return len(found)
