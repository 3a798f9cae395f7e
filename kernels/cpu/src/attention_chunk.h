// Where the keys and values of one chunk of a sequence lie in the cache, and how they are fetched and packed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "attention_formats.h"

namespace hr {

// A token that no query sees has no key and no value: neither what a slot held before nor the end of a buffer matters.
alignas(64) inline const uint8_t kNothing[256 * 4] = {};

// The chunk that begins at position `start`; tokens are counted from there.
struct Chunk {
  const uint8_t** keys;          // [kKeyChunk] rows of the cache; those before `first` are not set
  const uint8_t** values;        //
  const uint8_t** scales;        // [kKeyChunk] of keys, for int8
  int start, first, end, padded;  // tokens [first, end) are wanted, [end, padded) are kNothing

  // Panels in the order in which they are read: all of the keys, then all of the values.
  int panels() const { return (padded - first) / kPanelTokens; }
  const uint8_t* const* panel(int i) const {
    const int n = panels();
    return i < n ? keys + first + i * kPanelTokens : i < 2 * n ? values + first + (i - n) * kPanelTokens : nullptr;
  }
};

template <class Kv>
class ChunkReader {
 public:
  ChunkReader(const KvCache& kv, int layer, int kv_head, const int32_t* blocks)
      : kv_(kv), layer_(layer), kv_head_(kv_head), blocks_(blocks), row_bytes_(Kv::row_bytes(kv.head_dim)),
        to_values_(tile_bytes(kv) * static_cast<size_t>(kv.num_kv_heads)) {}

  size_t row_bytes() const { return row_bytes_; }

  // Tokens at positions [key0, key1) of the chunk that begins at `start`, widened to whole panels.
  void locate(int start, int key0, int key1, Chunk& c) const {
    c.start = start;
    c.first = std::max(key0 - start, 0) / kPanelTokens * kPanelTokens;
    c.end = std::min(key1 - start, kKeyChunk);
    c.padded = (c.end + kPanelTokens - 1) / kPanelTokens * kPanelTokens;
    int block = (start + c.first) / kv_.block_size, offset = (start + c.first) % kv_.block_size;
    for (int t = c.first; t < c.end; ++block, offset = 0) {
      const uint8_t* keys = tile(kv_, blocks_[block], layer_, 0, kv_head_);
      const uint8_t* scales = keys + row_bytes_ * static_cast<size_t>(kv_.block_size);
      if constexpr (Kv::kScaled) {
        for (int i = 0; i < kv_.block_size; i += kLanes) {
          prefetch(scales + 4 * i);
          prefetch(scales + 4 * i + to_values_);
        }
      }
      const int stop = std::min(c.end, t + kv_.block_size - offset);
      keys += row_bytes_ * static_cast<size_t>(offset);
      scales += 4 * offset;
      for (; t < stop; ++t, keys += row_bytes_, scales += 4) {
        c.keys[t] = keys;
        c.values[t] = keys + to_values_;
        if constexpr (Kv::kScaled) c.scales[t] = scales;
      }
    }
    for (int t = c.end; t < c.padded; ++t) c.keys[t] = c.values[t] = c.scales[t] = kNothing;
  }

  // Scales of tokens [first, padded), zero where there is no token.
  void read_scales(const Chunk& c, float* of_keys, float* of_values) const {
    if constexpr (Kv::kScaled) {
      int t = c.first;
      if (kv_.block_size % kLanes == 0) {
        for (; t + kLanes <= c.end; t += kLanes) {
          store(of_keys + t, load(reinterpret_cast<const float*>(c.scales[t])));
          store(of_values + t, load(reinterpret_cast<const float*>(c.scales[t] + to_values_)));
        }
      }
      for (; t < c.end; ++t) {
        std::memcpy(of_keys + t, c.scales[t], 4);
        std::memcpy(of_values + t, c.scales[t] + to_values_, 4);
      }
      for (t = c.end; t < c.padded; ++t) of_keys[t] = of_values[t] = 0.0f;
    }
  }

  // Into the cache, a panel of rows that begins at `at`. Where blocks are smaller than panels only the first block's
  // rows are the right ones.
  void fetch(const uint8_t* at) const {
    for (size_t b = 0; b < kPanelTokens * row_bytes_; b += 64) prefetch(at + b);
  }

 private:
  const KvCache& kv_;
  const int layer_, kv_head_;
  const int32_t* const blocks_;
  const size_t row_bytes_, to_values_;
};

}  // namespace hr
