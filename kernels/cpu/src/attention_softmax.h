// The online softmax of one query row over one chunk of keys (Milakov & Gimelshein 2018; Dao et al. 2022).
#pragma once

#include <algorithm>
#include <limits>

#include "attention_formats.h"

namespace hr {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x for finite x <= 0 or so; exactly 1 at 0, exactly 0 below -160; NaN stays NaN. Coefficients: least relative error
// on [-1/2, 1/2] with the constant term held at 1 (3e-6, 9e-8, 2e-9 for degree 4, 5, 6).
template <int Degree>
inline Vf exp2(Vf x) {
#if !defined(__AVX512F__)
  x = max(set1(-160.0f), x);  // scale_by_power has its limits
#endif
  const Vf n = round(x), r = x - n;
  Vf p;
  if constexpr (Degree == 4) {
    p = fma(set1(9.5828528656e-3f), r, set1(5.5906424925e-2f));
    p = fma(p, r, set1(2.4024098617e-1f));
    p = fma(p, r, set1(6.9312419336e-1f));
  } else if constexpr (Degree == 5) {
    p = fma(set1(1.3264726899e-3f), r, set1(9.6715126606e-3f));
    p = fma(p, r, set1(5.5507337442e-2f));
    p = fma(p, r, set1(2.4022242085e-1f));
    p = fma(p, r, set1(6.9314697760e-1f));
  } else {
    static_assert(Degree == 6, "no such polynomial");
    p = fma(set1(1.5353361818e-4f), r, set1(1.3398874446e-3f));
    p = fma(p, r, set1(9.6184373583e-3f));
    p = fma(p, r, set1(5.5503324710e-2f));
    p = fma(p, r, set1(2.4022647914e-1f));
    p = fma(p, r, set1(6.9314720286e-1f));
  }
  return scale_by_power(fma(p, r, set1(1.0f)), n);
}
inline float exp2_scalar(float x) {  // x may be -infinity
  float lanes[kLanes];
  store(lanes, exp2<6>(set1(x > -1e3f || x != x ? x : -1e3f)));
  return lanes[0];
}

constexpr float kHidden = -1e30f;  // a score whose probability is zero; finite, so that no NaN comes of it

// +infinity in the lanes of tokens first .. end - 1 of the vector that begins at `token`, kHidden in the others:
// min(score, this) hides them, NaN included.
inline Vf visible(int token, int first, int end) {
  constexpr float x = kHidden, o = kInfinity;
  static const float open[3 * kLanes] = {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, o, o, o, o, o, o, o, o,
                                         o, o, o, o, o, o, o, o, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
  const auto within = [](int n) { return n < 0 ? 0 : n > kLanes ? kLanes : n; };
  const int hidden = within(first - token), shown = within(end - token);
  return min(load(open + kLanes - hidden), load(open + 2 * kLanes - shown));
}

// What a chunk does to the sums of a row: sum = sum * keep + product * factor.
struct RowUpdate {
  float keep, factor;
};

// One row's scores of tokens [t0, t1) (multiples of 16, relative to the chunk), of which it sees [first, end).
struct ScoreRow {
  uint8_t* data;  // [kKeyChunk] floats
  int t0, t1, first, end;
  float scale;  // (times log2 e) what scores are to be multiplied by

  bool sees_nothing() const { return first >= end; }
  float* scores() const { return reinterpret_cast<float*>(data); }
};

// Hides what the row does not see; returns the largest score, scaled. key_scales: of the chunk's tokens, for int8.
template <class Kv>
inline float highest_score(const ScoreRow& row, const float* key_scales) {
  float* const scores = row.scores();
  const auto score = [&](int t) {
    const Vf s = load(scores + t);
    if constexpr (Kv::kScaled) return s * load(key_scales + t);
    return s;
  };
  // Tokens [whole0, whole1) are vectors that the row sees all of.
  const int whole0 = std::max((row.first + kLanes - 1) / kLanes * kLanes, row.t0);
  const int whole1 = std::max(std::min(row.end / kLanes * kLanes, row.t1), whole0);
  Vf a = set1(kHidden), b = a;
  const auto edge = [&](int t) {
    const Vf s = min(score(t), visible(t, row.first, row.end));
    store(scores + t, s);
    a = max(a, s);
  };
  for (int t = row.t0; t < std::min(whole0, row.t1); t += kLanes) edge(t);
  int t = whole0;
  for (; t + kLanes < whole1; t += 2 * kLanes) {
    const Vf s = score(t), u = score(t + kLanes);
    if constexpr (Kv::kScaled) {
      store(scores + t, s);
      store(scores + t + kLanes, u);
    }
    a = max(a, s);
    b = max(b, u);
  }
  for (; t < row.t1; t += kLanes) edge(t);
  return reduce_max(max(a, b)) * row.scale;
}

// Scores become probabilities in the units of the cache's type, in place; returns their sum. `factor`: what the units
// are to be multiplied by. value_scales: of the chunk's tokens, for int8.
template <class Kv>
inline float probabilities(const ScoreRow& row, float highest, const float* value_scales, float& factor) {
  float* const scores = row.scores();
  const Vf scale = set1(row.scale), shift = set1(-highest);
  Vf sum = zero_f(), largest = zero_f();
  for (int t = row.t0; t < row.t1; t += kLanes) {
    Vf p = exp2<Kv::kExpDegree>(fma(load(scores + t), scale, shift));
    sum = sum + p;
    if constexpr (Kv::kScaled) {
      p = p * load(value_scales + t);
      largest = max(largest, p);
      store(scores + t, p);
    } else {
      Kv::store_probability(row.data, t, p);
    }
  }
  factor = 1.0f;
  if constexpr (Kv::kScaled) {
    const float top = reduce_max(largest);
    const Vf inverse = set1(top > 1e-30f ? Kv::kRange / top : 0.0f);
    for (int t = row.t0; t < row.t1; t += kLanes) Kv::store_probability(row.data, t, load(scores + t) * inverse);
    factor = top / Kv::kRange;
  }
  return reduce_add(sum);
}

// What a row does not see at all leaves its state as it is, bit for bit: probabilities of zero.
template <class Kv>
inline void no_probabilities(const ScoreRow& row) {
  for (int t = row.t0; t < row.t1; t += kLanes) Kv::store_probability(row.data, t, zero_f());
}

}  // namespace hr
