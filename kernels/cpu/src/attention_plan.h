// How one step's attention is divided into tasks.
#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "model.h"
#include "pool.h"

namespace hr {

// A part of one (sequence, KV head): query rows against keys [key0, key1).
struct AttentionTask {
  int32_t sequence, kv_head, row0, rows, key0, key1;
  int32_t part;   // where its partial result goes, -1: it writes the output itself
  int32_t group;  // of the parts that are merged with it, -1: none
};

// Contexts are cut at multiples of kSplitKeys, whatever else the step holds: where a request's sums are cut must not
// hang on its company. `attend` cuts at the same places when it is given a whole context, so the bits are the same.
class AttentionPlan {
 public:
  AttentionPlan(const KvCache& kv, const AttentionShape& shape) : kv_(kv), shape_(shape) {}

  // Longest tasks first, so that no thread is left with one at the end. `split`: long contexts may be cut in parts.
  void make(const Step& step, bool split);

  const std::vector<AttentionTask>& tasks() const { return tasks_; }
  const Sequence& sequence(const AttentionTask& task) const { return sequences_[static_cast<size_t>(task.sequence)]; }
  // Where the task's partial result goes, or null.
  float* partial(const AttentionTask& task);
  // To be called when a part is done; whoever did the last one merges them into `out` (attention's output of the step).
  void finish(const AttentionTask& task, void* out, int64_t out_stride, bool out_bf16);

 private:
  struct Group {
    int32_t first_part, num_parts;
  };
  size_t part_floats() const;  // of one query head

  const KvCache kv_;
  const AttentionShape shape_;
  std::vector<Sequence> sequences_;
  std::vector<AttentionTask> tasks_;
  std::vector<Group> groups_;
  std::vector<TaskCounter> done_;
  std::vector<float> partial_;
};

}  // namespace hr
