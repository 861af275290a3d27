// How the emulator runs a kernel.
#pragma once

#include "cuda/dispatch.h"
#include "host.h"

namespace fastlstm {
namespace cuda {

extern const Instance* const grid_tables[6];

template <class C, class Args, class Walker>
const char* emulate(const void* args, int tiles, int teams) {
  Grid grid(tiles, teams, C::shared_bytes);
  return grid.run([&] {
    Host host(grid);
    Walker(*static_cast<const Args*>(args), host).walk();
  });
}

}  // namespace cuda
}  // namespace fastlstm
