// How each type of KV cache is multiplied: its units, its products, and the packing of keys, values and queries.
//
// Packed keys are panels of 16 tokens, [head_dim units][16 tokens]; packed values are [token units][head_dim]. A unit is
// a float (F32), a pair of bfloat16 (BF16) or of int16 (I8), over dimensions for keys and over tokens for values. Both
// are also what AMX wants as its right-hand operand.
//
// int8 caches are multiplied as int16 by int16 into int32: the bytes widen in one instruction, queries and probabilities
// keep 15 bits (bfloat16 has 8), and the sums are exact, so that no order of summation matters.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention_units.h"

namespace hr {

constexpr int kPanelTokens = kLanes;  // tokens of a panel of keys

inline uint32_t load_unit(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// take(i, the i-th four bytes of all 16 rows) for whole rows, whose length is a multiple of 16.
template <class Take>
inline void transpose_rows(const uint8_t* const* rows, size_t row_bytes, const Take& take) {
  Vb units[16];
  size_t offset = 0;
  for (; offset + 64 <= row_bytes; offset += 64) {
    transpose16(rows, offset, units);
    for (size_t j = 0; j < 16; ++j) take(offset / 4 + j, units[j]);
  }
  for (; offset < row_bytes; offset += 16) {
    transpose4(rows, offset, units);
    for (size_t j = 0; j < 4; ++j) take(offset / 4 + j, units[j]);
  }
}

struct FloatKv {
  using Sum = Vf;
  using Units = Vf;                       // 16 units
  static constexpr int kUnit = 1;         // values of a unit
  static constexpr int kLineUnits = 1;    // units of a key for each 64 bytes of 16 tokens
  static constexpr bool kScaled = false;  // whether tokens have scales
  static constexpr int kExpDegree = 6;    // of the polynomial of 2^x that the probabilities deserve

  static Sum zero() { return zero_f(); }
  static Units units(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static Sum dot(Sum sum, Units w, uint32_t x) {
    float value;
    std::memcpy(&value, &x, 4);
    return fma(w, set1(value), sum);
  }
  static Vf value(Sum sum) { return sum; }

  static size_t row_bytes(int head_dim) { return static_cast<size_t>(head_dim) * 4; }
  static float pack_query(const float* q, int head_dim, uint8_t* out) {
    std::memcpy(out, q, row_bytes(head_dim));
    return 1.0f;
  }
  static void pack_keys(const uint8_t* const* rows, int head_dim, uint8_t* out) {
    transpose_rows(rows, row_bytes(head_dim), [&](size_t unit, Vb tokens) { store_bytes(out + 64 * unit, tokens); });
  }
  // Dimensions d .. d + 16 * n - 1 of the tokens of one unit.
  static void value_units(const uint8_t* const* rows, int d, int n, Units* out) {
    for (int i = 0; i < n; ++i) out[i] = units(rows[0] + 4 * (d + i * kLanes));
  }
  static void store_units(uint8_t* p, Units x) { store(reinterpret_cast<float*>(p), x); }
  static void store_probability(uint8_t* row, int token, Vf p) { store(reinterpret_cast<float*>(row) + token, p); }
};

template <class T>
inline void interleave_rows(const T* a, const T* b, int n, Vb* out) {
  int i = 0;
  for (; i + 2 <= n; i += 2) interleave2(a + i * kLanes, b + i * kLanes, out + i);
  if (i < n) out[i] = interleave(a + i * kLanes, b + i * kLanes);
}

struct Bf16Kv {
  using Sum = Vf;
  using Units = Vb;
  static constexpr int kUnit = 2;
  static constexpr int kLineUnits = 1;
  static constexpr bool kScaled = false;
  static constexpr int kExpDegree = 4;

  static Sum zero() { return zero_f(); }
  static Units units(const uint8_t* p) { return load_bytes(p); }
  static Sum dot(Sum sum, Units w, uint32_t x) { return dot_bf16(sum, w, x); }
  static Vf value(Sum sum) { return sum; }

  static size_t row_bytes(int head_dim) { return static_cast<size_t>(head_dim) * 2; }
  static float pack_query(const float* q, int head_dim, uint8_t* out) {
    for (int d = 0; d < head_dim; d += kLanes) store_bf16(reinterpret_cast<uint16_t*>(out) + d, load(q + d));
    return 1.0f;
  }
  static void pack_keys(const uint8_t* const* rows, int head_dim, uint8_t* out) {
    FloatKv::pack_keys(rows, head_dim / 2, out);  // a pair moves as a float does
  }
  static void value_units(const uint8_t* const* rows, int d, int n, Units* out) {
    interleave_rows(reinterpret_cast<const uint16_t*>(rows[0]) + d, reinterpret_cast<const uint16_t*>(rows[1]) + d, n, out);
  }
  static void store_units(uint8_t* p, Units x) { store_bytes(p, x); }
  static void store_probability(uint8_t* row, int token, Vf p) {
    store_bf16(reinterpret_cast<uint16_t*>(row) + token, p);
  }
};

struct Int8Kv {
  using Sum = Vi;
  using Units = Vb;
  static constexpr int kUnit = 2;
  static constexpr int kLineUnits = 2;
  static constexpr bool kScaled = true;
  static constexpr int kExpDegree = 5;
  // |sum| <= 256 terms * 127 * 32767 < 2^31, for head_dim and for the tokens of a chunk alike.
  static constexpr float kRange = 32767.0f;

  static Sum zero() { return zero_i(); }
  static Units units(const uint8_t* p) { return load_bytes(p); }
  static Sum dot(Sum sum, Units w, uint32_t x) { return dot_i16(sum, w, x); }
  static Vf value(Sum sum) { return to_float(sum); }

  static size_t row_bytes(int head_dim) { return static_cast<size_t>(head_dim); }
  // Quantizes; returns the scale. Four dimensions 0 1 2 3 become the pairs (0, 2) and (1, 3), as pack_keys has them.
  static float pack_query(const float* q, int head_dim, uint8_t* out) {
    Vf most = zero_f();
    for (int d = 0; d < head_dim; d += kLanes) most = max(most, abs(load(q + d)));
    // Not a scale of 0 for a query of zeros: hidden tokens are told by scores that are far below all others once scaled.
    const float largest = std::max(reduce_max(most), 1e-12f);  // NaN stays NaN
    const float inverse = largest >= 1e-12f ? kRange / largest : 0.0f;
    int16_t values[kLanes];
    for (int d = 0; d < head_dim; d += kLanes) {
      store_i16(values, to_int(load(q + d) * set1(inverse)));
      for (int i = 0; i < kLanes; i += 4) {
        const int16_t pairs[4] = {values[i], values[i + 2], values[i + 1], values[i + 3]};
        std::memcpy(out + 2 * (d + i), pairs, 8);
      }
    }
    return largest / kRange;
  }
  static void pack_keys(const uint8_t* const* rows, int head_dim, uint8_t* out) {
    transpose_rows(rows, row_bytes(head_dim), [&](size_t quad, Vb tokens) {
      store_bytes(out + 128 * quad, widen_even(tokens));
      store_bytes(out + 128 * quad + 64, widen_odd(tokens));
    });
  }
  static void value_units(const uint8_t* const* rows, int d, int n, Units* out) {
    interleave_rows(reinterpret_cast<const int8_t*>(rows[0]) + d, reinterpret_cast<const int8_t*>(rows[1]) + d, n, out);
  }
  static void store_units(uint8_t* p, Units x) { store_bytes(p, x); }
  static void store_probability(uint8_t* row, int token, Vf p) {  // already in units of the row's factor
    store_i16(reinterpret_cast<int16_t*>(row) + token, to_int(p));
  }
};

}  // namespace hr
