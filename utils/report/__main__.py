"""Print the table of both evaluations, read from their metrics.json.

python -m utils.report results
python -m utils.report demo/results --truth demo/data       # simulated slices: beside the known ceiling
python -m utils.report results/real/seed_*/results          # several runs: mean and deviation over them
python -m utils.report results --html results/report.html   # both pages of a run as one
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils import arguments, settings
from utils.report.tables import ceiling_line, expression_lines, leak_lines, read_metrics, results_file, retrieval_lines


def write_html(path: Path, results: Path) -> None:
    """Maps, genes, examples and tables of both evaluations on one page. Raises ValueError where one has none."""
    from utils.report import page

    parts = {"expression": "similarity", "retrieval": "retrieval"}
    pages = {part: results_file(results, kind, "report.html", "--html: ") for part, kind in parts.items()}
    page.join_reports(path, "Magic: expression and retrieval from the image", pages)


def report_lines(results: list[Path], truth: Path | None) -> list[str]:
    similarity = [read_metrics(folder, "similarity") for folder in results]
    retrieval = [read_metrics(folder, "retrieval") for folder in results]
    lines = [*retrieval_lines(retrieval), "", *expression_lines(similarity), *leak_lines([*retrieval, *similarity])]
    if truth:
        ceilings = [ceiling_line(folder, truth, metrics) for folder, metrics in zip(results, similarity, strict=True)]
        lines += ["", *ceilings]
    return lines


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.Parser(__doc__, prog="python -m utils.report")
    parser.add_argument(
        "results", type=Path, nargs="+", help="folder with retrieval/ and similarity/; of several runs each"
    )
    parser.add_argument("--truth", type=Path, help="folder of the simulated slices, which hold the known ceiling")
    parser.add_argument("--html", type=Path, help="page to write: maps, genes, examples and tables of one run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.html and len(args.results) > 1:
            raise ValueError(f"--html: expected one folder of results, found {len(args.results)}; name one of them")
        lines = report_lines(args.results, args.truth)
        if args.html:
            write_html(args.html, args.results[0])
            lines += ["", f"maps, genes and examples: {args.html}"]
    except (ValueError, OSError) as error:
        print(f"utils.report: {settings.line_of(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    print("\n".join(lines))


if __name__ == "__main__":
    main()
