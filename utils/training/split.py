"""Slices by their part: those that training and evaluation use, what they must share with a model, what they must not.

What is held out must not have been trained on: genes that were chosen, models that are evaluated or built on. What a
model and the slices it is evaluated on must have in common: genes, by name, and the tiles' scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.features import dataset
from utils.genes import panels as gene_panels
from utils.slices import splits

LEAST_TARGETS = 10  # genes: a mean over fewer says little of the model
LEAST_INPUTS = 0.5  # share: of a profile with more zeros than genes the gene encoder has learnt nothing


def read_split(args: Any) -> tuple[list[splits.SliceRow], list[str]]:
    """The table of --data and --slices with the split, as every script after preprocessing uses it."""
    return splits.read_table(Path(args.data), args.slices, val_strip=args.val_strip, allow_leak=args.allow_leak)


def load_training(rows: list[splits.SliceRow], args: Any, roles: tuple[str, ...]) -> list[dataset.SliceData]:
    """Slices of the train and validation part. Raises ValueError where a part is empty, the panels were chosen on other
    slices, two parts hold the same counts, or the batch is larger than the train set."""
    used = splits.of_part(rows, "train", "val")
    for part in ("train", "val"):
        if not splits.of_part(used, part) and not (part == "val" and args.val_strip):
            raise ValueError(
                f"no slice has part {part}: expected one at least in slices.csv"
                + (", or use --val_strip" if part == "val" else "")
            )
    slices = dataset.load_slices(used, args, roles, args.val_strip)
    check_panel_origin(slices, [row.slice for row in used if row.part == "train"])
    for warning in splits.check_identical(used, dataset.counts_hashes(slices), args.allow_leak):
        print(f"warning: {warning}")
    n_train = len(dataset.spots_of(slices, "train"))
    if args.batch_size > n_train:
        raise ValueError(f"--batch_size {args.batch_size} is larger than the train set of {n_train} spots; lower it")
    return slices


def load_evaluation(
    args: Any, state: dict[str, Any], flag: str, roles: tuple[str, ...]
) -> tuple[list[dataset.SliceData], list[dataset.SliceData]]:
    """Slices of --part, and the train and validation slices that the checkpoint (and so the cheap rows) learnt from.

    Slices measured with another panel have the checkpoint's genes, those they lack as not measured. Raises ValueError
    where they were seen in training, tiles are not those of the checkpoint, or too few of its genes were measured.
    """
    rows, warnings = read_split(args)
    for warning in warnings:
        print(f"warning: {warning}")
    chosen = [row for row in rows if args.part in ("all", row.part)]
    if args.part == "val" and state["settings"]["val_strip"]:
        chosen = splits.of_part(rows, "train")
    if not chosen:
        raise ValueError(f"no slice has part {args.part}: expected one at least in slices.csv; see --part")
    taught = [splits.SliceRow(**row) for row in state["table"] if row["part"] in ("train", "val")]
    strip = state["settings"]["val_strip"]
    slices = (
        dataset.load_slices(chosen, args, roles, strip, state["genes"]),
        dataset.load_slices(taught, args, roles, strip),
    )
    check_unseen(chosen, state, flag, args.allow_leak, dataset.counts_hashes(slices[0]))
    for one in slices[0]:
        check_genes(one.panels[roles[0]], roles[0], one.name, flag)
    for one in (*slices[0], *slices[1]):
        one.downsample_counts = state["settings"].get("downsample_counts")
        check_same(one.panels[roles[0]], roles[0], state["genes"], flag)
        check_tiles(one.pack.folder, dataset.tile_scale(one), tuple(state["tile_scale"]), flag)
    return slices


def check_panel_origin(slices: list[Any], train: list[str]) -> None:
    """A panel chosen on a slice outside the train part has seen what it will be tested on."""
    for one in slices:
        for panel in one.panels.values():
            foreign = sorted(set(panel.train_slices) - set(train))
            if foreign:
                raise ValueError(
                    f"{panel.path}: its genes were chosen on {', '.join(foreign)}, outside the train part "
                    f"({', '.join(train)}); run make_decoder_data.py with this split"
                )


def check_unseen(
    rows: list[splits.SliceRow],
    state: dict[str, Any],
    flag: str,
    allow_leak: bool,
    hashes: dict[str, str] | None = None,
) -> None:
    """What is held out now must not have taught the checkpoint: test patients not at all, val slices not as train.

    `state` is the checkpoint, with the tables of slices that it and its encoder were trained by; `hashes` are those of
    the counts by slice, where they are known: a slice under another name is found by them.
    """
    tables = [*state["table"], *state.get("encoder_table", [])]
    taught = [row for row in tables if row["part"] in ("train", "val")]
    patients, trained = {row["patient"] for row in taught}, {row["slice"] for row in taught if row["part"] == "train"}
    contents = {state["counts_hashes"].get(row["slice"]) for row in taught} - {None}
    contents |= set(state["pretrain_hashes"].values())
    seen = [
        row.slice
        for row in rows
        if (row.part == "test" and (row.patient in patients or (hashes or {}).get(row.slice) in contents))
        or (row.part == "val" and row.slice in trained)
    ]
    if seen and not (allow_leak or state["settings"]["allow_leak"]):
        raise ValueError(
            f"{flag}: {', '.join(seen)} held out here, but seen in its training; use its split (slices.csv)"
        )
    if seen:
        print(f"warning: {flag}: {', '.join(seen)} held out here, but seen in its training")


def check_genes(panel: gene_panels.Panel, role: str, name: str, flag: str) -> None:
    """Says how many of a model's genes a slice has, where it lacks some; `panel` is in the model's genes (Panel.onto).

    Raises ValueError where too few are left: of the targets 10 (all, where the model has fewer), of the inputs half.
    """
    n, shared = len(panel.genes), int(panel.measured.sum())
    least = min(LEAST_TARGETS, n) if role == "target" else LEAST_INPUTS * n
    if shared < least:
        raise ValueError(
            f"{flag}: trained on {n} {role} genes, of which {panel.path} has {shared}, expected at least {least:.0f}; "
            f"make its panel with --{role}_genes, or train on genes that this slice has"
        )
    if shared < n and role == "target":
        print(f"{name}: evaluated on {shared} of the model's {n} genes; the slice's panel lacks {n - shared}")
    elif shared < n:
        print(f"{name}: has {shared} of the model's {n} input genes; the {n - shared} it lacks are read as zero")


def check_same(panel: gene_panels.Panel, role: str, wanted: list[str], flag: str) -> None:
    """The slices that a model was trained on are read with its own panel: the cheap rows learn from them."""
    if panel.genes != wanted:
        shared = len(set(panel.genes) & set(wanted))
        raise ValueError(
            f"{flag}: trained on {len(wanted)} {role} genes, of which {panel.path} has {shared} among its "
            f"{len(panel.genes)}; make its panel with --{role}_genes, or use the panels it was trained on"
        )


def check_tiles(folder: Path, found: tuple[int, float | None], wanted: tuple, flag: str) -> None:
    """Tiles must be of the side in pixels and the micrometres per pixel that a model was trained on."""
    if found != wanted:
        raise ValueError(
            f"{flag}: trained on tiles of {wanted} (px, um per px), those of {folder} are of {found}; "
            "cut tiles of that scale with image_tilling.py"
        )
