// Thread block clusters: mbarriers, and stores into other blocks' shared memory.
#include <algorithm>

#include "host.h"

namespace fastlstm {
namespace cuda {

// --- mbarriers -----------------------------------------------------------------------------

void Grid::init_barrier(const uint64_t* barrier) {
  check_shared(barrier, sizeof *barrier);
  const auto& own = shared[size_t(current->block)];
  const auto number = (reinterpret_cast<const char*>(barrier) - own.data()) / 8 % most_barriers;
  Mbarrier fresh{};
  fresh.who = tiles * threads + current->block % tiles * most_barriers + int(number);
  if (settings.detect) fresh.initialised = now();
  barriers_[barrier] = fresh;
}

void Grid::fence_barriers() {
  for (auto& [at, barrier] : barriers_)
    if (barrier.initialised.who < 0 || barrier.initialised.who == index(*current))
      barrier.fenced = true;
}

// As one of this block's threads knows it.
Mbarrier* Grid::barrier_of(const uint64_t* barrier) {
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end())
    fail("an mbarrier that is not initialised");
  else if (settings.detect && !before(current->clock, found->second.initialised))
    fail("a race of an mbarrier's initialisation and its use");
  if (!error.empty()) park();
  return &found->second;
}

void Grid::expect(const uint64_t* barrier, int bytes) {
  Mbarrier& mine = *barrier_of(barrier);
  mine.due += bytes;
  if (--mine.pending < 0) fail("one arrival too many at an mbarrier");
  settle(mine);
}

void Grid::settle(Mbarrier& barrier) {
  if (barrier.pending > 0) return;
  if (barrier.due < 0) fail("more bytes than an mbarrier expects");
  if (barrier.due != 0) return;
  barrier.pending = 1;
  ++barrier.phase;
  barrier.seen = barrier.gathering;
}

bool Grid::complete(const uint64_t* barrier, int parity) {
  const Mbarrier& mine = *barrier_of(barrier);
  if (int(mine.phase % 2) == parity) {
    pause();
    return false;
  }
  if (settings.detect && settings.omit != the_acquire) {
    for (Clock* clock : {&current->clock, &current->seen})
      (*clock)[size_t(mine.who)] = std::max((*clock)[size_t(mine.who)], mine.phase);
    join(current->seen, mine.seen);
    current->sent.reset();
  }
  return true;
}

// --- stores into other blocks --------------------------------------------------------------

void Grid::send(int rank, const void* to, const void* value, int bytes, const uint64_t* barrier) {
  check_shared(to, size_t(bytes));
  check_shared(barrier, sizeof *barrier);
  if (rank < 0 || rank >= tiles) {
    fail("a store into a block that is not in the cluster");
    park();
  }
  const char* own = shared[size_t(current->block)].data();
  Message message{};
  message.block = current->block / tiles * tiles + rank;
  char* there = shared[size_t(message.block)].data();
  message.to = there + (static_cast<const char*>(to) - own);
  message.bytes = bytes;
  std::memcpy(&message.value, value, size_t(bytes));
  message.barrier =
      reinterpret_cast<const uint64_t*>(there + (reinterpret_cast<const char*>(barrier) - own));
  if (settings.detect) {
    if (!current->sent) current->sent = std::make_shared<const Clock>(current->seen);
    message.seen = current->sent;
  }
  messages_.push_back(message);
}

// One of those on their way arrives.
void Grid::deliver(size_t place) {
  const Message message = messages_[place];
  messages_[place] = messages_.back();
  messages_.pop_back();
  const auto found = barriers_.find(message.barrier);
  if (running_[size_t(message.block)] == 0) return fail("a store into a block that has ended");
  if (found == barriers_.end()) return fail("a store that counts at no mbarrier");
  Mbarrier& barrier = found->second;
  if (!barrier.fenced) return fail("an mbarrier that others use without a fence");
  std::memcpy(message.to, &message.value, size_t(message.bytes));
  if (settings.detect) {
    const Clock& seen = *message.seen;
    if (!before(seen, barrier.initialised))
      fail("a race of an mbarrier's initialisation and its use");
    const auto begin = reinterpret_cast<uintptr_t>(message.to);
    for (uintptr_t at = begin / 2; at < (begin + size_t(message.bytes)) / 2; ++at) {
      Shadow& shadow = shadows_[at];
      if (!before(seen, shadow.write)) fail("a race of two writes");
      for (const Access& access : shadow.reads)
        if (!before(seen, access)) fail("a race of a read and a write after it");
      shadow.write = {barrier.who, barrier.phase + 1};
      shadow.reads.clear();
    }
    join(barrier.gathering, seen);
  }
  barrier.due -= message.bytes;
  settle(barrier);
}

void Grid::outlast_stores() {
  for (size_t k = messages_.size(); k-- > 0;)
    if (messages_[k].block == current->block) deliver(k);
}

// --- what a thread does --------------------------------------------------------------------

void Host::sync_cluster() {
  const Ordering which = fiber_.meetings++ == 0 ? the_first_meeting : the_last_meeting;
  if (settings.omit != which)
    grid_.meet(grid_.cluster_barrier[size_t(team())], grid_.tiles * threads, true);
}

}  // namespace cuda
}  // namespace fastlstm
