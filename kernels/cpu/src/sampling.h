// From logits to a token and log-probabilities, one row at a time, by one thread. The oracle is kernels/sampling.py.
//
// Nothing sorts the vocabulary. One pass takes the maximum of each run of 64 logits; after it, the best token, the
// candidates of top-k, min-p and top-p, and the top log-probabilities are found in the few runs that can hold them.
#pragma once

#include <cstdint>

namespace hr {

struct SamplingParams {  // mirrored by kernels/cpu/sampling.py
  float temperature;     // 0: greedy
  float top_p, min_p;    // 1, 0: off
  int32_t top_k;         // 0: off
  uint32_t key_first, key_second;  // of the noise: see kernels/sampling.py: gumbel_noise
  int32_t num_top_logprobs;        // -1: no log-probabilities at all
  float repetition_penalty, presence_penalty, frequency_penalty;  // 1, 0, 0: off
  int32_t num_seen;     // distinct tokens of prompt and output (repetition)
  int32_t num_counted;  // distinct output tokens and how often (presence, frequency)
  int32_t num_biased;
  int32_t num_forbidden;  // set to -infinity
  const int32_t* seen;
  const int32_t* counted;
  const int32_t* counts;
  const int32_t* biased;
  const float* bias;
  const int32_t* forbidden;
};

struct SamplingResult {
  int32_t token;  // lowest id among equals when greedy; -1: the row holds a NaN, and nothing else is written
  float logprob;  // of the token, by the raw logits (before penalties and temperature)
};

// Floats of scratch memory that sample_row needs.
int64_t sampling_scratch(int vocab);

// `logits` [vocab] float32, changed in place by penalties and bias. top_ids, top_logprobs: [num_top_logprobs], best
// first, lower id first among equals; num_top_logprobs may not exceed vocab.
void sample_row(float* logits, int vocab, const SamplingParams& params, SamplingResult* result, int32_t* top_ids,
                float* top_logprobs, float* scratch);

}  // namespace hr
