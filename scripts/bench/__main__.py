"""The command line of the benchmarks: a job's table, printed and kept."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from babl.errors import UserError
from babl.scripts import bench
from babl.scripts.bench import backends, busy, dropout, generate, gpu, kernels, load, lookup, overlap, score
from babl.scripts.bench.turns import machine

JOBS = (generate, lookup, load, dropout, score, backends, busy, overlap, kernels, gpu)


def main(argv: list[str] | None = None) -> int:
    """Prints the table a command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench", description=(bench.__doc__ or "").splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for job in JOBS:
        job.add(jobs)
    for each in jobs.choices.values():
        each.add_argument("--out", type=Path, metavar="FILE.json", help="keep every figure there")
    args = parser.parse_args(argv)
    try:
        rows = args.run(args)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if rows is None:
        return 0
    print(_markdown(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def _markdown(rows: list[dict[str, Any]]) -> str:
    shown = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
    lines = [list(shown[0]), ["---"] * len(shown[0])]
    lines += [[_number(value) for value in row.values()] for row in shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
