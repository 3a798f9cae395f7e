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
#include "simd.h"

namespace hr {

namespace {

constexpr int kOwnRows = 8;  // up to so many rows each thread prepares activations for itself

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
    return layer.output.format == format && layer.down.format == format;
  });
}

size_t arena_bytes(const Model& m, const KvCache& kv, int threads, int max_tokens) {
  const auto tokens = static_cast<size_t>(max_tokens);
  const int widest = widest_input(m);
  const AttentionShape shape{m.shape.num_heads, 0, 1.0f};
  size_t own = static_cast<size_t>(kTileRows) * static_cast<size_t>(widest_unit(padded_head(m.shape.head_dim))) * 4;
  own += attend_scratch_floats(kv, shape) * 4 + ActivationBuffer::bytes(widest, kOwnRows) + 1024;
  size_t floats = static_cast<size_t>(round_up(m.shape.hidden, kDepth) + m.shape.num_heads * m.shape.head_dim);
  floats += static_cast<size_t>(m.layers[0].output.k_pad + m.layers[0].down.k_pad);
  return tokens * floats * 4 + ActivationBuffer::bytes(widest, max_tokens) + static_cast<size_t>(threads) * own + 65536;
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
      inter_stride_(model.layers[0].down.k_pad),
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
  wide_ = ActivationBuffer(arena_, widest, max_tokens);
  own_.resize(static_cast<size_t>(pool->size()));
  for (Own& own : own_) {
    own.tile = arena_.take<float>(static_cast<size_t>(kTileRows) * static_cast<size_t>(widest_unit(head_pad_)));
    own.attention = arena_.take<float>(attend_scratch_floats(kv_, attention_shape_));
    own.activations = ActivationBuffer(arena_, widest, kOwnRows);
  }
  counters_ = std::vector<TaskCounter>(static_cast<size_t>(shape_.num_layers) * 5 + 2);
}

void Runtime::step(const Step& step) {
  step_ = &step;
  plan_.make(step, pool_->size() > 1);
  for (auto& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
  mark_ = std::chrono::steady_clock::now();
  const int64_t words = shape_.num_layers + 1, before = progress_.load(std::memory_order_relaxed);
  progress_.store((before / words + 1) * words, std::memory_order_release);
  pool_->run(body, this);
  step_ = nullptr;
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
    meet(kQkv, thread);
    // All threads came to the barrier with this layer's keys and values written: the store hands them on.
    if (thread == 0) progress_.store(progress_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    if (index == shape_.num_layers - 1 && step_->num_rows == 0) return;  // only keys and values were wanted
    attention(index, thread, counters_[counter++]);
    meet(kAttention, thread);
    if (index == shape_.num_layers - 1 && step_->num_rows < rows) {
      narrow(thread);
      rows = step_->num_rows;
    }
    add_projection(layer.output, plain(attended_, layer.output, rows, thread), rows, thread, counters_[counter++]);
    meet(kOutput, thread);
    gate_up(layer, normed(layer.mlp_norm, layer.gate_up, rows, thread), rows, thread, counters_[counter++]);
    meet(kGateUp, thread);
    add_projection(layer.down, plain(inter_, layer.down, rows, thread), rows, thread, counters_[counter++]);
    meet(kDown, thread);
  }
  head(normed(model_.final_norm, model_.head, rows, thread), thread, counters_[counter++]);
  meet(kHead, thread);
}

void Runtime::embed(TaskCounter& tasks) {
  constexpr int kRows = 16;
  const int hidden = shape_.hidden;
  for (int first = tasks.take() * kRows; first < step_->num_tokens; first = tasks.take() * kRows) {
    for (int t = first; t < std::min(step_->num_tokens, first + kRows); ++t) {
      float* x = x_ + static_cast<size_t>(t) * static_cast<size_t>(x_stride_);
      const auto token = static_cast<size_t>(step_->token_ids[t]);
      switch (shape_.embedding_kind) {
        case EmbeddingKind::F32:
          std::memcpy(x, static_cast<const float*>(model_.embedding) + token * static_cast<size_t>(hidden), static_cast<size_t>(hidden) * 4);
          break;
        case EmbeddingKind::BF16: {
          const uint16_t* row = static_cast<const uint16_t*>(model_.embedding) + token * static_cast<size_t>(hidden);
          for (int i = 0; i < hidden; ++i) x[i] = bf16_value(row[i]);
          break;
        }
        case EmbeddingKind::Head:
          unpack_row(model_.head, static_cast<int>(token), x);
          break;
      }
    }
  }
}

void Runtime::share_out(int rows, int thread, int* begin, int* end) const {
  const int each = (rows + pool_->size() - 1) / pool_->size();
  *begin = std::min(rows, thread * each);
  *end = std::min(rows, *begin + each);
}

// RMS norm of the residual stream, in the form that `w` reads.
Activations Runtime::normed(const float* weight, const Matrix& w, int rows, int thread) {
  return prepared(x_, x_stride_, weight, w, rows, thread);
}

// What an earlier stage wrote, in the form that `w` reads: as it is, or quantized.
Activations Runtime::plain(void* values, const Matrix& w, int rows, int thread) {
  if (direct_) return {w.format, w.k_pad, values, nullptr, nullptr};
  return prepared(static_cast<const float*>(values), w.k_pad, nullptr, w, rows, thread);
}

Activations Runtime::prepared(const float* x, int stride, const float* weight, const Matrix& w, int rows, int thread) {
  const bool own = rows <= kOwnRows;
  const Activations into = (own ? own_[static_cast<size_t>(thread)].activations : wide_).as(w);
  int begin = 0, end = rows;
  if (!own) share_out(rows, thread, &begin, &end);
  if (begin < end) prepare_rows(x, stride, w.k, weight, shape_.norm_eps, begin, end, into);
  if (!own) pool_->barrier();
  return into;
}

void Runtime::qkv(int index, int thread, TaskCounter& tasks) {
  const Layer& layer = model_.layers[index];
  const int dim = shape_.head_dim, half = dim / 2;
  const Activations x = normed(layer.input_norm, layer.qkv, step_->num_tokens, thread);
  const int unit_panels = std::max(1, head_pad_ / kPanel), width = unit_panels * kPanel, unit_heads = width / head_pad_;
  float* tile = own_[static_cast<size_t>(thread)].tile;
  for_tasks(layer.qkv.n_pad / width, step_->num_tokens, tasks, [&](int unit, int row_begin, int row_end) {
    for (int m0 = row_begin; m0 < row_end; m0 += kTileRows) {
      const int m1 = std::min(row_end, m0 + kTileRows);
      for (int p = 0; p < unit_panels; ++p) {
        gemm_panel(layer.qkv, unit * unit_panels + p, x, m0, m1, tile + p * kPanel, width, step_->use_tiles != 0);
      }
      for (int h = 0; h < unit_heads; ++h) {
        const int head = unit * unit_heads + h;
        if (head >= heads_total_) break;  // padding of the last panel
        const bool is_query = head < shape_.num_heads, is_value = head >= shape_.num_heads + shape_.num_kv_heads;
        for (int t = m0; t < m1; ++t) {
          float* values = tile + static_cast<size_t>(t - m0) * static_cast<size_t>(width) + h * head_pad_;
          if (!is_value) {
            const auto at = static_cast<size_t>(step_->positions[t]) * static_cast<size_t>(half);
            norm_rotate(values, dim, is_query ? layer.q_norm : layer.k_norm, shape_.norm_eps, model_.cos + at, model_.sin + at);
          }
          if (is_query) {
            std::memcpy(queries_ + static_cast<size_t>(t) * static_cast<size_t>(q_width_) + static_cast<size_t>(head * dim), values,
                        static_cast<size_t>(dim) * 4);
          } else {
            const int kv_head = (head - shape_.num_heads) % shape_.num_kv_heads;
            write_kv(kv_, index, is_value, kv_head, step_->slots[t], values);
          }
        }
      }
    }
  });
}

void Runtime::attention(int index, int thread, TaskCounter& tasks) {
  AttentionShape shape = attention_shape_;
  shape.window = model_.layers[index].window;
  const auto& all = plan_.tasks();
  for (auto i = static_cast<size_t>(tasks.take()); i < all.size(); i = static_cast<size_t>(tasks.take())) {
    const AttentionTask& task = all[i];
    float* partial = plan_.partial(task);
    attend(kv_, index, shape, plan_.sequence(task), task.kv_head, task.row0, task.rows, task.key0, task.key1, queries_,
           q_width_, attended_, attended_stride_, bf16_, partial, own_[static_cast<size_t>(thread)].attention,
           step_->use_tiles != 0);
    if (partial != nullptr) plan_.finish(task, attended_, attended_stride_, bf16_);
  }
}

// After the last layer's attention only the rows whose logits are wanted go on: move them to the front.
void Runtime::narrow(int thread) {
  if (thread == 0) {
    const size_t bytes = static_cast<size_t>(attended_stride_) * (bf16_ ? 2 : 4);
    auto* attended = static_cast<uint8_t*>(attended_);
    for (int i = 0; i < step_->num_rows; ++i) {  // ascending, so that nothing is overwritten before it is read
      const auto from = static_cast<size_t>(step_->rows[i]), to = static_cast<size_t>(i);
      if (from == to) continue;
      std::memcpy(x_ + to * static_cast<size_t>(x_stride_), x_ + from * static_cast<size_t>(x_stride_), static_cast<size_t>(x_stride_) * 4);
      std::memcpy(attended + to * bytes, attended + from * bytes, bytes);
    }
  }
  pool_->barrier();
}

void Runtime::add_projection(const Matrix& w, const Activations& x, int rows, int thread, TaskCounter& tasks) {
  float* tile = own_[static_cast<size_t>(thread)].tile;
  for_tasks(w.n_pad / kPanel, rows, tasks, [&](int panel, int row_begin, int row_end) {
    for (int m0 = row_begin; m0 < row_end; m0 += kTileRows) {
      const int m1 = std::min(row_end, m0 + kTileRows);
      gemm_panel(w, panel, x, m0, m1, tile, kPanel, step_->use_tiles != 0);
      for (int t = m0; t < m1; ++t) {
        float* into = x_ + static_cast<size_t>(t) * static_cast<size_t>(x_stride_) + panel * kPanel;
        const float* from = tile + (t - m0) * kPanel;
        for (int j = 0; j < kPanel; j += kLanes) store(into + j, load(into + j) + load(from + j));
      }
    }
  });
}

void Runtime::gate_up(const Layer& layer, const Activations& x, int rows, int thread, TaskCounter& tasks) {
  constexpr int kHalf = kPanel / 2;
  float* tile = own_[static_cast<size_t>(thread)].tile;
  for_tasks(layer.gate_up.n_pad / kPanel, rows, tasks, [&](int panel, int row_begin, int row_end) {
    for (int m0 = row_begin; m0 < row_end; m0 += kTileRows) {
      const int m1 = std::min(row_end, m0 + kTileRows);
      gemm_panel(layer.gate_up, panel, x, m0, m1, tile, kPanel, step_->use_tiles != 0);
      for (int t = m0; t < m1; ++t) {
        const float* from = tile + (t - m0) * kPanel;
        const size_t at = static_cast<size_t>(t) * static_cast<size_t>(inter_stride_) + static_cast<size_t>(panel * kHalf);
        for (int j = 0; j < kHalf; j += kLanes) {
          const Vf gate = load(from + j), up = load(from + kHalf + j);
          const Vf value = gate / (set1(1.0f) + exp(zero_f() - gate)) * up;  // silu(gate) * up
          if (bf16_) {
            store_bf16(static_cast<uint16_t*>(inter_) + at + j, value);
          } else {
            store(static_cast<float*>(inter_) + at + j, value);
          }
        }
      }
    }
  });
}

void Runtime::head(const Activations& x, int thread, TaskCounter& tasks) {
  float* tile = own_[static_cast<size_t>(thread)].tile;
  constexpr int kPanels = 4;  // of a task: the head has hundreds
  const int panels = model_.head.n_pad / kPanel;
  for_tasks((panels + kPanels - 1) / kPanels, step_->num_rows, tasks, [&](int unit, int row_begin, int row_end) {
    for (int panel = unit * kPanels; panel < std::min(panels, (unit + 1) * kPanels); ++panel) {
      const int width = std::min(kPanel, shape_.vocab - panel * kPanel);
      if (width <= 0) break;
      for (int m0 = row_begin; m0 < row_end; m0 += kTileRows) {
        const int m1 = std::min(row_end, m0 + kTileRows);
        gemm_panel(model_.head, panel, x, m0, m1, tile, kPanel, step_->use_tiles != 0);
        for (int t = m0; t < m1; ++t) {
          std::memcpy(step_->logits + static_cast<int64_t>(t) * step_->logits_stride + panel * kPanel,
                      tile + static_cast<size_t>(t - m0) * kPanel, static_cast<size_t>(width) * 4);
        }
      }
    }
  });
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

void hr_step(void* runtime, const hr::Step* step) { static_cast<hr::Runtime*>(runtime)->step(*step); }

int64_t hr_progress(const void* runtime) { return static_cast<const hr::Runtime*>(runtime)->progress(); }

// Seconds since the start in each stage: embedding, QKV, attention, output, gate and up, down, head.
void hr_stage_seconds(void* runtime, double* out) {
  std::memcpy(out, static_cast<hr::Runtime*>(runtime)->stage_seconds(), sizeof(double) * hr::kNumStages);
}
}
