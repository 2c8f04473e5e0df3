"""Slices by their part for training and evaluation, and checks that they fit a model and were held out from it.

Held-out slices must not have been used to choose genes or to train the model that is evaluated or built on. A model and
the slices it is evaluated on must share genes, by name, and the scale of the tiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.features import dataset
from utils.genes import panels as gene_panels
from utils.settings import EvaluationSettings, SharedSettings, TrainingSettings, warn
from utils.slices import splits
from utils.words import count_of

LEAST_TARGETS = 10  # genes: a mean over fewer is too noisy
LEAST_INPUTS = 0.5  # fraction of the input genes: the gene encoder was not trained on profiles with more zeros


def read_split(settings: SharedSettings) -> tuple[list[splits.SliceRow], list[str]]:
    """The table of --data and --slices with the split, as every script after preprocessing uses it."""
    return splits.read_table(
        settings.data, settings.slices, val_strip=settings.val_strip, allow_leak=settings.allow_leak
    )


def load_training(
    rows: list[splits.SliceRow],
    settings: TrainingSettings,
    roles: tuple[str, ...],
    downsample_counts: int | None = None,
) -> list[dataset.SliceData]:
    """Slices of the train and validation part, see `dataset.load_slice`.

    Raises ValueError where a part is empty, the panels were chosen on other slices, two parts hold
    the same counts, or the batch is larger than the train set.
    """
    used = splits.of_part(rows, "train", "val")
    for part in ("train", "val"):
        if not splits.of_part(used, part) and not (part == "val" and settings.val_strip):
            raise ValueError(
                f"expected a slice of part {part}, found none; name one in slices.csv"
                + (", or use --val_strip" if part == "val" else "")
            )
    slices = dataset.load_slices(used, settings, roles, settings.val_strip, downsample_counts=downsample_counts)
    check_panel_origin(slices, [row.slice for row in used if row.part == "train"], settings.val_strip)
    if settings.val_strip:
        print("\n".join(strip_sizes(slices)))
    hashes, totals = dataset.counts_hashes(slices), dataset.spot_totals(slices)
    warn(splits.check_identical(used, hashes, settings.allow_leak, totals))
    n_train = len(dataset.spots_of(slices, "train"))
    if settings.batch_size > n_train:
        raise ValueError(
            f"--batch_size: expected at most the {count_of(n_train, 'train spot')}, found {settings.batch_size}; lower "
            "it"
        )
    return slices


def strip_sizes(slices: list[dataset.SliceData]) -> list[str]:
    """How many spots of each slice --val_strip leaves for what."""
    lines = []
    for slice_ in slices:
        train, val, gap = (int((slice_.part == part).sum()) for part in ("train", "val", "gap"))
        lines.append(
            f"{slice_.name}: {train} train and {count_of(val, 'validation spot')}, {gap} left out between them"
        )
    return lines


def load_evaluation(
    settings: EvaluationSettings, state: dict[str, Any], flag: str, roles: tuple[str, ...]
) -> tuple[list[dataset.SliceData], list[dataset.SliceData]]:
    """Slices of --part, and the train and validation slices that the checkpoint (and so the baselines) are fitted on.

    Slices measured with another panel have the checkpoint's genes, those they lack as not measured. Raises ValueError
    where they were seen in training, tiles are not those of the checkpoint, or too few of its genes were measured.

    Parameters
    ----------
    state : checkpoint, which the file of `flag` holds
    roles : panels to read; the first is the checkpoint's own
    """
    rows = rows_of_part(settings, state)
    trained_rows = [splits.SliceRow(**row) for row in state["table"] if row["part"] in ("train", "val")]
    strip, depth = state["settings"]["val_strip"], state["settings"].get("downsample_counts")
    evaluated = dataset.load_slices(rows, settings, roles, strip, state["genes"], downsample_counts=depth)
    trained = dataset.load_slices(trained_rows, settings, roles, strip, downsample_counts=depth)
    check_unseen(rows, state, flag, settings.allow_leak, dataset.counts_hashes(evaluated))
    for slice_ in evaluated:
        check_genes(slice_.panels[roles[0]], roles[0], slice_.name, flag)
    for slice_ in (*evaluated, *trained):
        check_same(slice_.panels[roles[0]], roles[0], state["genes"], flag)
        check_tiles(slice_.pack.folder, dataset.tile_scale(slice_), tuple(state["tile_scale"]), flag)
    return evaluated, trained


def rows_of_part(settings: EvaluationSettings, state: dict[str, Any]) -> list[splits.SliceRow]:
    """Rows of the table that belong to --part; with validation strips those of the train slices too."""
    rows, warnings = read_split(settings)
    warn(warnings)
    if settings.part == "val" and state["settings"]["val_strip"]:
        return splits.of_part(rows, "train", "val")
    return splits.chosen(rows, settings.part)


def check_panel_origin(slices: list[dataset.SliceData], train: list[str], val_strip: bool) -> None:
    """A panel must have been chosen on train spots alone."""
    allowed = set(train)
    for slice_ in slices:
        for panel in slice_.panels.values():
            foreign = sorted(set(panel.train_slices) - allowed)
            if foreign:
                raise ValueError(
                    f"{panel.path}: expected genes chosen on the train part ({', '.join(train)}), found some chosen on "
                    f"{', '.join(foreign)}; run make_decoder_data.py with this split"
                )
            if val_strip and not panel.val_strip:
                raise ValueError(
                    f"{panel.path}: expected genes chosen without the validation strips, found some chosen on whole "
                    "slices; run make_decoder_data.py with --val_strip"
                )


def seen_in_training(
    rows: list[splits.SliceRow], state: dict[str, Any], hashes: dict[str, str] | None = None
) -> dict[str, str]:
    """Held-out slices that a checkpoint was trained on, and how: test slices of its patients, val slices that it has as
    train.

    Parameters
    ----------
    state : checkpoint, with the tables of slices that it and its encoder were trained on
    hashes : of the counts, by slice, where they are known; they find a slice under another name
    """
    tables = [*state["table"], *state.get("encoder_table", [])]
    used = [row for row in tables if row["part"] in ("train", "val")]
    patients = {splits.patient_key(row["patient"]) for row in used}
    trained = {row["slice"] for row in used if row["part"] == "train"}
    contents = {state["counts_hashes"].get(row["slice"]) for row in used} - {None}
    contents |= set(state["pretrain_hashes"].values())
    slices = {row["slice"] for row in used}

    def reason(row: splits.SliceRow) -> str | None:
        same = row.slice in slices or (hashes or {}).get(row.slice) in contents
        if (row.part == "test" and same) or (row.part == "val" and row.slice in trained):
            return "the slice itself"
        shared = row.part == "test" and splits.patient_key(row.patient) in patients
        return f"another slice of patient {row.patient}" if shared else None

    return {row.slice: text for row in rows if (text := reason(row))}


def leaked_slices(slices: list[dataset.SliceData], state: dict[str, Any]) -> list[str]:
    """Names of evaluated slices that the model was trained on, for metrics.json; there are some with --allow_leak
    only."""
    parts = ["train" if "train" in slice_.part else slice_.part[0] for slice_ in slices]  # of strips that of the slice
    rows = [splits.SliceRow(s.name, s.patient, part, None, None) for s, part in zip(slices, parts, strict=True)]
    return list(seen_in_training(rows, state, dataset.counts_hashes(slices)))


def leaks_of_table(state: dict[str, Any]) -> list[str]:
    """Patients that a checkpoint, or its encoder, has in test and in another part, with their parts."""
    tables = (state["table"], state.get("encoder_table", []))
    found = [splits.tested_elsewhere(splits.SliceRow(**row) for row in table) for table in tables]
    return list(dict.fromkeys(patient for of_table in found for patient in of_table))


def check_unseen(
    rows: list[splits.SliceRow],
    state: dict[str, Any],
    flag: str,
    allow_leak: bool,
    hashes: dict[str, str] | None = None,
) -> None:
    """Stop, or warn, where a checkpoint was trained on held-out slices, see `seen_in_training`."""
    seen = seen_in_training(rows, state, hashes)
    reasons = ", ".join(f"{name} ({reason})" for name, reason in seen.items())
    if seen and not (allow_leak or state["settings"]["allow_leak"]):
        raise ValueError(
            f"{flag}: expected a model that was not trained on {', '.join(seen)}, held out here, found that it was "
            f"trained on {reasons}; use its split (the slices.csv beside it), or --allow_leak"
        )
    if seen:
        print(f"warning: {flag}: held out here, but in its training: {reasons}: recorded as a leak")


def check_genes(panel: gene_panels.Panel, role: str, name: str, flag: str) -> None:
    """Report how many of a model's genes a slice has, where it lacks some; `panel` has the model's genes (Panel.onto).

    Raises ValueError where too few are left: of the targets 10 (all, where the model has fewer), of the inputs half.
    """
    n, shared = len(panel.genes), int(panel.measured.sum())
    least = min(LEAST_TARGETS, n) if role == "target" else LEAST_INPUTS * n
    if shared < least:
        raise ValueError(
            f"{panel.path}: expected at least {least:.0f} of the {n} {role} genes of {flag}, found {shared}; "
            f"make its panel with --{role}_genes, or train on genes that this slice has"
        )
    if shared < n and role == "target":
        print(f"{name}: evaluated on {shared} of the model's {n} genes; the slice's panel lacks {n - shared}")
    elif shared < n:
        print(f"{name}: has {shared} of the model's {n} input genes; the {n - shared} it lacks are read as zero")


def check_same(panel: gene_panels.Panel, role: str, wanted: list[str], flag: str) -> None:
    """The slices that a model was trained on must have its panel: the baselines are fitted on them."""
    if panel.genes != wanted:
        shared = len(set(panel.genes) & set(wanted))
        raise ValueError(
            f"{panel.path}: expected the {len(wanted)} {role} genes of {flag}, found {len(panel.genes)} genes, "
            f"{shared} of them among those; make its panel with --{role}_genes, or use the panels it was trained on"
        )


def check_tiles(folder: Path, found: tuple[int, float | None], wanted: tuple, flag: str) -> None:
    """Tiles must be of the side in pixels and the micrometres per pixel that a model was trained on."""
    if not dataset.same_scale(found, wanted):
        raise ValueError(
            f"{folder}: expected tiles of {dataset.describe_scale(wanted)}, as {flag} was trained on, found tiles of "
            f"{dataset.describe_scale(found)}; cut them with image_tilling.py --tile_um and --tile_px"
        )
