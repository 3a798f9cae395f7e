#include "attention_plan.h"

#include <algorithm>

namespace hr {

size_t AttentionPlan::part_floats() const { return static_cast<size_t>(kv_.head_dim) + 2; }

void AttentionPlan::make(const Step& step, bool split) {
  sequences_.clear();
  tasks_.clear();
  groups_.clear();
  const int most = attend_rows(kv_, shape_);
  int32_t parts = 0;
  for (int32_t s = 0; s < step.num_sequences; ++s) {
    const int32_t first = step.query_start[s], count = step.query_start[s + 1] - first;
    sequences_.push_back({step.blocks + step.block_start[s], first, count, step.lengths[s]});
    for (int32_t row0 = 0; row0 < count; row0 += most) {
      const int32_t rows = std::min(most, count - row0);
      const int32_t end = step.lengths[s] - count + row0 + rows;  // keys that its last row sees
      for (int32_t head = 0; head < kv_.num_kv_heads; ++head) {
        if (!split || rows > 1 || end <= kSplitKeys || end < step.lengths[s]) {
          tasks_.push_back({s, head, row0, rows, 0, step.lengths[s], -1, -1});
          continue;
        }
        const auto group = static_cast<int32_t>(groups_.size());
        groups_.push_back({parts, 0});
        for (int32_t key = 0; key < end; key += kSplitKeys) {
          tasks_.push_back({s, head, row0, rows, key, std::min(end, key + kSplitKeys), parts++, group});
          ++groups_.back().num_parts;
        }
      }
    }
  }
  const auto work = [](const AttentionTask& task) { return static_cast<int64_t>(task.rows) * (task.key1 - task.key0); };
  std::stable_sort(tasks_.begin(), tasks_.end(), [&](const auto& a, const auto& b) { return work(a) > work(b); });
  const size_t heads = static_cast<size_t>(shape_.num_heads / kv_.num_kv_heads);
  partial_.resize(std::max(partial_.size(), static_cast<size_t>(parts) * heads * part_floats()));
  if (done_.size() < groups_.size()) done_ = std::vector<TaskCounter>(groups_.size());
}

float* AttentionPlan::partial(const AttentionTask& task) {
  if (task.part < 0) return nullptr;
  const size_t heads = static_cast<size_t>(shape_.num_heads / kv_.num_kv_heads);
  return partial_.data() + static_cast<size_t>(task.part) * heads * part_floats();
}

void AttentionPlan::finish(const AttentionTask& task, void* out, int64_t out_stride, bool out_bf16) {
  const Group& group = groups_[static_cast<size_t>(task.group)];
  auto& done = done_[static_cast<size_t>(task.group)].next;
  if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < group.num_parts) return;
  done.store(0, std::memory_order_relaxed);  // for the next layer
  const int heads = shape_.num_heads / kv_.num_kv_heads;
  std::vector<const float*> parts(static_cast<size_t>(group.num_parts));
  const int64_t row = sequence(task).first_row + task.row0;
  for (int h = 0; h < heads; ++h) {
    for (size_t p = 0; p < parts.size(); ++p) {
      const size_t index = (static_cast<size_t>(group.first_part) + p) * static_cast<size_t>(heads) + static_cast<size_t>(h);
      parts[p] = partial_.data() + index * part_floats();
    }
    const int64_t at = row * out_stride + static_cast<int64_t>(task.kv_head * heads + h) * kv_.head_dim;
    void* into = out_bf16 ? static_cast<void*>(static_cast<uint16_t*>(out) + at) : static_cast<float*>(out) + at;
    merge_partials(parts.data(), group.num_parts, kv_.head_dim, into, out_bf16);
  }
}

}  // namespace hr
