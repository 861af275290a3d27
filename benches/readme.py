"""README's benchmark block: the short table and a picture of a recorded run."""

from __future__ import annotations

from summary import Result, compact, header

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
FOLDER = "benches/results"
READING = (
    "Medians of paired ratios; above 1, fastlstm is faster. Of several shapes, the geometric mean"
    " and the least. Memory is beyond inputs, outputs and gradients."
)


def block(result: Result, stem: str) -> str:
    """What stands between the marks; ``stem`` is the recorded run's name without its ending."""
    parts = (
        header(result),
        [
            READING,
            f"All rows, and how far from the machine's limits: [{stem}]({FOLDER}/{stem}.md).",
        ],
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
