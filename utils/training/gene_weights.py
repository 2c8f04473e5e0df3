"""Released weights of the gene encoder: scBERT's trunk and gene2vec positions, as far as flags name them.

Letters: V genes of the vocabulary, W width of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import arguments, settings
from utils.files import tensors as tensor_files
from utils.genes import lists as gene_lists
from utils.genes import names as gene_names
from utils.slices import visium

if TYPE_CHECKING:
    from model.gene_encoder import GeneEncoder


def add_flags(parser: arguments.Parser) -> None:
    group = parser.add_argument_group("gene weights")
    group.add_argument("--gene_weights", type=Path, help="released scBERT checkpoint, e.g. panglao_pretrain.pth")
    group.add_argument("--gene2vec", type=Path, help="gene positions: .npy with --gene_vocab, or .txt: gene v1 v2 ...")
    group.add_argument("--gene_vocab", type=Path, help="genes in the order of their positions: text, tsv or h5ad")
    group.add_argument(
        "--gene_aliases", type=Path, help="other names of genes: a table laid out as HGNC's complete set"
    )
    group.add_argument(
        "--tune_block", type=arguments.count_or_zero, default=4, help="block that trains with --gene_weights, from 0"
    )


def check(flags: settings.StageOneSettings) -> None:
    """Flags and files, before anything heavy is imported."""
    files = {name: getattr(flags, name) for name in ("gene_weights", "gene2vec", "gene_vocab", "gene_aliases")}
    for name, path in files.items():
        if path is not None:
            settings.require_file(path, f"--{name}", "see docs/gene_weights.md")
    named = flags.gene2vec is not None and flags.gene2vec.suffix in gene_lists.NAMED
    if (flags.gene_weights or flags.gene2vec) and not (flags.gene_vocab or named):
        raise ValueError(
            "--gene_weights and --gene2vec: expected --gene_vocab, which names the genes of their files, found none; "
            "give it"
        )
    if flags.gene_vocab and named:
        raise ValueError(
            f"--gene_vocab: expected none, since the lines of --gene2vec {flags.gene2vec} name their genes, found "
            f"{flags.gene_vocab}; leave it out"
        )
    if (flags.gene_vocab or flags.gene_aliases) and not (flags.gene_weights or flags.gene2vec):
        raise ValueError(
            "--gene_vocab and --gene_aliases: expected --gene_weights or --gene2vec, whose genes they name, found "
            "neither; give one"
        )
    if flags.gene_weights and flags.tune_block >= flags.gene_depth:
        raise ValueError(
            f"--tune_block: expected less than --gene_depth {flags.gene_depth}, found {flags.tune_block}; lower it"
        )


def load(encoder: GeneEncoder, flags: settings.StageOneSettings, panel: list[str], folders: Sequence[Path]) -> None:
    """Put released weights into the gene encoder, as far as flags name them, and report what was loaded.

    With --gene_weights all but --tune_block, the final norm and the head is frozen; with --gene2vec alone everything
    trains. Raises ValueError where a file is not what its flag says, or under half of the panel has a position.

    Parameters
    ----------
    panel : input genes
    folders : of the slices, for their Ensembl ids
    """
    import torch

    from model import scbert

    if not (flags.gene_weights or flags.gene2vec):
        return
    names, table = gene_lists.read_gene2vec(flags.gene2vec) if flags.gene2vec else (None, None)
    if not names:
        names = gene_lists.read_vocabulary(_given(flags.gene_vocab))
    if flags.gene_weights:
        tensors = tensor_files.read_weights(flags.gene_weights, "--gene_weights")
        loaded = scbert.load_scbert(encoder, tensors)
        print(f"{flags.gene_weights.name}: {len(tensors)} tensors\n{scbert.loading_table(loaded)}")
        encoder.freeze_trunk(flags.tune_block)
        table = tensors.get(scbert.POSITIONS) if table is None else table
    if table is None:
        raise ValueError(
            f"--gene_weights: {flags.gene_weights}: expected {scbert.POSITIONS}, found none; give --gene2vec"
        )
    positions = torch.as_tensor(table)
    check_table(positions.double().numpy(), names, flags)
    places = find_places(panel, names, flags, folders)
    scbert.set_gene_positions(encoder, positions, places, panel)


def _given(path: Path | None) -> Path:
    """A file that `check` has asked for."""
    assert path is not None
    return path


def check_table(table: np.ndarray, vocabulary: list[str], flags: settings.StageOneSettings) -> None:
    """One row per gene, apart from a last row of zeros, scBERT's for the token that it appends: (V or V + 1, W).

    A name too many or too few would shift every gene after it.
    """
    source = f"--gene2vec {flags.gene2vec}" if flags.gene2vec else f"--gene_weights {flags.gene_weights}"
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(f"{source}: expected a row of finite numbers per gene, found others; fetch the file again")
    n_rows = len(table) - (len(table) > 0 and not table[-1].any())
    if n_rows != len(vocabulary):
        raise ValueError(
            f"--gene_vocab {flags.gene_vocab}: expected {n_rows} genes, as {source} has positions, found "
            f"{len(vocabulary)}; give the vocabulary that belongs to them, one gene per line, in their order"
        )


def find_places(
    panel: list[str], vocabulary: list[str], flags: settings.StageOneSettings, folders: Sequence[Path]
) -> dict[str, int]:
    """Panel gene -> its place in the vocabulary; reports how many were found, and by what."""
    by_id = any(gene_names.is_ensembl(name) for name in (*panel, *vocabulary))
    symbols = gene_names.slice_names(map(visium.read_slice_genes, folders)).symbols if by_id else {}
    known = gene_names.known_names(flags.gene_aliases, symbols)
    matches = gene_names.match_genes(panel, vocabulary, known)
    flag, path = "--gene_vocab" if flags.gene_vocab else "--gene2vec", _given(flags.gene_vocab or flags.gene2vec)
    gene_names.require_half(len(matches.places), len(panel), f"{flag} {path}", matches.unmatched, vocabulary)
    print(f"gene positions: {len(matches.places)} of {len(panel)} panel genes found in {path.name}: {matches}")
    return matches.places
