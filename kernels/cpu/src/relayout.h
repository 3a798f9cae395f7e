// KV blocks between caches of different layouts: copied as they are, or through the compressed form of the wire.
#pragma once

#include <cstdint>

namespace hr {

// Row (block, layer, kv, head, token) begins at address + each index times its stride, and has row_bytes bytes; see
// kernels/cache_view.py, whose fields these are.
struct CacheView {
  uint8_t* address;
  int64_t num_blocks, num_layers, num_heads, num_tokens, row_bytes;
  int64_t block_stride, layer_stride, kv_stride, head_stride, token_stride;
};

enum class RowType : int32_t { F32 = 0, BF16 = 1, F16 = 2 };
enum class WireType : int32_t { I8 = 0, F8 = 1 };  // F8: e4m3fn

// Block from_blocks[i] to to_blocks[i], i < count. Both views have the same layers, heads, tokens and row_bytes, and no
// byte in common. stream: do not bring into the caches what is written.
void copy_blocks(const CacheView& to, const int64_t* to_blocks, const CacheView& from, const int64_t* from_blocks,
                 int64_t count, bool stream);

// wire: [count] blocks of tiles [layer, kv, head]: row values as bytes [num_tokens][dim], float scale[num_tokens].
// What they hold is written down in kernels/relayout.py. May throw std::bad_alloc.
void compress_blocks(uint8_t* wire, const CacheView& from, const int64_t* blocks, int64_t count, RowType rows,
                     WireType type);
void restore_blocks(const CacheView& to, const int64_t* blocks, const uint8_t* wire, int64_t count, RowType rows,
                    WireType type);

}  // namespace hr
