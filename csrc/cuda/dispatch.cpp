#include "dispatch.h"

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fastlstm {
namespace cuda {
namespace {

constexpr char no_such_limit[] = "; the backends 'triton' and 'aten' have no such limit";

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

// Compiled kernels for the fewest hidden units that are enough: by the number of sequences, and
// where they are as many, by the units of a block. Fewer of both are a shorter step.
std::vector<const Instance*> candidates(const Shape& shape, bool in_cluster) {
  std::vector<const Instance*> found;
  for (const Instance* const* table = instance_tables; *table != nullptr; ++table) {
    for (const Instance* i = *table; i != *table + instances_in_table; ++i) {
      if (i->launch == nullptr || i->kind != shape.kind || i->storage != shape.storage) continue;
      if ((i->cluster > 0) != in_cluster || shape.hidden > i->most_units) continue;
      if (!found.empty() && i->most_units > found[0]->most_units) continue;
      if (!found.empty() && i->most_units < found[0]->most_units) found.clear();
      found.push_back(i);
    }
  }
  std::sort(found.begin(), found.end(), [](const Instance* a, const Instance* b) {
    return std::make_pair(a->n_tiles, a->units) < std::make_pair(b->n_tiles, b->units);
  });
  return found;
}

std::string layer_name(const Shape& shape) {
  return std::to_string(shape.hidden) + " units of " + name_of(shape.storage);
}

// The first candidate with which all teams are on the device at once; else the last that fits, and
// the teams, which do not depend on each other, go in turns. `failed`: the device did not say.
std::string plan_with(const Shape& shape, bool in_cluster, Plan* plan, bool* failed) {
  const std::vector<const Instance*> all = candidates(shape, in_cluster);
  *plan = {};
  *failed = false;
  if (all.empty())
    return std::string("no ") + (in_cluster ? "cluster " : "") + "kernel was compiled for " +
           layer_name(shape) + no_such_limit;
  int most = 0, tiles = 0;
  for (const Instance* instance : all) {
    const char* error = nullptr;
    const int together = instance->together(&error);
    if (error != nullptr) {
      *failed = true;
      return std::string("asking what the device holds failed: ") + error +
             "; the backends 'triton' and 'aten' do not ask";
    }
    most = std::max(most, together);
    tiles = in_cluster ? instance->cluster : tiles_of(shape.hidden);
    if (together < tiles) continue;
    const int teams =
        shape.directions * slices_of(shape.rows_per_step, instance->n_tiles * mma_columns);
    *plan = {instance, tiles, teams, together / tiles};
    if (teams <= plan->teams_at_once) break;
  }
  if (plan->instance != nullptr) return "";
  return layer_name(shape) + " take " + std::to_string(tiles) +
         " blocks that wait for each other, and this device holds " + std::to_string(most) +
         (in_cluster ? " of such a cluster" : "") + " at once" + no_such_limit;
}

template <class Args>
void run_walk(Args args, const Shape& shape, Choice choice, void* stream) {
  Walk& walk = args.walk;
  if (walk.steps == 0 || walk.rows_per_step == 0) return;
  Plan plan;
  const std::string problem = make_plan(shape, choice, &plan);
  if (!problem.empty()) throw std::runtime_error("fastlstm: " + problem);
  for (int first = 0; first < plan.teams; first += plan.teams_at_once) {
    walk.first_team = first;
    const int teams = std::min(plan.teams_at_once, plan.teams - first);
    const char* error = plan.instance->launch(&args, plan.tiles, teams, stream);
    if (error != nullptr)
      throw std::runtime_error(std::string("fastlstm: launching a walk failed: ") + error);
  }
}

// A cluster whose steps are predicted to be shorter than the grid's.
bool is_short(const Plan& cluster) {
  const int cells = cluster.instance->units * cluster.instance->n_tiles * mma_columns;
  return cluster.teams <= cluster.teams_at_once && cells <= threads;
}

Shape shape_of(Kind kind, Storage storage, const Walk& walk) {
  return {kind, storage, walk.hidden, walk.directions, walk.rows_per_step};
}

}  // namespace

// The rule: a cluster where one was compiled for the layer, all teams are on the device at once,
// and no thread has more than a cell. It exchanges in one hop from shared memory to shared memory,
// where the grid's blocks publish, look and read through the L2 cache. But a second turn is a whole
// walk more, and what a step does beside its exchange grows with a block's units and sequences: the
// grid has more and smaller blocks, while clusters leave multiprocessors over that make up none.
std::string make_plan(const Shape& shape, Choice choice, Plan* plan) {
  bool failed;
  if (choice != Choice::best) return plan_with(shape, choice == Choice::cluster, plan, &failed);
  const std::string no_cluster = plan_with(shape, true, plan, &failed);
  if (failed || (no_cluster.empty() && is_short(*plan))) return no_cluster;
  Plan grid;
  const std::string no_grid = plan_with(shape, false, &grid, &failed);
  if (no_grid.empty()) *plan = grid;
  return no_cluster.empty() && !failed ? "" : no_grid;
}

void run(const ForwardArgs& args, Storage storage, Choice choice, void* stream) {
  run_walk(args, shape_of(Kind::forward, storage, args.walk), choice, stream);
}

void run(const BackwardArgs& args, Storage storage, Choice choice, void* stream) {
  run_walk(args, shape_of(Kind::backward, storage, args.walk), choice, stream);
}

}  // namespace cuda
}  // namespace fastlstm
