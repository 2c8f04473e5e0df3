"""Choose the gene panels on the train slices and write the two expression files of every slice.

    python make_decoder_data.py --data data/Breast_cancer
    python make_decoder_data.py --target_genes my_genes.txt      # one gene per line

Reads the counts of all slices; writes per slice `filtered_feature_bc_matrix_one.h5ad` (input genes of stage one) and
`filtered_feature_bc_matrix_decoder.h5ad` (target genes of stage two), raw counts, beside the counts or under --panels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from tqdm import tqdm

from utils.slices import export, genes, reader, table
from utils.training import arguments


def parse_args(argv=None):
    parser = arguments.shared(__doc__, part="all")
    group = parser.add_argument_group("panels")
    group.add_argument(
        "--n_top_genes", type=arguments.count, default=300, help="target genes: highest expressed, common"
    )
    group.add_argument(
        "--n_input_genes", type=arguments.count, default=2000, help="input genes: highly variable, common"
    )
    group.add_argument("--target_genes", type=Path, help="file with the target genes instead, one per line")
    group.add_argument("--input_genes", type=Path, help="file with the input genes instead, one per line")
    group.add_argument("--min_counts", type=arguments.count_or_zero, default=0, help="drop spots with fewer counts")
    return parser.parse_args(argv)


@dataclass
class Loaded:
    """One slice with unique gene names and no empty spot; `train` marks the spots that the panels may be chosen on."""

    row: table.SliceRow
    source: reader.Slice
    counts: sp.csr_matrix
    names: np.ndarray
    pitch_px: float
    counts_hash: str
    train: np.ndarray


def load_slice(row, source: reader.Slice, symbols: dict[str, str], args) -> Loaded:
    """Duplicate names summed, spots without a count (or below --min_counts) dropped and counted."""
    counts, names, summed = genes.unique_genes(source.counts, source.genes, symbols)
    total = np.asarray(counts.sum(1)).ravel()
    kept = total >= max(args.min_counts, 1)
    pitch_px = reader.pitch_fullres_px(source.spots)
    xy = source.spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    parts = table.strip_parts(xy, pitch_px) if args.val_strip and row.part == "train" else np.full(len(xy), row.part)
    notes = [f"{n} {what}" for what, n in source.unmatched.items() if n]
    notes += [f"{summed} duplicate gene names summed"] if summed else []
    notes += [f"{(~kept).sum()} spots below {max(args.min_counts, 1)} counts dropped"] if not kept.all() else []
    print(
        f"{row.slice}: {kept.sum()} spots, {len(names)} genes, {total.sum()} counts" + "".join(f", {n}" for n in notes)
    )
    if not kept.any():
        raise ValueError(f"{source.root}: expected spots with counts, found none of at least {max(args.min_counts, 1)}")
    content = reader.counts_hash(source.counts, source.spots.index.to_numpy(str), source.genes)
    spots = source.spots.loc[kept]
    source = reader.Slice(
        source.name, source.root, source.counts[kept], source.genes, source.gene_ids, spots, source.unmatched
    )
    return Loaded(row, source, counts[kept], names, pitch_px, content, (parts == "train")[kept])


def load_all(rows, args) -> list[Loaded]:
    sources = [
        reader.read_slice(table.slice_folder(args.data, row), row.slice)
        for row in tqdm(rows, desc="slices", unit="slice", disable=None)
    ]
    symbols: dict[str, str] = {}
    for source in sources:
        symbols |= genes.symbols_by_id(source.genes, source.gene_ids)
    return [load_slice(row, source, symbols, args) for row, source in zip(rows, sources, strict=True)]


def choose(role: str, train: list[Loaded], args) -> tuple[list[str], str]:
    """The panel of a role and, in words, how it was chosen."""
    given = args.target_genes if role == "target" else args.input_genes
    present = set().union(*(one.names for one in train))
    if given is not None:
        panel = genes.read_gene_list(given)
        unknown = [gene for gene in panel if gene not in present]
        if unknown:
            raise ValueError(
                f"{given}: {len(unknown)} of {len(panel)} genes are in no train slice ({unknown[0]}, ...); remove them"
            )
        return panel, f"the list {given.name}"
    wanted = args.n_top_genes if role == "target" else args.n_input_genes
    rule = genes.highest_expressed if role == "target" else genes.highly_variable
    panel = rule([(one.counts[one.train], one.names) for one in train], wanted)
    if not panel:
        raise ValueError(f"{args.data}: the train slices have no gene name in common; are they of one species?")
    if len(panel) < wanted:
        print(f"warning: {wanted} {role} genes asked for, the train slices have {len(panel)} in common: all are taken")
    return panel, f"{len(panel)} genes by {rule.__name__} on train spots"


def panel_file(one: Loaded, role: str, panel: list[str], how: str, train: list[Loaded]):
    """AnnData of one slice's panel genes; a gene that the slice lacks is a column of zeros, marked not measured."""
    import anndata
    import pandas as pd

    columns = genes.columns_of(one.names, panel)
    counts = sp.csc_matrix((one.counts.shape[0], len(panel)), dtype=np.int32).tolil()
    counts[:, columns >= 0] = one.counts[:, columns[columns >= 0]]
    spots = one.source.spots
    obs = spots[["array_row", "array_col"]].assign(total_counts=np.asarray(one.counts.sum(1)).ravel())
    adata = anndata.AnnData(counts.tocsr(), obs=obs, var=pd.DataFrame({"measured": columns >= 0}, index=panel))
    adata.obsm["spatial"] = spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    adata.uns["magic"] = {
        "format": 1,
        "role": role,
        "panel": np.array(panel),
        "panel_hash": genes.panel_hash(panel),
        "how": how,
        "train_slices": np.array([t.row.slice for t in train]),
        "train_hashes": np.array([t.counts_hash for t in train]),
        "counts_hash": one.counts_hash,
        "spot_pitch_fullres_px": one.pitch_px,
    }
    return adata


def main(args):
    rows, warnings = table.read_table(args.data, args.slices, val_strip=args.val_strip, allow_leak=args.allow_leak)
    arguments.say(warnings)
    rows = [row for row in rows if row.part]
    print(table.format_table(rows))
    for part in ("train", args.part):
        arguments.chosen(rows, part)
    loaded = load_all(rows, args)
    arguments.say(table.check_identical(rows, {one.row.slice: one.counts_hash for one in loaded}, args.allow_leak))
    train = [one for one in loaded if one.row.part == "train"]
    panels = {role: choose(role, train, args) for role in genes.FILES}
    for one in loaded:
        if args.part not in ("all", one.row.part):
            continue
        for role, (panel, how) in panels.items():
            adata = panel_file(one, role, panel, how, train)
            missing = int((~adata.var["measured"]).sum())
            if missing:
                print(f"{one.row.slice}: {missing} of {len(panel)} {role} genes are not in this slice")
            export.write_anndata(genes.panel_path(args.data, args.panels, one.row.slice, role), adata)
    for role, (panel, how) in panels.items():
        print(f"{role} panel: {how} of {len(train)} slices: {', '.join(panel[:5])}, ...")


if __name__ == "__main__":
    arguments.run(main, parse_args())
