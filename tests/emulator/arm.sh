#!/bin/sh
# Runs tests of the CPU's kernels on ARM's instructions: a cross-compiler makes the library, qemu
# runs python, torch and a tenth of the tests, in two minutes; `--group 7` names another tenth.
# Wants root and Debian's packages g++-aarch64-linux-gnu, qemu-user-static and debootstrap: Debian's
# python for ARM is unpacked below build/arm.
#
#     sh tests/emulator/arm.sh PYTHON TESTS...
set -eu

python=$1
shift
here=$(pwd)
root=$here/build/arm/root site=$here/build/arm/site package=$here/build/arm/package

if ! [ -e "$root/usr/bin/python3.11" ]; then
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 bookworm "$root"
  for archive in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$archive" "$root"; done
fi

# The newest torch whose wheel for ARM is a CPU build, and without what others it names.
if ! [ -e "$site/pytest_split" ]; then
  "$python" -m pip install --quiet --target "$site" --python-version 3.11 --only-binary :all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform any --no-deps \
    torch==2.10.0 filelock typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec numpy \
    pytest pytest-split iniconfig pluggy packaging pygments
fi

mkdir -p "$package/fastlstm"
ln -sfn "$here"/fastlstm/[!_]*[!o] "$here"/fastlstm/__*.py "$here"/kernels "$package/fastlstm/"

library=$(CXX=aarch64-linux-gnu-g++ "$python" -P - "$site/torch" <<'PROGRAM'
import importlib.util
import platform
import sys
from pathlib import Path

platform.machine = lambda: "aarch64"
spec = importlib.util.spec_from_file_location("build", "fastlstm/build.py")
build = sys.modules["build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build._find_torch = lambda: (Path(sys.argv[1]), "2.10.0")
print(build.build(Path("build/arm/library")))
PROGRAM
)

export FASTLSTM_LIBRARY="$library" PYTHONPATH="$package:$site" PYTHONPYCACHEPREFIX="$here/build/arm/pyc"
exec qemu-aarch64-static -L "$root" "$root/usr/bin/python3.11" -P -m pytest -p no:cacheprovider \
  --splits 10 --group 1 --splitting-algorithm least_duration "$@"
