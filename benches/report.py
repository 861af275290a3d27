"""Markdown from a recorded run, and README's benchmark block:

python benches/report.py benches/results/RESULT.json --readme README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastlstm.cli.arguments import Parser
from fastlstm.cli.contest import MODES, Row
from fastlstm.cli.table import MEASURED, means, measured, table

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
COLUMNS = ("T,B,I,H", "mode", "threads", *MEASURED, "% of best BLAS: ours / nn.LSTM")

Result = dict[str, Any]  # what run.py writes


def header(result: Result) -> list[str]:
    """The hardware, the versions, and how to read the table."""
    hardware, versions, sets = (result[k] for k in ("hardware", "versions", "instruction_sets"))
    limits = [
        f"{threads} thread{'s' * (threads != '1')}: matmul {limit['matmul_gflops']:.0f} GF/s,"
        f" copy {limit['copy_gbytes']:.0f} GB/s"
        for threads, limit in result["limits"].items()
    ]
    lines = [
        f"**{hardware['cpu']}** ({hardware['cpus']} CPUs), {result['dtype']},"
        f" {result['date'][:10]}: fastlstm {versions['fastlstm']}"
        f" (commit {versions['commit'] or 'unknown'}, {sets['fastlstm']}),"
        f" torch {versions['torch']} ({sets['torch']}), Python {versions['python']}.",
        f"Best BLAS of the same run, {result['limit_dtype']}: {'; '.join(limits)}.",
        "Paired and interleaved in one process, same weights, same inputs. Ratios are medians"
        " over the pairs, with quartiles; above 1, fastlstm is faster.",
    ]
    if result["environment"]:
        lines.append("Set: " + ", ".join(f"`{k}={v}`" for k, v in result["environment"].items()))
    return lines


def cells(row: Row, limits: dict[str, Any]) -> list[str]:
    """One line of the table, for COLUMNS."""
    lead = [",".join(map(str, row["shape"])), MODES[row["mode"]], str(row["threads"])]
    if "error" in row:
        return [*lead, *measured(row), ""]
    rate, best = row["gflops"], limits[str(row["threads"])]["matmul_gflops"] / 100
    share = f"{rate['ours'] / best:.0f} / {rate['theirs'] / best:.0f}"
    return [*lead, *measured(row), share]


def summary(rows: list[Row]) -> list[str]:
    """Geometric mean and minimum of the ratio for each mode and thread count."""
    lines = []
    for mode, threads in dict.fromkeys((row["mode"], row["threads"]) for row in rows):
        group = [r for r in rows if (r["mode"], r["threads"]) == (mode, threads)]
        lines.append([MODES[mode], str(threads), *means(group)])
    return table(lines, ("mode", "threads", "geometric mean", "minimum", "rows timed"))


def markdown(result: Result, name: str) -> str:
    """The whole report; ``name`` is the recorded run's file name."""
    rows = result["rows"]
    parts = (
        [*header(result), f"Recorded as `{name}`."],
        summary(rows),
        table([cells(row, result["limits"]) for row in rows], COLUMNS),
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def replace_block(text: str, block: str) -> str:
    """``text`` with what stands between the two marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"it needs {BEGIN} and, after it, {END}")
    return f"{before}{begin}\n{block}{end}{after}"


def main() -> None:
    parser = Parser(description="Markdown from a recorded run.")
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="written by run.py")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put it into FILE's block")
    args = parser.parse_args()
    try:
        text = markdown(json.loads(args.result.read_text(encoding="utf-8")), args.result.name)
        args.result.with_suffix(".md").write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"{args.result}: {error.strerror}")
    except (ValueError, LookupError, TypeError, AttributeError):
        parser.error(f"{args.result}: not a result of benches/run.py")
    if args.readme is None:
        sys.stdout.write(text)
        return
    try:
        page = replace_block(args.readme.read_text(encoding="utf-8"), text)
        args.readme.write_text(page, encoding="utf-8")
    except OSError as error:
        parser.error(f"{args.readme}: {error.strerror}")
    except ValueError as error:
        parser.error(f"{args.readme}: {error}")


if __name__ == "__main__":
    main()
