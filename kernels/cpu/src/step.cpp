// One step of the whole model as one call: embedding, layers, head.
//
// All threads walk the stages together and meet at a barrier after each. A stage is a list of tasks that threads take
// from a counter, so that a thread that lost its core for a moment does not hold up the others for long. What a stage
// needs beforehand for a few rows only (norm, quantization) every thread does for itself: that is quicker than a barrier.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

#include "gemm.h"
#include "runtime.h"

namespace hr {

namespace {

int round_up(int value, int to) { return (value + to - 1) / to * to; }

int widest_unit(int head_pad) { return std::max(kPanel, head_pad); }

int widest_input(const Model& m) {
  int widest = m.head.k_pad;
  for (int i = 0; i < m.shape.num_layers; ++i) {
    const Layer& layer = m.layers[i];
    widest = std::max({widest, layer.qkv.k_pad, layer.output.k_pad, layer.gate_up.k_pad, layer.down.k_pad});
  }
  return widest;
}

bool all_read(const Model& m, Format format) {
  return std::all_of(m.layers, m.layers + m.shape.num_layers, [format](const Layer& layer) {
    return layer.output.format == format && (layer.moe != nullptr || layer.down.format == format);
  });
}

template <class Value>  // the largest value(layer)
auto largest(const Model& m, const Value& value) {
  auto most = value(m.layers[0]);
  for (int i = 1; i < m.shape.num_layers; ++i) most = std::max(most, value(m.layers[i]));
  return most;
}

int inter_stride(const Model& m) {  // of the dense layers, which are all alike
  return largest(m, [](const Layer& layer) { return layer.moe != nullptr ? 0 : layer.down.k_pad; });
}

// Of the layers with experts the one that needs most room, null where there are none.
const Moe* largest_moe(const Model& m) {
  const Moe* most = nullptr;
  for (int i = 0; i < m.shape.num_layers; ++i) {
    const Moe* moe = m.layers[i].moe;
    if (moe != nullptr && (most == nullptr || moe->routing.num_experts > most->routing.num_experts)) most = moe;
  }
  return most;
}

bool any_norm_whole(const Model& m) {
  return largest(m, [](const Layer& layer) { return layer.norm_whole; }) != 0;
}

size_t arena_bytes(const Model& m, const KvCache& kv, int threads, int max_tokens) {
  const auto tokens = static_cast<size_t>(max_tokens);
  const int widest = widest_input(m);
  const AttentionShape shape{m.shape.num_heads, 0, 1.0f};
  size_t own = static_cast<size_t>(kTileRows) * static_cast<size_t>(widest_unit(padded_head(m.shape.head_dim))) * 4;
  own += attend_scratch_floats(kv, shape) * 4 + ActivationBuffer::bytes(widest, kOwnRows) + 1024;
  size_t floats = static_cast<size_t>(round_up(m.shape.hidden, kDepth) + m.shape.num_heads * m.shape.head_dim);
  floats += static_cast<size_t>(m.layers[0].output.k_pad + inter_stride(m));
  if (any_norm_whole(m)) floats += static_cast<size_t>(m.shape.num_kv_heads * m.shape.head_dim);
  const Moe* const moe = largest_moe(m);
  const size_t experts = moe == nullptr ? 0 : MoeLayer::bytes(*moe, max_tokens, threads);
  return tokens * floats * 4 + ActivationBuffer::bytes(widest, max_tokens) + static_cast<size_t>(threads) * own + experts + 65536;
}

}  // namespace

Runtime::Runtime(const Model& model, const KvCache& kv, Pool* pool, int max_tokens)
    : model_(model),
      shape_(model_.shape),
      kv_(kv),
      pool_(pool),
      head_pad_(padded_head(shape_.head_dim)),
      heads_total_(shape_.num_heads + 2 * shape_.num_kv_heads),
      q_width_(shape_.num_heads * shape_.head_dim),
      x_stride_(round_up(shape_.hidden, kDepth)),
      attended_stride_(model.layers[0].output.k_pad),
      inter_stride_(inter_stride(model)),
      direct_(all_read(model, Format::BF16) || all_read(model, Format::F32)),
      bf16_(all_read(model, Format::BF16)),
      attention_shape_{shape_.num_heads, 0, shape_.scale},
      arena_(arena_bytes(model, kv, pool->size(), max_tokens)),
      plan_(kv, attention_shape_) {
  const auto tokens = static_cast<size_t>(max_tokens);
  const int widest = widest_input(model);
  x_ = arena_.take<float>(tokens * static_cast<size_t>(x_stride_));
  queries_ = arena_.take<float>(tokens * static_cast<size_t>(q_width_));
  attended_ = arena_.take<float>(tokens * static_cast<size_t>(attended_stride_));
  inter_ = arena_.take<float>(tokens * static_cast<size_t>(inter_stride_));
  if (any_norm_whole(model)) keys_ = arena_.take<float>(tokens * static_cast<size_t>(shape_.num_kv_heads * shape_.head_dim));
  if (const Moe* const moe = largest_moe(model)) moe_ = std::make_unique<MoeLayer>(arena_, pool_, *moe, max_tokens);
  wide_ = ActivationBuffer(arena_, widest, max_tokens);
  own_.resize(static_cast<size_t>(pool->size()));
  for (Own& own : own_) {
    own.tile = arena_.take<float>(static_cast<size_t>(kTileRows) * static_cast<size_t>(widest_unit(head_pad_)));
    own.attention = arena_.take<float>(attend_scratch_floats(kv_, attention_shape_));
    own.activations = ActivationBuffer(arena_, widest, kOwnRows);
  }
  counters_ = std::vector<TaskCounter>(static_cast<size_t>(shape_.num_layers) * 5 + 2);
}

StepResult Runtime::step(const Step& step) {
  step_ = &step;
  result_ = {};
  plan_.make(step, pool_->size() > 1);
  for (auto& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
  mark_ = std::chrono::steady_clock::now();
  const int64_t words = shape_.num_layers + 1, before = progress_.load(std::memory_order_relaxed);
  progress_.store((before / words + 1) * words, std::memory_order_release);
  pool_->run(body, this);
  step_ = nullptr;
  return result_;
}

void Runtime::meet(Stage stage, int thread) {
  pool_->barrier();
  if (thread == 0) {
    const auto now = std::chrono::steady_clock::now();
    stage_seconds_[stage] += std::chrono::duration<double>(now - mark_).count();
    mark_ = now;
  }
}

void Runtime::walk(int thread) {
  size_t counter = 0;
  embed(counters_[counter++]);
  meet(kEmbed, thread);
  int rows = step_->num_tokens;
  for (int index = 0; index < shape_.num_layers; ++index) {
    const Layer& layer = model_.layers[index];
    qkv(index, thread, counters_[counter++]);
    if (layer.norm_whole) {
      pool_->barrier();
      norm_heads(index, thread);
    }
    meet(kQkv, thread);
    // All threads came to the barrier with this layer's keys and values written: the store hands them on.
    if (thread == 0) progress_.store(progress_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    const bool shared = layer.moe != nullptr && step_->exchange.call != nullptr;  // others wait for this rank's experts
    if (index == shape_.num_layers - 1 && step_->num_rows == 0 && !shared) return;  // only keys and values were wanted
    attention(index, thread, counters_[counter++]);
    meet(kAttention, thread);
    if (index == shape_.num_layers - 1 && step_->num_rows < rows) {
      narrow(thread);
      rows = step_->num_rows;
    }
    add_projection(layer.output, plain(attended_, layer.output, rows, thread), rows, thread, counters_[counter++]);
    meet(kOutput, thread);
    if (layer.moe != nullptr) {
      if (!experts(index, rows, thread)) return;
      meet(kExperts, thread);
      continue;
    }
    gate_up(layer, normed(layer.mlp_norm, layer.gate_up, rows, thread), rows, thread, counters_[counter++]);
    meet(kGateUp, thread);
    add_projection(layer.down, plain(inter_, layer.down, rows, thread), rows, thread, counters_[counter++]);
    meet(kDown, thread);
  }
  head(normed(model_.final_norm, model_.head, rows, thread), thread, counters_[counter++]);
  meet(kHead, thread);
}

}  // namespace hr

extern "C" {

// The model's arrays (layers included) and the cache must outlive the runtime. Null when memory is short.
void* hr_runtime_new(const hr::Model* model, const hr::KvCache* kv, void* pool, int max_tokens) {
  try {
    return new hr::Runtime(*model, *kv, static_cast<hr::Pool*>(pool), max_tokens);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void hr_runtime_delete(void* runtime) { delete static_cast<hr::Runtime*>(runtime); }

void hr_step(void* runtime, const hr::Step* step, hr::StepResult* result) {
  *result = static_cast<hr::Runtime*>(runtime)->step(*step);
}

int64_t hr_progress(const void* runtime) { return static_cast<const hr::Runtime*>(runtime)->progress(); }

// Seconds since the start in each stage: embedding, QKV, attention, output, gate and up, down, experts, head.
void hr_stage_seconds(void* runtime, double* out) {
  std::memcpy(out, static_cast<hr::Runtime*>(runtime)->stage_seconds(), sizeof(double) * hr::kNumStages);
}
}
