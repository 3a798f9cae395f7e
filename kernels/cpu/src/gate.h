// The gate of an MLP on one panel of its first projection: 32 gate columns, then their 32 up columns.
#pragma once

#include "moe.h"
#include "simd.h"

namespace hr {

inline Vf silu(Vf x) { return x / (set1(1.0f) + exp(zero_f() - x)); }

// GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), both clamped.
inline Vf clamped_swiglu(Vf gate, Vf up, const Gate& g) {
  const Vf limit = set1(g.limit);
  gate = min(gate, limit);
  up = max(min(up, limit), zero_f() - limit);
  return (up + set1(1.0f)) * (gate / (set1(1.0f) + exp(zero_f() - set1(g.alpha) * gate)));
}

// from [64] -> 32 values at `to`, bfloat16 or float.
inline void gate_panel(const float* from, const Gate& kind, void* to, size_t at, bool bf16) {
  constexpr int kHalf = kPanel / 2;
  for (int j = 0; j < kHalf; j += kLanes) {
    const Vf gate = load(from + j), up = load(from + kHalf + j);
    const Vf value = kind.kind == GateKind::Silu ? silu(gate) * up : clamped_swiglu(gate, up, kind);
    if (bf16) {
      store_bf16(static_cast<uint16_t*>(to) + at + j, value);
    } else {
      store(static_cast<float*>(to) + at + j, value);
    }
  }
}

}  // namespace hr
