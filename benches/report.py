"""Markdown and plots from a recorded run, and README's benchmark block:

python benches/report.py benches/results/RESULT.json ... --readme README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import plots
import readme
from floors import Work, floor, fma_peak
from summary import Result, compact, header, quotient, title

from fastlstm.cli.arguments import Parser
from fastlstm.cli.contest import MODES, Row
from fastlstm.cli.table import measured, table

COLUMNS = (
    *("T,B,I,H", "what", "mode", "threads", "rival", "× rival (quartiles)"),
    *(
        "ms: ours / rival",
        "GF/s: ours / rival",
        "% of the FMA peak: ours / rival",
        "% of the limit",
        "hop, ns",
    ),
)
HEADINGS = {
    "speed": "The layer",
    "features": "What else the module does",
    "threads": "Several threads against one",
    "scaling": "Scaling",
    "model": "A model end to end",
    "peers": "Others",
    "memory": "Peak memory",
    "random": "Random shapes, the worst first",
}
EXPLANATION = """\
Paired and interleaved in one process, same weights, same inputs, checked before they are timed.
Ratios are medians over the pairs, with quartiles; above 1, fastlstm is faster. The limit of a row
is the time that its products take at the peak named, or its weights to be read from the level of
cache that holds them, where that is longer (benches/floors.py). The matrix unit makes a float
product of six bfloat16 ones and a float16 product of three, so its peak is divided by so many. The
FMA peak is of vector instructions: the matrix unit can surpass it. The hop is the time until one
thread sees what another writes, before and after the row and its like: it is long between cores
that share no L3 cache, and a virtual machine may be moved from such to others."""


def limits(result: Result) -> list[str]:
    """What the machine does at best, for each number of threads."""
    lines = []
    for threads, found in result["limits"].items():
        reads = ", ".join(f"{name} {rate:.0f}" for name, rate in found["read_gbytes"].items())
        unit = found["matrix_unit_gflops"]
        figures = [found["fma_gflops"]["float32"], found["fma_gflops"]["float64"]]
        lines.append(
            [
                threads,
                " / ".join(f"{rate:.0f}" for rate in figures),
                f"{unit:.0f}" if unit else "none",
                f"{found['matmul_gflops']:.0f}",
                reads,
                f"{found['copy_gbytes']:.0f}",
            ]
        )
    columns = ("threads", "FMA peak: float32 / float64, GF/s", "matrix unit, bfloat16, GF/s")
    return table(lines, (*columns, "best torch.mm, GF/s", "reads, GB/s", "copy of 256 MiB, GB/s"))


def shares(row: Row, result: Result) -> list[str]:
    """How near a row comes to the FMA peak and to its own limit."""
    if "work" not in row:
        return ["", ""]
    found, work = result["limits"][str(row["threads"])], Work(**row["work"])
    best = fma_peak(found, row["dtype"]) / 100
    caches = result["hardware"]["caches"]
    least = floor(work, row["dtype"], row["threads"], caches, found)
    share = 100 * least.seconds / row["ours"]["median"]
    rates = [f"{row['gflops'][who] / best:.0f}" for who in ("ours", "theirs")]
    return [" / ".join(rates), f"{share:.0f} ({least.bound})"]


def cells(row: Row, result: Result) -> list[str]:
    """One line of the table, for COLUMNS."""
    lead = [",".join(map(str, row["shape"])), title(row), MODES[row["mode"]], str(row["threads"])]
    lead.append(row["rival"])
    if "error" in row:
        return [*lead, *measured(row), "", "", hops(row)]
    # The model's work is more than its LSTM's: no rate.
    known = measured(row) if "gflops" in row else [*measured({**row, "gflops": NO_RATE})[:2], ""]
    return [*lead, *known, *shares(row, result), hops(row)]


def hops(row: Row) -> str:
    """Before and after; nothing of one thread's rows and of older runs."""
    return " – ".join(f"{ns:.0f}" for ns in row.get("hop_ns", ()))


NO_RATE = {"ours": 0.0, "theirs": 0.0}


def memory(rows: list[Row]) -> list[str]:
    """Bytes beyond inputs, outputs and gradients, on one thread."""
    lines = [
        [
            ",".join(map(str, row["shape"])),
            MODES[row["mode"]],
            " / ".join(f"{row['peak_bytes'][who] / 2**20:.1f}" for who in ("ours", "theirs")),
            f"{quotient(row):.2f}",
        ]
        for row in rows
    ]
    return table(lines, ("T,B,I,H", "mode", "MiB: ours / nn.LSTM", "nn.LSTM / ours"))


def part(name: str, result: Result) -> list[str]:
    """The table of one part."""
    rows = [row for row in result["rows"] if row["part"] == name]
    if name == "memory":
        return memory(rows)
    if name == "random":
        rows.sort(key=lambda row: -1 if "error" in row else quotient(row))
    return table([cells(row, result) for row in rows], COLUMNS)


def markdown(result: Result, name: str) -> str:
    """The whole report; ``name`` is the recorded run's file name."""
    there = dict.fromkeys(row["part"] for row in result["rows"])
    peers = (f"{peer} {standing}" for peer, standing in result["peers"].items())
    parts = [
        [*header(result), f"Recorded as `{name}`."],
        EXPLANATION.splitlines(),
        limits(result),
        [f"Others: {'; '.join(peers)}."],
        compact(result),
    ]
    for each in there:
        parts += [[f"## {HEADINGS[each]}"], part(each, result)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def report(path: Path, result: Result) -> str:
    """Write the Markdown and the plots beside the recorded run; the Markdown."""
    text = markdown(result, path.name)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    plots.write(path, result)
    return text


def main() -> None:
    parser = Parser(description="Markdown and plots from recorded runs.")
    add = parser.add_argument
    add("results", type=Path, nargs="+", metavar="RESULT.json", help="written by run.py")
    add("--readme", type=Path, metavar="FILE", help="put them into FILE's block, in this order")
    args = parser.parse_args()
    runs, texts = [], []
    for path in args.results:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            texts.append(report(path, result))
        except OSError as error:
            parser.error(f"{path}: {error.strerror}")
        except (ValueError, LookupError, TypeError, AttributeError):
            parser.error(f"{path}: not a result of benches/run.py")
        runs.append((result, path.stem))
    if args.readme is None:
        sys.stdout.write("\n".join(texts))
        return
    try:
        page = args.readme.read_text(encoding="utf-8")
        page = readme.replace_block(page, readme.block(runs))
        args.readme.write_text(page, encoding="utf-8")
    except OSError as error:
        parser.error(f"{args.readme}: {error.strerror}")
    except ValueError as error:
        parser.error(f"{args.readme}: {error}")


if __name__ == "__main__":
    main()
