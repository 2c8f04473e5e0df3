"""Choose the gene panels on the train slices and write the two expression files of every slice.

    python make_decoder_data.py --data data/Breast_cancer
    python make_decoder_data.py --target_genes my_genes.txt      # one gene per line
    python make_decoder_data.py --input_genes panglao_human.h5ad --full_vocabulary     # all that scBERT was trained on

Reads the counts slice by slice, those that --memory does not hold by spans of spots, once to choose the panels and once
to write them; writes per slice `filtered_feature_bc_matrix_one.h5ad` (input genes of stage one) and
`filtered_feature_bc_matrix_decoder.h5ad` (target genes of stage two), raw counts, beside the counts or under --panels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import settings
from utils.files.exclusive import exclusive_folder
from utils.genes import lists as gene_lists
from utils.genes import names as gene_names
from utils.genes import panels as gene_panels
from utils.slices import content, matrix, splits, visium


def parse_args(argv=None):
    parser = settings.shared(__doc__, part="all")
    group = parser.add_argument_group("panels")
    group.add_argument(
        "--n_top_genes", type=settings.count, default=300, help="target genes: highest expressed, common"
    )
    group.add_argument(
        "--n_input_genes", type=settings.count, default=2000, help="input genes: highly variable, common"
    )
    group.add_argument("--target_genes", type=Path, help="file with the target genes instead, e.g. one per line")
    group.add_argument("--input_genes", type=Path, help="file with the input genes instead, a list or an h5ad")
    group.add_argument(
        "--full_vocabulary", action="store_true", help="half of --input_genes may be in no train slice, reading as zero"
    )
    group.add_argument(
        "--gene_aliases", type=Path, help="other names of genes: a table laid out as HGNC's complete set"
    )
    group.add_argument("--min_counts", type=settings.count_or_zero, default=0, help="drop spots with fewer counts")
    settings.add_memory(parser)
    return parser.parse_args(argv)


@dataclass
class Surveyed:
    """What is kept of a slice between choosing the panels and writing them; its counts stay on disk."""

    row: splits.SliceRow
    total: np.ndarray  # (S,) counts of every spot under tissue
    kept: np.ndarray  # (S,) bool: not empty, not below --min_counts
    pitch_px: float
    counts_hash: str
    files_hash: str  # of the matrix and the positions
    profile: gene_panels.Profile  # of the kept train spots


def read_slice(row, args) -> visium.CountedSlice:
    return visium.read_slice(splits.slice_folder(args.data, row), row.slice, bytes_of(args))


def bytes_of(args) -> float:
    return args.memory * 2**30


def train_spots(row, source: visium.CountedSlice, pitch_px: float, args) -> np.ndarray:
    """Spots that the panels may be chosen on: (S,) bool."""
    if args.val_strip and row.part == "train":
        return splits.strip_parts(source.spots[["x_fullres_px", "y_fullres_px"]].to_numpy(), pitch_px) == "train"
    return np.full(len(source.spots), row.part == "train")


def survey(row, slice_names: gene_names.SliceNames, args) -> Surveyed:
    """Duplicate names summed, spots without a count (or below --min_counts) dropped and counted."""
    source, least = read_slice(row, args), max(args.min_counts, 1)
    mapped = slice_names.agreed(source.genes, source.gene_ids)
    names = list(dict.fromkeys(mapped.tolist()))
    pitch_px = source.pitch_px
    total, train = np.zeros(len(source.spots), np.int64), train_spots(row, source, pitch_px, args)
    gathering, profile = gene_panels.gather(mapped, names), None
    shared = np.array([sys.intern(name) for name in names], object)  # hundreds of slices hold the same names once
    for span in visium.spans(source.counts, bytes_of(args)):
        counts = source.counts[span]
        total[span] = np.asarray(counts.sum(1)).ravel()
        part = gene_panels.profile(counts[(total[span] >= least) & train[span]] @ gathering, shared)
        profile = part if profile is None else gene_panels.merged(profile, part)
    kept = total >= least
    tell(row, source, total, kept, len(names), least)
    counts_hash = visium.counts_hash(source.counts, source.spots.index.to_numpy(str), source.genes, bytes_of(args))
    return Surveyed(row, total, kept, pitch_px, counts_hash, content.files_hash(source.root), profile)


def tell(row, source: visium.CountedSlice, total: np.ndarray, kept: np.ndarray, n_genes: int, least: int) -> None:
    """A line per slice. Raises ValueError where no spot is left."""
    summed = len(source.genes) - n_genes
    notes = [f"{n} {what}" for what, n in source.unmatched.items() if n]
    notes += [f"{summed} duplicate gene names summed"] if summed else []
    controls = matrix.count_controls(source.root)
    notes += [f"{controls} control features left out"] if controls else []
    notes += [f"{(~kept).sum()} spots below {least} counts dropped"] if not kept.all() else []
    print(", ".join([f"{row.slice}: {kept.sum()} spots", f"{n_genes} genes", f"{total.sum()} counts", *notes]))
    if not kept.any():
        raise ValueError(f"{source.root}: expected spots with counts, found none of at least {least}")


def listed(given: Path, train: list[Surveyed], known: gene_names.KnownNames, whole: bool) -> tuple[list[str], str]:
    """The panel that a file names. Of a `whole` vocabulary half its genes, of a list all must be in a train slice."""
    panel, how = gene_lists.read_vocabulary(given), {}
    if controls := [gene for gene in panel if gene_names.is_control(gene)]:
        raise ValueError(
            f"{given}: expected genes, found {len(controls)} control features in {len(panel)} names "
            f"({controls[0]}, ...); remove them"
        )
    for one in train:
        matches = gene_names.match_genes(one.profile.names, panel, known)
        how = {panel[place]: matches.how[name] for name, place in matches.places.items()} | how
    unknown = [gene for gene in panel if gene not in how]
    if unknown and not whole:
        hint = gene_lists.hint(panel, unknown, (name for one in train for name in one.profile.names))
        remedy = hint or "remove them" + ("" if known.approved else ", or name a table of aliases with --gene_aliases")
        raise ValueError(
            f"{given}: {len(unknown)} of {len(panel)} genes are in no train slice ({unknown[0]}, ...); {remedy}"
        )
    if whole:
        gene_names.require_half(len(how), len(panel), f"--input_genes {given}", unknown, train[0].profile.names)
        print(
            f"{given.name}: {len(how)} of {len(panel)} genes are in a train slice, {gene_names.counted(how.values())}"
        )
        print(f"{given.name}: {len(unknown)} genes are in none and read as zero")
    return panel, f"the list {given.name}"


def choose(role: str, train: list[Surveyed], known: gene_names.KnownNames, args) -> tuple[list[str], str]:
    """The panel of a role and, in words, how it was chosen."""
    given = args.target_genes if role == "target" else args.input_genes
    if given is not None:
        return listed(given, train, known, args.full_vocabulary and role == "input")
    if not any(one.profile.n_spots for one in train):
        raise ValueError(f"{args.data}: expected train spots outside the strips, found none; lower --min_counts")
    wanted = args.n_top_genes if role == "target" else args.n_input_genes
    rule = gene_panels.highest_expressed if role == "target" else gene_panels.highly_variable
    panel = rule([one.profile for one in train], wanted)
    if not panel:
        raise ValueError(f"{args.data}: the train slices have no gene name in common; are they of one species?")
    if len(panel) < wanted:
        print(f"warning: {wanted} {role} genes asked for, the train slices have {len(panel)} in common: all are taken")
    return panel, f"{len(panel)} genes by {rule.__name__} on train spots"


def panel_file(one: Surveyed, spots, measured: np.ndarray, role: str, choice: tuple[list[str], str], train):
    """AnnData of one slice's panel genes, its counts still to come; `measured` (P,) marks genes that the slice has."""
    import anndata
    import pandas as pd

    panel, how = choice
    obs = spots[["array_row", "array_col"]].assign(total_counts=one.total[one.kept])
    adata = anndata.AnnData(obs=obs, var=pd.DataFrame({"measured": measured}, index=panel))
    adata.obsm["spatial"] = spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    adata.uns["magic"] = {
        "format": 1,
        "role": role,
        "panel": np.array(panel),
        "panel_hash": gene_panels.panel_hash(panel),
        "how": how,
        "train_slices": np.array([t.row.slice for t in train]),
        "train_hashes": np.array([t.counts_hash for t in train]),
        "counts_hash": one.counts_hash,
        "files_hash": one.files_hash,
        "spot_pitch_fullres_px": one.pitch_px,
    }
    return adata


def write_panels(one: Surveyed, panels: dict[str, tuple[list[str], str]], train, slice_names, known, args) -> None:
    """Both files of a slice; a gene that it lacks is a column of zeros, marked not measured."""
    source = read_slice(one.row, args)
    mapped = slice_names.agreed(source.genes, source.gene_ids)
    spans = visium.spans(source.counts, bytes_of(args))
    for role, choice in panels.items():
        names = gene_names.renamed(mapped, choice[0], known)
        measured, gathering = np.isin(choice[0], names), gene_panels.gather(names, choice[0])
        if not measured.all():
            print(f"{one.row.slice}: {(~measured).sum()} of {len(measured)} {role} genes are not in this slice")
        adata = panel_file(one, source.spots.loc[one.kept], measured, role, choice, train)
        blocks = ((source.counts[span][one.kept[span]] @ gathering).sorted_indices() for span in spans)
        gene_panels.write_panel(gene_panels.panel_path(args.data, args.panels, one.row.slice, role), adata, blocks)


@exclusive_folder("panels", "data")
def main(args):
    rows, warnings = splits.read_table(args.data, args.slices, val_strip=args.val_strip, allow_leak=args.allow_leak)
    settings.say(warnings)
    rows = [row for row in rows if row.part]
    print(splits.format_table(rows))
    if args.full_vocabulary and args.input_genes is None:
        raise ValueError("--full_vocabulary: expected --input_genes with the vocabulary, found none; give the file")
    for part in ("train", args.part):
        settings.chosen(rows, part)
    slice_names = gene_names.slice_names(visium.read_slice_genes(splits.slice_folder(args.data, row)) for row in rows)
    known = gene_names.known_names(args.gene_aliases, slice_names.symbols)
    surveyed = [survey(row, slice_names, args) for row in rows]
    settings.say(splits.check_identical(rows, {one.row.slice: one.counts_hash for one in surveyed}, args.allow_leak))
    train = [one for one in surveyed if one.row.part == "train"]
    panels = {role: choose(role, train, known, args) for role in gene_panels.FILES}
    wanted = [one for one in surveyed if args.part in ("all", one.row.part)]
    for one in tqdm(wanted, desc="slices", unit="slice", disable=None):
        write_panels(one, panels, train, slice_names, known, args)
    for role, (panel, how) in panels.items():
        print(f"{role} panel: {how} of {len(train)} slices: {', '.join(panel[:5])}, ...")


if __name__ == "__main__":
    settings.run(main, parse_args())
