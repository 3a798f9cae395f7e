#include "moe_route.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hr {
namespace {

void softmax(const float* x, int n, float* out) {
  const float largest = *std::max_element(x, x + n);
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum += out[i] = std::exp(x[i] - largest);
  for (int i = 0; i < n; ++i) out[i] /= sum;
}

// Indices of the k largest of x, largest first; those taken become -inf. With NaN among them still k distinct indices.
void take_largest(float* x, int n, int k, int32_t* out) {
  constexpr float kTaken = -std::numeric_limits<float>::infinity();
  for (int j = 0; j < k; ++j) {
    int best = 0;
    for (int i = 1; i < n; ++i) {
      if (x[i] > x[best]) best = i;
    }
    if (!(x[best] > kTaken)) {  // all that is left is NaN or not eligible: the first that is not taken
      const auto taken = [&](int i) { return std::find(out, out + j, i) != out + j; };
      for (best = 0; taken(best);) ++best;
    }
    out[j] = best;
    x[best] = kTaken;
  }
}

void keep_best_groups(float* choice, const Routing& r) {
  constexpr float kOut = -std::numeric_limits<float>::infinity();
  const int each = r.num_experts / r.num_groups;
  std::vector<float> score(static_cast<size_t>(r.num_groups));
  std::vector<int32_t> best(static_cast<size_t>(r.top_groups));
  for (int g = 0; g < r.num_groups; ++g) {
    float first = kOut, second = kOut;
    for (int i = g * each; i < (g + 1) * each; ++i) {
      second = std::max(second, std::min(first, choice[i]));
      first = std::max(first, choice[i]);
    }
    score[static_cast<size_t>(g)] = r.group_score == GroupScore::Max ? first : first + second;
  }
  take_largest(score.data(), r.num_groups, r.top_groups, best.data());
  for (int g = 0; g < r.num_groups; ++g) {
    if (std::find(best.begin(), best.end(), g) == best.end()) std::fill_n(choice + g * each, each, kOut);
  }
}

}  // namespace

void route_row(const float* logits, const Routing& r, const float* bias, float* scratch, float* weights,
               int32_t* experts) {
  const int n = r.num_experts;
  float* const scores = scratch;
  float* const choice = scratch + n;
  switch (r.scoring) {
    case Scoring::Softmax: softmax(logits, n, scores); break;
    case Scoring::Sigmoid:
      for (int i = 0; i < n; ++i) scores[i] = 1.0f / (1.0f + std::exp(-logits[i]));
      break;
    case Scoring::SoftmaxAfterTopK: std::copy_n(logits, n, scores); break;
  }
  for (int i = 0; i < n; ++i) choice[i] = bias == nullptr ? scores[i] : scores[i] + bias[i];
  if (r.top_groups < r.num_groups) keep_best_groups(choice, r);
  take_largest(choice, n, r.top_k, experts);
  for (int j = 0; j < r.top_k; ++j) weights[j] = scores[experts[j]];
  if (r.scoring == Scoring::SoftmaxAfterTopK) softmax(weights, r.top_k, weights);
  float divisor = 1.0f;
  if (r.normalize) {
    divisor = 1e-20f;
    for (int j = 0; j < r.top_k; ++j) divisor += weights[j];
  }
  for (int j = 0; j < r.top_k; ++j) weights[j] = weights[j] / divisor * r.scale;
}

void SortedRows::sort(const int32_t* keys, int rows, int num_keys) {
  begin.assign(static_cast<size_t>(num_keys) + 1, 0);
  order.resize(static_cast<size_t>(rows));
  for (int i = 0; i < rows; ++i) ++begin[static_cast<size_t>(keys[i]) + 1];
  for (size_t key = 1; key < begin.size(); ++key) begin[key] += begin[key - 1];
  // `begin` moves on by one key as rows are placed, and is moved back after.
  for (int i = 0; i < rows; ++i) order[static_cast<size_t>(begin[static_cast<size_t>(keys[i])]++)] = i;
  for (size_t key = begin.size() - 1; key > 0; --key) begin[key] = begin[key - 1];
  begin[0] = 0;
}

}  // namespace hr
