// What this machine can do at most, to hold the kernels against: multiply-adds from registers, bytes from memory.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace hr {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A value that the compiler must neither know nor drop.
template <typename T>
void opaque(T& value) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(value.v));
#else
  asm volatile("" : : "r"(&value) : "memory");
#endif
}

// 12 chains hide the latency and leave every instruction set registers enough.
template <typename Acc, typename Dot>
double multiply_adds(double seconds, double operations, Acc zero, Dot dot) {
  constexpr int kChains = 12, kRounds = 20000;
  double best = 0.0;
  const double end = seconds_now() + seconds;
  do {
    Acc acc[kChains];
    for (Acc& a : acc) a = zero;
    Vb w{};
    const double start = seconds_now();
    for (int round = 0; round < kRounds; ++round) {
      opaque(w);
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = dot(acc[i], w);
    }
    const double took = seconds_now() - start;
    for (Acc& a : acc) opaque(a);
    best = std::max(best, operations * kLanes * kChains * kRounds / took);
  } while (seconds_now() < end);
  return best;
}

}  // namespace
}  // namespace hr

extern "C" {

// Multiplications and additions a second of one thread, the best seen in `seconds`.
double hr_bench_peak_bf16(double seconds) {
  return hr::multiply_adds(seconds, 4.0, hr::zero_f(),
                           [](hr::Vf sum, hr::Vb w) { return hr::dot_bf16(sum, w, 0x3f803f80u); });
}
double hr_bench_peak_i8(double seconds) {
  return hr::multiply_adds(seconds, 8.0, hr::zero_i(),
                           [](hr::Vi sum, hr::Vb w) { return hr::dot_u8s8(sum, w, 0x01010101); });
}

// Bytes a second that one thread reads, the best of `repeats` walks over `p`.
double hr_bench_read(const void* p, size_t bytes, int repeats) {
  const uint8_t* const from = static_cast<const uint8_t*>(p);
  double best = 0.0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    hr::Vf sum[4] = {hr::zero_f(), hr::zero_f(), hr::zero_f(), hr::zero_f()};
    const double start = hr::seconds_now();
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
      for (int j = 0; j < 4; ++j) {
        __builtin_prefetch(from + i + 4096 + j * 64);
        sum[j] = sum[j] + hr::load(reinterpret_cast<const float*>(from + i + j * 64));
      }
    }
    for (hr::Vf& s : sum) hr::opaque(s);
    best = std::max(best, static_cast<double>(bytes) / (hr::seconds_now() - start));
  }
  return best;
}

}  // extern "C"
