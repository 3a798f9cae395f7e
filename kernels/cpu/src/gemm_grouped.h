// One block of rows times one panel for Q8 and Q4: 32 inputs share a scale, on both sides.
//
// Group after group: whole numbers are summed over its 32 inputs, exactly, and join the float32 sums with two roundings.
// The float sums of a block wait in the L1 cache, so that registers are free for the whole numbers and a group's
// nibbles are taken apart once for all rows.
#pragma once

#include "gemm_dense.h"

namespace hr {

constexpr int kQuads = kGroup / 4;  // steps of a group

template <Format F>
struct Group {  // one group of one panel
  static constexpr int kHalves = F == Format::Q4 ? 2 : 1;
  static constexpr int kHeader = kPanel * 2 * kHalves;
  static constexpr int kBytes = kHeader + kPanel * kGroup / kHalves;

  static HR_INLINE Vf d(const uint8_t* p, int strip) { return load_f16(reinterpret_cast<const uint16_t*>(p) + strip * kLanes); }
  static HR_INLINE Vf m(const uint8_t* p, int strip) { return d(p + kPanel * 2, strip); }
};

// The sums of a group for R rows and S strips. `q`: uint8 [8][64][4], or Q4's packed nibbles.
template <bool Nibbles, int R, int S>
HR_INLINE void group_dots(Vi (&acc)[R][S], const uint8_t* q, const int8_t* x, size_t stride) {
  HR_UNROLL for (int quad = 0; quad < (Nibbles ? kQuads / 2 : kQuads); ++quad) {
    HR_UNROLL for (int j = 0; j < S; ++j) {
      const Vb w = load_bytes(q + quad * kStepBytes + j * 64);
      if constexpr (Nibbles) {
        const Vb low = low_nibbles(w), high = high_nibbles(w);
        HR_UNROLL for (int r = 0; r < R; ++r) {
          acc[r][j] = dot_u8s8(acc[r][j], low, load_quad(x + r * stride + quad * 4));
          acc[r][j] = dot_u8s8(acc[r][j], high, load_quad(x + r * stride + quad * 4 + 16));
        }
      } else {
        HR_UNROLL for (int r = 0; r < R; ++r) acc[r][j] = dot_u8s8(acc[r][j], w, load_quad(x + r * stride + quad * 4));
      }
    }
  }
}

// Adds group `g` of rows [row, row + R) into `sums` [R][64].
template <Format F, bool Nibbles, int R>
HR_INLINE void group_tile(const uint8_t* group, const uint8_t* q, const Activations& x, int row, int g, float* sums) {
  constexpr int S = tile_strips(R);
  const size_t k = static_cast<size_t>(x.k_pad);
  const int8_t* data = static_cast<const int8_t*>(x.data) + row * k + g * kGroup;
  const float* scale = x.scale + row * (k / kGroup) + g;
  const float* total = x.sum + row * (k / kGroup) + g;
  for (int strip = 0; strip < kStrips; strip += S) {
    Vi acc[R][S];
    HR_UNROLL for (int r = 0; r < R; ++r) {
      // Q8's offset of 128 is taken off in whole numbers; Q4's minimum is a float.
      const Vi start = F == Format::Q8 ? set1_i(-128 * static_cast<int32_t>(total[r * (k / kGroup)])) : zero_i();
      HR_UNROLL for (int j = 0; j < S; ++j) acc[r][j] = start;
    }
    group_dots<Nibbles, R, S>(acc, q + strip * 64, data, k);
    HR_UNROLL for (int j = 0; j < S; ++j) {
      const Vf d = Group<F>::d(group, strip + j);
      HR_UNROLL for (int r = 0; r < R; ++r) {
        Vf value = to_float(acc[r][j]) * d;
        if constexpr (F == Format::Q4) value = fma(Group<F>::m(group, strip + j), set1(total[r * (k / kGroup)]), value);
        float* sum = sums + r * kPanel + (strip + j) * kLanes;
        store(sum, fma(value, set1(scale[r * (k / kGroup)]), load(sum)));
      }
    }
  }
}

template <Format F, bool Nibbles, int R = kRows>
HR_INLINE void group_rest(int rows, const uint8_t* group, const uint8_t* q, const Activations& x, int row, int g,
                          float* sums) {
  if (rows == R) return group_tile<F, Nibbles, R>(group, q, x, row, g, sums);
  if constexpr (R > 1) group_rest<F, Nibbles, R - 1>(rows, group, q, x, row, g, sums);
}

// All groups for at most kRows rows: the nibbles are taken apart in registers.
template <Format F>
void grouped_few(const uint8_t* group, const Activations& x, int m0, int m1, float* sums) {
  for (int g = 0; g < x.k_pad / kGroup; ++g, group += Group<F>::kBytes) {
    for (int line = 0; line < Group<F>::kBytes; line += 64) __builtin_prefetch(group + 4096 + line);
    group_rest<F, F == Format::Q4>(m1 - m0, group, group + Group<F>::kHeader, x, m0, g, sums);
  }
}

template <Format F>
void grouped_many(const uint8_t* group, const Activations& x, int m0, int m1, float* sums) {
  alignas(64) uint8_t apart[kPanel * kGroup];
  for (int g = 0; g < x.k_pad / kGroup; ++g, group += Group<F>::kBytes) {
    for (int line = 0; line < Group<F>::kBytes; line += 64) __builtin_prefetch(group + 4096 + line);
    const uint8_t* q = group + Group<F>::kHeader;
    if constexpr (F == Format::Q4) {
      for (int i = 0; i < kPanel * kGroup / 2; i += 64) {
        const Vb w = load_bytes(q + i);
        store_bytes(apart + i, low_nibbles(w));
        store_bytes(apart + i + kPanel * kGroup / 2, high_nibbles(w));
      }
      q = apart;
    }
    float* sum = sums;
    int row = m0;
    for (; m1 - row >= kRows; row += kRows, sum += kRows * kPanel) group_tile<F, false, kRows>(group, q, x, row, g, sum);
    if (row < m1) group_rest<F, false>(m1 - row, group, q, x, row, g, sum);
  }
}

// At most kTileRows rows.
template <Format F>
void gemm_grouped(const Matrix& w, int index, const Activations& x, int m0, int m1, float* out, int64_t ldc) {
  alignas(64) float sums[kTileRows * kPanel];
  std::memset(sums, 0, sizeof(float) * kPanel * static_cast<size_t>(m1 - m0));
  (m1 - m0 <= kRows ? grouped_few<F> : grouped_many<F>)(panel(w, index), x, m0, m1, sums);
  for (int strip = 0; strip < kStrips; ++strip) {
    const Vf bias = w.bias ? load(w.bias + index * kPanel + strip * kLanes) : zero_f();
    for (int r = 0; r < m1 - m0; ++r) {
      store(out + r * ldc + strip * kLanes, load(sums + r * kPanel + strip * kLanes) + bias);
    }
  }
}

}  // namespace hr
