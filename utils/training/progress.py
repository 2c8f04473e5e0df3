"""A training run that may be interrupted: where it stands, when that is saved, why it stops, and how it goes on.

What a step draws is seeded by its number, and the place in the data is known by it, so that a run that goes on from any
step ends with the same weights, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from utils import distributed, settings
from utils.training import checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Stopped(Exception):
    """A signal came while nothing was being learnt."""


def _changed(now: dict[str, Any], then: dict[str, Any], before_name: str = "", but: tuple[str, ...] = ()) -> str:
    """In words what differs of what both have, but for some names; nothing where all is the same."""
    names = sorted((now.keys() & then.keys()).difference(but))
    return ", ".join(f"{before_name}{name} {now[name]}, not {then[name]}" for name in names if now[name] != then[name])


class Progress:
    """Place of a run in its epochs and steps, its best score, and its files in --out; within it signals save and leave.

    `epoch` and `step` are the next to do, `sums` what the epoch's steps before added up to. Of several processes all
    must call the methods, the first one writes.

    Parameters
    ----------
    kind : "stage_one" or "stage_two"
    about : what stands in a checkpoint beside the parts' states, the same during a run
    parts : model (not wrapped), optimizer, schedule, and the scaler of fp16 or None
    """

    def __init__(self, args: Any, kind: str, about: dict[str, Any], **parts: Any):
        self.args, self.kind, self.about = args, kind, about
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.epoch, self.step, self.best = args.Init_Epoch, 0, -1.0
        self.sums: dict[str, float] = {}
        self.found: dict[str, Any] = {"row": {}}  # what the last epoch found
        self.ends = time.monotonic() + 60 * (args.max_minutes or float("inf"))
        self.signal: int | None = None
        self.at_once = False
        self.before: list[Any] = []
        if args.resume:
            self._resume()

    def __enter__(self) -> Self:
        self.before = [signal.signal(number, self._take) for number in SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in zip(SIGNALS, self.before, strict=True):
            signal.signal(number, before)

    def _resume(self) -> None:
        state = checkpoint.read_resumed(self.args.out, self.kind, self.about)
        checkpoint.fit(self.parts["model"], state["model"], self.args.out / checkpoint.LAST, "--resume")
        changed = _changed(self.about["settings"], state["settings"], "--", (*settings.WHERE, "precision"))
        if changed:
            print(f"warning: --resume with {changed}: the run ends otherwise than it would have")
        others = _changed(self.about["conditions"], state.get("conditions", {}))
        if others:
            print(f"warning: --resume with {others}: the end is close to that of an unbroken run, not equal")
        try:
            for name in self.parts.keys() - {"model"}:
                self.parts[name].load_state_dict(state[name])
        except ValueError as error:  # torch's, of groups of parameters
            raise ValueError(f"--resume: the flags {changed} train other parameters; use those of before") from error
        self.epoch, self.step, self.sums, self.best = (state[key] for key in ("next_epoch", "step", "sums", "best"))
        self.found = {key: state[key] for key in ("row", "val_pcc") if key in state}
        print(f"going on at epoch {self.epoch}, step {self.step}")

    def _take(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, signal.default_int_handler)  # a second one stops without saving
        if self.at_once:
            raise _Stopped

    def after_step(self, step: int, sums: dict[str, float]) -> None:
        """`step` steps of the epoch are done. Leaves the run, once it is saved, where it was asked to."""
        self.step, self.sums = step, sums
        why = self._why()
        if why or (self.args.save_every and step % self.args.save_every == 0):
            self.sums = distributed.mean(sums)
            self._save()
        if why:
            self._leave(why)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Round what learns nothing, a validation: a signal need not wait for its end."""
        self.at_once = True
        try:
            if self.signal is not None:
                raise _Stopped
            yield
        except _Stopped:
            self._save()
            self._leave(signal.Signals(self.signal or signal.SIGTERM).name)
        finally:
            self.at_once = False

    def begin(self, score: float = -1.0, **found: Any) -> None:
        """Nothing is learnt yet: saved, to have something to go on from; with a score it may become the best."""
        self._keep(score, found)
        self._save()

    def after_epoch(self, score: float, **found: Any) -> None:
        """An epoch is done and validated: `found` (row, val_pcc) stands in its checkpoint, also as the best's if it
        has the highest score."""
        self._keep(score, found)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self._save()
        why = self._why()
        if why and self.epoch < self.args.Epoch:
            self._leave(why)

    def _keep(self, score: float, found: dict[str, Any]) -> None:
        if score > self.best and distributed.is_main():
            state = {"model": self.parts["model"].state_dict(), **found, **self.about}
            checkpoint.save(self.args.out / checkpoint.BEST, self.kind, **state)
        self.best, self.found = max(score, self.best), found or self.found

    def _why(self) -> str | None:
        """A reason to stop that one of the processes has."""
        late = time.monotonic() > self.ends
        if not distributed.any_true(late or self.signal is not None):
            return None
        if self.signal is not None:
            return signal.Signals(self.signal).name
        return f"--max_minutes {self.args.max_minutes:g}" if late else "another process"

    def _save(self) -> None:
        if distributed.is_main():
            place = {"next_epoch": self.epoch, "step": self.step, "sums": self.sums, "best": self.best}
            state = {name: part.state_dict() for name, part in self.parts.items()}
            checkpoint.save_last(self.args.out, self.kind, **place, **state, **self.found, **self.about)

    def _leave(self, why: str) -> None:
        """Code 0 where the minutes were over, 128 and the signal's number as a shell has it."""
        print(
            f"stopped by {why} and saved before epoch {self.epoch}, step {self.step}: "
            "go on with the same command and --resume",
            flush=True,
        )
        raise SystemExit(128 + self.signal if self.signal else 0)
