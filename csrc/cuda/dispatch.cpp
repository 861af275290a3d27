#include "dispatch.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace fastlstm {
namespace cuda {
namespace {

const char* name_of(Storage storage) {
  switch (storage) {
    case Storage::f16:
      return "float16";
    case Storage::bf16:
      return "bfloat16";
    case Storage::f32:
      return "float32";
    case Storage::f64:
      return "float64";
  }
  return "?";
}

// Compiled kernels of the narrowest rows that are wide enough, by the number of sequences.
std::vector<const Instance*> candidates(Kind kind, Storage storage, int hidden) {
  std::vector<const Instance*> found;
  for (const Instance* const* table = instance_tables; *table != nullptr; ++table) {
    for (const Instance* i = *table; i != *table + instances_in_table; ++i) {
      if (i->launch == nullptr || i->kind != kind || i->storage != storage) continue;
      if (hidden * item_size(storage) > i->pairs * bytes_of_pairs) continue;
      if (!found.empty() && i->pairs > found[0]->pairs) continue;
      if (!found.empty() && i->pairs < found[0]->pairs) found.clear();
      found.push_back(i);
    }
  }
  std::sort(found.begin(), found.end(),
            [](const Instance* a, const Instance* b) { return a->n_tiles < b->n_tiles; });
  return found;
}

template <class Args>
void run_walk(Args args, Kind kind, Storage storage, void* stream) {
  Walk& walk = args.walk;
  if (walk.steps == 0 || walk.rows_per_step == 0) return;
  Plan plan;
  const std::string problem =
      make_plan(kind, storage, walk.hidden, walk.directions, walk.rows_per_step, &plan);
  if (!problem.empty()) throw std::runtime_error("fastlstm: " + problem);
  for (int first = 0; first < plan.teams; first += plan.teams_at_once) {
    walk.first_team = first;
    const int teams = std::min(plan.teams_at_once, plan.teams - first);
    const char* error = plan.instance->launch(&args, plan.tiles, teams, stream);
    if (error != nullptr)
      throw std::runtime_error(std::string("fastlstm: launching a walk failed: ") + error);
  }
}

}  // namespace

// The fewest sequences to a block with which all teams are on the device at once; else the most,
// and the teams, which do not depend on each other, go in turns.
std::string make_plan(Kind kind, Storage storage, int hidden, int directions, int rows_per_step,
                      Plan* plan) {
  const std::vector<const Instance*> all = candidates(kind, storage, hidden);
  if (all.empty())
    return "no kernel was compiled for " + std::to_string(hidden) + " units of " + name_of(storage);
  const int tiles = tiles_of(hidden);
  *plan = {nullptr, tiles, 0, 0};
  int most = 0;
  for (const Instance* instance : all) {
    const char* error = nullptr;
    const int together = instance->together(&error);
    if (error != nullptr) return std::string("asking what the device holds failed: ") + error;
    most = std::max(most, together);
    if (together < tiles) continue;
    const int teams = directions * slices_of(rows_per_step, instance->n_tiles * mma_columns);
    *plan = {instance, tiles, teams, together / tiles};
    if (teams <= plan->teams_at_once) break;
  }
  if (plan->instance != nullptr) return "";
  return std::to_string(hidden) + " units of " + name_of(storage) + " take " +
         std::to_string(tiles) + " blocks that wait for each other, and this device holds " +
         std::to_string(most) + " at once; the backends 'triton' and 'aten' have no such limit";
}

void run(const ForwardArgs& args, Storage storage, void* stream) {
  run_walk(args, Kind::forward, storage, stream);
}

void run(const BackwardArgs& args, Storage storage, void* stream) {
  run_walk(args, Kind::backward, storage, stream);
}

}  // namespace cuda
}  // namespace fastlstm
