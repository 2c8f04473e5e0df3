"""Trained models of stage two, and how they are run: one, or several as an ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from model.stage_two import StageTwo, StageTwoSizes
from utils.training import checkpoint, split


@dataclass(frozen=True)
class Member:
    """A model on its device, and what its checkpoint holds besides the weights."""

    model: StageTwo
    state: dict[str, Any]
    file_hash: str

    @property
    def tile_px(self) -> int:
        return self.state["tile_scale"][0]

    @property
    def um_per_px(self) -> float:
        return self.state["tile_scale"][1]

    @property
    def encoder(self) -> str:
        """Models with the same one share features."""
        return f"{self.state['encoder_hash']} {self.tile_px} px of {self.um_per_px} um, tta {self.model.sizes.tta}"


@dataclass(frozen=True)
class Run:
    """What slides are predicted with; `prediction_std` asks for the deviation over flipped and rotated tiles."""

    members: list[Member]
    accelerator: Accelerator
    precision: str
    batch_size: int
    workers: int | None
    memory: float  # GiB
    prediction_std: bool

    @property
    def model_hash(self) -> str:
        """Of the members' files, separated by spaces."""
        return " ".join(member.file_hash for member in self.members)


def read_checkpoints(paths: list[Path]) -> list[dict[str, Any]]:
    """Checkpoints of one panel, in one unit, and of tiles of a stated scale. Raises ValueError otherwise."""
    states = [checkpoint.load(path, "stage_two", "--decoder") for path in paths]
    for path, state in zip(paths, states, strict=True):
        for key in ("genes", "target"):
            if state[key] != states[0][key]:
                raise ValueError(
                    f"--decoder: {path}: expected the {key} of {paths[0]}, found others; give decoders that share them"
                )
        if state["tile_scale"][1] is None:
            raise ValueError(
                f"--decoder: {path}: expected a model of tiles of a stated scale, found one of --crop_size tiles, "
                "which cannot be cut from another slide; train on tiles of image_tilling.py --tile_um"
            )
    return states


def leak_warnings(paths: list[Path], states: list[dict[str, Any]]) -> list[str]:
    """One for each model that was trained although patients are in test and in another part."""
    found = [(path, split.leaks_of_table(state)) for path, state in zip(paths, states, strict=True)]
    return [
        f"{path}: trained with --allow_leak, patients in test and in another part: {', '.join(patients)}; what its "
        "evaluation says does not hold for new patients"
        for path, patients in found
        if patients
    ]


def load_members(paths: list[Path], states: list[dict[str, Any]], device: Any) -> list[Member]:
    members = []
    for path, state in zip(paths, states, strict=True):
        model = StageTwo(StageTwoSizes(**state["sizes"]))
        checkpoint.fit(model, state["model"], path, "--decoder")
        rest = {key: value for key, value in state.items() if key != "model"}
        members.append(Member(model.to(device).eval(), rest, checkpoint.model_hash(path)))
    return members
