// From logits to a token and log-probabilities, one row at a time, by one thread. The oracle is kernels/sampling.py.
#pragma once

#include <cstdint>

namespace hr {

struct SamplingParams {  // mirrored by kernels/cpu/sampling.py
  float temperature;     // below 1e-5: greedy
  float top_p, min_p;
  int32_t top_k;              // 0: off
  uint32_t key_first, key_second;  // of the noise: see kernels/sampling.py: gumbel_noise
  int32_t num_top_logprobs;   // -1: no log-probabilities at all
  float repetition_penalty, presence_penalty, frequency_penalty;  // 1, 0, 0: off
  int32_t num_seen;      // distinct tokens of prompt and output (repetition)
  const int32_t* seen;
  int32_t num_counted;   // distinct output tokens and how often (presence, frequency)
  const int32_t* counted;
  const int32_t* counts;
  int32_t num_biased;    // added in order
  const int32_t* biased;
  const float* bias;
  int32_t num_forbidden;  // set to -infinity
  const int32_t* forbidden;
};

struct SamplingResult {
  int32_t token;
  float logprob;  // of the token, by the raw logits (before penalties and temperature)
};

// `logits` [vocab] float32, changed in place by penalties and bias. top_ids, top_logprobs: [num_top_logprobs], best
// first, lower id first among equals. scratch: 2 * vocab floats.
void sample_row(float* logits, int vocab, const SamplingParams& params, SamplingResult* result, int32_t* top_ids,
                float* top_logprobs, float* scratch);

}  // namespace hr
