#include "attention.h"

#include <algorithm>

#include "attention_product.h"
#include "attention_rows.h"

namespace hr {
namespace {

constexpr int kItemRows = 128;  // query rows times heads of an item: they share the packing of a chunk
constexpr int kBlockRows = 24;  // of these, scored at a time: their scores stay in the first-level cache
constexpr size_t kScoreBytes = kKeyChunk * 4;
constexpr size_t kAlign = 64;

uintptr_t aligned(uintptr_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// A token that no query sees has no key and no value: neither what a slot held before nor the end of a buffer matters.
alignas(64) const uint8_t kNothing[256 * 4] = {};

// Where the pieces of the scratch lie.
struct Scratch {
  uint8_t *queries, *keys, *values, *scores;
  const uint8_t **key_rows, **value_rows;
  float *query_scales, *key_scales, *value_scales, *states, *parts;
  size_t query_bytes, state_floats;  // of a row
  size_t bytes;                      // of all

  Scratch(const KvCache& kv, int rows, uintptr_t base) {
    const size_t dim = static_cast<size_t>(kv.head_dim), n = static_cast<size_t>(rows);
    const size_t value_bytes = kv.type == KvType::F32 ? 4 : 2;
    uintptr_t at = aligned(base);
    const auto take = [&](size_t size) {
      uint8_t* piece = reinterpret_cast<uint8_t*>(at);
      at += aligned(size);
      return piece;
    };
    query_bytes = dim * value_bytes;
    state_floats = aligned((dim + 2) * 4) / 4;
    queries = take(n * query_bytes);
    keys = take(kKeyChunk * dim * value_bytes);
    values = take(kKeyChunk * dim * value_bytes);
    scores = take(kBlockRows * kScoreBytes);
    key_rows = reinterpret_cast<const uint8_t**>(take(kKeyChunk * sizeof(uint8_t*)));
    value_rows = reinterpret_cast<const uint8_t**>(take(kKeyChunk * sizeof(uint8_t*)));
    query_scales = reinterpret_cast<float*>(take(n * 4));
    key_scales = reinterpret_cast<float*>(take(kKeyChunk * 4));
    value_scales = reinterpret_cast<float*>(take(kKeyChunk * 4));
    states = reinterpret_cast<float*>(take(n * state_floats * 4));
    parts = reinterpret_cast<float*>(take(n * state_floats * 4));
    bytes = at - base;
  }
};

// The queries of one item against the keys of one KV head.
template <class Kv>
class Item {
 public:
  Item(const KvCache& kv, int layer, const AttentionShape& shape, const Sequence& seq, int kv_head, int row0, int rows,
       const float* q, int64_t q_stride, const Scratch& scratch)
      : kv_(kv), seq_(seq), layer_(layer), kv_head_(kv_head), dim_(kv.head_dim),
        group_(shape.num_heads / kv.num_kv_heads), rows_(rows * group_), window_(shape.window),
        position_(seq.length - seq.num_rows + row0), s_(scratch) {
    for (int r = 0; r < rows_; ++r) {
      const int64_t token = seq.first_row + row0 + r / group_;
      const float* head = q + token * q_stride + static_cast<int64_t>(kv_head * group_ + r % group_) * dim_;
      const float scale = Kv::pack_query(head, dim_, s_.queries + static_cast<size_t>(r) * s_.query_bytes);
      s_.query_scales[r] = scale * shape.scale * 1.44269504f;  // scores are kept as powers of two
    }
  }

  int rows() const { return rows_; }

  // The states of all rows after keys [key0, key1), from nothing.
  void run(int key0, int key1, float* states) {
    for (int r = 0; r < rows_; ++r) reset_state(states + static_cast<size_t>(r) * s_.state_floats, dim_);
    key0 = std::max(key0, first_key(0));
    key1 = std::min(key1, end_key(rows_ - 1));
    for (int chunk = key0 / kKeyChunk * kKeyChunk; chunk < key1; chunk += kKeyChunk) {
      const int end = std::min(key1 - chunk, kKeyChunk);
      const int t0 = std::max(key0 - chunk, 0) / kLanes * kLanes, t1 = (end + kLanes - 1) / kLanes * kLanes;
      pack(chunk, t0, t1, end);
      for (int r = 0; r < rows_; r += kBlockRows) {
        block(chunk, r, std::min(kBlockRows, rows_ - r), t0, t1, end, states);
      }
    }
  }

 private:
  int first_key(int row) const {
    const int position = position_ + row / group_;
    return window_ > 0 ? std::max(position - window_ + 1, 0) : 0;
  }
  int end_key(int row) const { return position_ + row / group_ + 1; }

  // Keys and values of tokens [t0, t1) of the chunk; those from `end` on are zeros.
  void pack(int chunk, int t0, int t1, int end) {
    const size_t row = Kv::row_bytes(dim_), scales = row * static_cast<size_t>(kv_.block_size);
    const size_t to_values = tile_bytes(kv_) * static_cast<size_t>(kv_.num_kv_heads);
    int index = (chunk + t0) / kv_.block_size, offset = (chunk + t0) % kv_.block_size;
    const uint8_t* keys = t0 < end ? tile(kv_, seq_.blocks[index], layer_, 0, kv_head_) : nullptr;
    for (int t = t0; t < t1; ++t) {
      if (t >= end) {
        s_.key_rows[t] = s_.value_rows[t] = kNothing;
        if (Kv::kScaled) s_.key_scales[t] = s_.value_scales[t] = 0.0f;
        continue;
      }
      if (offset == kv_.block_size) {
        offset = 0;
        keys = tile(kv_, seq_.blocks[++index], layer_, 0, kv_head_);
      }
      s_.key_rows[t] = keys + static_cast<size_t>(offset) * row;
      s_.value_rows[t] = s_.key_rows[t] + to_values;
      if (Kv::kScaled) {
        const uint8_t* scale = keys + scales + static_cast<size_t>(offset) * 4;
        std::memcpy(s_.key_scales + t, scale, 4);
        std::memcpy(s_.value_scales + t, scale + to_values, 4);
      }
      ++offset;
    }
    for (int t = t0; t < t1; t += kPanelTokens) {
      Kv::pack_keys(s_.key_rows + t, dim_, s_.keys + static_cast<size_t>(t) * s_.query_bytes);
    }
    for (int t = t0; t < t1; t += Kv::kUnit) {
      Kv::pack_values(s_.value_rows + t, dim_, s_.values + static_cast<size_t>(t) * s_.query_bytes);
    }
  }

  // Rows [row0, row0 + rows) against the packed chunk.
  void block(int chunk, int row0, int rows, int t0, int t1, int end, float* states) {
    const auto state = [&](int r) { return states + static_cast<size_t>(row0 + r) * s_.state_floats; };
    t0 = std::max(t0, (first_key(row0) - chunk) / kLanes * kLanes);
    end = std::min(end, end_key(row0 + rows - 1) - chunk);
    t1 = std::min(t1, (end + kLanes - 1) / kLanes * kLanes);
    if (t0 >= t1) return;

    Product scores;
    scores.x = s_.queries + static_cast<size_t>(row0) * s_.query_bytes;
    scores.x_stride = s_.query_bytes;
    scores.w = s_.keys + static_cast<size_t>(t0) * s_.query_bytes;
    scores.unit_stride = 64;
    scores.vector_stride = kPanelTokens * s_.query_bytes;
    scores.units = dim_ / Kv::kUnit;
    product<Kv>(scores, rows, (t1 - t0) / kLanes, [&](int r, int panel, Vf value) {
      store(reinterpret_cast<float*>(s_.scores + r * kScoreBytes) + t0 + panel * kLanes, value);
    });

    RowUpdate updates[kBlockRows];
    for (int r = 0; r < rows; ++r) {
      const int first = first_key(row0 + r) - chunk, last = std::min(end_key(row0 + r) - chunk, end);
      float* sums = state(r);
      updates[r] = softmax_row<Kv>(s_.scores + r * kScoreBytes, t0, t1, std::max(first, t0), last,
                                   s_.query_scales[row0 + r], s_.key_scales, s_.value_scales, sums[dim_],
                                   sums[dim_ + 1]);
    }

    Product sums;
    sums.x = s_.scores + static_cast<size_t>(t0 / Kv::kUnit) * 4;
    sums.x_stride = kScoreBytes;
    sums.w = s_.values + static_cast<size_t>(t0) * s_.query_bytes;
    sums.unit_stride = static_cast<size_t>(dim_) * 4;
    sums.vector_stride = 64;
    sums.units = (t1 - t0) / Kv::kUnit;
    product<Kv>(sums, rows, dim_ / kLanes, [&](int r, int vector, Vf value) {
      float* sum = state(r) + vector * kLanes;
      store(sum, fma(value, set1(updates[r].factor), load(sum) * set1(updates[r].keep)));
    });
  }

  const KvCache& kv_;
  const Sequence& seq_;
  const int layer_, kv_head_, dim_, group_, rows_, window_, position_;
  const Scratch& s_;
};

template <class Kv>
void attend_item(Item<Kv>& item, int key0, int key1, const Scratch& s, int head_dim) {
  for (int split = key0 / kSplitKeys * kSplitKeys; split < key1; split += kSplitKeys) {
    const int end = std::min(split + kSplitKeys, key1);
    if (split == key0 / kSplitKeys * kSplitKeys) {
      item.run(key0, end, s.states);
      continue;
    }
    item.run(split, end, s.parts);
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
  return (Scratch(kv, rows, 0).bytes + kAlign) / 4;
}

void attend(const KvCache& kv, int layer, const AttentionShape& shape, const Sequence& seq, int kv_head, int row0,
            int rows, int key0, int key1, const float* q, int64_t q_stride, void* out, int64_t out_stride,
            bool out_bf16, float* partial, float* scratch, bool use_tiles) {
  (void)use_tiles;
  const int group = shape.num_heads / kv.num_kv_heads;
  const Scratch s(kv, attend_rows(kv, shape) * group, reinterpret_cast<uintptr_t>(scratch));
  const auto run = [&](auto format) {
    Item<decltype(format)> item(kv, layer, shape, seq, kv_head, row0, rows, q, q_stride, s);
    attend_item(item, key0, key1, s, kv.head_dim);
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
