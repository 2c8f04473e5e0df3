"""Kinds of values that the flags of a script take, and a parser that answers a wrong flag in one line."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from utils import words

T = TypeVar("T")

UNUSED = "not used by this script; accepted so that the same flags fit all"


class Help(argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it is, the kind of value that a flag takes, and the default of every flag that has
    one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said, default = action.help or "", action.default
        without = default in (None, "", argparse.SUPPRESS) or default is False or action.required
        if without or said == UNUSED or "(default" in said:
            return action.help
        values = default if isinstance(default, list) else [default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        return f"{said} (default: {shown.replace('%', '%%')})".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """No abbreviated flags; a wrong flag gives one line, not the usage page, and the flag that may be meant."""

    def __init__(self, description: str | None, prog: str | None = None):
        super().__init__(description=description, prog=prog, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        given = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        meant = dict.fromkeys(flag for word in given for flag in words.nearest(word, self._option_string_actions))
        hint = f"; did you mean {' '.join(meant)}?" if meant else ""
        print(f"{self.prog}: {message}{hint} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _number(text: str, kind: type, low: float, high: float, open_low: bool, what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (low < value if open_low else low <= value) or not value <= high:
        raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
    return value


def count(text: str) -> int:
    return _number(text, int, 1, math.inf, False, "a whole number of at least 1")


def count_or_zero(text: str) -> int:
    return _number(text, int, 0, math.inf, False, "a whole number of at least 0")


def positive(text: str) -> float:
    return _number(text, float, 0, sys.float_info.max, True, "a number above 0")


def fraction(text: str) -> float:
    return _number(text, float, 0, 1, False, "a number from 0 to 1")


def fraction_above_zero(text: str) -> float:
    return _number(text, float, 0, 1, True, "a number above 0, at most 1")


def not_negative(text: str) -> float:
    return _number(text, float, 0, sys.float_info.max, False, "a number of at least 0")


def shard(text: str) -> tuple[int, int]:
    """Index from 0, and number of shards, of "I/N" with I from 1."""
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    index, number = (int(numbers[1]) - 1, int(numbers[2])) if numbers else (-1, 0)
    if not 0 <= index < number:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 1/4, found {text!r}")
    return index, number


def of_shard(items: list[T], shard: tuple[int, int], unit: str) -> list[T]:
    """Every N-th of the items from the I-th on; prints a line where none belongs to the shard.

    Parameters
    ----------
    shard : see `shard`
    unit : what the line calls the items
    """
    index, number = shard
    if not items[index::number]:
        print(f"shard {index + 1} of {number}: none of {len(items)} {unit} belongs to it")
    return items[index::number]


METAVARS: dict[Any, str] = {Path: "PATH", int: "N", count: "N", count_or_zero: "N", float: "X"}
METAVARS |= dict.fromkeys((positive, fraction, fraction_above_zero, not_negative), "X") | {shard: "I/N"}
