// The items that a forward pass (forward.h) is cut into, and their weights.
//
// An item is one direction and one group of up to `lanes` hidden units, with their four gates. Its
// weights are packed into two panels, [i f] and [g o]. The last units of a direction may be so few
// that two gates fit into a vector, or all four: then they share it, so that one panel or its first
// vector is multiplied, and each gate is put where cells expect it.
#pragma once

#include <algorithm>
#include <cstring>

#include "../layer.h"
#include "operand.h"
#include "scratch.h"

namespace fastlstm {
namespace {

template <class T>
struct Item {
  static constexpr int64_t L = lanes<T>;

  int64_t index;
  int d;
  int64_t unit;           // the first one
  int count;              // of units
  int64_t gate_distance;  // from one gate's first column to the next one's

  // As many as there are left, or L. Their gates are as close together as units allow, and four in
  // a vector at most.
  Item(int64_t number, int direction, int64_t first, int64_t left)
      : index(number), d(direction), unit(first), count(int(std::min(left, L))), gate_distance(L) {
    while (4 * gate_distance > L && 2 * count <= gate_distance) gate_distance /= 2;
  }
  bool narrow() const { return gate_distance < L; }
  int64_t columns() const { return 4 * gate_distance; }
  int64_t panel_count() const { return blocks_of(columns(), panel_width<T>); }
};

template <class Tiles>
class ForwardItems {
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using V = Vec<T>;
  using Inputs = typename Tiles::Inputs;
  static constexpr int64_t L = lanes<T>, width = panel_width<T>;

 public:
  // `ahead`: is the input part multiplied apart, ahead of the steps?
  ForwardItems(const ForwardArgs& args, bool ahead)
      : a_(args),
        n_(args.shape),
        ahead_(ahead),
        groups_(blocks_of(n_.H, L)),
        panel_size_(Tiles::panel_size(ahead ? 0 : n_.I) + Tiles::panel_size(n_.P)),
        input_panel_size_(ahead ? Inputs::panel_size(n_.I) : 0),
        panels_(count() * 2 * panel_size_),
        input_panels_(count() * 2 * input_panel_size_),
        bias_(count() * 4 * L) {}

  int64_t groups() const { return groups_; }
  int64_t count() const { return n_.D * groups_; }
  Item<T> operator[](int64_t index) const {
    const int64_t unit = index % groups_ * L;
    return {index, int(index / groups_), unit, n_.H - unit};
  }

  int64_t panel_size() const { return panel_size_; }
  // What is multiplied at every step, and the input part that is multiplied ahead.
  Panels<typename Tiles::Element> panels(const Item<T>& item) const {
    return {panels_ + item.index * 2 * panel_size_, panel_size_};
  }
  Panels<typename Inputs::Element> input_panels(const Item<T>& item) const {
    return {input_panels_ + item.index * 2 * input_panel_size_, input_panel_size_};
  }
  // (4, L)
  const T* bias(const Item<T>& item) const { return bias_ + item.index * 4 * L; }

  // Returns nonzero if a value was beyond what may be multiplied.
  unsigned pack(const Item<T>& item) {
    const S* w_ih = static_cast<const S*>(a_.w_ih[item.d]);
    const S* w_hh = static_cast<const S*>(a_.w_hh[item.d]);
    const S* bias = static_cast<const S*>(a_.bias[item.d]);
    auto* panel = panels_ + item.index * 2 * panel_size_;
    unsigned beyond = 0;
    if (ahead_) {
      beyond |= pack_weights<Inputs>(
          item, w_ih, n_.I, input_panels_ + item.index * 2 * input_panel_size_, input_panel_size_);
    } else {
      beyond |= pack_weights<Tiles>(item, w_ih, n_.I, panel, panel_size_);
      panel += Tiles::panel_size(n_.I);
    }
    beyond |= pack_weights<Tiles>(item, w_hh, n_.P, panel, panel_size_);
    for (int gate = 0; gate < 4; ++gate)
      store(bias_ + (item.index * 4 + gate) * L,
            bias ? load_some(bias + gate * n_.H + item.unit, item.count) : V{});
    return beyond;
  }

  // (eq. 1) pre (rows, 4L) = a tile times an item's panels.
  template <class Multiplier, class Other>
  static void multiply(const Item<T>& item, const Panels<typename Multiplier::Element>& panels,
                       const Segments& segments, const Blocked<Multiplier>& blocked, int64_t tile,
                       int64_t rows, Advance advance, T* pre, Other& meanwhile) {
    if constexpr (Multiplier::pair_rows > 0)
      if (rows <= Multiplier::pair_rows && item.panel_count() == 2)
        return Multiplier::multiply_pair(blocked.tile(tile), blocked.height, rows, panels, segments,
                                         advance, {pre, 4 * L, width}, nullptr);
    for (int64_t k = 0; k < item.panel_count(); ++k)
      Multiplier::multiply(blocked.tile(tile), blocked.height, rows,
                           {panels.first + k * panels.distance, item.columns() - k * width},
                           segments, advance, pre + k * width, 4 * L, nullptr, false, meanwhile);
    if (item.narrow()) spread_gates(item, pre, rows);
  }

 private:
  // An item's rows of one matrix of weights (4H, k_size).
  template <class Packer>
  unsigned pack_weights(const Item<T>& item, const S* w, int64_t k_size,
                        typename Packer::Element* panel, int64_t distance) const {
    w += item.unit * k_size;
    if (item.narrow()) return pack_narrow<Packer>(item, w, k_size, panel);
    unsigned beyond = 0;
    for (int gate = 0; gate < 4; ++gate)
      beyond |= Packer::pack_transposed(w + gate * n_.H * k_size, k_size, k_size, item.count,
                                        gate % 2, panel + gate / 2 * distance);
    return beyond;
  }

  // Of gates that share vectors some columns of their rows are first brought together.
  template <class Packer>
  unsigned pack_narrow(const Item<T>& item, const S* w, int64_t k_size,
                       typename Packer::Element* panel) const {
    constexpr int64_t some = 64;
    unsigned beyond = 0;
    for (int64_t k = 0; k < k_size; k += some) {
      const int64_t size = std::min(k_size - k, some);
      S rows[width * some] = {};  // one for each of the panel's columns
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t unit = 0; unit < item.count; ++unit)
          std::memcpy(rows + (gate * item.gate_distance + unit) * some,
                      w + (gate * n_.H + unit) * k_size + k, size_t(size) * sizeof(S));
      for (int half = 0; half < panel_vectors; ++half)
        beyond |= Packer::pack_transposed(rows + half * L * some, some, size, L, half,
                                          panel + Packer::panel_size(k));
    }
    return beyond;
  }

  static void spread_gates(const Item<T>& item, T* pre, int64_t rows) {
    for (const T* const end = pre + rows * 4 * L; pre < end; pre += 4 * L) {
      V gates[4];
      for (int gate = 0; gate < 4; ++gate)
        gates[gate] = load_some(pre + gate * item.gate_distance, item.count);
      for (int gate = 0; gate < 4; ++gate) store(pre + gate * L, gates[gate]);
    }
  }

  const ForwardArgs& a_;
  const Shape& n_;
  const bool ahead_;
  const int64_t groups_;  // of L hidden units, the last one padded
  const int64_t panel_size_, input_panel_size_;
  Scratch<typename Tiles::Element> panels_;  // (items, 2) panels of I and P rows, or of P rows
  Scratch<typename Inputs::Element> input_panels_;  // (items, 2) panels of I rows, if ahead
  Scratch<T> bias_;                                 // (items, 4, L)
};

}  // namespace
}  // namespace fastlstm
