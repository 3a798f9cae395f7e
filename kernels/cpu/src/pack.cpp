// Weights into panels, and rows back out of them. Done once, when a model is loaded, by several threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm.h"
#include "simd.h"

namespace hr {
namespace {

// The source row that becomes feature j; null: a row of zeros.
template <typename T>
const T* source(const T* w, int64_t ldw, const int32_t* rows, int n, int j) {
  const int64_t row = rows ? rows[j] : j < n ? j : -1;
  return row < 0 ? nullptr : w + row * ldw;
}

// Panels of [k_pad / Pack][64][Pack] from rows of T: `convert(feature in the panel, value)` gives what is stored.
template <int Pack, typename To, typename From, typename Convert>
void pack_panel(const From* const (&row)[kPanel], int k, int k_pad, To* to, Convert convert) {
  // Blocks of k, so that the 64 source rows and the part of the panel they go to stay in the L1 cache.
  constexpr int kBlock = 64;
  for (int begin = 0; begin < k_pad; begin += kBlock) {
    To* const block = to + static_cast<size_t>(begin) * kPanel;
    std::memset(block, 0, sizeof(To) * kBlock * kPanel);
    const int count = std::min(kBlock, k - begin);
    for (int j = 0; j < kPanel; ++j) {
      const From* const from = row[j] + (row[j] ? begin : 0);
      if (row[j] == nullptr) continue;
      To* const column = block + j * Pack;
      int i = 0;
      for (; i + Pack <= count; i += Pack) {
        for (int p = 0; p < Pack; ++p) column[i * kPanel + p] = convert(j, from[i + p]);
      }
      for (int p = 0; i + p < count; ++p) column[i * kPanel + p] = convert(j, from[i + p]);
    }
  }
}

template <typename T>
void sources(const T* w, int64_t ldw, const int32_t* rows, int n, int panel, const T* (&row)[kPanel]) {
  for (int j = 0; j < kPanel; ++j) row[j] = source(w, ldw, rows, n, panel * kPanel + j);
}

uint8_t quantize_weight(float value, float inverse) {
  const float q = std::nearbyint(value * inverse);
  return static_cast<uint8_t>(128 + static_cast<int>(q > -127.0f ? std::min(q, 127.0f) : -127.0f));  // NaN: -127
}

// One group of 32 inputs of feature j, whose bytes are q.
void pack_group_q8(const uint8_t* q, uint8_t* to, int j) {
  for (int quad = 0; quad < kGroup / 4; ++quad) std::memcpy(to + (quad * kPanel + j) * 4, q + quad * 4, 4);
}
void pack_group_q4(const uint8_t* q, uint8_t* to, int j) {
  for (int quad = 0; quad < kGroup / 8; ++quad) {
    uint8_t both[4];
    for (int i = 0; i < 4; ++i) {
      both[i] = static_cast<uint8_t>((q[quad * 4 + i] & 15) | (q[16 + quad * 4 + i] & 15) << 4);
    }
    std::memcpy(to + (quad * kPanel + j) * 4, both, 4);
  }
}

}  // namespace

void pack_f32(const float* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
              uint8_t* data) {
  for (int index = panel0; index < panel1; ++index) {
    const float* row[kPanel];
    sources(w, ldw, rows, n, index, row);
    float* to = reinterpret_cast<float*>(data + index * panel_bytes(Format::F32, k_pad));
    pack_panel<1>(row, k, k_pad, to, [](int, float value) { return value; });
  }
}

void pack_bf16(const uint16_t* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
               uint8_t* data) {
  for (int index = panel0; index < panel1; ++index) {
    const uint16_t* row[kPanel];
    sources(w, ldw, rows, n, index, row);
    uint16_t* to = reinterpret_cast<uint16_t*>(data + index * panel_bytes(Format::BF16, k_pad));
    pack_panel<2>(row, k, k_pad, to, [](int, uint16_t value) { return value; });
  }
}

void pack_i8(const float* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
             uint8_t* data, float* scale) {
  for (int index = panel0; index < panel1; ++index) {
    const float* row[kPanel];
    sources(w, ldw, rows, n, index, row);
    float inverse[kPanel];
    for (int j = 0; j < kPanel; ++j) {
      float absmax = 0.0f;
      bool finite = true;
      for (int i = 0; row[j] && i < k; ++i) {
        absmax = std::max(absmax, std::fabs(row[j][i]));
        finite &= std::isfinite(row[j][i]);
      }
      const bool zero = absmax < 1e-36f;  // 127 / absmax would overflow
      inverse[j] = zero || !finite ? 0.0f : 127.0f / absmax;
      scale[index * kPanel + j] = !finite ? NAN : zero ? 0.0f : absmax / 127.0f;
    }
    uint8_t* to = data + index * panel_bytes(Format::I8, k_pad);
    pack_panel<4>(row, k, k_pad, to, [&](int j, float value) { return quantize_weight(value, inverse[j]); });
  }
}

void pack_grouped(Format format, const uint8_t* q, const uint16_t* d, const uint16_t* m, int k, int k_pad,
                  const int32_t* rows, int n, int panel0, int panel1, uint8_t* data) {
  const bool q4 = format == Format::Q4;
  const int groups = k / kGroup, header = kPanel * (q4 ? 4 : 2);
  const size_t group_bytes = panel_bytes(format, kGroup);
  for (int index = panel0; index < panel1; ++index) {
    uint8_t* const to = data + index * panel_bytes(format, k_pad);
    std::memset(to, 0, panel_bytes(format, k_pad));
    for (int j = 0; j < kPanel; ++j) {
      const uint8_t* const from = source(q, k, rows, n, index * kPanel + j);
      if (from == nullptr) continue;
      const int64_t first = (from - q) / k * groups;
      for (int g = 0; g < groups; ++g) {
        uint8_t* const group = to + g * group_bytes;
        std::memcpy(group + j * 2, d + first + g, 2);
        if (q4) std::memcpy(group + kPanel * 2 + j * 2, m + first + g, 2);
        (q4 ? pack_group_q4 : pack_group_q8)(from + g * kGroup, group + header, j);
      }
    }
  }
}

void unpack_row(const Matrix& w, int row, float* out) {
  const uint8_t* const from = panel(w, row / kPanel);
  const int j = row % kPanel;
  switch (w.format) {
    case Format::F32:
      for (int i = 0; i < w.k; ++i) std::memcpy(out + i, from + (i * kPanel + j) * size_t{4}, 4);
      break;
    case Format::BF16:
      for (int i = 0; i < w.k; ++i) {
        uint16_t bits;
        std::memcpy(&bits, from + ((i / 2 * kPanel + j) * 2 + i % 2) * size_t{2}, 2);
        out[i] = bf16_value(bits);
      }
      break;
    case Format::I8:
      for (int i = 0; i < w.k; ++i) {
        out[i] = w.scale[row] * static_cast<float>(from[(i / 4 * kPanel + j) * size_t{4} + i % 4] - 128);
      }
      break;
    case Format::Q8:
    case Format::Q4: {
      const bool q4 = w.format == Format::Q4;
      const size_t group_bytes = panel_bytes(w.format, kGroup);
      for (int i = 0; i < w.k; i += kGroup) {
        const uint8_t* const group = from + i / kGroup * group_bytes;
        uint16_t d, m = 0;
        std::memcpy(&d, group + j * 2, 2);
        if (q4) std::memcpy(&m, group + kPanel * 2 + j * 2, 2);
        const uint8_t* const q = group + kPanel * (q4 ? 4 : 2);
        const float scale = f16_value(d), minimum = f16_value(m);
        for (int p = 0; p < std::min(kGroup, w.k - i); ++p) {
          const int place = q4 ? p % 16 : p;
          const int byte = q[(place / 4 * kPanel + j) * 4 + place % 4];
          out[i + p] = q4 ? scale * static_cast<float>(p < 16 ? byte & 15 : byte >> 4) + minimum
                          : scale * static_cast<float>(byte - 128);
        }
      }
      break;
    }
  }
}

}  // namespace hr

extern "C" {

void hr_pack_f32(const float* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
                 uint8_t* data) {
  hr::pack_f32(w, ldw, k, k_pad, rows, n, panel0, panel1, data);
}
void hr_pack_bf16(const uint16_t* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
                  uint8_t* data) {
  hr::pack_bf16(w, ldw, k, k_pad, rows, n, panel0, panel1, data);
}
void hr_pack_i8(const float* w, int64_t ldw, int k, int k_pad, const int32_t* rows, int n, int panel0, int panel1,
                uint8_t* data, float* scale) {
  hr::pack_i8(w, ldw, k, k_pad, rows, n, panel0, panel1, data, scale);
}
void hr_pack_grouped(int format, const uint8_t* q, const uint16_t* d, const uint16_t* m, int k, int k_pad,
                     const int32_t* rows, int n, int panel0, int panel1, uint8_t* data) {
  hr::pack_grouped(static_cast<hr::Format>(format), q, d, m, k, k_pad, rows, n, panel0, panel1, data);
}
void hr_unpack_rows(const hr::Matrix* w, const int32_t* rows, int count, float* out) {  // out [count][k]
  for (int i = 0; i < count; ++i) hr::unpack_row(*w, rows[i], out + static_cast<size_t>(i) * w->k);
}

}  // extern "C"
