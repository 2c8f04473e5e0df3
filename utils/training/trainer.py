"""The bookkeeping of a training run: its place, its checkpoints and its log, interruptions, and how it is resumed.

    with Trainer(...).resume_if_asked() as trainer:
        for epoch in trainer.epochs():
            ...                                                    # trainer.backward, trainer.step, trainer.after_step
            trainer.log(row)
            trainer.after_epoch(score)

What a step draws is seeded by its number, and the place in the data is known by it, so that a run resumed at any step
ends with the same weights, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from utils import distributed, settings
from utils.files.atomic import plain
from utils.training import checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

    from utils.training.loop import StepFigures

SIGNALS = (*distributed.END_SIGNALS, signal.SIGINT)
COPIES_S = 1.0  # in which a launcher and the queue hand on the same signal
Row = dict[str, float]  # figures of an epoch by name


class Stateful(Protocol):
    """A part of a run whose state is saved and loaded."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class _Stopped(Exception):
    """A signal came during validation."""


class RunLog:
    """logs/<stage>/<time>/: settings.json, log.jsonl, and TensorBoard events where tensorboard is installed; of several
    processes the first one writes."""

    def __init__(self, folder: Path, stage: str, settings: dict[str, Any]):
        self.rows: list[Row] = []
        self.events: Any = None
        self.folder = folder / stage / time.strftime("%Y-%m-%d_%H-%M-%S")
        if not distributed.is_main():
            return
        n = 1
        while self.folder.exists():
            n += 1
            self.folder = self.folder.with_name(f"{self.folder.name.split('.')[0]}.{n}")
        self.folder.mkdir(parents=True)
        (self.folder / "settings.json").write_text(json.dumps(plain(settings), indent=1) + "\n")
        self.events = self._tensorboard()

    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.folder))

    def add(self, row: Row) -> None:
        """One epoch: a line of JSON, and scalars by name."""
        self.rows.append(row)
        if not distributed.is_main():
            return
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.events is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self.events.add_scalar(name, value, row["epoch"])
            self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def _changed(now: dict[str, Any], before: dict[str, Any], prefix: str = "", but: tuple[str, ...] = ()) -> str:
    """In words which values differ, of the names that both have; empty where all are the same."""
    names = sorted((now.keys() & before.keys()).difference(but))
    return ", ".join(f"{prefix}{name} {now[name]}, not {before[name]}" for name in names if now[name] != before[name])


class Trainer:
    """A run of either stage; within its `with` block a signal saves and leaves.

    `epoch` is the next to do, `n_steps` how many of its steps are done and `sums` what they added up to, `best` the
    highest score. Of several processes all must call the methods, the first one writes.

    Parameters
    ----------
    flags : of the script
    kind : "stage_one" or "stage_two"
    about : entries of a checkpoint beside the states, the same during a run
    model : holds the weights that are saved
    optimizer, schedule : of the part of the model that trains
    n_train_spots : for settings.json of the log
    """

    def __init__(
        self,
        flags: settings.TrainingSettings,
        kind: str,
        about: dict[str, Any],
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        n_train_spots: int,
    ):
        self.flags, self.kind, self.accelerator, self.model, self.schedule = flags, kind, accelerator, model, schedule
        conditions = distributed.conditions(accelerator, flags.workers, flags.compile)
        self.about = about | {"settings": plain(asdict(flags)), "conditions": conditions}
        self.parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "schedule": schedule}
        if accelerator.scaler is not None:  # of fp16
            self.parts["scaler"] = accelerator.scaler
        self.optimizer: Any = optimizer  # prepared by accelerate in __enter__
        self.epoch, self.n_steps, self.best = flags.Init_Epoch, 0, -1.0
        self.sums: Row = {}
        self.validated: dict[str, Any] = {"row": {}}  # row and what else was found after the last epoch
        self.n_train_spots, self.began = n_train_spots, time.monotonic()
        self.ends = self.began + 60 * (flags.max_minutes or float("inf"))
        self.signal: int | None = None
        self.signalled = 0.0
        self.interruptible_now = False
        self.handlers: list[Any] = []

    # ---- start and end

    def resume_if_asked(self) -> Self:
        """Continue from the last checkpoint in --out where --resume says so."""
        if not self.flags.resume:
            return self
        state = checkpoint.read_resumed(self.flags.out, self.kind, self.about)
        checkpoint.fit(self.model, state["model"], self.flags.out / checkpoint.LAST, "--resume")
        changed = _changed(self.about["settings"], state["settings"], "--", (*settings.WHERE, "precision"))
        if changed:
            print(f"warning: --resume with {changed}: the run ends otherwise than it would have")
        others = _changed(self.about["conditions"], state.get("conditions", {}))
        if others:
            print(f"warning: --resume with {others}: the end is close to that of an unbroken run, not equal")
        try:
            for name in (self.parts.keys() & state.keys()) - {"model"}:  # another precision: with or without a scaler
                self.parts[name].load_state_dict(state[name])
        except ValueError as error:  # torch's, of groups of parameters
            raise ValueError(
                f"--resume: expected the parameters of before, found {changed}; use those of before"
            ) from error
        self.epoch, self.n_steps, self.sums, self.best = (state[key] for key in ("next_epoch", "step", "sums", "best"))
        self.validated = {key: state[key] for key in ("row", "val_pcc", "interval") if key in state}
        print(f"going on at epoch {self.epoch}, step {self.n_steps}")
        return self

    def __enter__(self) -> Self:
        self.handlers = [signal.signal(number, self._take) for number in SIGNALS]
        self.run_log = RunLog(
            self.flags.logs, self.kind, self.about["settings"] | {"n_train_spots": self.n_train_spots}
        )
        self.optimizer = self.accelerator.prepare(self.optimizer)
        return self

    def __exit__(self, *error: object) -> None:
        self.run_log.close()
        for number, handler in zip(SIGNALS, self.handlers, strict=True):
            signal.signal(number, handler)

    def begin(self, score: float = -1.0, **validated: Any) -> None:
        """Save before the first step, to have something to resume; with a score it may become the best."""
        self._keep(score, validated)
        self._save()

    # ---- epochs and steps

    def epochs(self) -> Iterator[int]:
        """Numbers of the epochs that are left, to --Epoch."""
        for epoch in range(self.epoch, self.flags.Epoch):
            self.began = time.monotonic()
            yield epoch

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self) -> None:
        """One step of the optimizer and its schedule."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()

    def after_step(self, step: int, figures: StepFigures) -> None:
        """`step` batches of the epoch are done, with --accumulate several since the last call. Leaves the run, once it
        is saved, where it was asked to."""

        def due(every: int) -> bool:
            return every > 0 and step // every > before // every

        before, self.n_steps = self.n_steps, step
        reason = self._reason_to_stop() if distributed.n_processes() == 1 or due(figures.every) else None
        if reason or due(self.flags.save_every):
            self.sums = distributed.mean(figures.read())
            self._save()
        if reason:
            self._leave(reason)

    def means(self, figures: StepFigures, n_steps: int) -> Row:
        """Of all figures over the epoch's steps, which are done."""
        self.sums = distributed.mean(figures.read())
        return {name: value / n_steps for name, value in self.sums.items()}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around a validation: a signal need not wait for its end."""
        self.interruptible_now = True
        try:
            if self.signal is not None:
                raise _Stopped
            yield
        except _Stopped:
            self._save()
            self._leave(signal.Signals(self.signal or signal.SIGTERM).name)
        finally:
            self.interruptible_now = False

    def log(self, row: Row) -> Row:
        """Write the figures of an epoch, with its number, learning rate and duration; returns all of them."""
        row = {"epoch": self.epoch} | row | {"lr": float(self.schedule.get_last_lr()[0])}
        row["seconds"] = time.monotonic() - self.began
        self.run_log.add(row)
        return row

    def after_epoch(self, score: float, **validated: Any) -> None:
        """An epoch is trained, validated and logged: its row and `validated` (val_pcc, interval) go into the last
        checkpoint, and into the best one if it has the highest score."""
        self._keep(score, {"row": self.run_log.rows[-1], **validated})
        self.epoch, self.n_steps, self.sums = self.epoch + 1, 0, {}
        self._save()
        reason = self._reason_to_stop()
        if reason and self.epoch < self.flags.Epoch:
            self._leave(reason)

    # ---- inside

    def _take(self, number: int, frame: FrameType | None) -> None:
        """The first signal ends the run once it is saved. Further ones are copies of it, by a launcher and the queue;
        only a later Ctrl-C stops without saving."""
        if self.signal is not None:
            if number == signal.SIGINT and time.monotonic() > self.signalled + COPIES_S:
                raise KeyboardInterrupt
            return
        self.signal, self.signalled = number, time.monotonic()
        if self.interruptible_now:
            raise _Stopped

    def _keep(self, score: float, validated: dict[str, Any]) -> None:
        if score > self.best and distributed.is_main():
            state = {"model": self.model.state_dict(), **validated, **self.about}
            checkpoint.save(self.flags.out / checkpoint.BEST, self.kind, **state)
        self.best, self.validated = max(score, self.best), validated or self.validated

    def _reason_to_stop(self) -> str | None:
        """One that any of the processes has."""
        late = time.monotonic() > self.ends
        if not distributed.any_true(late or self.signal is not None):
            return None
        if self.signal is not None:
            return signal.Signals(self.signal).name
        return f"--max_minutes {self.flags.max_minutes:g}" if late else "another process"

    def _save(self) -> None:
        if distributed.is_main():
            place = {"next_epoch": self.epoch, "step": self.n_steps, "sums": self.sums, "best": self.best}
            state = {name: part.state_dict() for name, part in self.parts.items()}
            checkpoint.save_last(self.flags.out, self.kind, **place, **state, **self.validated, **self.about)

    def _leave(self, reason: str) -> None:
        """Code 0 where the minutes were over, 128 and the signal's number as a shell has it."""
        print(
            f"stopped by {reason} and saved before epoch {self.epoch}, step {self.n_steps}: "
            "go on with the same command and --resume",
            flush=True,
        )
        raise SystemExit(128 + self.signal if self.signal else 0)
