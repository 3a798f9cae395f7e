// A row of logits in runs of 64, of which one pass has taken the maxima: what sampling asks of a whole vocabulary.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "simd.h"

namespace hr {
namespace {

constexpr int kRun = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int num_runs(int vocab) { return (vocab + kRun - 1) / kRun; }

inline bool has_nan(const float* x, int n) {
  uint32_t found = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    found |= (bits & 0x7fffffffu) > 0x7f800000u;
  }
  return found != 0;
}

struct Row {
  const float* x;
  const float* maxima;  // [num_runs] of each run
  int vocab;
  float best;

  int run_end(int run) const { return std::min(vocab, (run + 1) * kRun); }
};

// Fills `maxima`; false when the row holds a NaN.
inline bool scan(const float* x, int vocab, float* maxima, Row* row) {
  float best = -kInfinity;
  Vf odd = zero_f();  // 0 * x is NaN for NaN and for an infinity, which is allowed and told apart below
  const int whole = vocab / kRun;
  for (int run = 0; run < whole; ++run) {
    const float* p = x + run * kRun;
    const Vf a = load(p), b = load(p + 16), c = load(p + 32), d = load(p + 48);
    const Vf zero = zero_f();
    odd = fma(a, zero, fma(b, zero, fma(c, zero, fma(d, zero, odd))));
    maxima[run] = reduce_max(max(max(a, b), max(c, d)));
    best = std::max(best, maxima[run]);
  }
  float rest = 0.0f;
  if (whole * kRun < vocab) {
    float highest = -kInfinity;
    for (int i = whole * kRun; i < vocab; ++i) {
      highest = std::max(highest, x[i]);
      rest += 0.0f * x[i];
    }
    maxima[whole] = highest;
    best = std::max(best, highest);
  }
  *row = {x, maxima, vocab, best};
  return !std::isnan(reduce_add(odd) + rest) || !has_nan(x, vocab);
}

inline int32_t first_best(const Row& row) {
  for (int run = 0;; ++run) {
    if (row.maxima[run] != row.best) continue;
    for (int i = run * kRun;; ++i) {
      if (row.x[i] == row.best) return i;
    }
  }
}

// A value that at least `count` logits reach, and not many more: the count-th largest maximum of a run.
inline float reached_by(const Row& row, int count, float* scratch) {
  const int runs = num_runs(row.vocab);
  if (count > runs) return -kInfinity;
  std::copy(row.maxima, row.maxima + runs, scratch);
  std::nth_element(scratch, scratch + (count - 1), scratch + runs, std::greater<float>());
  return scratch[count - 1];
}

// Calls take(id) for every logit >= floor, ids ascending.
template <class Take>
void for_each_above(const Row& row, float floor, Take take) {
  for (int run = 0, runs = num_runs(row.vocab); run < runs; ++run) {
    if (!(row.maxima[run] >= floor)) continue;
    for (int i = run * kRun, end = row.run_end(run); i < end; ++i) {
      if (row.x[i] >= floor) take(i);
    }
  }
}

// Sum of exp(x[i] / temperature - shift).
inline double sum_exp(const float* x, int vocab, float temperature, float shift) {
  const Vf t = set1(temperature), s = set1(shift);
  Vf a = zero_f(), b = zero_f(), c = zero_f(), d = zero_f();
  double sum = 0.0;
  int i = 0;
  for (; i + kRun <= vocab; i += kRun) {
    a = a + exp(load(x + i) / t - s);
    b = b + exp(load(x + i + 16) / t - s);
    c = c + exp(load(x + i + 32) / t - s);
    d = d + exp(load(x + i + 48) / t - s);
    if (i % (64 * kRun) == 0) {  // float sums stay short, so that they stay exact enough
      sum += reduce_add((a + b) + (c + d));
      a = b = c = d = zero_f();
    }
  }
  for (; i < vocab; ++i) sum += std::exp(static_cast<double>(x[i] / temperature - shift));
  return sum + reduce_add((a + b) + (c + d));
}

}  // namespace
}  // namespace hr
