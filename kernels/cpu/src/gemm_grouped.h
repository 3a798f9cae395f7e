// One block of rows times one panel for Q8 and Q4: 32 inputs share a scale, on both sides.
//
// A group's products are summed as whole numbers, exactly; its sum then joins the float32 sums of the row. Both kinds
// of sums stay in registers. Work goes by blocks of groups, so that what is read from memory once serves all rows.
#pragma once

#include <algorithm>

#include "gemm_dense.h"

namespace hr {

constexpr int kQuads = kGroup / 4;  // steps of a group

// Strips of a tile: two accumulators for each, one of whole numbers and one of floats.
#if defined(__AVX512F__)
constexpr int group_strips(int rows) { return rows <= 3 ? 4 : 2; }
#else
constexpr int group_strips(int) { return 1; }
#endif

// The bits of kMagic as a float, plus the whole number i, are those of kMagic + i / 128 (|i| < 2^22; a group's sum is
// less than 2^20). A sum that starts there is a float without a conversion, and in the very unit of the weights' offset
// of 128; subtractions also leave the multipliers alone, which are the bottleneck.
constexpr float kMagic = 98304.0f;  // 1.5 * 2^16
constexpr float kUnit = 128.0f;

template <Format F>
struct Group {  // one group of one panel
  static constexpr int kHalves = F == Format::Q4 ? 2 : 1;
  static constexpr int kHeader = kPanel * 2 * kHalves;
  static constexpr int kBytes = kHeader + kPanel * kGroup / kHalves;

  static HR_INLINE Vf d(const uint8_t* p, int strip) {
    return load_f16(reinterpret_cast<const uint16_t*>(p) + strip * kLanes);
  }
  static HR_INLINE Vf m(const uint8_t* p, int strip) { return d(p + kPanel * 2, strip); }
};

// Some groups of a panel.
struct GroupBlock {
  int first, end;
  const uint8_t* from;   // group `first`
  const uint8_t* ahead;  // where to read ahead, and how many lines for every group and pass over it
  int ahead_lines;
};

// Four inputs of R rows times S strips.
template <Format F, int R, int S>
HR_INLINE void quad_dots(Vi (&acc)[R][S], const Vb (&w)[S], const int8_t* x, size_t stride) {
  HR_UNROLL for (int r = 0; r < R; ++r) {
    const int32_t quad = load_quad(x + r * stride);
    HR_UNROLL for (int j = 0; j < S; ++j) {
      acc[r][j] = F == Format::Q4 ? dot_u4s8(acc[r][j], w[j], quad) : dot_u8s8(acc[r][j], w[j], quad);
    }
  }
}

template <Format F, int R, int S>
HR_INLINE void group_dots(Vi (&acc)[R][S], const uint8_t* q, const int8_t* x, size_t stride) {
  for (int step = 0; step < kQuads / Group<F>::kHalves; ++step, q += kStepBytes, x += 4) {
    Vb w[S];
    HR_UNROLL for (int j = 0; j < S; ++j) {
      w[j] = load_bytes(q + j * 64);
      if constexpr (F == Format::Q4) w[j] = low_nibbles(w[j]);
    }
    quad_dots<F, R, S>(acc, w, x, stride);
    if constexpr (F == Format::Q4) {
      HR_UNROLL for (int j = 0; j < S; ++j) w[j] = high_nibbles(load_bytes(q + j * 64));
      quad_dots<F, R, S>(acc, w, x + kGroup / 2, stride);
    }
  }
}

// Adds a block of groups to `sums` [R][64], the sums of rows [row, row + R) so far.
template <Format F, int R>
void group_tile(GroupBlock& block, const Activations& x, int row, float* sums) {
  constexpr int S = group_strips(R);
  const size_t k = static_cast<size_t>(x.k_pad), groups = k / kGroup;
  const int8_t* const data = static_cast<const int8_t*>(x.data) + row * k;
  const float* const scale = x.scale + row * groups;
  const float* const total = x.sum + row * groups;
  for (int strip = 0; strip < kStrips; strip += S) {
    Vf sum[R][S];
    HR_UNROLL for (int r = 0; r < R; ++r) {
      HR_UNROLL for (int j = 0; j < S; ++j) sum[r][j] = load(sums + r * kPanel + (strip + j) * kLanes);
    }
    const uint8_t* group = block.from;
    for (int g = block.first; g < block.end; ++g, group += Group<F>::kBytes) {
      for (int line = 0; line < block.ahead_lines; ++line, block.ahead += 64) __builtin_prefetch(block.ahead);
      Vi acc[R][S];
      HR_UNROLL for (int r = 0; r < R; ++r) {
        HR_UNROLL for (int j = 0; j < S; ++j) acc[r][j] = as_int(set1(kMagic));
      }
      group_dots<F, R, S>(acc, group + Group<F>::kHeader + strip * 64, data + g * kGroup, k);
      HR_UNROLL for (int j = 0; j < S; ++j) {
        const Vf d = Group<F>::d(group, strip + j) * set1(kUnit);
        HR_UNROLL for (int r = 0; r < R; ++r) {
          const Vf base = F == Format::Q8 ? set1(kMagic) + set1(total[r * groups + g]) : set1(kMagic);
          Vf value = (as_float(acc[r][j]) - base) * d;
          if constexpr (F == Format::Q4) {
            value = fma(Group<F>::m(group, strip + j), set1(total[r * groups + g]), value);
          }
          sum[r][j] = fma(value, set1(scale[r * groups + g]), sum[r][j]);
        }
      }
    }
    HR_UNROLL for (int r = 0; r < R; ++r) {
      HR_UNROLL for (int j = 0; j < S; ++j) store(sums + r * kPanel + (strip + j) * kLanes, sum[r][j]);
    }
  }
}

template <Format F, int R = kRows>
HR_INLINE void group_tile_of(int rows, GroupBlock& block, const Activations& x, int row, float* sums) {
  if (rows == R) return group_tile<F, R>(block, x, row, sums);
  if constexpr (R > 1) group_tile_of<F, R - 1>(rows, block, x, row, sums);
}

// All groups of a panel into `sums` [m1 - m0][64].
template <Format F>
void group_blocks(const uint8_t* panel, const Activations& x, int m0, int m1, float* sums) {
  const int groups = x.k_pad / kGroup;
  const int passes = tiles(m1 - m0) * kStrips / group_strips(tile_rows(m1 - m0));
  // One tile of rows: so few that the second half of the strips finds them, and the next block, in the L1 cache. More
  // rows: enough to hide the way in and out of the tiles.
  const int even = std::max(1, (groups + 8) / 16);
  const int size = m1 - m0 > kRows ? (groups + even - 1) / even : 8;
  GroupBlock block;
  block.ahead_lines = (Group<F>::kBytes / 64 + passes - 1) / passes;
  for (block.first = 0; block.first < groups; block.first = block.end) {
    block.end = std::min(groups, block.first + size);
    block.from = panel + block.first * Group<F>::kBytes;
    block.ahead = block.from + size * Group<F>::kBytes;
    for (int row = m0, rows; row < m1; row += rows) {
      rows = tile_rows(m1 - row);
      group_tile_of<F>(rows, block, x, row, sums + (row - m0) * kPanel);
    }
  }
}

// At most kTileRows rows.
template <Format F>
void gemm_grouped(const Matrix& w, int index, const Activations& x, int m0, int m1, float* out, int64_t ldc) {
  alignas(64) float sums[kTileRows * kPanel];
  const int rows = m1 - m0;
  std::memset(sums, 0, sizeof(float) * kPanel * static_cast<size_t>(rows));
  const uint8_t* const from = panel(w, index);
  group_blocks<F>(from, x, m0, m1, sums);
  for (int strip = 0; strip < kStrips; ++strip) {
    const Vf bias = w.bias ? load(w.bias + index * kPanel + strip * kLanes) : zero_f();
    for (int r = 0; r < rows; ++r) {
      store(out + r * ldc + strip * kLanes, load(sums + r * kPanel + strip * kLanes) + bias);
    }
  }
}

}  // namespace hr
