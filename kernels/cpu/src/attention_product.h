// The one matrix product of attention: rows of units times columns of units, register-blocked.
//
// Each element is one chain of products over the units in order, so that it hangs neither on the shape of the block it
// is computed in nor on which blocks there are.
#pragma once

#include "attention_formats.h"

namespace hr {

// Before loops over sums: registers have no index, so the loops must be gone before the compiler places the sums.
#if defined(__AVX2__)
#define HR_ATTEND_UNROLL _Pragma("GCC unroll 8")
#else
#define HR_ATTEND_UNROLL
#endif

// Rows x vectors of sums that are kept in registers.
#if defined(__AVX512F__)
constexpr int kProductRows = 6, kProductVectors = 4;
#else
constexpr int kProductRows = 2, kProductVectors = 2;
#endif

struct ProductRows {
  const uint8_t* data;  // units of 4 bytes
  size_t stride;        // bytes
  int units;
};

// Panels of the cache that are wanted later: fetched a little at each step of a product, so that memory and
// multiplication are busy at the same time.
struct Ahead {
  const uint8_t* const* panels = nullptr;  // where each begins
  int count = 0;
};

// Packed keys or values: unit u of vector n at data + u * unit_stride + n * vector_stride.
template <class Kv>
struct PackedColumns {
  const uint8_t* data;
  size_t unit_stride, vector_stride;

  template <int Vectors>
  void read(int unit, int vector, typename Kv::Units* w) const {
    const uint8_t* at = data + static_cast<size_t>(unit) * unit_stride + static_cast<size_t>(vector) * vector_stride;
    HR_ATTEND_UNROLL for (int n = 0; n < Vectors; ++n) w[n] = Kv::units(at + static_cast<size_t>(n) * vector_stride);
  }
  PackedColumns again() const { return *this; }
};

// Packed keys, while whose panels are read as many others are fetched.
template <class Kv>
struct KeyColumns {
  PackedColumns<Kv> keys;
  Ahead ahead;

  template <int Vectors>
  void read(int unit, int vector, typename Kv::Units* w) const {
    // A panel of bfloat16 or float has as many cache lines as a key has units, one of int8 has half as many.
    constexpr int kSteps = Kv::kLineUnits;
    for (int i = unit % kSteps; i < ahead.count; i += kSteps) prefetch(ahead.panels[i] + unit / kSteps * 64);
    keys.template read<Vectors>(unit, vector, w);
  }
  KeyColumns again() const { return {keys, {}}; }  // for a second reading
};

// Values where the cache has them, for so few rows that packing would not pay. While a panel is read, one that is
// wanted later is fetched.
template <class Kv>
struct ValueColumns {
  const uint8_t* const* rows;
  size_t row_bytes;
  Ahead ahead;

  template <int Vectors>
  void read(int unit, int vector, typename Kv::Units* w) const {
    const int token = unit * Kv::kUnit;
    if (ahead.count) {
      const uint8_t* later = ahead.panels[token / kPanelTokens] + static_cast<size_t>(token % kPanelTokens) * row_bytes;
      for (size_t b = 0; b < Kv::kUnit * row_bytes; b += 64) prefetch(later + b);
    }
    Kv::value_units(rows + token, vector * kLanes, Vectors, w);
  }
  ValueColumns again() const { return {rows, row_bytes, {}}; }
};

template <class Kv, int Rows, int Vectors, class Columns, class Take>
inline void product_block(const ProductRows& x, int row0, const Columns& columns, int vector0, const Take& take) {
  typename Kv::Sum sum[Rows][Vectors];
  HR_ATTEND_UNROLL for (int r = 0; r < Rows; ++r) {
    HR_ATTEND_UNROLL for (int n = 0; n < Vectors; ++n) sum[r][n] = Kv::zero();
  }
  const uint8_t* data = x.data + static_cast<size_t>(row0) * x.stride;
  for (int u = 0; u < x.units; ++u, data += 4) {
    typename Kv::Units w[Vectors];
    columns.template read<Vectors>(u, vector0, w);
    HR_ATTEND_UNROLL for (int r = 0; r < Rows; ++r) {
      const uint32_t value = load_unit(data + static_cast<size_t>(r) * x.stride);
      HR_ATTEND_UNROLL for (int n = 0; n < Vectors; ++n) sum[r][n] = Kv::dot(sum[r][n], w[n], value);
    }
  }
  HR_ATTEND_UNROLL for (int r = 0; r < Rows; ++r) {
    HR_ATTEND_UNROLL for (int n = 0; n < Vectors; ++n) take(row0 + r, vector0 + n, Kv::value(sum[r][n]));
  }
}

template <class Kv, int Vectors, class Columns, class Take>
inline void product_rows(const ProductRows& x, int row0, int rows, const Columns& columns, int vector0,
                         const Take& take) {
  switch (rows) {
    case 1: return product_block<Kv, 1, Vectors>(x, row0, columns, vector0, take);
    case 2: return product_block<Kv, 2, Vectors>(x, row0, columns, vector0, take);
#if defined(__AVX512F__)
    case 3: return product_block<Kv, 3, Vectors>(x, row0, columns, vector0, take);
    case 4: return product_block<Kv, 4, Vectors>(x, row0, columns, vector0, take);
    case 5: return product_block<Kv, 5, Vectors>(x, row0, columns, vector0, take);
    case 6: return product_block<Kv, 6, Vectors>(x, row0, columns, vector0, take);
#endif
  }
}

// take(row, vector, Vf) for every row in [0, rows) and vector in [0, vectors).
template <class Kv, class Columns, class Take>
inline void product(const ProductRows& x, int rows, Columns columns, int vectors, const Take& take) {
  // As even as possible: 8 rows are 4 + 4, because few sums at a time do not hide the latency of a product.
  const int blocks = (rows + kProductRows - 1) / kProductRows;
  for (int v = 0; v < vectors; v += kProductVectors) {
    const int count = vectors - v < kProductVectors ? vectors - v : kProductVectors;
    for (int b = 0; b < blocks; ++b, columns = columns.again()) {
      const int row0 = rows * b / blocks, block_rows = rows * (b + 1) / blocks - row0;
      switch (count) {
        case 1: product_rows<Kv, 1>(x, row0, block_rows, columns, v, take); break;
        case 2: product_rows<Kv, 2>(x, row0, block_rows, columns, v, take); break;
#if defined(__AVX512F__)
        case 3: product_rows<Kv, 3>(x, row0, block_rows, columns, v, take); break;
        case 4: product_rows<Kv, 4>(x, row0, block_rows, columns, v, take); break;
#endif
      }
    }
  }
}

}  // namespace hr
