#include "moe_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm.h"
#include "share.h"
#include "simd.h"

namespace hr {
namespace {

// Tokens whose rows are computed at a time: enough for experts to be bound by arithmetic, and a bound on memory.
constexpr int kBatchTokens = 1024;
constexpr int kRouteRows = 16;  // of a task
constexpr int kFewRows = 64;

int batch_of(int max_tokens) { return std::min(max_tokens, kBatchTokens); }
size_t padded(size_t bytes) { return bytes + 64; }

size_t results_bytes(const Moe& m, int rows) {
  return std::max(ActivationBuffer::bytes(m.like.gate_up.k_pad, rows), padded(static_cast<size_t>(rows) * static_cast<size_t>(m.like.down.n) * 4));
}

void copy_row(const Activations& from, int row, const Activations& into, int at) {
  const Activations a = from_row(from, row), b = from_row(into, at);
  const auto scales = static_cast<size_t>(activation_scales(a.format, a.k_pad)) * 4;
  std::memcpy(b.data, a.data, activation_bytes(a.format, a.k_pad));
  if (scales == 0) return;
  std::memcpy(b.scale, a.scale, scales);
  std::memcpy(b.sum, a.sum, scales);
}

}  // namespace

size_t MoeLayer::bytes(const Moe& m, int max_tokens, int threads) {
  const auto tokens = static_cast<size_t>(max_tokens), k = static_cast<size_t>(m.routing.top_k);
  const int rows = batch_of(max_tokens) * m.routing.top_k;
  size_t total = padded(tokens * static_cast<size_t>(m.router.k_pad) * 4) + ActivationBuffer::bytes(m.router.k_pad, max_tokens);
  total += padded(tokens * static_cast<size_t>(m.router.n_pad) * 4) + static_cast<size_t>(threads) * padded(static_cast<size_t>(m.routing.num_experts) * 8);
  total += 2 * padded(tokens * k * 4) + padded(tokens * 4) + results_bytes(m, rows) + GroupedMlp::bytes(m.like, rows);
  if (m.shared != nullptr) total += GroupedMlp::bytes(*m.shared, rows);
  return total + 4096;
}

MoeLayer::MoeLayer(Arena& arena, Pool* pool, const Moe& m, int max_tokens)
    : pool_(pool),
      top_k_(m.routing.top_k),
      batch_tokens_(batch_of(max_tokens)),
      hidden_(m.like.down.n),
      logits_stride_(m.router.n_pad),
      normed_(arena.take<float>(static_cast<size_t>(max_tokens) * static_cast<size_t>(m.router.k_pad))),
      rows_(arena, m.router.k_pad, max_tokens),
      logits_(arena.take<float>(static_cast<size_t>(max_tokens) * static_cast<size_t>(m.router.n_pad))),
      experts_(arena.take<int32_t>(static_cast<size_t>(max_tokens) * static_cast<size_t>(m.routing.top_k))),
      weights_(arena.take<float>(static_cast<size_t>(max_tokens) * static_cast<size_t>(m.routing.top_k))),
      shared_weights_(arena.take<float>(static_cast<size_t>(max_tokens))),
      mlp_(arena, pool, m.like, batch_of(max_tokens) * m.routing.top_k) {
  const int rows = batch_tokens_ * top_k_;
  for (int thread = 0; thread < pool->size(); ++thread) {
    own_.push_back(arena.take<float>(static_cast<size_t>(m.routing.num_experts) * 2));
  }
  auto* const memory = arena.take<uint8_t>(results_bytes(m, rows));
  for (int row = 0; row < rows; ++row) {
    results_.push_back(reinterpret_cast<float*>(memory) + static_cast<size_t>(row) * static_cast<size_t>(hidden_));
  }
  gathered_ = ActivationBuffer::in(memory, m.like.gate_up.k_pad, rows);
  if (m.shared != nullptr) shared_mlp_ = std::make_unique<GroupedMlp>(arena, pool, *m.shared, rows);
}

Activations MoeLayer::rows(const Moe& moe, const MoeInput& in) const {
  const Format form = moe.like.gate_up.format;
  const Format format = in.exchange.call == nullptr || form == Format::BF16 ? form : Format::F32;
  return {format, moe.router.k_pad, rows_.data, rows_.scale, rows_.sum};
}

StepStatus MoeLayer::run(const Moe& moe, const MoeInput& in, int thread) {
  route(moe, in, thread);
  pool_->barrier();
  if (thread == 0) route_tasks_.next.store(0, std::memory_order_relaxed);
  return in.exchange.call == nullptr ? here(moe, in, thread) : among_ranks(moe, in, thread);
}

// A row is its task's alone from the norm to the choice of experts. Whoever ends the last task also prepares what comes
// next, where that takes less than a barrier.
void MoeLayer::route(const Moe& moe, const MoeInput& in, int thread) {
  const int each = std::max(1, std::min(kRouteRows, (in.rows + pool_->size() - 1) / pool_->size()));
  for (int begin = route_tasks_.take() * each; begin < in.rows; begin = route_tasks_.take() * each) {
    const int end = std::min(in.rows, begin + each);
    route_rows(moe, in, begin, end, thread);
    if (routed_.fetch_add(end - begin, std::memory_order_acq_rel) + end - begin < in.rows) continue;
    routed_.store(0, std::memory_order_relaxed);
    count_choices(moe, in.rows);
    if (in.exchange.call != nullptr) continue;
    sorted_status_ = sort_own(moe, 0, std::min(batch_tokens_, in.rows));
    if (few(moe, in) && sorted_status_ == StepStatus::Done) gather_own(moe, 0, Share(in.rows, 0, 1));
  }
}

void MoeLayer::route_rows(const Moe& moe, const MoeInput& in, int begin, int end, int thread) {
  alignas(64) float tile[kTileRows * kPanel];
  const int k_pad = moe.router.k_pad, num_experts = moe.routing.num_experts;
  const Activations normed{Format::F32, k_pad, normed_, nullptr, nullptr};
  prepare_rows(in.x, in.stride, hidden_, in.norm, in.eps, begin, end, normed);
  prepare_rows(normed_, k_pad, hidden_, nullptr, 0.0f, begin, end, rows(moe, in));
  for (int panel = 0; panel < moe.router.n_pad / kPanel; ++panel) {
    gemm_panel(moe.router, panel, normed, begin, end, tile, kPanel, false);
    for (int row = begin; row < end; ++row) {
      std::memcpy(logits_ + static_cast<size_t>(row) * static_cast<size_t>(logits_stride_) + panel * kPanel, tile + (row - begin) * kPanel, kPanel * 4);
    }
  }
  for (int row = begin; row < end; ++row) {
    const float* logits = logits_ + static_cast<size_t>(row) * static_cast<size_t>(logits_stride_);
    const size_t at = static_cast<size_t>(row) * static_cast<size_t>(top_k_);
    route_row(logits, moe.routing, moe.correction_bias, own_[static_cast<size_t>(thread)], weights_ + at, experts_ + at);
    shared_weights_[row] = moe.shared_gated ? 1.0f / (1.0f + std::exp(-logits[num_experts])) : 1.0f;
  }
}

// So few that one thread gathers them. With a shared expert they must wait: its results go where they would be.
bool MoeLayer::few(const Moe& moe, const MoeInput& in) const {
  return moe.shared == nullptr && in.rows * top_k_ <= kFewRows;
}

void MoeLayer::count_choices(const Moe& moe, int rows) {
  for (int i = 0; i < rows * top_k_; ++i) ++moe.expert_counts[experts_[i]];
}

void MoeLayer::shared_expert(const Moe& moe, const MoeInput& in, int thread) {
  if (moe.shared == nullptr) return;
  GroupedMlp& mlp = *shared_mlp_;
  const int most = batch_tokens_ * top_k_;
  for (int first = 0; first < in.rows; first += most) {
    const int count = std::min(most, in.rows - first);
    Activations part = from_row(rows(moe, in), first);
    if (part.format != moe.shared->gate_up.format) {  // other ranks' form
      const auto* const floats = static_cast<const float*>(part.data);
      part = gathered(moe);
      const Share share(count, thread, pool_->size());
      prepare_rows(floats, part.k_pad, hidden_, nullptr, 0.0f, share.begin, share.end, part);
    }
    const ExpertRows all{moe.shared, 0, count};
    if (thread == 0) mlp.plan(&all, 1);
    pool_->barrier();
    mlp.run(part, moe.gate, results_.data(), thread, in.use_tiles);
    add(in, first, count, 1, shared_weights_ + first, results_.data(), thread);
    pool_->barrier();
  }
}

StepStatus MoeLayer::here(const Moe& moe, const MoeInput& in, int thread) {
  if (in.rows > 0 && sorted_status_ != StepStatus::Done) return sorted_status_;
  shared_expert(moe, in, thread);
  for (int first = 0; first < in.rows; first += batch_tokens_) {
    const int rows = std::min(batch_tokens_, in.rows - first);
    if (first > 0) {
      pool_->barrier();
      if (thread == 0) sorted_status_ = sort_own(moe, first, rows);
      pool_->barrier();
      if (sorted_status_ != StepStatus::Done) return sorted_status_;
    }
    if (!few(moe, in)) {
      gather_own(moe, first, Share(rows, thread, pool_->size()));
      pool_->barrier();
    }
    mlp_.run(gathered(moe), moe.gate, outputs_.data(), thread, in.use_tiles);
    add(in, first, rows, top_k_, weights_ + static_cast<size_t>(first) * static_cast<size_t>(top_k_), results_.data(), thread);
  }
  return StepStatus::Done;
}

StepStatus MoeLayer::sort_own(const Moe& moe, int first, int rows) {
  const int count = rows * top_k_;
  const int32_t* experts = experts_ + static_cast<size_t>(first) * static_cast<size_t>(top_k_);
  keys_.resize(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    const int slot = moe.slot_of[experts[i]];
    if (slot < 0) {
      fault_ = -1 - experts[i];
      return StepStatus::NoExpert;
    }
    if (check_slot(moe, slot) != StepStatus::Done) return StepStatus::NoExpert;
    keys_[static_cast<size_t>(i)] = slot;
  }
  sorted_.sort(keys_.data(), count, moe.num_slots);
  place_.resize(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) place_[static_cast<size_t>(sorted_.order[static_cast<size_t>(i)])] = i;
  plan_rows(moe, 0, count, results_.data());
  return StepStatus::Done;
}

StepStatus MoeLayer::check_slot(const Moe& moe, int slot) {
  if (slot >= 0 && slot < moe.num_slots && moe.slots[slot].gate_up.data != nullptr) return StepStatus::Done;
  fault_ = slot;
  return StepStatus::NoExpert;
}

// The experts of sorted rows [first, end), which are numbered from 0 among those that are computed together, and where
// their results go, `outputs` being in the order before the sort.
void MoeLayer::plan_rows(const Moe& moe, int first, int end, float* const* outputs) {
  expert_rows_.clear();
  outputs_.resize(static_cast<size_t>(end - first));
  for (int i = first; i < end; ++i) {
    outputs_[static_cast<size_t>(i - first)] = outputs[sorted_.order[static_cast<size_t>(i)]];
  }
  for (int slot = 0; slot < moe.num_slots; ++slot) {
    const int from = std::max(first, sorted_.begin[static_cast<size_t>(slot)]);
    const int to = std::min(end, sorted_.begin[static_cast<size_t>(slot) + 1]);
    if (from >= to) continue;
    moe.slot_counts[slot] += to - from;
    expert_rows_.push_back({&moe.slots[slot], from - first, to - first});
  }
  mlp_.plan(expert_rows_.data(), expert_rows_.size());
}

void MoeLayer::gather_own(const Moe& moe, int first, const Share& share) {
  const Activations from = rows_.as(moe.like.gate_up), into = gathered(moe);
  for (int row = share.begin; row < share.end; ++row) {
    for (int j = 0; j < top_k_; ++j) copy_row(from, first + row, into, place_[static_cast<size_t>(row * top_k_ + j)]);
  }
}

// into[first + row] += sum over j of weights[row][j] * results[row][j], always in the order of j.
void MoeLayer::add(const MoeInput& in, int first, int rows, int terms, const float* weights,
                   const float* const* results, int thread) {
  constexpr int kColumns = 256;
  const int pieces = (hidden_ + kColumns - 1) / kColumns;
  const Share share(rows * pieces, thread, pool_->size());
  for (int i = share.begin; i < share.end; ++i) {
    const int row = i / pieces, begin = i % pieces * kColumns, end = std::min(hidden_, begin + kColumns);
    float* const into = in.into + static_cast<int64_t>(first + row) * in.stride;
    const float* const* const from = results + row * terms;
    for (int c = begin; c < end; c += kLanes) {
      const int n = std::min(kLanes, end - c);
      Vf sum = zero_f();
      for (int j = 0; j < terms; ++j) {
        sum = fma(load_n(from[j] + c, n), set1(weights[row * terms + j]), sum);
      }
      store_n(into + c, load_n(into + c, n) + sum, n);
    }
  }
}

}  // namespace hr
