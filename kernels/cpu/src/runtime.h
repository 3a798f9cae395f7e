// A model bound to its threads, its KV cache and its scratch memory: what carries out steps.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "attention_plan.h"
#include "model.h"
#include "moe_layer.h"
#include "pool.h"
#include "scratch.h"

namespace hr {

constexpr int kOwnRows = 8;      // up to so many rows each thread prepares activations for itself
constexpr int kChunkRows = 128;  // rows of a GEMM task: their activations stay in L2

enum Stage { kEmbed, kQkv, kAttention, kOutput, kGateUp, kDown, kExperts, kHead, kNumStages };

class Runtime {
 public:
  Runtime(const Model& model, const KvCache& kv, Pool* pool, int max_tokens);

  StepResult step(const Step& step);
  const double* stage_seconds() const { return stage_seconds_; }
  // How far the steps are, for any thread to ask: steps begun * (num_layers + 1) + layers of the last one whose keys and
  // values are in the cache for all its tokens. Never falls. Who reads it sees those keys and values.
  int64_t progress() const { return progress_.load(std::memory_order_acquire); }

 private:
  struct Own {  // one thread's scratch
    float* tile;       // [kTileRows][widest unit]
    float* attention;
    ActivationBuffer activations;
  };

  static void body(void* self, int thread) { static_cast<Runtime*>(self)->walk(thread); }
  void walk(int thread);

  void embed(TaskCounter& tasks);
  void qkv(int layer, int thread, TaskCounter& tasks);
  void norm_heads(int layer, int thread);
  void attention(int layer, int thread, TaskCounter& tasks);
  void narrow(int thread);
  void add_projection(const Matrix& w, const Activations& x, int rows, int thread, TaskCounter& tasks);
  void gate_up(const Layer& layer, const Activations& x, int rows, int thread, TaskCounter& tasks);
  bool experts(int layer, int rows, int thread);  // false: the step has failed, `result_` says why
  void head(const Activations& x, int thread, TaskCounter& tasks);

  Activations normed(const float* weight, const Matrix& w, int rows, int thread);
  Activations plain(void* values, const Matrix& w, int rows, int thread);
  Activations prepared(const float* x, int stride, const float* weight, const Matrix& w, int rows, int thread);

  float* query(int t) const { return queries_ + static_cast<size_t>(t) * static_cast<size_t>(q_width_); }
  float* key(int t) const { return keys_ + static_cast<size_t>(t) * static_cast<size_t>(shape_.num_kv_heads * shape_.head_dim); }
  size_t angles(int t) const { return static_cast<size_t>(step_->positions[t]) * static_cast<size_t>(shape_.head_dim / 2); }
  const float* cos_of(int t) const { return model_.cos + angles(t); }
  const float* sin_of(int t) const { return model_.sin + angles(t); }

  template <class Work>  // work(panel, first row, last row)
  void for_tasks(int units, int rows, TaskCounter& tasks, const Work& work) {
    const int chunks = (rows + kChunkRows - 1) / kChunkRows;
    for (int task = tasks.take(); task < units * chunks; task = tasks.take()) {
      const int chunk = task / units, unit = task % units;
      work(unit, chunk * kChunkRows, std::min(rows, (chunk + 1) * kChunkRows));
    }
  }

  void meet(Stage stage, int thread);

  const Model model_;
  const ModelShape& shape_;
  const KvCache kv_;
  Pool* const pool_;
  const int head_pad_, heads_total_, q_width_, x_stride_, attended_stride_, inter_stride_;
  // The form in which attention and the MLP's gate leave their results: what the next GEMM reads, where all layers read
  // the same unquantized form, else float32, which is then quantized.
  const bool direct_, bf16_;
  AttentionShape attention_shape_;

  Arena arena_;
  float* x_;         // [T][x_stride] residual stream
  float* queries_;   // [T][num_heads * head_dim]
  float* keys_ = nullptr;  // [T][num_kv_heads * head_dim] before a norm over all heads, where there is one
  void* attended_;   // [T][k_pad of output] bfloat16 or float
  void* inter_;      // [T][k_pad of down] bfloat16 or float
  ActivationBuffer wide_;  // of all threads together, for many rows
  std::vector<Own> own_;
  std::vector<TaskCounter> counters_;
  AttentionPlan plan_;
  std::unique_ptr<MoeLayer> moe_;  // where a layer has experts
  StepResult result_{};

  alignas(64) std::atomic<int64_t> progress_{0};  // others poll it: on a cache line of its own
  alignas(64) const Step* step_ = nullptr;
  double stage_seconds_[kNumStages] = {};
  std::chrono::steady_clock::time_point mark_;
};

}  // namespace hr
