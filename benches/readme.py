"""README's benchmark block: the short tables and a picture of each of the recorded runs."""

from __future__ import annotations

from collections.abc import Iterable

from summary import Result, compact, header

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
FOLDER = "benches/results"
READING = (
    "Medians of paired ratios; above 1, fastlstm is faster. Of several shapes, the geometric mean"
    " and the least. Memory is beyond inputs, outputs and gradients."
)


def block(runs: Iterable[tuple[Result, str]]) -> str:
    """What stands between the marks: of each recorded run, with its name without its ending."""
    parts = [[READING]]
    for result, stem in runs:
        parts += (
            header(result),
            [f"All rows, and how far from the machine's limits: [{stem}]({FOLDER}/{stem}.md)."],
            compact(result),
            [f"![Times of nn.LSTM over times of fastlstm, by shape]({FOLDER}/{stem}.png)"],
        )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def replace_block(text: str, block: str) -> str:
    """``text`` with what stands between the two marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"it needs {BEGIN} and, after it, {END}")
    return f"{before}{begin}\n{block}{end}{after}"
