"""What the checks found: lines on the way, and the list of problems with their fixes at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

GIB = 2**30


@dataclass
class Findings:
    """Prints what is found as it is found; `problems` are the lines of the list at the end."""

    problems: list[str] = field(default_factory=list)

    def log(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def note(self, text: str) -> None:
        self.log(f"note: {text}")

    def problem(self, found: str, fix: str) -> None:
        """A line of the list at the end, where it stands once however often it is found."""
        line = f"found {found}; fix: {fix}"
        if line not in self.problems:
            self.problems.append(line)
        self.log(f"  to fix: no. {self.problems.index(line) + 1} below")

    def error(self, where: str, error: Exception) -> None:
        """An error whose one line ends with the way to fix it, after its last semicolon."""
        found, _, fix = " ".join(str(error).split()).rpartition("; ")
        self.problem(
            f"in {where}: {found or fix}", fix.removeprefix("fix: ") if found else "see docs/troubleshooting.md"
        )

    @contextmanager
    def caught(self, where: str) -> Iterator[None]:
        """Report an error of the block as a problem, and go on after it."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(where, error)


def existing(place: Path) -> Path:
    """The folder itself, or the nearest existing one above it."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())
