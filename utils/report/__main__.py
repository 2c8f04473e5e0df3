"""The table of both evaluations, read from their metrics.json.

python -m utils.report results
python -m utils.report demo/results --truth demo/data     # simulated slices: beside the known ceiling
python -m utils.report results/real/seed_*/results        # several runs: mean and deviation over them
python -m utils.report results --html results/report.html # both pages of a run as one
"""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.report.tables import ceiling_line, expression_lines, read_metrics, retrieval_lines, write_html


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folder with retrieval/ and similarity/")
    parser.add_argument("--truth", type=Path, help="folder of simulated slices")
    parser.add_argument("--html", type=Path, help="a page to write: maps, genes, examples and tables of one run")
    args = parser.parse_args(argv)
    try:
        if args.html and len(args.results) > 1:
            raise ValueError(f"--html: expected one folder of results, found {len(args.results)}; name one of them")
        similarity = [read_metrics(results, "similarity") for results in args.results]
        lines = retrieval_lines([read_metrics(results, "retrieval") for results in args.results])
        lines += ["", *expression_lines(similarity)]
        if args.truth:
            lines += ["", *(ceiling_line(r, args.truth, one) for r, one in zip(args.results, similarity, strict=True))]
        if args.html:
            write_html(args.html, args.results[0])
            lines += ["", f"maps, genes and examples: {args.html}"]
    except ValueError as error:
        parser.exit(2, f"report: {error}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
