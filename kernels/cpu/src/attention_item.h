// One item of attention: the query rows of a stretch of tokens, all query heads of one KV head, over that head's keys.
//
// Few rows (decode) are bound by reading the cache: keys are packed a few panels at a time and scored at once, values
// are used where they lie, and what comes next is fetched meanwhile. Many rows (prefill) are bound by multiplication:
// a chunk's keys and values are packed once and used by all rows. The arithmetic of a row is the same in both.
#pragma once

#include "attention_chunk.h"
#include "attention_product.h"
#include "attention_rows.h"

namespace hr {

constexpr int kItemRows = 192;   // query rows times heads of an item: they share the packing of a chunk
constexpr int kBlockRows = 24;   // of these, scored at a time: their scores stay in the first-level cache
constexpr int kDirectRows = 12;  // at most so many rows are worked off without packing values
constexpr int kStretch = 4;      // panels of keys that are packed at a time for few rows
constexpr int kAhead = 8;        // panels between fetching and use
constexpr size_t kScoreBytes = kKeyChunk * 4;

// Where the pieces of the scratch lie.
struct Scratch {
  uint8_t *queries, *keys, *values, *scores;
  Chunk chunks[2];
  float *query_scales, *key_scales, *value_scales, *states, *parts;
  size_t query_bytes, state_floats;  // of a row
  size_t bytes;                      // of all

  static uintptr_t aligned(uintptr_t x) { return (x + 63) / 64 * 64; }

  Scratch(const KvCache& kv, int rows, uintptr_t base) {
    const size_t dim = static_cast<size_t>(kv.head_dim), n = static_cast<size_t>(rows);
    const size_t value_bytes = kv.type == KvType::F32 ? 4 : 2;
    uintptr_t at = aligned(base);
    const auto take = [&](auto*& piece, size_t size) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(at);
      at += aligned(size);
    };
    query_bytes = dim * value_bytes;
    state_floats = aligned((dim + 2) * 4) / 4;
    take(queries, n * query_bytes);
    take(keys, kKeyChunk * dim * value_bytes);
    take(values, kKeyChunk * dim * value_bytes);
    take(scores, kBlockRows * kScoreBytes);
    for (Chunk& chunk : chunks) {
      take(chunk.keys, kKeyChunk * sizeof(uint8_t*));
      take(chunk.values, kKeyChunk * sizeof(uint8_t*));
      take(chunk.scales, kKeyChunk * sizeof(uint8_t*));
    }
    take(query_scales, n * 4);
    take(key_scales, kKeyChunk * 4);
    take(value_scales, kKeyChunk * 4);
    take(states, n * state_floats * 4);
    take(parts, n * state_floats * 4);
    bytes = at - base;
  }
};

template <class Kv>
class Item {
 public:
  Item(const KvCache& kv, int layer, const AttentionShape& shape, const Sequence& seq, int kv_head, int row0, int rows,
       const float* q, int64_t q_stride, Scratch& scratch)
      : reader_(kv, layer, kv_head, seq.blocks), dim_(kv.head_dim), group_(shape.num_heads / kv.num_kv_heads),
        rows_(rows * group_), window_(shape.window), position_(seq.length - seq.num_rows + row0), s_(scratch) {
    for (int r = 0; r < rows_; ++r) {
      const int64_t token = seq.first_row + row0 + r / group_;
      const float* head = q + token * q_stride + static_cast<int64_t>(kv_head * group_ + r % group_) * dim_;
      const float scale = Kv::pack_query(head, dim_, s_.queries + static_cast<size_t>(r) * s_.query_bytes);
      s_.query_scales[r] = scale * shape.scale * 1.44269504f;  // scores are kept as powers of two
    }
  }

  int rows() const { return rows_; }
  int first_key() const { return first_key(0); }

  // The states of all rows after keys [key0, key1), from nothing. key0 is a multiple of kKeyChunk.
  void run(int key0, int key1, float* states) {
    for (int r = 0; r < rows_; ++r) reset_state(states + static_cast<size_t>(r) * s_.state_floats, dim_);
    key0 = std::max(key0, first_key(0));
    key1 = std::min(key1, end_key(rows_ - 1));
    int start = key0 / kKeyChunk * kKeyChunk, turn = 0;
    if (start >= key1) return;
    reader_.locate(start, key0, key1, s_.chunks[0]);
    if (rows_ <= kDirectRows) {
      for (int i = 0; i < std::min(kAhead, s_.chunks[0].panels()); ++i) reader_.fetch(*s_.chunks[0].panel(i));
    }
    for (; start < key1; start += kKeyChunk, turn ^= 1) {
      const Chunk& c = s_.chunks[turn];
      Chunk& next = s_.chunks[turn ^ 1];
      const bool last = start + kKeyChunk >= key1;
      if (!last) reader_.locate(start + kKeyChunk, key0, key1, next);
      if (rows_ <= kDirectRows) {
        few_rows(c, last ? nullptr : &next, states);
      } else {
        many_rows(c, states);
      }
    }
  }

 private:
  int first_key(int row) const {
    const int position = position_ + row / group_;
    return window_ > 0 ? std::max(position - window_ + 1, 0) : 0;
  }
  int end_key(int row) const { return position_ + row / group_ + 1; }
  float* state(float* states, int row) const { return states + static_cast<size_t>(row) * s_.state_floats; }

  void few_rows(const Chunk& c, const Chunk* next, float* states) {
    const int panels = c.panels();
    const auto later = [&](int i) {  // where that begins which is wanted kAhead panels after panel i
      const int at = i + kAhead;
      if (at < 2 * panels) return *c.panel(at);
      return next && at < 4 * panels ? *next->panel(std::min(at - 2 * panels, next->panels())) : kNothing;
    };
    reader_.read_scales(c, s_.key_scales, s_.value_scales);
    const uint8_t* ahead[kKeyChunk / kPanelTokens];
    for (int i = 0; i < panels; i += kStretch) {
      const int n = std::min(kStretch, panels - i), t = c.first + i * kPanelTokens;
      for (int j = 0; j < n; ++j) {
        ahead[j] = later(i + j);
        Kv::pack_keys(c.panel(i + j), dim_, s_.keys + static_cast<size_t>(j * kPanelTokens) * s_.query_bytes);
      }
      score(0, rows_, t, t + n * kPanelTokens, KeyColumns<Kv>{packed_keys(0), {ahead, n}});
    }
    RowUpdate updates[kDirectRows];
    weigh(c, 0, rows_, c.first, c.padded, states, updates);
    for (int i = 0; i < panels; ++i) ahead[i] = later(panels + i);
    add_values(0, rows_, c.first, c.padded, ValueColumns<Kv>{c.values + c.first, reader_.row_bytes(), {ahead, panels}},
               states, updates);
  }

  void many_rows(const Chunk& c, float* states) {
    reader_.read_scales(c, s_.key_scales, s_.value_scales);
    for (int t = c.first; t < c.padded; t += kPanelTokens) {
      Kv::pack_keys(c.keys + t, dim_, s_.keys + static_cast<size_t>(t) * s_.query_bytes);
    }
    for (int t = c.first; t < c.padded; t += Kv::kUnit) {
      uint8_t* out = s_.values + static_cast<size_t>(t) * s_.query_bytes;
      typename Kv::Units units[256 / kLanes];
      Kv::value_units(c.values + t, 0, dim_ / kLanes, units);
      for (int i = 0; i < dim_ / kLanes; ++i) Kv::store_units(out + 64 * i, units[i]);
    }
    for (int row = 0; row < rows_; row += kBlockRows) {
      const int rows = std::min(kBlockRows, rows_ - row);
      const int first = std::max(c.first, (first_key(row) - c.start) / kLanes * kLanes);
      const int end = std::min(c.end, end_key(row + rows - 1) - c.start);
      const int padded = (end + kLanes - 1) / kLanes * kLanes;
      if (first >= padded) continue;
      score(row, rows, first, padded, packed_keys(first));
      RowUpdate updates[kBlockRows];
      weigh(c, row, rows, first, padded, states, updates);
      const uint8_t* values = s_.values + static_cast<size_t>(first) * s_.query_bytes;
      add_values(row, rows, first, padded, PackedColumns<Kv>{values, static_cast<size_t>(dim_) * 4, 64}, states,
                 updates);
    }
  }

  PackedColumns<Kv> packed_keys(int token) const {
    return {s_.keys + static_cast<size_t>(token) * s_.query_bytes, 64, kPanelTokens * s_.query_bytes};
  }

  // Scores of rows [row, row + rows) and tokens [t0, t1), which begin at `keys`.
  template <class Columns>
  void score(int row, int rows, int t0, int t1, const Columns& keys) {
    const ProductRows queries{s_.queries + static_cast<size_t>(row) * s_.query_bytes, s_.query_bytes, dim_ / Kv::kUnit};
    product<Kv>(queries, rows, keys, (t1 - t0) / kLanes, [&](int r, int panel, Vf value) {
      float* scores = reinterpret_cast<float*>(s_.scores + static_cast<size_t>(r) * kScoreBytes);
      store(scores + t0 + panel * kLanes, value);
    });
  }

  // Scores of rows [row, row + rows) and tokens [t0, t1) into probabilities; the rows' running state moves on. All rows
  // step by step, because one row alone is a chain of instructions that wait for each other.
  void weigh(const Chunk& c, int row, int rows, int t0, int t1, float* states, RowUpdate* updates) {
    ScoreRow scores[kBlockRows];
    float highest[kBlockRows];
    for (int r = 0; r < rows; ++r) {
      const int first = std::max(first_key(row + r) - c.start, t0), end = std::min(end_key(row + r) - c.start, c.end);
      scores[r] = {s_.scores + static_cast<size_t>(r) * kScoreBytes, t0, t1, first, end, s_.query_scales[row + r]};
      if (!scores[r].sees_nothing()) highest[r] = highest_score<Kv>(scores[r], s_.key_scales);
    }
    for (int r = 0; r < rows; ++r) {
      if (scores[r].sees_nothing()) {
        no_probabilities<Kv>(scores[r]);
        updates[r] = {1.0f, 0.0f};
        continue;
      }
      float& of_state = state(states, row + r)[dim_];
      highest[r] = of_state > highest[r] ? of_state : highest[r];
      updates[r].keep = exp2_scalar(of_state - highest[r]);
      of_state = highest[r];
      float& total = state(states, row + r)[dim_ + 1];
      const float sum = probabilities<Kv>(scores[r], highest[r], s_.value_scales, updates[r].factor);
      total = total * updates[r].keep + sum;
    }
  }

  template <class Columns>
  void add_values(int row, int rows, int t0, int t1, const Columns& values, float* states, const RowUpdate* updates) {
    const ProductRows weights{s_.scores + static_cast<size_t>(t0 / Kv::kUnit) * 4, kScoreBytes, (t1 - t0) / Kv::kUnit};
    product<Kv>(weights, rows, values, dim_ / kLanes, [&](int r, int vector, Vf value) {
      float* sum = state(states, row + r) + vector * kLanes;
      store(sum, fma(value, set1(updates[r].factor), load(sum) * set1(updates[r].keep)));
    });
  }

  const ChunkReader<Kv> reader_;
  const int dim_, group_, rows_, window_, position_;
  Scratch& s_;
};

}  // namespace hr
