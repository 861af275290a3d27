"""The texts that character models learn: a file of the user's, or what ships with Python."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

from common import UserError


def python_topics() -> str:
    """CPython's own help texts: English prose about Python, in sorted order of topic.

    Underlines (rows of one repeated sign) are dropped, since guessing them is too easy, and so
    are spaces at line ends and all but one of several blank lines.
    """
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    text = re.sub(r"^\s*([*=~^-])\1{2,}\s*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))


def read_text(path: Path | None) -> str:
    """The training text: a UTF-8 file, or the text that ships with Python."""
    if path is None:
        return python_topics()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text:
        raise UserError(f"{path} is empty")
    return text
