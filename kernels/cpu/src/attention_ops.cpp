// The operations of attention.h one by one, over whole batches and in one thread: for tests and measurements. A model's
// step divides the same work among threads.
#include <algorithm>
#include <vector>

#include "attention.h"

using namespace hr;

extern "C" {

int32_t hr_attention_supports(int32_t head_dim, int32_t block_size) { return attention_supports(head_dim, block_size); }
int64_t hr_kv_tile_bytes(const KvCache* kv) { return static_cast<int64_t>(tile_bytes(*kv)); }
int32_t hr_split_keys() { return kSplitKeys; }

// q float [tokens][num_heads][head_dim] -> out, float or bfloat16, alike. Sequence s has the query tokens
// [query_start[s], query_start[s + 1]) and the block table that begins at blocks[block_start[s]]. item_rows: query
// tokens of an item, 0 for as many as may be. `split`: long contexts in parts, as several threads would have them.
void hr_attend_batch(const KvCache* kv, int32_t layer, int32_t num_heads, int32_t window, float scale,
                     int32_t num_sequences, const int32_t* query_start, const int32_t* lengths, const int32_t* blocks,
                     const int32_t* block_start, const float* q, void* out, int32_t out_bf16, int32_t item_rows,
                     int32_t split, int32_t use_tiles) {
  const AttentionShape shape{num_heads, window, scale};
  const int most = attend_rows(*kv, shape), item = item_rows > 0 ? std::min(item_rows, most) : most;
  const int dim = kv->head_dim, group = num_heads / kv->num_kv_heads;
  const int64_t stride = static_cast<int64_t>(num_heads) * dim;
  const size_t part_floats = static_cast<size_t>(item) * group * (dim + 2);
  std::vector<float> scratch(attend_scratch_floats(*kv, shape)), partial;
  std::vector<const float*> parts;
  for (int s = 0; s < num_sequences; ++s) {
    const Sequence seq{blocks + block_start[s], query_start[s], query_start[s + 1] - query_start[s], lengths[s]};
    const int num_parts = split ? (seq.length + kSplitKeys - 1) / kSplitKeys : 1;
    for (int head = 0; head < kv->num_kv_heads; ++head) {
      for (int row = 0; row < seq.num_rows; row += item) {
        const int rows = std::min(item, seq.num_rows - row);
        if (num_parts == 1) {
          attend(*kv, layer, shape, seq, head, row, rows, 0, seq.length, q, stride, out, stride, out_bf16 != 0, nullptr,
                 scratch.data(), use_tiles != 0);
          continue;
        }
        partial.resize(part_floats * static_cast<size_t>(num_parts));
        for (int i = 0; i < num_parts; ++i) {
          attend(*kv, layer, shape, seq, head, row, rows, i * kSplitKeys, std::min((i + 1) * kSplitKeys, seq.length), q,
                 stride, nullptr, 0, false, partial.data() + part_floats * static_cast<size_t>(i), scratch.data(),
                 use_tiles != 0);
        }
        for (int r = 0; r < rows * group; ++r) {
          parts.clear();
          for (int i = 0; i < num_parts; ++i) {
            parts.push_back(partial.data() + part_floats * static_cast<size_t>(i) + static_cast<size_t>(r) * (dim + 2));
          }
          const int64_t at = (seq.first_row + row + r / group) * stride + (head * group + r % group) * dim;
          merge_partials(parts.data(), num_parts, dim, static_cast<uint8_t*>(out) + at * (out_bf16 ? 2 : 4),
                         out_bf16 != 0);
        }
      }
    }
  }
}

// x float [tokens][heads][head_dim] in place; cos, sin [tokens][head_dim / 2]; weight [head_dim] or null.
void hr_norm_rotate(float* x, int32_t tokens, int32_t heads, int32_t head_dim, const float* weight, float eps,
                    const float* cos, const float* sin) {
  const int64_t half = head_dim / 2;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      norm_rotate(x + (t * heads + h) * head_dim, head_dim, weight, eps, cos + t * half, sin + t * half);
    }
  }
}

// x float [tokens][num_kv_heads][head_dim] at slots [tokens] of a layer.
void hr_write_kv(const KvCache* kv, int32_t layer, int32_t k_or_v, int32_t tokens, const float* x,
                 const int64_t* slots) {
  for (int t = 0; t < tokens; ++t) {
    for (int h = 0; h < kv->num_kv_heads; ++h) {
      write_kv(*kv, layer, k_or_v, h, slots[t],
               x + (static_cast<int64_t>(t) * kv->num_kv_heads + h) * kv->head_dim);
    }
  }
}

}  // extern "C"
