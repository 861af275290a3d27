// Which kernel serves a walk, and in how many launches.
#pragma once

#include <string>

#include "layout.h"

namespace fastlstm {
namespace cuda {

// All that were compiled, then a null: written by fastlstm/build.py. Of the six in a table, those
// without a `launch` are not there.
extern const Instance* const instance_tables[];
constexpr int instances_in_table = 6;

// The kernels to choose from; `best`: whichever make_plan's rule says.
enum class Choice { best, grid, cluster };

struct Plan {
  const Instance* instance;
  int tiles;          // blocks of a team
  int teams;          // of the walk
  int teams_at_once;  // that the device holds
};

// What a plan depends on.
struct Shape {
  Kind kind;
  Storage storage;
  int hidden, directions, rows_per_step;
};

// A plan for the current device, or why there is none, empty if there is.
std::string make_plan(const Shape& shape, Choice choice, Plan* plan);

// Walks args.walk, a range of positions of all teams, on `stream`. Throws std::runtime_error.
void run(const ForwardArgs& args, Storage storage, Choice choice, void* stream);
void run(const BackwardArgs& args, Storage storage, Choice choice, void* stream);

}  // namespace cuda
}  // namespace fastlstm
