"""Every example opens as a notebook: cells that run one after the other, without a __file__."""

from __future__ import annotations

import codeop
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["char_rnn", "gates", "time_series", "tune"])
def test_cells_run_in_turn_and_the_kernels_options_are_not_taken(name, monkeypatch):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    cells = re.split(r"^(?=# %% \S)", text, flags=re.MULTILINE)
    assert 5 <= len(cells) <= 12
    notebook = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)  # dataclasses look their module up
    compiler = codeop.Compile()  # a __future__ import holds for the cells that follow, as there
    for cell in cells:
        exec(compiler(cell, "cell", "exec"), vars(notebook))
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    seeds = []
    parser = notebook.make_parser()
    notebook.common.run_example(lambda args: seeds.append(args.seed), parser, None)
    assert seeds == [0]
    monkeypatch.delitem(sys.modules, "ipykernel")
    with pytest.raises(SystemExit):
        notebook.common.run_example(lambda args: None, parser, None)
