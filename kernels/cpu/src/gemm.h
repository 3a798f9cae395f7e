// y = x W^T over packed weights, by one thread. Work is divided among threads by the caller, by panel and by row.
//
// The value of an output element hangs on its row of x and its column of W alone: k is summed in one fixed order,
// whatever the number of rows in the call. That is what makes a request's tokens independent of the batch it runs in.
#pragma once

#include "matrix.h"

namespace hr {

constexpr int kTileRows = 64;  // the most rows that a caller should pass at once: 64 x 64 floats stay in L1

// Rows [m0, m1) of `x` times one panel of `w`: out[(i - m0) * ldc + j], j in [0, 64), i in [m0, m1). Overwrites.
// The bias is added. `use_tiles`: AMX may be used (ignored where the variant has none); one value for all calls, since
// bfloat16's roundings differ. Walk panels in order: the kernels read ahead into the next one (past the last one
// too, which is no more than a hint to the processor). Rows or panels may be the outer loop, the speed is the same.
void gemm_panel(const Matrix& w, int panel, const Activations& x, int m0, int m1, float* out, int64_t ldc,
                bool use_tiles);

// Rows [m0, m1) of float32 `x` (row stride ldx) into the form that `format` wants, padding zeroed. With `weight` (of
// length k) not null the RMS norm comes first: x / sqrt(mean(x^2) + eps) * weight, in float32. A NaN or an infinity
// becomes a NaN scale in the quantized forms: the row's outputs are NaN, other rows' are not touched.
void prepare_rows(const float* x, int64_t ldx, int k, const float* weight, float eps, int m0, int m1,
                  const Activations& out);

// Packing. Source rows are [n, k]; `rows`, when not null, says which source row becomes feature j (-1: zeros), for j in
// [0, n_pad). All write whole panels [panel0, panel1) of `data` (and `scale`).
void pack_f32(const float* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
              uint8_t* data);
void pack_bf16(const uint16_t* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
               uint8_t* data);
// Symmetric, per output feature, scale = max|w| / 127.
void pack_i8(const float* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
             uint8_t* data, float* scale);
// From integers with a scale (and minimum) for each 32 inputs: q [n][k] one byte each (0..255 with offset 128 for Q8,
// 0..15 for Q4), d and m half [n][k / 32] (m unused by Q8). k must be a multiple of 32.
void pack_grouped(Format format, const uint8_t* q, const uint16_t* d, const uint16_t* m, int k, int k_pad,
                  const int32_t* rows, int n, int panel0, int panel1, uint8_t* data);

// Row `row` of the matrix as float32 [k] (the embedding of a token when it is tied to the head).
void unpack_row(const Matrix& w, int row, float* out);

}  // namespace hr
