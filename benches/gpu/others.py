"""A step of ``make gpu``: tests of the CPU's tensors with this torch; see tests.py."""

from __future__ import annotations

import sys

from recording import arguments

from gpu.tests import run

TESTS = ("test_module.py", "test_functional.py", "test_autograd.py")
TESTS += ("test_triton_launch.py", "test_dispatch.py")
DRY = ("test_dispatch.py",)


def main() -> int:
    args = arguments(__doc__)
    return run(args, "others", DRY if args.device == "cpu" else TESTS)


if __name__ == "__main__":
    sys.exit(main())
