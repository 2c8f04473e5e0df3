"""Choose the gene panels on the train slices and write the two expression files of every slice.

    python make_decoder_data.py --data data/Breast_cancer
    python make_decoder_data.py --target_genes my_genes.txt      # one gene per line
    python make_decoder_data.py --input_genes panglao_human.h5ad --full_vocabulary     # all that scBERT was trained on

Reads the counts of each slice twice, to choose the panels and to write them; a matrix that --memory does not hold is
read by spans of spots. Writes per slice `filtered_feature_bc_matrix_one.h5ad` (input genes of stage one) and
`filtered_feature_bc_matrix_decoder.h5ad` (target genes of stage two), raw counts, beside the counts or under --panels.
"""
# S spots and G genes of a slice, P genes of a panel

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from utils import arguments
from utils import settings as flags
from utils.files.exclusive import exclusive_folder
from utils.genes import lists as gene_lists
from utils.genes import names as gene_names
from utils.genes import panels as gene_panels
from utils.slices import content, matrix, splits, visium
from utils.words import count_of

if TYPE_CHECKING:
    import anndata
    import pandas as pd


@dataclass(kw_only=True)
class Settings(flags.SharedSettings):
    part: str
    n_top_genes: int
    n_input_genes: int
    target_genes: Path | None
    input_genes: Path | None
    full_vocabulary: bool
    gene_aliases: Path | None
    min_counts: int
    memory: float  # GiB

    @property
    def memory_bytes(self) -> float:
        return self.memory * 2**30

    @property
    def least_counts(self) -> int:
        """Spots with fewer counts are dropped; one without any always is."""
        return max(self.min_counts, 1)


def parse_args(argv: Sequence[str] | None = None) -> Settings:
    parser = flags.shared(__doc__, part="all", unused=("tiles", "device", "seed", "workers"))
    group = parser.add_argument_group("panels")
    group.add_argument(
        "--n_top_genes",
        type=arguments.count,
        default=300,
        help="target genes: the highest expressed of all train slices",
    )
    group.add_argument(
        "--n_input_genes", type=arguments.count, default=2000, help="input genes: the most variable of all train slices"
    )
    group.add_argument(
        "--target_genes", type=Path, help="file of target genes, e.g. one per line; replaces --n_top_genes"
    )
    group.add_argument(
        "--input_genes", type=Path, help="file of input genes, a list or an h5ad; replaces --n_input_genes"
    )
    group.add_argument(
        "--full_vocabulary",
        action="store_true",
        help="up to half of --input_genes may be in no train slice; they are read as zero",
    )
    group.add_argument(
        "--gene_aliases", type=Path, help="other names of genes: a table laid out as HGNC's complete set"
    )
    group.add_argument("--min_counts", type=arguments.count_or_zero, default=0, help="drop spots with fewer counts")
    flags.add_memory(parser)
    return Settings(**vars(parser.parse_args(argv)))


@dataclass(frozen=True)
class Survey:
    """What is kept of a slice between choosing the panels and writing them; its counts stay on disk."""

    row: splits.SliceRow
    barcodes: np.ndarray  # (S,) of every spot under tissue
    total: np.ndarray  # (S,) their counts
    kept: np.ndarray  # (S,) bool: not empty, not below --min_counts
    pitch_px: float
    counts_hash: str
    files_hash: str | None  # of the matrix and the positions
    profile: gene_panels.Profile  # of the kept train spots


@dataclass(frozen=True)
class Choice:
    """A panel, and in words how it was chosen."""

    genes: list[str]
    how: str


def read_slice(row: splits.SliceRow, settings: Settings) -> visium.CountedSlice:
    return visium.read_slice(splits.slice_folder(settings.data, row), row.slice, settings.memory_bytes)


def train_spots(row: splits.SliceRow, slice_: visium.CountedSlice, val_strip: bool) -> np.ndarray:
    """Spots that the panels may be chosen on: (S,) bool."""
    if val_strip and row.part == "train":
        xy_px = slice_.spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
        return splits.strip_parts(xy_px, slice_.pitch_px) == "train"
    return np.full(len(slice_.spots), row.part == "train")


def survey(row: splits.SliceRow, slice_names: gene_names.SliceNames, settings: Settings) -> Survey:
    """Read a slice: sums per gene over its train spots, duplicate names added up, and which spots are kept."""
    slice_, memory = read_slice(row, settings), settings.memory_bytes
    mapped = slice_names.agreed(slice_.genes, slice_.gene_ids)
    names = list(dict.fromkeys(mapped.tolist()))
    interned = np.array([sys.intern(name) for name in names], object)  # hundreds of slices hold the same names once
    total, train = np.zeros(len(slice_.spots), np.int64), train_spots(row, slice_, settings.val_strip)
    gathering, profile = gene_panels.gather(mapped, names), gene_panels.no_spots(interned)
    for span in visium.spans(slice_.counts, memory):
        counts = slice_.counts[span]
        total[span] = np.asarray(counts.sum(1)).ravel()
        chosen = train[span] & (total[span] >= settings.least_counts)
        profile = gene_panels.merged(profile, gene_panels.profile(counts[chosen] @ gathering, interned))
    kept = total >= settings.least_counts
    report(row, slice_, total, kept, len(names), settings.least_counts)
    barcodes = slice_.spots.index.to_numpy(str)
    counts_hash = visium.counts_hash(slice_.counts, barcodes, slice_.genes, memory)
    return Survey(row, barcodes, total, kept, slice_.pitch_px, counts_hash, content.files_hash(slice_.root), profile)


def report(
    row: splits.SliceRow, slice_: visium.CountedSlice, total: np.ndarray, kept: np.ndarray, n_genes: int, least: int
) -> None:
    """Print a line about a slice. Raises ValueError where no spot is left."""
    summed, controls = len(slice_.genes) - n_genes, matrix.count_controls(slice_.root)
    notes = [f"{n} {what}" for what, n in slice_.unmatched.items() if n]
    notes += [f"{count_of(summed, 'duplicate gene name')} summed"] if summed else []
    notes += [f"{count_of(controls, 'control feature')} left out"] if controls else []
    notes += [f"{count_of((~kept).sum(), 'spot')} below {count_of(least, 'count')} dropped"] if not kept.all() else []
    size = [count_of(n, what) for n, what in ((kept.sum(), "spot"), (n_genes, "gene"), (total.sum(), "count"))]
    print(f"{row.slice}: {', '.join([*size, *notes])}")
    if not kept.any():
        raise ValueError(
            f"{slice_.root}: expected spots of at least {count_of(least, 'count')}, found none; lower --min_counts, "
            "or leave the slice out of slices.csv"
        )


def read_choice(path: Path, train: list[Survey], known: gene_names.KnownNames, whole: bool) -> Choice:
    """The panel that a file names: all its genes must be in a train slice, of a `whole` vocabulary half of them."""
    panel = gene_lists.read_vocabulary(path)
    how: dict[str, str] = {}
    if controls := [gene for gene in panel if gene_names.is_control(gene)]:
        raise ValueError(
            f"{path}: expected genes, found {len(controls)} control features in {len(panel)} names "
            f"({controls[0]}, ...); remove them"
        )
    for surveyed in train:
        matches = gene_names.match_genes(surveyed.profile.names.tolist(), panel, known)
        how = {panel[place]: matches.how[name] for name, place in matches.places.items()} | how
    unknown = [gene for gene in panel if gene not in how]
    if unknown and not whole:
        hint = gene_lists.hint(unknown, (name for surveyed in train for name in surveyed.profile.names))
        remedy = hint or "remove them" + ("" if known.approved else ", or name a table of aliases with --gene_aliases")
        raise ValueError(
            f"{path}: expected genes of the train slices, found {len(unknown)} of {len(panel)} in none ({unknown[0]}, "
            f"...); {remedy}"
        )
    if whole:
        gene_names.require_half(len(how), len(panel), f"--input_genes {path}", unknown, train[0].profile.names.tolist())
        print(f"{path.name}: {len(how)} of {len(panel)} genes are in a train slice, {gene_names.counted(how.values())}")
        print(f"{path.name}: {len(unknown)} genes are in none and read as zero")
    return Choice(panel, f"the list {path.name}")


def choose(role: str, train: list[Survey], known: gene_names.KnownNames, settings: Settings) -> Choice:
    """The panel of a role, "target" or "input": of the file that a flag names, else by the role's rule."""
    path = settings.target_genes if role == "target" else settings.input_genes
    if path is not None:
        return read_choice(path, train, known, settings.full_vocabulary and role == "input")
    if not any(surveyed.profile.n_spots for surveyed in train):
        raise ValueError(f"{settings.data}: expected train spots outside the strips, found none; lower --min_counts")
    wanted = settings.n_top_genes if role == "target" else settings.n_input_genes
    rule = gene_panels.highest_expressed if role == "target" else gene_panels.highly_variable
    panel = rule([surveyed.profile for surveyed in train], wanted)
    if not panel:
        raise ValueError(
            f"{settings.data}: expected gene names that all train slices share, found none; train on slices of one "
            "species, whose files name genes alike"
        )
    if len(panel) < wanted:
        print(f"warning: {wanted} {role} genes asked for, the train slices have {len(panel)} in common: all are taken")
    return Choice(panel, f"{len(panel)} genes by {rule.__name__} on train spots")


def without_counts(
    surveyed: Survey,
    spots: pd.DataFrame,
    measured: np.ndarray,
    role: str,
    choice: Choice,
    train: list[Survey],
    val_strip: bool,
) -> anndata.AnnData:
    """A panel file without its counts: `measured` (P,) marks the genes that the slice has, uns['magic'] the choice."""
    import anndata
    import pandas as pd

    obs = spots[["array_row", "array_col"]].assign(total_counts=surveyed.total[surveyed.kept])
    adata = anndata.AnnData(obs=obs, var=pd.DataFrame({"measured": measured}, index=choice.genes))
    adata.obsm["spatial"] = spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    adata.uns["magic"] = {
        "format": 1,
        "role": role,
        "panel": np.array(choice.genes),
        "panel_hash": gene_panels.panel_hash(choice.genes),
        "how": choice.how,
        "train_slices": np.array([other.row.slice for other in train]),
        "train_hashes": np.array([other.counts_hash for other in train]),
        "val_strip": val_strip,
        "counts_hash": surveyed.counts_hash,
        "files_hash": surveyed.files_hash,
        "spot_pitch_fullres_px": surveyed.pitch_px,
    }
    return adata


def write_panels(
    surveyed: Survey,
    choices: Mapping[str, Choice],
    train: list[Survey],
    slice_names: gene_names.SliceNames,
    known: gene_names.KnownNames,
    settings: Settings,
) -> None:
    """Both files of a slice; a gene that it lacks is a column of zeros, marked not measured."""
    slice_ = read_slice(surveyed.row, settings)
    mapped = slice_names.agreed(slice_.genes, slice_.gene_ids)
    spans = visium.spans(slice_.counts, settings.memory_bytes)
    for role, choice in choices.items():
        names = gene_names.renamed(mapped, choice.genes, known)
        measured, gathering = np.isin(choice.genes, names), gene_panels.gather(names, choice.genes)
        if not measured.all():
            print(f"{surveyed.row.slice}: {(~measured).sum()} of {len(measured)} {role} genes are not in this slice")
        spots = slice_.spots.loc[surveyed.kept]
        adata = without_counts(surveyed, spots, measured, role, choice, train, settings.val_strip)
        blocks = ((slice_.counts[span][surveyed.kept[span]] @ gathering).sorted_indices() for span in spans)
        path = gene_panels.panel_path(settings.data, settings.panels, surveyed.row.slice, role)
        gene_panels.write_panel(path, adata, blocks)


@exclusive_folder("panels", "data")
def main(settings: Settings) -> None:
    rows, warnings = splits.read_table(
        settings.data, settings.slices, val_strip=settings.val_strip, allow_leak=settings.allow_leak
    )
    flags.warn(warnings)
    rows = [row for row in rows if row.part]
    print(splits.format_table(rows))
    if settings.full_vocabulary and settings.input_genes is None:
        raise ValueError("--full_vocabulary: expected --input_genes with the vocabulary, found none; give the file")
    for part in ("train", settings.part):
        splits.chosen(rows, part)

    features = (visium.read_slice_genes(splits.slice_folder(settings.data, row)) for row in rows)
    slice_names = gene_names.slice_names(features)
    known = gene_names.known_names(settings.gene_aliases, slice_names.symbols)
    surveys = [survey(row, slice_names, settings) for row in rows]
    hashes = {surveyed.row.slice: surveyed.counts_hash for surveyed in surveys}
    totals = {surveyed.row.slice: (surveyed.barcodes, surveyed.total) for surveyed in surveys}
    flags.warn(splits.check_identical(rows, hashes, settings.allow_leak, totals))

    train = [surveyed for surveyed in surveys if surveyed.row.part == "train"]
    choices = {role: choose(role, train, known, settings) for role in gene_panels.FILES}
    wanted = [surveyed for surveyed in surveys if settings.part in ("all", surveyed.row.part)]
    for surveyed in tqdm(wanted, desc="slices", unit="slice", disable=None):
        write_panels(surveyed, choices, train, slice_names, known, settings)
    for role, choice in choices.items():
        print(f"{role} panel: {choice.how} of {count_of(len(train), 'slice')}: {', '.join(choice.genes[:5])}, ...")


if __name__ == "__main__":
    flags.run(main, parse_args())
