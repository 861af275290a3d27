// The grid kernels that the emulator has.
#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/rows.h"
#include "instances.h"

namespace fastlstm {
namespace cuda {
namespace {

int together(const char**) {
  return int(settings.blocks);
}

template <class C>
const char* launch(const void* args, int tiles, int teams, void*) {
  if constexpr (C::kind == Kind::forward)
    return emulate<C, ForwardArgs, Forward<C, Host, Rows<C, Host>>>(args, tiles, teams);
  else
    return emulate<C, BackwardArgs, Backward<C, Host, Rows<C, Host>>>(args, tiles, teams);
}

template <Kind kind, Storage storage, int pairs, int n_tiles>
constexpr Instance instance() {
  if constexpr (is_compiled(kind, pairs, n_tiles)) {
    using C = Config<kind, storage, pairs, n_tiles>;
    return grid_instance<C>(pairs, &together, &launch<C>);
  }
  return {};
}

template <Storage storage, int pairs>
constexpr Instance table[instances_in_table] = {
    instance<Kind::forward, storage, pairs, 1>(),  instance<Kind::forward, storage, pairs, 2>(),
    instance<Kind::forward, storage, pairs, 4>(),  instance<Kind::backward, storage, pairs, 1>(),
    instance<Kind::backward, storage, pairs, 2>(), instance<Kind::backward, storage, pairs, 4>(),
};

}  // namespace

const Instance* const grid_tables[] = {
    table<Storage::f16, 1>, table<Storage::bf16, 1>, table<Storage::bf16, 2>,
    table<Storage::f32, 1>, table<Storage::f32, 2>,  table<Storage::f32, 8>,
};

}  // namespace cuda
}  // namespace fastlstm
