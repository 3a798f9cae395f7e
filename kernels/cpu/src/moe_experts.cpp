#include "moe_experts.h"

#include <algorithm>
#include <cstring>

#include "gate.h"
#include "gemm.h"
#include "share.h"

namespace hr {
namespace {

constexpr int kChunkRows = 128;  // rows of a task: their activations stay in L2

bool quantizes(Format format) { return format != Format::F32 && format != Format::BF16; }

size_t inner_bytes(const Expert& like, int max_rows) {
  return static_cast<size_t>(max_rows) * static_cast<size_t>(like.down.k_pad) * (like.down.format == Format::BF16 ? 2 : 4);
}

}  // namespace

size_t GroupedMlp::bytes(const Expert& like, int max_rows) {
  const size_t quantized = quantizes(like.down.format) ? ActivationBuffer::bytes(like.down.k_pad, max_rows) : 0;
  return inner_bytes(like, max_rows) + quantized + 256;
}

GroupedMlp::GroupedMlp(Arena& arena, Pool* pool, const Expert& like, int max_rows)
    : pool_(pool),
      format_(like.down.format),
      hidden_(like.down.n),
      gate_up_panels_(like.gate_up.n_pad / kPanel),
      down_panels_(like.down.n_pad / kPanel),
      inner_stride_(like.down.k_pad),
      inner_(arena.take<uint8_t>(inner_bytes(like, max_rows))) {
  if (quantizes(format_)) quantized_ = ActivationBuffer(arena, inner_stride_, max_rows);
}

void GroupedMlp::plan(const ExpertRows* experts, size_t count) {
  chunks_.clear();
  rows_ = 0;
  for (size_t i = 0; i < count; ++i) {
    const ExpertRows& rows = experts[i];
    for (int begin = rows.begin; begin < rows.end; begin += kChunkRows) {
      chunks_.push_back({rows.expert, begin, std::min(rows.end, begin + kChunkRows)});
    }
    rows_ = std::max(rows_, rows.end);
  }
  gate_up_tasks_.next.store(0, std::memory_order_relaxed);
  down_tasks_.next.store(0, std::memory_order_relaxed);
}

void GroupedMlp::run(const Activations& x, const Gate& gate, float* const* out, int thread, bool use_tiles) {
  gate_up(x, gate, use_tiles);
  pool_->barrier();
  down(inner(thread), out, use_tiles);
  pool_->barrier();
}

void GroupedMlp::gate_up(const Activations& x, const Gate& gate, bool use_tiles) {
  alignas(64) float tile[kTileRows * kPanel];
  const int count = static_cast<int>(chunks_.size()) * gate_up_panels_;
  for (int task = gate_up_tasks_.take(); task < count; task = gate_up_tasks_.take()) {
    const Chunk& chunk = chunks_[static_cast<size_t>(task / gate_up_panels_)];
    const int panel = task % gate_up_panels_;
    for (int m0 = chunk.begin; m0 < chunk.end; m0 += kTileRows) {
      const int m1 = std::min(chunk.end, m0 + kTileRows);
      gemm_panel(chunk.expert->gate_up, panel, x, m0, m1, tile, kPanel, use_tiles);
      for (int row = m0; row < m1; ++row) {
        const size_t at = static_cast<size_t>(row) * static_cast<size_t>(inner_stride_) + static_cast<size_t>(panel * kPanel / 2);
        gate_panel(tile + (row - m0) * kPanel, gate, inner_, at, format_ == Format::BF16);
      }
    }
  }
}

// What `gate_up` left, in the form that `down` reads.
Activations GroupedMlp::inner(int thread) {
  if (!quantizes(format_)) return {format_, inner_stride_, inner_, nullptr, nullptr};
  const Activations into{format_, inner_stride_, quantized_.data, quantized_.scale, quantized_.sum};
  const Share share(rows_, thread, pool_->size());
  prepare_rows(static_cast<const float*>(inner_), inner_stride_, inner_stride_, nullptr, 0.0f, share.begin, share.end, into);
  pool_->barrier();
  return into;
}

void GroupedMlp::down(const Activations& x, float* const* out, bool use_tiles) {
  alignas(64) float tile[kTileRows * kPanel];
  const int count = static_cast<int>(chunks_.size()) * down_panels_;
  for (int task = down_tasks_.take(); task < count; task = down_tasks_.take()) {
    const Chunk& chunk = chunks_[static_cast<size_t>(task / down_panels_)];
    const int panel = task % down_panels_, column = panel * kPanel, width = std::min(kPanel, hidden_ - column);
    for (int m0 = chunk.begin; m0 < chunk.end; m0 += kTileRows) {
      const int m1 = std::min(chunk.end, m0 + kTileRows);
      gemm_panel(chunk.expert->down, panel, x, m0, m1, tile, kPanel, use_tiles);
      for (int row = m0; row < m1; ++row) {
        std::memcpy(out[row] + column, tile + (row - m0) * kPanel, static_cast<size_t>(width) * 4);
      }
    }
  }
}

}  // namespace hr
