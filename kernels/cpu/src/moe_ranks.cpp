// A layer whose experts are spread over ranks: rows go out, others' rows come in, and results go the same way back.
#include <algorithm>
#include <cstring>

#include "gemm.h"
#include "moe_layer.h"

namespace hr {

StepStatus MoeLayer::among_ranks(const Moe& moe, const MoeInput& in, int thread) {
  Exchange& e = exchange_;
  if (thread == 0) {
    const Activations sent = rows(moe, in);
    e = Exchange{};
    e.layer = moe.index, e.num_rows = in.rows, e.hidden = hidden_, e.top_k = top_k_;
    e.rows_bf16 = sent.format == Format::BF16, e.row_stride = sent.k_pad;
    e.rows = sent.data, e.experts = experts_, e.weights = weights_;
    sorted_status_ = call(in, Phase::Send);
  }
  shared_expert(moe, in, thread);
  if (thread == 0) {
    if (sorted_status_ == StepStatus::Done) sorted_status_ = call(in, Phase::Receive);
    if (sorted_status_ == StepStatus::Done) sorted_status_ = sort_received(moe);
  }
  pool_->barrier();
  if (sorted_status_ != StepStatus::Done) return sorted_status_;
  const int most = batch_tokens_ * top_k_;
  const int received = static_cast<int>(e.num_received);
  for (int first = 0; first < received; first += most) {
    const int end = std::min(received, first + most);
    if (thread == 0) plan_rows(moe, first, end, e.outputs);
    gather_received(moe, first, end, thread);
    pool_->barrier();
    mlp_.run(gathered(moe), moe.gate, outputs_.data(), thread, in.use_tiles);
  }
  if (thread == 0) {
    collected_status_ = call(in, Phase::Return);
    if (collected_status_ == StepStatus::Done) collected_status_ = call(in, Phase::Collect);
  }
  pool_->barrier();
  if (collected_status_ != StepStatus::Done) return collected_status_;
  add(in, 0, in.rows, top_k_, weights_, e.returned, thread);
  return StepStatus::Done;
}

StepStatus MoeLayer::sort_received(const Moe& moe) {
  const Exchange& e = exchange_;
  const int count = static_cast<int>(e.num_received);
  for (int i = 0; i < count; ++i) {
    if (check_slot(moe, e.slots[i]) != StepStatus::Done) return StepStatus::NoExpert;
  }
  sorted_.sort(e.slots, count, moe.num_slots);
  return StepStatus::Done;
}

StepStatus MoeLayer::call(const MoeInput& in, Phase phase) {
  const int32_t failed = in.exchange.call(in.exchange.context, static_cast<int32_t>(phase), &exchange_);
  return failed == 0 ? StepStatus::Done : StepStatus::ExchangeFailed;
}

void MoeLayer::gather_received(const Moe& moe, int first, int end, int thread) {
  const Exchange& e = exchange_;
  const Activations into = gathered(moe);
  const Share share(end - first, thread, pool_->size());
  for (int i = share.begin; i < share.end; ++i) {
    const void* const from = e.received[sorted_.order[static_cast<size_t>(first + i)]];
    if (into.format != Format::BF16) {
      prepare_rows(static_cast<const float*>(from), 0, hidden_, nullptr, 0.0f, 0, 1, from_row(into, i));
      continue;
    }
    uint16_t* const to = static_cast<uint16_t*>(into.data) + static_cast<size_t>(i) * static_cast<size_t>(into.k_pad);
    std::memcpy(to, from, static_cast<size_t>(hidden_) * 2);
    std::memset(to + hidden_, 0, static_cast<size_t>(into.k_pad - hidden_) * 2);
  }
}

}  // namespace hr
