// One block of rows times one panel by AMX, for BF16 and I8.
//
// Sixteen steps of gemm_dense.h are one tile of weights: 16 rows of 64 bytes, 256 bytes apart in the panel; the rows of
// x are tiles as they lie. Two rows of tiles by two columns reuse every loaded tile twice; up to 16 rows of x are one
// row of tiles by all four columns.
#pragma once

#include <algorithm>

#include "amx.h"
#include "gemm_dense.h"

#if defined(HR_TILES)
namespace hr {

constexpr int kTile = 16;       // rows of a tile; also columns of a tile of sums
constexpr int kTileBytes = 64;  // of a row

// Tiles 0, 1 and 2, 3: sums; 4, 5: rows of x; 6, 7: weights. `top` rows are in 0, 1, 4, `bottom` rows in 2, 3, 5.
// Loaded anew by every call: other code on this thread (oneDNN) has its own shapes.
inline void set_tiles(int top, int bottom) {
  TileShapes shapes;
  for (int t : {0, 1, 4}) shapes.set(t, top, kTileBytes);
  for (int t : {2, 3, 5}) shapes.set(t, bottom, kTileBytes);
  for (int t : {6, 7}) shapes.set(t, kTile, kTileBytes);
  tile_shapes(shapes);
}

template <Format F, int C, int A, int B>
HR_INLINE void tile_dot() {
  if constexpr (F == Format::BF16) tile_dot_bf16<C, A, B>();
  else tile_dot_s8u8<C, A, B>();
}

template <int... T>
HR_INLINE void tiles_zero() {
  (tile_zero<T>(), ...);
}

struct TileBlock {
  const uint8_t* w;  // the panel
  const uint8_t* x;  // the first row
  size_t stride;     // from row to row of x; a multiple of kTileBytes
  float* sums;       // [rows][64]: floats, or the bits of int32
  bool ahead;        // the panel comes from memory: read ahead
};

HR_INLINE void tile_ahead(const uint8_t* from) {
  for (int line = 0; line < kTile * kStepBytes; line += 64) __builtin_prefetch(from + line);
}

// 17 to 32 rows.
template <Format F>
void tiles_two_by_two(const TileBlock& b, int rows) {
  constexpr size_t kWeights = kTile * kStepBytes, kSums = kPanel * sizeof(float);
  set_tiles(kTile, rows - kTile);
  for (int column = 0; column < kPanel; column += 2 * kTile) {
    tiles_zero<0, 1, 2, 3>();
    const uint8_t* w = b.w + column * 4;
    for (size_t at = 0; at < b.stride; at += kTileBytes, w += kWeights) {
      if (b.ahead && column == 0) tile_ahead(w + 2 * kWeights);
      tile_load<6>(w, kStepBytes);
      tile_load<4>(b.x + at, b.stride);
      tile_dot<F, 0, 4, 6>();
      tile_load<7>(w + kTileBytes, kStepBytes);
      tile_dot<F, 1, 4, 7>();
      tile_load<5>(b.x + kTile * b.stride + at, b.stride);
      tile_dot<F, 2, 5, 6>();
      tile_dot<F, 3, 5, 7>();
    }
    float* const sums = b.sums + column;
    tile_store<0>(sums, kSums);
    tile_store<1>(sums + kTile, kSums);
    tile_store<2>(sums + kTile * kPanel, kSums);
    tile_store<3>(sums + kTile * kPanel + kTile, kSums);
  }
}

// 1 to 16 rows.
template <Format F>
void tiles_one_by_four(const TileBlock& b, int rows) {
  constexpr size_t kWeights = kTile * kStepBytes, kSums = kPanel * sizeof(float);
  set_tiles(rows, rows);
  tiles_zero<0, 1, 2, 3>();
  const uint8_t* w = b.w;
  for (size_t at = 0; at < b.stride; at += kTileBytes, w += kWeights) {
    if (b.ahead) tile_ahead(w + 2 * kWeights);
    tile_load<4>(b.x + at, b.stride);
    tile_load<6>(w, kStepBytes);
    tile_dot<F, 0, 4, 6>();
    tile_load<7>(w + kTileBytes, kStepBytes);
    tile_dot<F, 1, 4, 7>();
    tile_load<6>(w + 2 * kTileBytes, kStepBytes);
    tile_dot<F, 2, 4, 6>();
    tile_load<7>(w + 3 * kTileBytes, kStepBytes);
    tile_dot<F, 3, 4, 7>();
  }
  tile_store<0>(b.sums, kSums);
  tile_store<1>(b.sums + kTile, kSums);
  tile_store<2>(b.sums + 2 * kTile, kSums);
  tile_store<3>(b.sums + 3 * kTile, kSums);
}

HR_INLINE Vf tile_sums(const float* p, Vf) { return load(p); }
HR_INLINE Vi tile_sums(const float* p, Vi start) { return start + as_int(load(p)); }

template <Format F>
void gemm_tiles(const Matrix& w, int index, const Activations& x, int m0, int m1, float* out, int64_t ldc) {
  alignas(64) float sums[2 * kTile * kPanel];
  const size_t stride = activation_bytes(F, w.k_pad);
  for (int row = m0, rows; row < m1; row += rows) {
    rows = std::min(2 * kTile, m1 - row);
    const uint8_t* const x_row = static_cast<const uint8_t*>(x.data) + static_cast<size_t>(row) * stride;
    const TileBlock block{panel(w, index), x_row, stride, sums, row == m0};
    (rows > kTile ? tiles_two_by_two<F> : tiles_one_by_four<F>)(block, rows);
    for (int strip = 0; strip < kStrips; ++strip) {
      const int column = index * kPanel + strip * kLanes;
      const Vf bias = w.bias ? load(w.bias + column) : zero_f();
      for (int r = 0; r < rows; ++r) {
        const auto acc = tile_sums(sums + r * kPanel + strip * kLanes, Dense<F>::start(x, row + r));
        store(out + (row - m0 + r) * ldc + strip * kLanes, Dense<F>::finish(acc, x, row + r, w.scale + column, bias));
      }
    }
  }
}

}  // namespace hr
#endif
