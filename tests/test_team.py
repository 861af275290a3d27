"""The threads of one call (csrc/cpu/team.h): who does which piece of the work."""

from __future__ import annotations

import subprocess
from pathlib import Path

from fastlstm import build

# Turn after turn, each thread counts the items that it does; one of them sleeps over its first
# piece of every 50th turn.
PROGRAM = """
#include <unistd.h>
#include <cstdio>
#include <cstdlib>
#include "cpu/team.h"
using namespace fastlstm;
constexpr int threads = 4, items = 37, turns = 2000;
int done[turns][items], helped = 0;
int main() {
  run_team(threads, [&](const Team& team) {
    const Range own = team.share(items);
    for (int64_t turn = 0; turn < turns; ++turn) {
      const bool sleeps = turn % 50 == 0 && team.rank == turn / 50 % threads;
      bool first = true;
      team.each_piece(items, 3, turn % 2 != 0, turn + 5, [&](const Range& piece) {
        if (sleeps && first) usleep(2000);
        first = false;
        if (piece.end - piece.begin > 3) std::abort();
        if (piece.begin < own.begin || piece.begin >= own.end)
          __atomic_add_fetch(&helped, 1, __ATOMIC_RELAXED);
        for (int64_t k = piece.begin; k < piece.end; ++k)
          __atomic_add_fetch(&done[turn][k], 1, __ATOMIC_RELAXED);
      });
      team.barrier.wait();
    }
  });
  int wrong = 0;
  for (auto& turn : done)
    for (int count : turn) wrong += count != 1;
  int alone = 0;
  run_team(threads, [&](const Team& team) {
    team.each_piece(items, 3, true, Team::alone, [&](const Range& piece) {
      const Range own = team.share(items);
      if (piece.begin < own.begin || piece.end > own.end) std::abort();
      __atomic_add_fetch(&alone, int(piece.end - piece.begin), __ATOMIC_RELAXED);
    });
  });
  std::printf("%d %d %d", wrong, helped, alone);
}
"""


def test_threads_help_each_other(tmp_path: Path) -> None:
    """Every item is done once in each turn, those of a thread that is late by others."""
    source, program = tmp_path / "team.cpp", tmp_path / "team"
    source.write_text(PROGRAM)
    compiler = build.find_toolchain().compiler
    options = ("-std=c++17", "-O2", "-fopenmp", f"-I{build.sources_dir()}")
    subprocess.run([*compiler, *options, source, "-o", program], check=True)
    found = subprocess.run([program], check=True, capture_output=True, text=True)
    wrong, helped, alone = map(int, found.stdout.split())
    assert wrong == 0
    assert helped >= 40, "a thread slept in 40 turns, and nobody did its work"
    assert alone == 37
