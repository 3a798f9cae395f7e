#include "attention.h"

#include <algorithm>

#include "attention_item.h"

namespace hr {
namespace {

// Keys [key0, key1) in parts that begin at multiples of kSplitKeys; the sum is in s.states.
template <class Kv>
void run_parts(Item<Kv>& item, int key0, int key1, const Scratch& s, int head_dim) {
  const int first = std::max(key0, item.first_key()) / kSplitKeys * kSplitKeys;
  item.run(std::max(key0, first), std::min(first + kSplitKeys, key1), s.states);
  for (int split = first + kSplitKeys; split < key1; split += kSplitKeys) {
    item.run(split, std::min(split + kSplitKeys, key1), s.parts);
    for (int r = 0; r < item.rows(); ++r) {
      const size_t at = static_cast<size_t>(r) * s.state_floats;
      merge_state(s.states + at, s.parts + at, head_dim);
    }
  }
}

}  // namespace

bool attention_supports(int head_dim, int block_size) {
  return head_dim > 0 && head_dim <= 256 && head_dim % kLanes == 0 && block_size > 0 && block_size <= 256;
}

int attend_rows(const KvCache& kv, const AttentionShape& shape) {
  return std::max(1, kItemRows / (shape.num_heads / kv.num_kv_heads));
}

size_t attend_scratch_floats(const KvCache& kv, const AttentionShape& shape) {
  const int rows = attend_rows(kv, shape) * (shape.num_heads / kv.num_kv_heads);
  return (Scratch(kv, rows, 0).bytes + 64) / 4;
}

void attend(const KvCache& kv, int layer, const AttentionShape& shape, const Sequence& seq, int kv_head, int row0,
            int rows, int key0, int key1, const float* q, int64_t q_stride, void* out, int64_t out_stride,
            bool out_bf16, float* partial, float* scratch, bool use_tiles) {
  (void)use_tiles;
  const int group = shape.num_heads / kv.num_kv_heads;
  Scratch s(kv, attend_rows(kv, shape) * group, reinterpret_cast<uintptr_t>(scratch));
  const auto run = [&](auto format) {
    Item<decltype(format)> item(kv, layer, shape, seq, kv_head, row0, rows, q, q_stride, s);
    run_parts(item, key0, key1, s, kv.head_dim);
  };
  switch (kv.type) {
    case KvType::F32: run(FloatKv()); break;
    case KvType::BF16: run(Bf16Kv()); break;
    case KvType::I8: run(Int8Kv()); break;
  }
  const bool whole = key0 == 0 && key1 >= seq.length;
  for (int r = 0; r < rows * group; ++r) {
    const float* state = s.states + static_cast<size_t>(r) * s.state_floats;
    if (!whole) {
      const size_t floats = static_cast<size_t>(kv.head_dim) + 2;
      std::memcpy(partial + static_cast<size_t>(r) * floats, state, floats * 4);
      continue;
    }
    const int64_t token = seq.first_row + row0 + r / group;
    const int64_t at = token * out_stride + static_cast<int64_t>(kv_head * group + r % group) * kv.head_dim;
    write_row(state, kv.head_dim, static_cast<uint8_t*>(out) + at * (out_bf16 ? 2 : 4), out_bf16);
  }
}

void merge_partials(const float* const* parts, int num_parts, int head_dim, void* out, bool out_bf16) {
  float state[256 + 2];
  std::memcpy(state, parts[0], sizeof(float) * (static_cast<size_t>(head_dim) + 2));
  for (int i = 1; i < num_parts; ++i) merge_state(state, parts[i], head_dim);
  write_row(state, head_dim, out, out_bf16);
}

}  // namespace hr
