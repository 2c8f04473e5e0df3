"""What is held out must not have taught: genes that were chosen, models that are evaluated or built on."""

from __future__ import annotations

from typing import Any

from utils.slices import splits


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
