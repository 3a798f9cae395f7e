// Copies between random layouts in buffers of exactly the size they must have, and the wire's compressed form there and
// back. Meant for AddressSanitizer and UndefinedBehaviorSanitizer.
#include "relayout.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "simd.h"

using namespace hr;

namespace {

std::mt19937 random_bits(1);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }

[[noreturn]] void fail(const char* what, int64_t at) {
  std::printf("%s, at %lld\n", what, static_cast<long long>(at));
  std::exit(1);
}

// A cache with its dimensions in a random order, gaps, and no byte more than its rows reach.
struct Cache {
  CacheView view{};
  std::vector<uint8_t> data;

  Cache(int layers, int heads, int tokens, int row_bytes, bool gaps) {
    view.num_blocks = pick(1, 6);
    view.num_layers = layers;
    view.num_heads = heads;
    view.num_tokens = tokens;
    view.row_bytes = row_bytes;
    struct Dimension {
      int64_t count, *stride;
    } dimensions[] = {{tokens, &view.token_stride},
                      {heads, &view.head_stride},
                      {2, &view.kv_stride},
                      {layers, &view.layer_stride},
                      {view.num_blocks, &view.block_stride}};
    if (gaps) std::shuffle(std::begin(dimensions), std::end(dimensions), random_bits);
    int64_t extent = row_bytes;
    for (const Dimension& d : dimensions) {
      *d.stride = extent + (gaps && pick(0, 2) == 0 ? pick(1, 70) : 0);
      extent += *d.stride * (d.count - 1);
    }
    data.resize(static_cast<size_t>(extent));
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(pick(0, 255));
    view.address = data.data();
  }

  template <class Visit>  // visit(index of the row in canonical order, its place in `data`)
  void rows(const std::vector<int64_t>& blocks, const Visit& visit) const {
    int64_t index = 0;
    for (const int64_t block : blocks)
      for (int64_t layer = 0; layer < view.num_layers; ++layer)
        for (int64_t kv = 0; kv < 2; ++kv)
          for (int64_t head = 0; head < view.num_heads; ++head)
            for (int64_t token = 0; token < view.num_tokens; ++token) {
              visit(index++, block * view.block_stride + layer * view.layer_stride + kv * view.kv_stride +
                                 head * view.head_stride + token * view.token_stride);
            }
  }

  std::vector<int64_t> some_blocks(size_t most) const {
    std::vector<int64_t> blocks(static_cast<size_t>(view.num_blocks));
    std::iota(blocks.begin(), blocks.end(), 0);
    if (pick(0, 1)) std::shuffle(blocks.begin(), blocks.end(), random_bits);
    blocks.resize(std::min(most, blocks.size()));
    return blocks;
  }
};

void check_copy(int row_bytes) {
  const int layers = pick(1, 4), heads = pick(1, 4), tokens = pick(1, 5);
  Cache to(layers, heads, tokens, row_bytes, pick(0, 1)), from(layers, heads, tokens, row_bytes, pick(0, 1));
  const std::vector<int64_t> of = from.some_blocks(static_cast<size_t>(to.view.num_blocks));
  const std::vector<int64_t> into = to.some_blocks(of.size());
  const auto bytes = static_cast<size_t>(row_bytes);
  std::vector<uint8_t> expected = to.data, wire(of.size() * 2 * static_cast<size_t>(layers * heads * tokens) * bytes);
  from.rows(of, [&](int64_t i, int64_t at) { std::memcpy(wire.data() + i * row_bytes, from.data.data() + at, bytes); });
  to.rows(into, [&](int64_t i, int64_t at) { std::memcpy(expected.data() + at, wire.data() + i * row_bytes, bytes); });
  copy_blocks(to.view, into.data(), from.view, of.data(), static_cast<int64_t>(of.size()), pick(0, 1));
  if (to.data != expected) fail("a copy is wrong, rows of bytes", row_bytes);
}

float value_of(const uint8_t* p, RowType type) {
  if (type == RowType::F32) {
    float value;
    std::memcpy(&value, p, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return type == RowType::BF16 ? bf16_value(bits) : f16_value(bits);
}

void check_wire(RowType rows, WireType type, int dim) {
  const int layers = pick(1, 3), heads = pick(1, 3), tokens = pick(1, 5), item = rows == RowType::F32 ? 4 : 2;
  Cache from(layers, heads, tokens, dim * item, true), to(layers, heads, tokens, dim * item, true);
  const std::vector<int64_t> of = from.some_blocks(static_cast<size_t>(to.view.num_blocks));
  const std::vector<int64_t> into = to.some_blocks(of.size());
  const auto count = static_cast<int64_t>(of.size());
  std::vector<float> values;
  from.rows(of, [&](int64_t index, int64_t at) {
    uint8_t* row = from.data.data() + at;
    const bool infinite = index % 7 == 3;
    for (int d = 0; d < dim; ++d) {
      const float x = infinite && d == dim / 2 ? INFINITY : bf16_value(bf16_bits(normal()));
      const auto half = static_cast<uint16_t>(infinite && d == dim / 2 ? 0x7c00 : pick(0, 0x7bff) | pick(0, 1) << 15);
      const uint16_t bits = rows == RowType::F16 ? half : bf16_bits(x);
      if (rows == RowType::F32) {
        std::memcpy(row + d * 4, &x, 4);
      } else {
        std::memcpy(row + d * 2, &bits, 2);
      }
      values.push_back(value_of(row + d * item, rows));
    }
  });
  std::vector<uint8_t> wire(of.size() * 2 * static_cast<size_t>(layers * heads * tokens * (dim + 4)));
  compress_blocks(wire.data(), from.view, of.data(), count, rows, type);
  std::vector<uint8_t> beside = to.data;
  restore_blocks(to.view, into.data(), wire.data(), count, rows, type);
  to.rows(into, [&](int64_t index, int64_t at) {
    const float* x = values.data() + index * dim;
    float amax = 0;
    bool finite = true;
    for (int d = 0; d < dim; ++d) {
      finite = finite && std::isfinite(x[d]);
      amax = std::max(amax, std::fabs(x[d]));
    }
    for (int d = 0; d < dim; ++d) {
      const float y = value_of(to.data.data() + at + d * item, rows);
      const float allowed = (type == WireType::I8 ? amax / 250 : amax / 448 / 500 + std::fabs(x[d]) / 15) +
                            (rows == RowType::F32 ? 0 : std::fabs(x[d]) / 250 + 1e-7f);
      if (finite ? !(std::fabs(y - x[d]) <= allowed) : std::isfinite(y)) fail("a row comes back wrong", index);
    }
    std::memcpy(beside.data() + at, to.data.data() + at, static_cast<size_t>(dim * item));
  });
  if (beside != to.data) fail("bytes beside the rows were written, dim", dim);
}

}  // namespace

int main() {
  for (int i = 0; i < 400; ++i) check_copy(i % 4 ? pick(1, 300) : pick(1000, 6000));
  for (const RowType rows : {RowType::F32, RowType::BF16, RowType::F16}) {
    for (const WireType type : {WireType::I8, WireType::F8}) {
      for (int i = 0; i < 40; ++i) check_wire(rows, type, i % 2 ? pick(1, 70) : 16 * pick(1, 16));
    }
  }
  std::printf("relayout: all right\n");
}
