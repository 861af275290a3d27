// The cluster kernels that the emulator has, all tables, and what else a library needs.
#include "cuda/backward.h"
#include "cuda/cluster.h"
#include "cuda/forward.h"
#include "cuda/probe.h"
#include "instances.h"

namespace fastlstm {
namespace cuda {
namespace {

int together(const char**) {
  return int(settings.clusters);
}

template <class C>
const char* launch(const void* args, int tiles, int teams, void*) {
  if constexpr (C::kind == Kind::forward)
    return emulate<C, ForwardArgs, Forward<C, Host, ClusterForward<C, Host>>>(args, tiles, teams);
  else
    return emulate<C, BackwardArgs, Backward<C, Host, ClusterBackward<C, Host>>>(args, tiles,
                                                                                 teams);
}

template <Kind kind, Storage storage, int blocks, int units, int n_tiles>
constexpr Instance instance() {
  if constexpr (is_compiled(storage, blocks, units, n_tiles)) {
    using C = ClusterConfig<kind, storage, blocks, units, n_tiles>;
    return cluster_instance<C>(&together, &launch<C>);
  }
  return {};
}

template <Storage storage, int blocks, int units>
constexpr Instance table[instances_in_table] = {
    instance<Kind::forward, storage, blocks, units, 1>(),
    instance<Kind::forward, storage, blocks, units, 2>(),
    instance<Kind::forward, storage, blocks, units, 4>(),
    instance<Kind::backward, storage, blocks, units, 1>(),
    instance<Kind::backward, storage, blocks, units, 2>(),
    instance<Kind::backward, storage, blocks, units, 4>(),
};

}  // namespace

const Instance* const instance_tables[] = {
    grid_tables[0],
    grid_tables[1],
    grid_tables[2],
    grid_tables[3],
    grid_tables[4],
    grid_tables[5],
    table<Storage::f16, 8, 16>,
    table<Storage::bf16, 8, 16>,
    table<Storage::bf16, 16, 32>,
    table<Storage::f32, 8, 16>,
    table<Storage::f32, 16, 16>,
    table<Storage::f32, 8, 32>,
    nullptr,
};

void probe(const Probe& p, void*) {
  for (int64_t k = 0; k < p.n; ++k) probe_point(p, k);
}

}  // namespace cuda
}  // namespace fastlstm
