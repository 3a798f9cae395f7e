// Which experts a token goes to and with what weight, and the order in which experts take their tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "moe.h"

namespace hr {

// logits [num_experts] of one row -> weights and experts [top_k], best first, equals by lower index.
// `bias` [num_experts] takes part in the choice only, or null. scratch: 2 * num_experts floats.
void route_row(const float* logits, const Routing& routing, const float* bias, float* scratch, float* weights,
               int32_t* experts);

// Rows of one key each, sorted by it, those of one key in their order.
struct SortedRows {
  std::vector<int32_t> order;  // [rows] which row comes where
  std::vector<int32_t> begin;  // [keys + 1] where each key's rows begin in it

  void sort(const int32_t* keys, int rows, int num_keys);  // keys in [0, num_keys)
};

}  // namespace hr
