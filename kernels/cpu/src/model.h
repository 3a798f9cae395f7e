// A decoder's weights and one step's input, as the caller (kernels/cpu/decoder.py) lays them out in memory.
#pragma once

#include <cstdint>

#include "attention.h"
#include "matrix.h"
#include "moe.h"

namespace hr {

// Heads are columns of the QKV projection, padded so that they fall on panels: several whole heads to a panel where
// head_dim divides 64, else each head in as many panels as it needs.
inline int padded_head(int head_dim) {
  return kPanel % head_dim == 0 ? head_dim : (head_dim + kPanel - 1) / kPanel * kPanel;
}

struct Layer {
  const float* input_norm;  // [hidden]
  const float* q_norm;      // [head_dim] or null; norm_whole: [num_heads * head_dim]
  const float* k_norm;      // the same of the KV heads
  const float* mlp_norm;    // [hidden]
  Matrix qkv;       // query heads, key heads, value heads, each padded_head(head_dim) columns
  Matrix output;    // [hidden, num_heads * head_dim]
  Matrix gate_up;   // each panel: 32 gate columns, then the 32 up columns that belong to them
  Matrix down;      // [hidden, intermediate]
  const Moe* moe;   // null: dense. Else gate_up and down have no data.
  int32_t window;   // 0: none
  int32_t norm_whole;  // q_norm and k_norm are over all heads together (OLMoE), not over each
};

enum class EmbeddingKind : int32_t { F32 = 0, BF16 = 1, Head = 2 };  // Head: rows of the packed head

struct ModelShape {
  int32_t num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab, max_positions;
  float norm_eps, scale;
  EmbeddingKind embedding_kind;
  int32_t reserved;
};

struct Model {
  ModelShape shape;
  const void* embedding;    // [vocab][hidden], null for EmbeddingKind::Head
  const Layer* layers;      // [num_layers]
  const float* final_norm;  // [hidden]
  const float* cos;         // [max_positions][head_dim / 2]
  const float* sin;
  Matrix head;              // [vocab, hidden]
};

struct Step {
  int32_t num_tokens, num_sequences, num_rows, use_tiles;
  const int32_t* token_ids;    // [num_tokens]
  const int32_t* positions;    // [num_tokens]
  const int64_t* slots;        // [num_tokens] block * block_size + offset
  const int32_t* query_start;  // [num_sequences + 1]
  const int32_t* lengths;      // [num_sequences] context, this step's tokens included
  const int32_t* blocks;       // block tables, one after another
  const int32_t* block_start;  // [num_sequences] where each begins in `blocks`
  const int32_t* rows;         // [num_rows] ascending rows of the step whose logits are wanted
  float* logits;               // [num_rows][logits_stride]
  int64_t logits_stride;       // at least vocab, in floats
  ExchangeHook exchange;       // with the ranks that hold the other experts; a step may then have no tokens
};

}  // namespace hr
