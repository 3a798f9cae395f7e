// One block of rows times one panel, for the formats whose groups, if any, span all of k: F32, BF16, I8.
//
// All three are walked in steps of four bytes of a row of x against 256 bytes of the panel: one float, a pair of
// bfloat16 or four int8 of x, times 64 columns. A tile of R rows by S strips of 16 columns is kept in registers.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "simd.h"

namespace hr {

// always_inline: a tile's accumulators must stay in the caller's registers.
#define HR_INLINE inline __attribute__((always_inline))

// Before a loop over rows or strips: registers have no index. Plain C++ has no such registers, only longer to compile.
#if defined(__AVX2__)
#define HR_UNROLL _Pragma("GCC unroll 8")
#else
#define HR_UNROLL
#endif

constexpr int kStrips = kPanel / kLanes;
constexpr int kStepBytes = kPanel * 4;

// The tile that fits the registers: accumulators, the weights of one step and one broadcast.
#if defined(__AVX512F__)
constexpr int kRows = 6;  // 24 accumulators of 32 registers
constexpr int tile_strips(int) { return 4; }
#elif defined(__AVX2__)
constexpr int kRows = 4;  // 8 accumulators of 16 registers, two to a strip
constexpr int tile_strips(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#else
constexpr int kRows = 2;
constexpr int tile_strips(int) { return 1; }
#endif

constexpr int tiles(int rows) { return (rows + kRows - 1) / kRows; }
// Of the first tile of so many rows: tiles of nearly the same height beat full ones and a low one.
constexpr int tile_rows(int rows) { return (rows + tiles(rows) - 1) / tiles(rows); }

template <Format F>
struct Dense;

template <>
struct Dense<Format::F32> {
  using Acc = Vf;
  using Weights = Vf;
  static HR_INLINE Weights weights(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static HR_INLINE Acc dot(Acc acc, Weights w, const uint8_t* x) {
    float value;
    std::memcpy(&value, x, 4);
    return fma(set1(value), w, acc);
  }
  static HR_INLINE Acc start(const Activations&, int) { return zero_f(); }
  static HR_INLINE Vf finish(Acc acc, const Activations&, int, const float*, Vf bias) { return acc + bias; }
};

template <>
struct Dense<Format::BF16> : Dense<Format::F32> {
  using Weights = Vb;
  static HR_INLINE Weights weights(const uint8_t* p) { return load_bytes(p); }
  static HR_INLINE Acc dot(Acc acc, Weights w, const uint8_t* x) {
    uint32_t pair;
    std::memcpy(&pair, x, 4);
    return dot_bf16(acc, w, pair);
  }
};

template <>
struct Dense<Format::I8> {
  using Acc = Vi;
  using Weights = Vb;
  static HR_INLINE Weights weights(const uint8_t* p) { return load_bytes(p); }
  static HR_INLINE Acc dot(Acc acc, Weights w, const uint8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return dot_u8s8(acc, w, quad);
  }
  // The weights' offset of 128, taken off in whole numbers: exact.
  static HR_INLINE Acc start(const Activations& x, int row) { return set1_i(-128 * static_cast<int32_t>(x.sum[row])); }
  static HR_INLINE Vf finish(Acc acc, const Activations& x, int row, const float* scale, Vf bias) {
    return fma(to_float(acc) * set1(x.scale[row]), load(scale), bias);
  }
};

template <Format F, int R, int S, int Lines>
HR_INLINE void dense_steps(typename Dense<F>::Acc (&acc)[R][S], const uint8_t* w, const uint8_t* x, size_t stride,
                           int steps, const uint8_t* ahead) {
  for (int s = 0; s < steps; ++s, w += kStepBytes, x += 4, ahead += Lines * 64) {
    typename Dense<F>::Weights strip[S];
    HR_UNROLL for (int j = 0; j < S; ++j) strip[j] = Dense<F>::weights(w + j * 64);
    HR_UNROLL for (int line = 0; line < Lines; ++line) __builtin_prefetch(ahead + line * 64);
    HR_UNROLL for (int r = 0; r < R; ++r) {
      HR_UNROLL for (int j = 0; j < S; ++j) acc[r][j] = Dense<F>::dot(acc[r][j], strip[j], x + r * stride);
    }
  }
}

// Steps [first, end) of a panel.
struct DenseBlock {
  const Matrix& w;
  const Activations& x;
  int panel, first, end;
};

// Rows [row, row + R) of x times a block. `sums` [R][kStrips] holds what the blocks before came to.
template <Format F, int R, int Lines>
void dense_tile(const DenseBlock& b, int row, const uint8_t* ahead, typename Dense<F>::Acc* sums, float* out,
                int64_t ldc) {
  constexpr int S = tile_strips(R);
  const size_t stride = activation_bytes(F, b.w.k_pad);
  const uint8_t* const x = static_cast<const uint8_t*>(b.x.data) + static_cast<size_t>(row) * stride + b.first * 4;
  const uint8_t* const w = panel(b.w, b.panel) + static_cast<size_t>(b.first) * kStepBytes;
  const bool last = static_cast<size_t>(b.end) * 4 == stride;
  for (int strip = 0; strip < kStrips; strip += S) {
    typename Dense<F>::Acc acc[R][S];
    HR_UNROLL for (int r = 0; r < R; ++r) {
      HR_UNROLL for (int j = 0; j < S; ++j) {
        acc[r][j] = b.first == 0 ? Dense<F>::start(b.x, row + r) : sums[r * kStrips + strip + j];
      }
    }
    dense_steps<F, R, S, Lines>(acc, w + strip * 64, x, stride, b.end - b.first, ahead);
    HR_UNROLL for (int j = 0; j < S; ++j) {
      const int column = b.panel * kPanel + (strip + j) * kLanes;
      const Vf bias = b.w.bias ? load(b.w.bias + column) : zero_f();
      HR_UNROLL for (int r = 0; r < R; ++r) {
        if (last) {
          const Vf y = Dense<F>::finish(acc[r][j], b.x, row + r, b.w.scale + column, bias);
          store(out + r * ldc + (strip + j) * kLanes, y);
        } else {
          sums[r * kStrips + strip + j] = acc[r][j];
        }
      }
    }
  }
}

template <Format F, int Lines, int R = kRows>
HR_INLINE void dense_tile_of(int rows, const DenseBlock& b, int row, const uint8_t* ahead,
                             typename Dense<F>::Acc* sums, float* out, int64_t ldc) {
  if (rows == R) return dense_tile<F, R, Lines>(b, row, ahead, sums, out, ldc);
  if constexpr (R > 1) dense_tile_of<F, Lines, R - 1>(rows, b, row, ahead, sums, out, ldc);
}

// All tiles of rows for one block. The first one waits for memory and the others do not, so these fetch the next block,
// all of them a part: callers walk panels in order, and the next block may be the next panel's.
template <Format F>
void dense_block(const DenseBlock& b, int m0, int m1, typename Dense<F>::Acc* sums, float* out, int64_t ldc) {
  const size_t bytes = static_cast<size_t>(b.end - b.first) * kStepBytes;
  const uint8_t* ahead = panel(b.w, b.panel) + static_cast<size_t>(b.end) * kStepBytes;
  const uint8_t* const end = ahead + bytes;
  const bool few = tiles(m1 - m0) <= 3;
  for (int row = m0, rows; row < m1; row += rows) {
    rows = tile_rows(m1 - row);
    float* const to = out + (row - m0) * ldc;
    typename Dense<F>::Acc* const so_far = sums + (row - m0) * kStrips;
    if (ahead >= end) {
      dense_tile_of<F, 0>(rows, b, row, ahead, so_far, to, ldc);
    } else if (few) {
      dense_tile_of<F, 2>(rows, b, row, ahead, so_far, to, ldc);
      ahead += bytes / 2;
    } else {
      dense_tile_of<F, 1>(rows, b, row, ahead, so_far, to, ldc);
      ahead += bytes / 4;
    }
  }
}

// At most kTileRows rows.
template <Format F>
void gemm_dense(const Matrix& w, int index, const Activations& x, int m0, int m1, float* out, int64_t ldc) {
  constexpr size_t kAhead = 4096;  // bytes
  const int steps = static_cast<int>(activation_bytes(F, w.k_pad) / 4);
  alignas(64) typename Dense<F>::Acc sums[kTileRows * kStrips];
  if (m1 - m0 <= kRows) {
    return dense_tile_of<F, 4>(m1 - m0, {w, x, index, 0, steps}, m0, panel(w, index) + kAhead, sums, out, ldc);
  }
  // Two or three tiles compute no longer than the panel takes to arrive: in small blocks the one hides the other, for a
  // way out of the registers and back. More tiles have time to spare, but two blocks must fit the L2 cache.
  const int size = tiles(m1 - m0) == 2 ? 32 : tiles(m1 - m0) == 3 ? 64 : 512;
  for (int first = 0; first < steps; first += size) {
    dense_block<F>({w, x, index, first, std::min(steps, first + size)}, m0, m1, sums, out, ldc);
  }
}

}  // namespace hr
