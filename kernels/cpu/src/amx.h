// AMX's tiles: the instructions, or (HEADRACE_SOFT_TILES) a model of them in plain C++ with which machines that lack
// them test what is built on them. Variants without either have no HR_TILES.
//
// A tile is up to 16 rows of up to 64 bytes. Tile numbers are part of an instruction, so they are template arguments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "simd.h"

#if defined(HEADRACE_SOFT_TILES) || (defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__))
#define HR_TILES 1

namespace hr {

struct alignas(64) TileShapes {  // the operand of LDTILECFG
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

#if defined(HEADRACE_SOFT_TILES)

struct SoftTiles {
  TileShapes shapes;
  uint8_t bytes[8][16][64];
};
inline thread_local SoftTiles soft_tiles;

inline void tile_shapes(const TileShapes& shapes) {
  soft_tiles.shapes = shapes;
  std::memset(soft_tiles.bytes, 0, sizeof(soft_tiles.bytes));
}
template <int T>
void tile_zero() {
  std::memset(soft_tiles.bytes[T], 0, sizeof(soft_tiles.bytes[T]));
}
template <int T>
void tile_load(const void* from, size_t stride) {
  tile_zero<T>();
  for (int row = 0; row < soft_tiles.shapes.rows[T]; ++row) {
    std::memcpy(soft_tiles.bytes[T][row], static_cast<const uint8_t*>(from) + row * stride,
                soft_tiles.shapes.row_bytes[T]);
  }
}
template <int T>
void tile_store(void* to, size_t stride) {
  for (int row = 0; row < soft_tiles.shapes.rows[T]; ++row) {
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, soft_tiles.bytes[T][row], soft_tiles.shapes.row_bytes[T]);
  }
}

// C[row][column] = add(C[row][column], 4 bytes of A[row], 4 bytes of B[.][column]) over A's row.
template <int C, int A, int B, typename Sum, typename Add>
void soft_dot(Add add) {
  const TileShapes& shapes = soft_tiles.shapes;
  // What the instructions fault on.
  if (shapes.rows[C] != shapes.rows[A] || shapes.rows[B] * 4 != shapes.row_bytes[A]) std::abort();
  if (shapes.row_bytes[C] != shapes.row_bytes[B] || shapes.rows[C] == 0) std::abort();
  for (int row = 0; row < shapes.rows[C]; ++row) {
    for (int column = 0; column < shapes.row_bytes[C] / 4; ++column) {
      Sum sum;
      std::memcpy(&sum, soft_tiles.bytes[C][row] + column * 4, 4);
      for (int step = 0; step < shapes.row_bytes[A] / 4; ++step) {
        sum = add(sum, soft_tiles.bytes[A][row] + step * 4, soft_tiles.bytes[B][step] + column * 4);
      }
      std::memcpy(soft_tiles.bytes[C][row] + column * 4, &sum, 4);
    }
  }
}
template <int C, int A, int B>
void tile_dot_bf16() {
  soft_dot<C, A, B, float>([](float sum, const uint8_t* a, const uint8_t* b) {
    uint16_t x[2], w[2];
    std::memcpy(x, a, 4);
    std::memcpy(w, b, 4);
    for (int i = 0; i < 2; ++i) sum += bf16_value(x[i]) * bf16_value(w[i]);
    return sum;
  });
}
template <int C, int A, int B>
void tile_dot_s8u8() {
  soft_dot<C, A, B, int32_t>([](int32_t sum, const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a[i]) * b[i];
    return sum;
  });
}

#else  // the instructions; as assembly, for the intrinsics' tile numbers must be literals

// The shapes are an operand, so that the compiler keeps the stores that fill them (gcc 12 drops them before its own
// intrinsic, and the next tile instruction faults).
inline void tile_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
template <int T>
void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
void tile_load(const void* from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
void tile_store(void* to, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
// C += A B: pairs of bfloat16; signed bytes of A by unsigned bytes of B.
template <int C, int A, int B>
void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
void tile_dot_s8u8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace hr
#endif
