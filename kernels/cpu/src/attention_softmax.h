// The online softmax of one query row over one chunk of keys (Milakov & Gimelshein 2018; Dao et al. 2022).
#pragma once

#include <limits>

#include "attention_formats.h"

namespace hr {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x for x <= 0 or so; exactly 1 at 0, exactly 0 below -160; NaN stays NaN. Coefficients: least relative error on
// [-1/2, 1/2] with the constant term held at 1 (3e-6, 9e-8, 2e-9 for degree 4, 5, 6).
template <int Degree>
inline Vf exp2(Vf x) {
  x = max(set1(-160.0f), x);
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
inline float exp2_scalar(float x) {
  float lanes[kLanes];
  store(lanes, exp2<6>(set1(x)));
  return lanes[0];
}

// +infinity in the lanes of tokens first .. end - 1 of the vector that begins at `token`, -infinity in the others:
// min(score, this) hides them, NaN included.
inline Vf visible(int token, int first, int end) {
  static const float open[3 * kLanes] = {
      -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity,
      -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity,
      kInfinity,  kInfinity,  kInfinity,  kInfinity,  kInfinity,  kInfinity,  kInfinity,  kInfinity,
      kInfinity,  kInfinity,  kInfinity,  kInfinity,  kInfinity,  kInfinity,  kInfinity,  kInfinity,
      -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity,
      -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity};
  const auto within = [](int n) { return n < 0 ? 0 : n > kLanes ? kLanes : n; };
  const int hidden = within(first - token), shown = within(end - token);
  return min(load(open + kLanes - hidden), load(open + 2 * kLanes - shown));
}

// What a chunk does to the sums of a row: sum = sum * keep + product * factor.
struct RowUpdate {
  float keep, factor;
};

// Scores of tokens [t0, t1) (multiples of 16, relative to the chunk) of one row become probabilities in the units of
// the cache's type, in place. The row sees tokens [first, end); `scale` (times log2 e) is what its scores are to be
// multiplied by. `highest` (of scale * score) and `total` (of probabilities) are the row's running state.
// key_scales, value_scales: of the chunk's tokens, for int8 only.
template <class Kv>
inline RowUpdate softmax_row(uint8_t* row, int t0, int t1, int first, int end, float scale, const float* key_scales,
                             const float* value_scales, float& highest, float& total) {
  float* const scores = reinterpret_cast<float*>(row);
  if (first >= end) {  // the row sees nothing here: its state stays as it is, bit for bit
    for (int t = t0; t < t1; t += kLanes) Kv::store_probability(row, t, zero_f());
    return {1.0f, 0.0f};
  }
  Vf most = set1(-kInfinity);
  for (int t = t0; t < t1; t += kLanes) {
    Vf s = load(scores + t);
    if constexpr (Kv::kScaled) s = s * load(key_scales + t);
    const bool whole = t >= first && t + kLanes <= end;
    if (!whole) s = min(s, visible(t, first, end));
    if (Kv::kScaled || !whole) store(scores + t, s);
    most = max(most, s);
  }
  const float before = highest, in_chunk = reduce_max(most) * scale;
  highest = before > in_chunk ? before : in_chunk;
  const float keep = exp2_scalar(before - highest);

  const Vf factor = set1(scale), shift = set1(-highest);
  Vf sum = zero_f(), largest = zero_f();
  for (int t = t0; t < t1; t += kLanes) {
    Vf p = exp2<Kv::kExpDegree>(fma(load(scores + t), factor, shift));
    sum = sum + p;
    if constexpr (Kv::kScaled) {
      p = p * load(value_scales + t);
      largest = max(largest, p);
      store(scores + t, p);
    } else {
      Kv::store_probability(row, t, p);
    }
  }
  total = total * keep + reduce_add(sum);
  if constexpr (Kv::kScaled) {
    const float top = reduce_max(largest);
    const Vf inverse = set1(top > 1e-30f ? Kv::kRange / top : 0.0f);
    for (int t = t0; t < t1; t += kLanes) {
      Kv::store_probability(row, t, load(scores + t) * inverse);
    }
    return {keep, top / Kv::kRange};
  }
  return {keep, 1.0f};
}

}  // namespace hr
