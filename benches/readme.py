"""README's benchmark block: recorded runs side by side, a column for each machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from summary import Result, groups, header, mean_and_least

from fastlstm.cli.contest import MODES, Row
from fastlstm.cli.table import table

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
FOLDER = "benches/results"
READING = """\
How many times as fast as the rival, or how many times less memory: on one thread / on two, or one
figure where only one of them was timed. Medians of paired ratios; of several shapes the geometric
mean, and in brackets the least. Memory is beyond inputs, outputs and gradients. The machines:"""
ABSENT = "–"


def block(runs: Iterable[tuple[Result, str]]) -> str:
    """What stands between the marks, of recorded runs with their names without their endings."""
    runs = list(runs)
    results = [result for result, _ in runs]
    parts = [READING, "\n".join(machine(k + 1, *run) for k, run in enumerate(runs))]
    for mode, name in MODES.items():
        parts += [f"### {name.capitalize()}", "\n".join(beside(results, mode))]
    for k in dict.fromkeys((0, len(runs) - 1)):
        parts.append(f"![Machine {k + 1}: times of nn.LSTM over times of fastlstm, by shape]"
                     f"({FOLDER}/{runs[k][1]}.png)")  # fmt: skip
    return "\n\n".join(parts) + "\n"


def machine(number: int, result: Result, stem: str) -> str:
    """A list's item: what it is, what ran there and where all of the run is."""
    about = " ".join(header(result))
    return f"{number}. {about} [All rows, and how far from its limits]({FOLDER}/{stem}.md)."


def beside(results: Sequence[Result], mode: str) -> list[str]:
    """A Markdown table of everything that was timed in one mode: a column for each machine."""
    found = [groups([row for row in r["rows"] if row["mode"] == mode]) for r in results]
    keys = dict.fromkeys(key for rows in found for key in rows)
    lines = [[*key, *(on_each_threads(rows.get(key, ())) for rows in found)] for key in keys]
    names = [f"{k + 1}: {r['instruction_sets']['fastlstm']}" for k, r in enumerate(results)]
    return table(lines, ("what", "× faster than", *names))


def on_each_threads(rows: Sequence[Row]) -> str:
    """``1.61 (1.41) / 1.86 (1.60)``: what was timed on one number of threads alone stands alone."""
    counts = sorted({row["threads"] for row in rows})
    figures = [mean_and_least([r for r in rows if r["threads"] == n]) for n in counts]
    return " / ".join(figures).replace("**", "").replace("least ", "") or ABSENT


def replace_block(text: str, block: str) -> str:
    """``text`` with what stands between the two marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"it needs {BEGIN} and, after it, {END}")
    return f"{before}{begin}\n{block}{end}{after}"
