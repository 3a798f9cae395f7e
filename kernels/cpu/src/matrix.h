// Weights and activations in the forms that the GEMM reads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hr {

constexpr int kPanel = 64;  // columns (output features) of a panel
constexpr int kGroup = 32;  // inputs that share a scale in the grouped formats
constexpr int kDepth = 64;  // k is padded with zeros to a multiple of this

// How a weight matrix [n, k] is kept. Every format is a sequence of panels of 64 output features (zero padded), each
// panel one contiguous piece in the order it is read: all of k for these 64 features.
//
//   F32   float    [k_pad][64]
//   BF16  bfloat16 [k_pad / 2][64][2]
//   I8    uint8    [k_pad / 4][64][4]                       value = scale[n] * (q - 128)
//   Q8    per 32 inputs: half d[64], uint8 q[8][64][4]      value = d * (q - 128)
//   Q4    per 32 inputs: half d[64], half m[64], uint8 q[4][64][4]
//         byte [j][n][i] holds input 4 * j + i in its low and input 16 + 4 * j + i in its high four bits
//         value = d * nibble + m
//
// Weights are unsigned and activations signed bytes, because that is what VPDPBUSD multiplies; the offsets come out
// again through the sum of the activations.
enum class Format : int32_t { F32 = 0, BF16 = 1, I8 = 2, Q8 = 3, Q4 = 4 };

// Bytes of one panel.
inline size_t panel_bytes(Format format, int k_pad) {
  const size_t k = static_cast<size_t>(k_pad);
  switch (format) {
    case Format::F32: return k * kPanel * 4;
    case Format::BF16: return k * kPanel * 2;
    case Format::I8: return k * kPanel;
    case Format::Q8: return k / kGroup * (kPanel * 2 + kPanel * kGroup);
    case Format::Q4: return k / kGroup * (kPanel * 4 + kPanel * kGroup / 2);
  }
  return 0;
}

struct Matrix {
  Format format;
  int32_t n, k;          // features out, features in
  int32_t n_pad, k_pad;  // multiples of kPanel, kDepth
  int32_t reserved;
  const uint8_t* data;  // n_pad / 64 panels, 64-byte aligned
  const float* scale;   // I8: [n_pad], else null
  const float* bias;    // [n_pad] or null
};

inline const uint8_t* panel(const Matrix& w, int index) {
  return w.data + static_cast<size_t>(index) * panel_bytes(w.format, w.k_pad);
}

// The right form of activations for a format: F32 -> F32; BF16 -> BF16; I8 -> one scale per row; Q8, Q4 -> one scale
// per row and 32 inputs. Rows are k_pad long, padding is zero.
struct Activations {
  Format format;
  int32_t k_pad;
  void* data;    // float, bfloat16 or int8 [m][k_pad], 64-byte aligned
  float* scale;  // I8: [m]; Q8, Q4: [m][k_pad / 32]; x = scale * q, q in [-127, 127]
  float* sum;    // as scale: the sum of q, a whole number: what the weights' offsets are multiplied by
};

inline size_t activation_bytes(Format format, int k_pad) {  // of `data`, a row
  return static_cast<size_t>(k_pad) * (format == Format::F32 ? 4 : format == Format::BF16 ? 2 : 1);
}
inline int activation_scales(Format format, int k_pad) {  // of `scale` and of `sum`, a row
  return format == Format::I8 ? 1 : format == Format::Q8 || format == Format::Q4 ? k_pad / kGroup : 0;
}

inline Activations from_row(const Activations& x, int row) {  // the rows from this one on
  const auto at = static_cast<size_t>(row), scales = at * static_cast<size_t>(activation_scales(x.format, x.k_pad));
  return {x.format, x.k_pad, static_cast<uint8_t*>(x.data) + at * activation_bytes(x.format, x.k_pad),
          x.scale == nullptr ? nullptr : x.scale + scales, x.sum == nullptr ? nullptr : x.sum + scales};
}

}  // namespace hr
