// The one matrix product of attention: rows of units times columns of units, register-blocked.
//
// Each element is one chain of products over the units in order, so that it hangs neither on the shape of the block it
// is computed in nor on which blocks there are.
#pragma once


#include "attention_formats.h"

namespace hr {

// Rows x vectors of sums that are kept in registers.
#if defined(__AVX512F__)
constexpr int kProductRows = 6, kProductVectors = 4;
#else
constexpr int kProductRows = 2, kProductVectors = 2;
#endif

struct Product {
  const uint8_t* x;  // [rows][x_stride bytes], units of 4 bytes
  size_t x_stride;
  const uint8_t* w;  // unit u of vector n at w + u * unit_stride + n * vector_stride, 64 bytes
  size_t unit_stride, vector_stride;
  int units;
};

template <class Kv, int Rows, int Vectors, class Take>
inline void product_block(const Product& p, int row0, int vector0, const Take& take) {
  typename Kv::Sum sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < Vectors; ++n) sum[r][n] = Kv::zero();
  }
  const uint8_t* x = p.x + row0 * p.x_stride;
  const uint8_t* w = p.w + vector0 * p.vector_stride;
  for (int u = 0; u < p.units; ++u, x += 4, w += p.unit_stride) {
    for (int r = 0; r < Rows; ++r) {
      const uint32_t value = load_unit(x + r * p.x_stride);
      for (int n = 0; n < Vectors; ++n) sum[r][n] = Kv::dot(sum[r][n], w + n * p.vector_stride, value);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < Vectors; ++n) take(row0 + r, vector0 + n, Kv::value(sum[r][n]));
  }
}

template <class Kv, int Vectors, class Take>
inline void product_rows(const Product& p, int rows, int row0, int vector0, const Take& take) {
  switch (rows) {
    case 1: return product_block<Kv, 1, Vectors>(p, row0, vector0, take);
    case 2: return product_block<Kv, 2, Vectors>(p, row0, vector0, take);
#if defined(__AVX512F__)
    case 3: return product_block<Kv, 3, Vectors>(p, row0, vector0, take);
    case 4: return product_block<Kv, 4, Vectors>(p, row0, vector0, take);
    case 5: return product_block<Kv, 5, Vectors>(p, row0, vector0, take);
    case 6: return product_block<Kv, 6, Vectors>(p, row0, vector0, take);
#endif
  }
}

// take(row, vector, Vf) for every row in [0, rows) and vector in [0, vectors).
template <class Kv, class Take>
inline void product(const Product& p, int rows, int vectors, const Take& take) {
  // As even as possible: 8 rows are 4 + 4, because few sums at a time do not hide the latency of a product.
  const int blocks = (rows + kProductRows - 1) / kProductRows;
  for (int v = 0; v < vectors; v += kProductVectors) {
    const int count = vectors - v < kProductVectors ? vectors - v : kProductVectors;
    for (int b = 0; b < blocks; ++b) {
      const int row0 = rows * b / blocks, block_rows = rows * (b + 1) / blocks - row0;
      switch (count) {
        case 1: product_rows<Kv, 1>(p, block_rows, row0, v, take); break;
        case 2: product_rows<Kv, 2>(p, block_rows, row0, v, take); break;
#if defined(__AVX512F__)
        case 3: product_rows<Kv, 3>(p, block_rows, row0, v, take); break;
        case 4: product_rows<Kv, 4>(p, block_rows, row0, v, take); break;
#endif
      }
    }
  }
}

}  // namespace hr
