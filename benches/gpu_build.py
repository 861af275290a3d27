"""A step of ``make gpu``: build the CPU's library in place.

The triton backend does not need it, so missing tools are only reported; a build that starts and
fails is an error.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from recording import ROOT, SKIPPED


def main() -> int:
    path = ROOT / "fastlstm" / "build.py"
    if "FASTLSTM_LIBRARY" in os.environ:
        print("nothing to build: FASTLSTM_LIBRARY names a library")
        return SKIPPED
    spec = importlib.util.spec_from_file_location("fastlstm_build", path)
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build
    spec.loader.exec_module(build)
    try:
        build.find_toolchain()
    except build.MissingError as error:
        print(f"no library for the CPU: {error}")
        return SKIPPED
    return subprocess.run([sys.executable, "-P", str(path)], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
