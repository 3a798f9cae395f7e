// Attention over the paged KV cache, rotary embedding and the write of new keys and values, by one thread.
//
// The cache is [num_blocks][num_layers][2 (k, v)][num_kv_heads] tiles; a tile is [block_size][head_dim] values. For int8
// the tile's values are followed by float scale[block_size]: x = scale * q, q in [-127, 127], so that a tile has
// block_size * (head_dim + 4) bytes.
//
// What a query's output is hangs on its sequence alone: keys are visited in chunks that begin at multiples of
// kKeyChunk positions, in order, chunks are summed up within parts that begin at multiples of kSplitKeys, and the parts
// are merged in order. So neither the batch, nor the division of a prompt into chunks, nor a prefix hit, nor the number
// of threads that share a context changes a bit of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hr {

enum class KvType : int32_t { F32 = 0, BF16 = 1, I8 = 2 };

constexpr int kKeyChunk = 256;   // keys scored at once; int8 products of more would overflow
constexpr int kSplitKeys = 2048;  // keys of a part: a context may be divided among threads at multiples of this

struct KvCache {
  uint8_t* data;
  KvType type;
  int32_t num_blocks, num_layers, num_kv_heads, block_size, head_dim;
};

inline size_t tile_bytes(const KvCache& kv) {
  const size_t tokens = static_cast<size_t>(kv.block_size), dim = static_cast<size_t>(kv.head_dim);
  return kv.type == KvType::I8 ? tokens * (dim + 4) : tokens * dim * (kv.type == KvType::BF16 ? 2 : 4);
}
inline uint8_t* tile(const KvCache& kv, int block, int layer, int k_or_v, int head) {
  const size_t index = ((static_cast<size_t>(block) * kv.num_layers + layer) * 2 + k_or_v) * kv.num_kv_heads + head;
  return kv.data + index * tile_bytes(kv);
}

// One sequence of a step.
struct Sequence {
  const int32_t* blocks;  // its block table
  int32_t first_row;      // of its query tokens in the step
  int32_t num_rows;       // query tokens
  int32_t length;         // context, this step's tokens included; the last query is at position length - 1
};

struct AttentionShape {
  int32_t num_heads;  // a multiple of num_kv_heads; consecutive query heads share a KV head
  int32_t window;     // positions a query sees, its own included; 0: all
  float scale;        // of the scores, above 0
};

// head_dim: a multiple of 16 up to 256; block_size: 1 to 256.
bool attention_supports(int head_dim, int block_size);

// Scratch floats that one call of `attend` may use.
size_t attend_scratch_floats(const KvCache& kv, const AttentionShape& shape);
// Query rows of one work item: the caller divides a sequence's queries into items of at most this many.
int attend_rows(const KvCache& kv, const AttentionShape& shape);

// Query rows [row0, row0 + rows) of the sequence (relative to its first_row; rows <= attend_rows), all query heads of
// one KV head, against the keys of [key0, key1) that they may see (causal, window).
// q: float [..][q_stride], head h of row r at q + r * q_stride + h * head_dim, r counted over the step's rows, rotated.
// Whole context (key0 = 0, key1 >= length): writes out (bfloat16 or float by `out_bf16`, [..][out_stride], same
// indexing). Otherwise one part of it, key0 = i * kSplitKeys, key1 = min(key0 + kSplitKeys, length): writes
// float [rows][group][head_dim + 2] to `partial`, which merge_partials adds up to the very bits of the whole. Parts may
// be left out when they end before the window begins.
void attend(const KvCache& kv, int layer, const AttentionShape& shape, const Sequence& seq, int kv_head, int row0,
            int rows, int key0, int key1, const float* q, int64_t q_stride, void* out, int64_t out_stride,
            bool out_bf16, float* partial, float* scratch, bool use_tiles);

// Sum of the parts of one row and head, in order: out [head_dim]. parts: [num_parts >= 1] pointers to
// float [head_dim + 2]: sum of p * v, the largest score in units of log2, the sum of p.
void merge_partials(const float* const* parts, int num_parts, int head_dim, void* out, bool out_bf16);

// One row's worth of work after the QKV projection for one head: optional RMS norm (weight [head_dim] or null), then the
// rotation by cos, sin [head_dim / 2] (float32; rotate-half: x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin), in place.
void norm_rotate(float* head, int head_dim, const float* weight, float eps, const float* cos, const float* sin);

// x [n] in place: x / rms(x) * weight.
void norm_row(float* x, int n, const float* weight, float eps);

// Store one head's key or value [head_dim] (float32) at a slot = block * block_size + offset of a layer.
void write_kv(const KvCache& kv, int layer, int k_or_v, int kv_head, int64_t slot, const float* head);

}  // namespace hr
