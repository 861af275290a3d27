"""The command line, ``python -m fastlstm info | check | bench``, and what it measures with.

``timing`` and ``contest`` are how this project times two LSTMs, ``compare`` says when two
results agree; benches/ and tests/ import them from here.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import bench, check, info
from .arguments import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for a failed check, 2 for bad arguments."""
    parser = Parser(prog="python -m fastlstm", description="fastlstm on this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (info, check, bench):
        name, text = module.__name__.rpartition(".")[2], str(module.__doc__)
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    args = parser.parse_args(argv)
    return int(args.run(args))
