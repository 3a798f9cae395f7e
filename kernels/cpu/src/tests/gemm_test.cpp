// Packing, preparing and multiplying random shapes in buffers of exact sizes, against a naive loop. Compiled with
// sanitizers by tests/kernels/cpu/test_sanitizers.py: a read past an end is a failure too.
#include "gemm.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "simd.h"

extern "C" {
int hr_amx_enable();
double hr_bench_peak_bf16(double seconds);
double hr_bench_peak_i8(double seconds);
double hr_bench_read(const void* p, size_t bytes, int repeats);
}

namespace {

using hr::Format;

std::mt19937 generator(7);

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

// On a cache line, and not a byte longer.
template <typename T>
class Exact {
 public:
  explicit Exact(size_t count) : data_(nullptr, std::free) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, count * sizeof(T) + (count == 0))) std::abort();
    data_.reset(static_cast<T*>(p));
    for (size_t i = 0; i < count; ++i) data_.get()[i] = T{};
  }
  T* get() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }

 private:
  std::unique_ptr<T, void (*)(void*)> data_;
};

int round_up(int value, int to) { return (value + to - 1) / to * to; }

struct Packed {
  hr::Matrix matrix;
  Exact<uint8_t> data;
  Exact<float> scale, bias;
};

Packed make(Format format, int n, int k, bool permuted) {
  const int n_pad = round_up(n, hr::kPanel), k_pad = round_up(k, hr::kDepth), panels = n_pad / hr::kPanel;
  Packed p{{format, n, k, n_pad, k_pad, 0, nullptr, nullptr, nullptr},
           Exact<uint8_t>(panels * hr::panel_bytes(format, k_pad)), Exact<float>(n_pad), Exact<float>(n_pad)};
  std::vector<int32_t> order(n_pad);
  for (int& row : order) row = pick(-1, n - 1);
  order.shrink_to_fit();
  const int32_t* const rows = permuted ? order.data() : nullptr;
  const int cut = pick(0, panels);  // as two threads would
  const auto both = [&](auto pack) { pack(0, cut), pack(cut, panels); };
  const int64_t ldw = k + pick(0, 3);
  const size_t count = static_cast<size_t>((n - 1) * ldw + k);
  uint8_t* const data = p.data.get();
  if (format == Format::BF16) {
    std::vector<uint16_t> w(count);
    for (uint16_t& v : w) v = hr::bf16_bits(normal());
    both([&](int a, int b) { hr::pack_bf16(w.data(), ldw, k, k_pad, rows, n, a, b, data); });
  } else if (format == Format::F32 || format == Format::I8) {
    std::vector<float> w(count);
    for (float& v : w) v = normal();
    if (pick(0, 3) == 0) w[static_cast<size_t>(pick(0, static_cast<int>(count) - 1))] = pick(0, 1) ? NAN : INFINITY;
    both([&](int a, int b) {
      if (format == Format::F32) hr::pack_f32(w.data(), ldw, k, k_pad, rows, n, a, b, data);
      else hr::pack_i8(w.data(), ldw, k, k_pad, rows, n, a, b, data, p.scale.get());
    });
  } else {
    const size_t scales = static_cast<size_t>(n) * k / hr::kGroup;
    std::vector<uint8_t> q(static_cast<size_t>(n) * k);
    for (uint8_t& v : q) v = static_cast<uint8_t>(pick(0, format == Format::Q4 ? 15 : 255));
    std::vector<uint16_t> d(scales), m(scales);
    for (uint16_t& v : d) v = static_cast<uint16_t>(0x2000 + pick(0, 0x1000));
    for (uint16_t& v : m) v = static_cast<uint16_t>(0xb000 + pick(0, 0x800));
    both([&](int a, int b) {
      hr::pack_grouped(format, q.data(), d.data(), m.data(), k, k_pad, rows, n, a, b, data);
    });
  }
  p.matrix.data = data;
  p.matrix.scale = format == Format::I8 ? p.scale.get() : nullptr;
  if (pick(0, 1)) {
    for (int j = 0; j < n_pad; ++j) p.bias[j] = normal();
    p.matrix.bias = p.bias.get();
  }
  return p;
}

float prepared(const hr::Activations& x, int row, int i) {
  const size_t at = static_cast<size_t>(row) * x.k_pad + i;
  switch (x.format) {
    case Format::F32: return static_cast<const float*>(x.data)[at];
    case Format::BF16: return hr::bf16_value(static_cast<const uint16_t*>(x.data)[at]);
    case Format::I8: return x.scale[row] * static_cast<const int8_t*>(x.data)[at];
    default: return x.scale[at / hr::kGroup] * static_cast<const int8_t*>(x.data)[at];
  }
}

bool check(Format format) {
  const bool grouped = format == Format::Q8 || format == Format::Q4;
  const int m = pick(1, 90), n = pick(1, 200), k = grouped ? 32 * pick(1, 24) : pick(1, 800);
  const Packed w = make(format, n, k, pick(0, 1));
  const int k_pad = w.matrix.k_pad, n_pad = w.matrix.n_pad;
  const int64_t ldx = k + pick(0, 3);
  std::vector<float> source(static_cast<size_t>((m - 1) * ldx + k)), norm(k);
  for (float& v : source) v = normal();
  for (float& v : norm) v = normal();
  if (pick(0, 3) == 0) source[0] = pick(0, 1) ? NAN : -INFINITY;
  if (pick(0, 3) == 0) source[source.size() - 1] = 3e38f;
  const Exact<uint8_t> data(m * hr::activation_bytes(format, k_pad));
  const size_t scales = static_cast<size_t>(m) * hr::activation_scales(format, k_pad);
  const Exact<float> scale(scales), sum(scales);
  const hr::Activations x{format, k_pad, data.get(), scale.get(), sum.get()};
  hr::prepare_rows(source.data(), ldx, k, pick(0, 1) ? norm.data() : nullptr, 1e-5f, 0, m, x);

  const int m0 = pick(0, m - 1), m1 = pick(m0 + 1, m);
  const int64_t ldc = n_pad + pick(0, 1) * 16;
  std::vector<float> out(static_cast<size_t>((m1 - m0 - 1) * ldc + n_pad)), row(k);
  for (int panel = 0; panel < n_pad / hr::kPanel; ++panel) {
    hr::gemm_panel(w.matrix, panel, x, m0, m1, out.data() + panel * hr::kPanel, ldc, pick(0, 1));
  }
  for (int j = 0; j < n_pad; ++j) {
    hr::unpack_row(w.matrix, j, row.data());
    for (int i = m0; i < m1; ++i) {
      double exact = w.matrix.bias ? w.matrix.bias[j] : 0.0, size = std::fabs(exact);
      for (int c = 0; c < k; ++c) {
        const double term = static_cast<double>(prepared(x, i, c)) * row[static_cast<size_t>(c)];
        exact += term;
        size += std::fabs(term);
      }
      const float got = out[static_cast<size_t>((i - m0) * ldc + j)];
      const bool alike = std::isfinite(size) && size < 1e38 ? std::fabs(got - exact) <= 4e-6 * size + 1e-6
                                                            : !std::isfinite(got) || size < 1e39;
      if (!alike) {
        std::printf("format %d m %d..%d n %d k %d: [%d][%d] is %g, not %g\n", static_cast<int>(format), m0, m1, n, k,
                    i, j, got, exact);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  hr_amx_enable();
  for (int round = 0; round < 60; ++round) {
    for (Format format : {Format::F32, Format::BF16, Format::I8, Format::Q8, Format::Q4}) {
      if (!check(format)) return 1;
    }
  }
  const std::vector<uint8_t> memory(1000);
  if (!(hr_bench_peak_bf16(0) > 0 && hr_bench_peak_i8(0) > 0)) return 1;
  return hr_bench_read(memory.data(), memory.size(), 2) > 0 ? 0 : 1;
}
