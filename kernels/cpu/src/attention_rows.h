// The running sums of query rows, and how those of consecutive parts of a context become one.
//
// Layout of one row's state, floats: [head_dim] sum of p * v; then `highest`, the largest score in units of log2; then
// `total`, the sum of p. p = 2^(score - highest). A row that has seen nothing has total 0.
#pragma once

#include "attention_softmax.h"

namespace hr {

inline void reset_state(float* state, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) store(state + d, zero_f());
  state[head_dim] = -kInfinity;
  state[head_dim + 1] = 0.0f;
}

// state += part.
inline void merge_state(float* state, const float* part, int head_dim) {
  if (part[head_dim + 1] == 0.0f) return;
  if (state[head_dim + 1] == 0.0f) {
    std::memcpy(state, part, sizeof(float) * (static_cast<size_t>(head_dim) + 2));
    return;
  }
  const float a = state[head_dim], b = part[head_dim], highest = a > b ? a : b;
  const float weight_a = exp2_scalar(a - highest), weight_b = exp2_scalar(b - highest);
  for (int d = 0; d < head_dim; d += kLanes) {
    store(state + d, fma(load(part + d), set1(weight_b), load(state + d) * set1(weight_a)));
  }
  state[head_dim] = highest;
  state[head_dim + 1] = state[head_dim + 1] * weight_a + part[head_dim + 1] * weight_b;
}

inline void write_row(const float* state, int head_dim, void* out, bool out_bf16) {
  const Vf inverse = set1(1.0f / state[head_dim + 1]);
  for (int d = 0; d < head_dim; d += kLanes) {
    // Plus zero: whether a zero is negative may hang on which hidden keys were multiplied by zero.
    const Vf value = load(state + d) * inverse + zero_f();
    if (out_bf16) {
      store_bf16(static_cast<uint16_t*>(out) + d, value);
    } else {
      store(static_cast<float*>(out) + d, value);
    }
  }
}

}  // namespace hr
