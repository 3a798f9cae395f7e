// Activations: the RMS norm and the form that a weight format wants, in one pass over rows that are in the cache.
#include <algorithm>

#include "gemm.h"
#include "simd.h"

namespace hr {
namespace {

constexpr float kSmallest = 1e-36f;  // an absolute maximum below this counts as zero: 127 / it would overflow

// The normed row, 16 inputs at a time; zeros at and past k.
class Row {
 public:
  Row(const float* x, int k, const float* weight, float eps) : x_(x), weight_(weight), k_(k) {
    if (weight_ == nullptr) return;
    Vf squares[4] = {zero_f(), zero_f(), zero_f(), zero_f()};  // four chains hide the latency
    int i = 0;
    for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) add_square(load(x_ + i + j * kLanes), squares[j]);
    }
    for (; i < k; i += kLanes) add_square(load_n(x_ + i, std::min(kLanes, k - i)), squares[0]);
    const float sum = reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3]));
    inverse_rms_ = 1.0f / std::sqrt(sum / static_cast<float>(k) + eps);
  }
  Vf at(int i) const {
    const int n = std::min(kLanes, k_ - i);
    if (n <= 0) return zero_f();
    const Vf v = n == kLanes ? load(x_ + i) : load_n(x_ + i, n);
    if (weight_ == nullptr) return v;
    return v * set1(inverse_rms_) * (n == kLanes ? load(weight_ + i) : load_n(weight_ + i, n));
  }

 private:
  static void add_square(Vf v, Vf& sum) { sum = fma(v, v, sum); }

  const float* x_;
  const float* weight_;
  int k_;
  float inverse_rms_ = 1.0f;
};

void convert_f32(const Row& row, int k_pad, float* out) {
  for (int i = 0; i < k_pad; i += kLanes) store(out + i, row.at(i));
}

void convert_bf16(const Row& row, int k_pad, uint16_t* out) {
  for (int i = 0; i < k_pad; i += kLanes) store_bf16(out + i, row.at(i));
}

// Inputs [begin, end) with one scale. A NaN or an infinity makes the scale NaN: every output of the row will say so.
void quantize(const Row& row, int begin, int end, int8_t* out, float* scale, float* sum) {
  Vf largest = zero_f(), poison = zero_f();
  for (int i = begin; i < end; i += kLanes) {
    const Vf v = row.at(i);
    largest = max(abs(v), largest);
    poison = fma(v, zero_f(), poison);
  }
  const float absmax = reduce_max(largest);
  const bool finite = reduce_add(poison) == 0.0f;
  if (!finite || absmax < kSmallest) {
    std::memset(out + begin, 0, static_cast<size_t>(end - begin));
    *scale = finite ? 0.0f : NAN;
    *sum = 0.0f;
    return;
  }
  const Vf inverse = set1(127.0f / absmax);
  Vi total = zero_i();
  for (int i = begin; i < end; i += kLanes) {
    const Vi q = to_int(row.at(i) * inverse);
    store_i8(out + i, q);
    total = total + q;
  }
  *scale = absmax / 127.0f;
  *sum = static_cast<float>(reduce_add(total));
}

}  // namespace

void prepare_rows(const float* x, int64_t ldx, int k, const float* weight, float eps, int m0, int m1,
                  const Activations& out) {
  const int k_pad = out.k_pad, groups = k_pad / kGroup;
  for (int m = m0; m < m1; ++m) {
    const Row row(x + m * ldx, k, weight, eps);
    const size_t at = static_cast<size_t>(m) * static_cast<size_t>(k_pad);
    switch (out.format) {
      case Format::F32: convert_f32(row, k_pad, static_cast<float*>(out.data) + at); break;
      case Format::BF16: convert_bf16(row, k_pad, static_cast<uint16_t*>(out.data) + at); break;
      case Format::I8:
        quantize(row, 0, k_pad, static_cast<int8_t*>(out.data) + at, out.scale + m, out.sum + m);
        break;
      case Format::Q8:
      case Format::Q4:
        for (int g = 0; g < groups; ++g) {
          const size_t slot = static_cast<size_t>(m) * groups + g;
          quantize(row, g * kGroup, (g + 1) * kGroup, static_cast<int8_t*>(out.data) + at, out.scale + slot,
                   out.sum + slot);
        }
        break;
    }
  }
}

}  // namespace hr

extern "C" void hr_prepare_rows(const float* x, int64_t ldx, int k, const float* weight, float eps, int m0, int m1,
                                const hr::Activations* out) {
  hr::prepare_rows(x, ldx, k, weight, eps, m0, m1, *out);
}
