// The arithmetic of a step's stages; step.cpp says in what order they come.
#include <algorithm>
#include <cstring>

#include "gate.h"
#include "gemm.h"
#include "runtime.h"
#include "share.h"
#include "simd.h"

namespace hr {

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
  const Share part = own ? Share(rows, 0, 1) : Share(rows, thread, pool_->size());
  prepare_rows(x, stride, w.k, weight, shape_.norm_eps, part.begin, part.end, into);
  if (!own) pool_->barrier();
  return into;
}

void Runtime::qkv(int index, int thread, TaskCounter& tasks) {
  const Layer& layer = model_.layers[index];
  const int dim = shape_.head_dim;
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
        const int kv_head = (head - shape_.num_heads) % shape_.num_kv_heads;
        for (int t = m0; t < m1; ++t) {
          float* values = tile + static_cast<size_t>(t - m0) * static_cast<size_t>(width) + h * head_pad_;
          if (!is_value && !layer.norm_whole) {
            norm_rotate(values, dim, is_query ? layer.q_norm : layer.k_norm, shape_.norm_eps, cos_of(t), sin_of(t));
          }
          if (is_query) {
            std::memcpy(query(t) + head * dim, values, static_cast<size_t>(dim) * 4);
          } else if (is_value || !layer.norm_whole) {
            write_kv(kv_, index, is_value, kv_head, step_->slots[t], values);
          } else {
            std::memcpy(key(t) + kv_head * dim, values, static_cast<size_t>(dim) * 4);
          }
        }
      }
    }
  });
}

// Where the norm is over all heads together, it waits for all of them.
void Runtime::norm_heads(int index, int thread) {
  const Layer& layer = model_.layers[index];
  const int dim = shape_.head_dim;
  const Share part(step_->num_tokens, thread, pool_->size());
  for (int t = part.begin; t < part.end; ++t) {
    norm_row(query(t), shape_.num_heads * dim, layer.q_norm, shape_.norm_eps);
    norm_row(key(t), shape_.num_kv_heads * dim, layer.k_norm, shape_.norm_eps);
    for (int head = 0; head < shape_.num_heads; ++head) {
      norm_rotate(query(t) + head * dim, dim, nullptr, 0.0f, cos_of(t), sin_of(t));
    }
    for (int head = 0; head < shape_.num_kv_heads; ++head) {
      norm_rotate(key(t) + head * dim, dim, nullptr, 0.0f, cos_of(t), sin_of(t));
      write_kv(kv_, index, 0, head, step_->slots[t], key(t) + head * dim);
    }
  }
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
  const Gate silu_gate{GateKind::Silu, 0.0f, 0.0f};
  float* tile = own_[static_cast<size_t>(thread)].tile;
  for_tasks(layer.gate_up.n_pad / kPanel, rows, tasks, [&](int panel, int row_begin, int row_end) {
    for (int m0 = row_begin; m0 < row_end; m0 += kTileRows) {
      const int m1 = std::min(row_end, m0 + kTileRows);
      gemm_panel(layer.gate_up, panel, x, m0, m1, tile, kPanel, step_->use_tiles != 0);
      for (int t = m0; t < m1; ++t) {
        const size_t at = static_cast<size_t>(t) * static_cast<size_t>(inter_stride_) + static_cast<size_t>(panel * kPanel / 2);
        gate_panel(tile + (t - m0) * kPanel, silu_gate, inter_, at, bf16_);
      }
    }
  });
}

bool Runtime::experts(int index, int rows, int thread) {
  const Layer& layer = model_.layers[index];
  const MoeInput in{x_, x_stride_, layer.mlp_norm, shape_.norm_eps, rows, x_, step_->use_tiles != 0, step_->exchange};
  const StepStatus status = moe_->run(*layer.moe, in, thread);
  if (status == StepStatus::Done) return true;
  if (thread == 0) result_ = {status, index, moe_->fault()};
  return false;
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
