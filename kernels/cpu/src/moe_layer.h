// One mixture-of-experts layer of a step, by all threads together: route, give each expert its rows, sum.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "moe.h"
#include "moe_experts.h"
#include "moe_route.h"
#include "share.h"

namespace hr {

struct MoeInput {
  const float* x;  // [rows][stride], before the norm
  int64_t stride;
  const float* norm;  // [hidden] weights of the RMS norm that comes first, or null: none
  float eps;
  int rows;
  float* into;  // [rows][stride] to which the result is added; may be `x`
  bool use_tiles;
  ExchangeHook exchange;
};

class MoeLayer {
 public:
  // For all layers of a model: `largest` has the most experts of them.
  static size_t bytes(const Moe& largest, int max_tokens, int threads);
  MoeLayer(Arena& arena, Pool* pool, const Moe& largest, int max_tokens);

  // All threads; the status is the same for all. No barrier comes after the last write to `into`.
  StepStatus run(const Moe& moe, const MoeInput& in, int thread);
  int fault() const { return fault_; }  // StepResult::expert

 private:
  void route(const Moe& moe, const MoeInput& in, int thread);
  void route_rows(const Moe& moe, const MoeInput& in, int begin, int end, int thread);
  bool few(const Moe& moe, const MoeInput& in) const;
  void shared_expert(const Moe& moe, const MoeInput& in, int thread);
  StepStatus here(const Moe& moe, const MoeInput& in, int thread);
  StepStatus among_ranks(const Moe& moe, const MoeInput& in, int thread);

  // One thread, before a barrier.
  void count_choices(const Moe& moe, int rows);
  StepStatus sort_own(const Moe& moe, int first, int rows);
  StepStatus sort_received(const Moe& moe);
  StepStatus check_slot(const Moe& moe, int slot);
  StepStatus call(const MoeInput& in, Phase phase);
  void plan_rows(const Moe& moe, int first, int end, float* const* outputs);

  // A share each.
  void gather_own(const Moe& moe, int first, const Share& share);
  void gather_received(const Moe& moe, int first, int end, int thread);
  void add(const MoeInput& in, int first, int rows, int terms, const float* weights, const float* const* results,
           int thread);

  // This rank's rows after the norm: as the experts read them, or, for other ranks, before that is quantized.
  Activations rows(const Moe& moe, const MoeInput& in) const;
  Activations gathered(const Moe& moe) const { return gathered_.as(moe.like.gate_up); }

  Pool* const pool_;
  const int top_k_, batch_tokens_, hidden_, logits_stride_;
  // What one thread tells the others over a barrier. Two, because thread 0 may say the second before they have read the first.
  StepStatus sorted_status_ = StepStatus::Done, collected_status_ = StepStatus::Done;
  int fault_ = 0;

  TaskCounter route_tasks_;
  std::atomic<int> routed_{0};  // rows
  float* normed_;              // [tokens][k_pad], what the router reads
  ActivationBuffer rows_;      // [tokens]
  float* logits_;              // [tokens][logits_stride]
  std::vector<float*> own_;    // of each thread: scores of a row
  int32_t* experts_;           // [tokens][k]
  float* weights_;             // [tokens][k]
  float* shared_weights_;      // [tokens]

  SortedRows sorted_;
  std::vector<int32_t> keys_, place_;  // slot of each choice; where each choice is in sorted order
  std::vector<ExpertRows> expert_rows_;
  // Rows in sorted order, and in the same memory what comes out for each: by then the rows have been read.
  ActivationBuffer gathered_;  // [batch_tokens * k]
  std::vector<float*> results_;  // [batch_tokens * k] rows [hidden]
  std::vector<float*> outputs_;  // which of them, or of other ranks', belongs to each row in sorted order
  GroupedMlp mlp_;
  std::unique_ptr<GroupedMlp> shared_mlp_;  // where there are shared experts
  Exchange exchange_{};
};

}  // namespace hr
