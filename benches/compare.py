"""Did fastlstm get slower?  Compares two runs that benches/run.py recorded, row by row:

python benches/compare.py OLD.json NEW.json

What is compared is the ratio to the rival, which both met the same machine in.  A row got slower if
its quartiles lie below the old ones without touching them, and its median by more than --least:
runs of the same code differ by that much, because memory lies elsewhere.  Memory, which does not
scatter, is compared by --least alone.  The exit status is 1 if a row got slower, takes more memory,
or is no longer timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from summary import Result, quotient, title

from fastlstm.cli.arguments import Parser, seconds_of
from fastlstm.cli.contest import MODES, Row
from fastlstm.cli.table import aligned

KEY = ("part", "shape", "variant", "dtype", "mode", "threads", "rival")
LEAST = 0.05
# What must be the same for ratios to be comparable; the rest, as the commit, is what is compared.
SETTINGS = ("hardware", "instruction_sets", "environment")
VERSIONS = ("torch", "python", "compiler")
COLUMNS = ("", "T,B,I,H", "what", "mode", "threads", "rival", "old", "new", "new / old")


class Change(NamedTuple):
    """A row in both runs."""

    row: Row
    old: float
    new: float
    verdict: str  # slower, faster, more memory, less memory or, if nothing is certain, empty


def key(row: Row) -> tuple[Any, ...]:
    """What names a row."""
    return tuple(tuple(v) if isinstance(v := row[name], list) else v for name in KEY)


def warnings(old: Result, new: Result) -> list[str]:
    """Where the machines or the versions differ."""
    found = [(name, old[name], new[name]) for name in SETTINGS]
    found += [(name, old["versions"][name], new["versions"][name]) for name in VERSIONS]
    return [f"warning: another {name}: {a}, then {b}" for name, a, b in found if a != b]


def change(old: Row, new: Row, least: float) -> Change:
    """What became of a row that was timed in both runs."""
    before, after = quotient(old), quotient(new)
    words = "slower", "faster"
    certain = abs(after / before - 1) > least
    if "peak_bytes" in new:
        words = "more memory", "less memory"
    elif after < before:
        certain &= new["ratio"]["q3"] < old["ratio"]["q1"]
    else:
        certain &= new["ratio"]["q1"] > old["ratio"]["q3"]
    return Change(new, before, after, words[after > before] if certain else "")


def changes(old: Result, new: Result, least: float) -> tuple[list[Change], list[Row]]:
    """The rows timed in both, and those that only the old run could time."""
    before = {key(row): row for row in old["rows"] if "error" not in row}
    after = {key(row): row for row in new["rows"] if "error" not in row}
    failed = {key(row): row for row in new["rows"] if "error" in row}
    both = [change(before[k], after[k], least) for k in before if k in after]
    return both, [failed[k] for k in before if k in failed]


def described(row: Row) -> list[str]:
    shape = ",".join(map(str, row["shape"]))
    what = title(row) if row["part"] != "memory" else "peak memory"
    return [shape, what, MODES[row["mode"]], str(row["threads"]), row["rival"]]


def text(found: list[Change], lost: list[Row], every: bool) -> list[str]:
    """A table of what changed, or of all rows, the worst first."""
    lines = [
        [c.verdict, *described(c.row), f"{c.old:.2f}", f"{c.new:.2f}", f"{c.new / c.old:.2f}"]
        for c in sorted(found, key=lambda c: c.new / c.old)
        if c.verdict or every
    ]
    lines = [["not timed", *described(row), "", row["error"], ""] for row in lost] + lines
    counts = {word: sum(c.verdict == word for c in found) for word in ("slower", "faster")}
    end = f"{len(found)} rows in both: " + ", ".join(f"{n} {word}" for word, n in counts.items())
    return [*(aligned(lines, COLUMNS) if lines else []), end]


def read(path: Path, parser: argparse.ArgumentParser) -> Result:
    """A recorded run, or one line and status 2."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            key(row)
        warnings(result, result)
    except OSError as error:
        parser.error(f"{path}: {error.strerror}")
    except (ValueError, LookupError, TypeError):
        parser.error(f"{path}: not a result of benches/run.py, or of an old one")
    return result


def main(words: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--least", type=seconds_of, default=LEAST, help="share, default 0.05")
    parser.add_argument("--all", action="store_true", help="unchanged rows too")
    args = parser.parse_args(words)
    old, new = (read(path, parser) for path in (args.old, args.new))
    found, lost = changes(old, new, args.least)
    if not found and not lost:
        parser.error("no row is in both runs")
    print("\n".join([*warnings(old, new), *text(found, lost, args.all)]))
    return int(bool(lost) or any(c.verdict in ("slower", "more memory") for c in found))


if __name__ == "__main__":
    raise SystemExit(main())
