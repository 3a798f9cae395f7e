#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "sampling_runs.h"
#include "simd.h"

namespace hr {
namespace {

constexpr float kNoiseSpan = 26.1f;     // see kernels/sampling.py: _NOISE_SPAN
constexpr float kNoiseCeiling = 22.9f;  // no noise is above

// --- noise -----------------------------------------------------------------------------------------------------------

struct Key {
  uint32_t first, second;
};

inline uint32_t noise_bits(Key key, uint32_t id) {
  uint32_t bits = id * 0x9E3779B1u + key.first;
  bits = (bits ^ (bits >> 16)) * 0x85EBCA6Bu;
  bits = (bits ^ (bits >> 13)) * 0xC2B2AE35u;
  bits = bits ^ (bits >> 16) ^ key.second;
  bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
  bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
  return bits ^ (bits >> 16);
}

double gumbel(uint32_t bits) { return -std::log(-std::log((bits + 0.5) * 0x1p-32)); }

// The best of what was offered so far.
struct Draw {
  Key key;
  int32_t token = -1;
  double score = -std::numeric_limits<double>::infinity();

  void offer(int32_t id, float z) {
    const uint32_t bits = noise_bits(key, static_cast<uint32_t>(id));
    // -log(-log u) < -log(1 - u), and 1 - u > 2^-(n+1) when n leading bits of ~bits are zero: two logarithms saved.
    const int zeros = bits == 0xffffffffu ? 32 : __builtin_clz(~bits);
    if (z + 0.693148 * (zeros + 1) < score) return;
    const double with_noise = z + gumbel(bits);
    if (with_noise > score || (with_noise == score && id < token)) {
      token = id;
      score = with_noise;
    }
  }
};

// The draw among all tokens with x / temperature >= floor. A token of value z wins only if its noise exceeds
// score - z, so only if 1 - u < exp(z - score): one exponential per token and, in all, a handful of logarithms.
int32_t draw_above(const Row& row, float temperature, float floor, Key key) {
  Draw draw{key};
  draw.offer(first_best(row), row.best / temperature);
  const Vf t = set1(temperature);
  for (int run = 0, runs = num_runs(row.vocab); run < runs; ++run) {
    const float highest = row.maxima[run] / temperature;
    if (!(highest >= floor) || highest + kNoiseCeiling < draw.score) continue;
    const int begin = run * kRun, end = row.run_end(run);
    if (end - begin == kRun) {
      float above[kRun];  // 1 - u, rounded down
      for (int i = 0; i < kRun; ++i) {
        const uint32_t left = ~noise_bits(key, static_cast<uint32_t>(begin + i));
        above[i] = static_cast<float>(static_cast<int32_t>(left >> 8)) * 0x1p-24f;
      }
      const Vf score = set1(static_cast<float>(draw.score) - 1e-5f * (1.0f + std::fabs(row.best / temperature)));
      Vf margin = set1(-1.0f);
      for (int i = 0; i < kRun; i += 16) {
        margin = max(margin, exp(load(row.x + begin + i) / t - score) - load(above + i));
      }
      if (reduce_max(margin) <= 0.0f) continue;
    }
    for (int i = begin; i < end; ++i) {
      const float z = row.x[i] / temperature;
      if (z >= floor) draw.offer(i, z);
    }
  }
  return draw.token;
}

// --- candidates --------------------------------------------------------------------------------------------------------

struct Candidates {  // in scratch memory
  int32_t* ids;
  float* z;
  int count;

  // Without branches: which candidates stay is as good as random.
  template <class Stays>
  void filter(Stays stays) {
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      const int32_t id = ids[i];
      const float value = z[i];
      ids[kept] = id;
      z[kept] = value;
      kept += stays(id, value);
    }
    count = kept;
  }
};

// Tokens with x / temperature >= floor, exactly: the division is done only for those that come near. Ids ascend.
void collect(const Row& row, float temperature, float floor, Candidates* found) {
  float raw = floor * temperature;
  raw -= std::fabs(raw) * 1e-6f + 1e-30f;
  int count = 0;
  for (int run = 0, runs = num_runs(row.vocab); run < runs; ++run) {
    if (!(row.maxima[run] >= raw)) continue;
    for (int i = run * kRun, end = row.run_end(run); i < end; ++i) {
      found->ids[count] = i;
      found->z[count] = row.x[i];
      count += row.x[i] >= raw;
    }
  }
  for (int i = 0; i < count; ++i) found->z[i] /= temperature;
  found->count = count;
  found->filter([&](int32_t, float z) { return z >= floor; });
}

float kth_largest(const Row& row, int k, Candidates room) {
  int count = 0;
  for_each_above(row, reached_by(row, k, room.z), [&](int id) { room.z[count++] = row.x[id]; });
  std::nth_element(room.z, room.z + (k - 1), room.z + count, std::greater<float>());
  return room.z[k - 1];
}

// exp(z) of all candidates together, as a multiple of exp(best).
double mass(const Candidates& found, float best) { return sum_exp(found.z, found.count, 1.0f, best); }

// Keeps each candidate whose more likely ones hold less than `share`, a mass as above. They are told apart by 16 bins
// for each factor of e; only the bin in which the share is reached is sorted. room: [count] floats and [count] ints.
void keep_share(Candidates* found, double share, float best, float* weight, int32_t* members) {
  constexpr int kBins = 512;  // 26.1 * 16, and some
  const auto bin_of = [best](float z) { return std::min(kBins - 1, static_cast<int>((best - z) * 16.0f)); };
  for (int i = 0; i < found->count; i += kLanes) {
    const int n = std::min(kLanes, found->count - i);
    store_n(weight + i, exp(load_n(found->z + i, n) - set1(best)), n);
  }
  double held[kBins] = {};
  for (int i = 0; i < found->count; ++i) held[bin_of(found->z[i])] += weight[i];
  double before = 0.0;
  int bin = 0;
  while (bin < kBins && before + held[bin] < share) before += held[bin++];
  if (bin == kBins) return;
  int num = 0;
  for (int i = 0; i < found->count; ++i) {
    members[num] = i;
    num += bin_of(found->z[i]) == bin;
  }
  std::sort(members, members + num, [&](int32_t a, int32_t b) {
    return found->z[a] > found->z[b] || (found->z[a] == found->z[b] && a < b);
  });
  int last = 0;  // of those that stay; the first always does
  for (; last + 1 < num && before + weight[members[last]] < share; ++last) before += weight[members[last]];
  const float cut = found->z[members[last]];
  const int32_t cut_id = found->ids[members[last]];
  found->filter([&](int32_t id, float z) { return z > cut || (z == cut && id <= cut_id); });
}

int32_t draw(const Row& row, const SamplingParams& params, float* scratch) {
  const float t = params.temperature, best = row.best / t;
  if (!std::isfinite(best)) return first_best(row);
  const Key key{params.key_first, params.key_second};
  const bool with_top_k = 0 < params.top_k && params.top_k < row.vocab, with_top_p = params.top_p < 1.0f;
  const int64_t vocab = row.vocab;
  Candidates found{reinterpret_cast<int32_t*>(scratch), scratch + vocab, 0};
  float floor = best - kNoiseSpan;
  if (params.min_p > 0.0f) floor = std::max(floor, best + std::log(params.min_p));
  if (with_top_k) floor = std::max(floor, kth_largest(row, params.top_k, found) / t);
  if (!with_top_k && !with_top_p) return draw_above(row, t, floor, key);
  double total = 0.0;
  if (with_top_p && !with_top_k && params.min_p <= 0.0f) {
    // What lies below the floor counts in the total too. Most often a few tokens near the best hold the share.
    total = sum_exp(row.x, row.vocab, t, best);
    for (float reach = 4.0f; reach < kNoiseSpan && found.count == 0; reach *= 2.0f) {
      collect(row, t, best - reach, &found);
      if (mass(found, best) <= params.top_p * total) found.count = 0;
    }
  }
  if (found.count == 0) collect(row, t, floor, &found);
  if (with_top_p) {
    if (total == 0.0) total = mass(found, best);
    keep_share(&found, params.top_p * total, best, scratch + 2 * vocab,
               reinterpret_cast<int32_t*>(scratch + 3 * vocab));
  }
  Draw drawn{key};
  drawn.offer(first_best(row), best);  // it always stays, and most others need not be looked at after it
  for (int i = 0; i < found.count; ++i) drawn.offer(found.ids[i], found.z[i]);
  return drawn.token;
}

// --- around the draw ---------------------------------------------------------------------------------------------------

bool adjusts(const SamplingParams& p) {
  return p.num_seen || p.num_counted || p.num_biased || p.num_forbidden;
}

void adjust(float* x, const SamplingParams& p) {
  for (int i = 0; i < p.num_seen; ++i) {
    float& value = x[p.seen[i]];
    value = value > 0.0f ? value / p.repetition_penalty : value * p.repetition_penalty;
  }
  for (int i = 0; i < p.num_counted; ++i) {
    x[p.counted[i]] -= p.presence_penalty + p.frequency_penalty * static_cast<float>(p.counts[i]);
  }
  for (int i = 0; i < p.num_biased; ++i) x[p.biased[i]] += p.bias[i];
  for (int i = 0; i < p.num_forbidden; ++i) x[p.forbidden[i]] = -kInfinity;
}

void top_logprobs_of(const Row& row, int count, double log_total, int32_t* ids, float* logprobs, float* scratch) {
  int32_t* found = reinterpret_cast<int32_t*>(scratch + row.vocab);
  int num = 0;
  for_each_above(row, reached_by(row, count, scratch), [&](int id) { found[num++] = id; });
  std::partial_sort(found, found + count, found + num,
                    [&](int32_t a, int32_t b) { return row.x[a] > row.x[b] || (row.x[a] == row.x[b] && a < b); });
  for (int i = 0; i < count; ++i) {
    ids[i] = found[i];
    logprobs[i] = static_cast<float>(row.x[found[i]] - log_total);
  }
}

}  // namespace

int64_t sampling_scratch(int vocab) { return 5 * static_cast<int64_t>(vocab) + num_runs(vocab); }

void sample_row(float* logits, int vocab, const SamplingParams& params, SamplingResult* result, int32_t* top_ids,
                float* top_logprobs, float* scratch) {
  float* maxima = scratch + 5 * static_cast<int64_t>(vocab);
  Row row;
  result->token = -1;
  if (!scan(logits, vocab, maxima, &row)) return;
  const bool with_logprobs = params.num_top_logprobs >= 0, adjusted = adjusts(params);
  const float* raw = logits;
  double log_total = 0.0;
  if (with_logprobs) {
    log_total = row.best + std::log(sum_exp(logits, vocab, 1.0f, row.best));
    if (params.num_top_logprobs > 0) {
      top_logprobs_of(row, params.num_top_logprobs, log_total, top_ids, top_logprobs, scratch);
    }
    if (adjusted) raw = std::copy(logits, logits + vocab, scratch + 4 * static_cast<int64_t>(vocab)) - vocab;
  }
  if (adjusted) {
    adjust(logits, params);
    if (!scan(logits, vocab, maxima, &row)) return;
  }
  result->token = params.temperature > 0.0f ? draw(row, params, scratch) : first_best(row);
  if (with_logprobs) result->logprob = static_cast<float>(raw[result->token] - log_total);
}

}  // namespace hr

extern "C" {

int64_t hr_sample_scratch(int vocab) { return hr::sampling_scratch(vocab); }

// `rows` rows of [vocab] logits, `stride` floats apart; the other arrays have one entry per row, top_ids and
// top_logprobs `top_stride` per row.
void hr_sample(float* logits, int rows, int vocab, int64_t stride, const hr::SamplingParams* params,
               hr::SamplingResult* results, int32_t* top_ids, float* top_logprobs, int top_stride, float* scratch) {
  for (int row = 0; row < rows; ++row) {
    const int64_t top = static_cast<int64_t>(row) * top_stride;
    hr::sample_row(logits + row * stride, vocab, params[row], results + row, top_ids + top, top_logprobs + top,
                   scratch);
  }
}
}
