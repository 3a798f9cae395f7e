// Attention over random shapes, in buffers of exactly the size they must have, against a naive loop in double. Meant
// for AddressSanitizer and UndefinedBehaviorSanitizer.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "simd.h"

using namespace hr;

namespace {

std::mt19937 random_bits(1);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }

[[noreturn]] void fail(const char* what, double found, double allowed) {
  std::printf("%s: %g, allowed %g\n", what, found, allowed);
  std::exit(1);
}

float stored(const KvCache& kv, int block, int k_or_v, int head, int offset, int d) {
  const uint8_t* at = tile(kv, block, 0, k_or_v, head);
  const size_t index = static_cast<size_t>(offset) * kv.head_dim + d;
  if (kv.type == KvType::I8) {
    float scale;
    std::memcpy(&scale, at + static_cast<size_t>(kv.block_size) * kv.head_dim + static_cast<size_t>(offset) * 4, 4);
    return scale * static_cast<float>(reinterpret_cast<const int8_t*>(at)[index]);
  }
  if (kv.type == KvType::BF16) {
    uint16_t bits;
    std::memcpy(&bits, at + index * 2, 2);
    return bf16_value(bits);
  }
  float value;
  std::memcpy(&value, at + index * 4, 4);
  return value;
}

struct Shape {
  KvType type;
  int head_dim, block_size, kv_heads, group, length, rows, window;
};

void check(const Shape& shape) {
  const int blocks = (shape.length + shape.block_size - 1) / shape.block_size, dim = shape.head_dim;
  KvCache kv{nullptr, shape.type, blocks, 1, shape.kv_heads, shape.block_size, dim};
  std::vector<uint8_t> data(tile_bytes(kv) * static_cast<size_t>(blocks) * 2 * static_cast<size_t>(shape.kv_heads));
  kv.data = data.data();
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (int i = 0; i < blocks; ++i) table[static_cast<size_t>(i)] = i;
  std::shuffle(table.begin(), table.end(), random_bits);

  std::vector<float> head(static_cast<size_t>(dim));
  for (int t = 0; t < shape.length; ++t) {
    for (int h = 0; h < shape.kv_heads; ++h) {
      for (int k_or_v = 0; k_or_v < 2; ++k_or_v) {
        for (float& x : head) x = normal();
        const int64_t block = table[static_cast<size_t>(t / shape.block_size)];
        write_kv(kv, 0, k_or_v, h, block * shape.block_size + t % shape.block_size, head.data());
      }
    }
  }
  const int heads = shape.kv_heads * shape.group, stride = heads * dim;
  std::vector<float> q(static_cast<size_t>(shape.rows) * static_cast<size_t>(stride));
  for (float& x : q) x = bf16_value(bf16_bits(normal()));

  const AttentionShape attention{heads, shape.window, 1.0f / std::sqrt(static_cast<float>(dim))};
  const Sequence seq{table.data(), 0, shape.rows, shape.length};
  const int most = attend_rows(kv, attention), item = pick(1, most);
  const size_t row_floats = static_cast<size_t>(dim) + 2;
  std::vector<float> out(q.size()), merged(q.size());
  std::vector<uint16_t> out16(q.size());
  for (int h = 0; h < shape.kv_heads; ++h) {
    for (int row = 0; row < shape.rows; row += item) {
      const int rows = std::min(item, shape.rows - row);
      std::vector<float> scratch(attend_scratch_floats(kv, attention));
      const auto run = [&](int key0, int key1, void* to, bool bf16, float* partial) {
        attend(kv, 0, attention, seq, h, row, rows, key0, key1, q.data(), stride, to, stride, bf16, partial,
               scratch.data(), true);
      };
      run(0, shape.length, out.data(), false, nullptr);
      run(0, shape.length, out16.data(), true, nullptr);
      if (shape.length <= kSplitKeys) continue;
      const size_t floats = static_cast<size_t>(rows * shape.group) * row_floats;
      std::vector<std::vector<float>> parts;
      for (int key = 0; key < shape.length; key += kSplitKeys) {
        parts.emplace_back(floats);
        run(key, std::min(key + kSplitKeys, shape.length), nullptr, false, parts.back().data());
      }
      for (int r = 0; r < rows * shape.group; ++r) {
        std::vector<const float*> of_row;
        for (const auto& part : parts) of_row.push_back(part.data() + static_cast<size_t>(r) * row_floats);
        const int at = (row + r / shape.group) * stride + (h * shape.group + r % shape.group) * dim;
        merge_partials(of_row.data(), static_cast<int>(of_row.size()), dim, merged.data() + at, false);
      }
    }
  }
  if (shape.length > kSplitKeys && merged != out) fail("merged parts differ from the whole", 1, 0);

  double worst = 0, largest = 0;
  for (int row = 0; row < shape.rows; ++row) {
    const int position = shape.length - shape.rows + row;
    const int first = shape.window ? std::max(0, position - shape.window + 1) : 0;
    for (int h = 0; h < heads; ++h) {
      const float* query = q.data() + row * stride + h * dim;
      std::vector<double> scores, sum(static_cast<size_t>(dim));
      for (int t = first; t <= position; ++t) {
        double score = 0;
        const int block = table[static_cast<size_t>(t / shape.block_size)];
        for (int d = 0; d < dim; ++d) score += query[d] * stored(kv, block, 0, h / shape.group, t % shape.block_size, d);
        scores.push_back(score * attention.scale);
      }
      const double highest = *std::max_element(scores.begin(), scores.end());
      double total = 0;
      for (int t = first; t <= position; ++t) {
        const double p = std::exp(scores[static_cast<size_t>(t - first)] - highest);
        const int block = table[static_cast<size_t>(t / shape.block_size)];
        total += p;
        for (int d = 0; d < dim; ++d) {
          const double v = stored(kv, block, 1, h / shape.group, t % shape.block_size, d);
          sum[static_cast<size_t>(d)] += p * v;
          largest = std::max(largest, std::abs(v));
        }
      }
      for (int d = 0; d < dim; ++d) {
        const size_t at = static_cast<size_t>(row * stride + h * dim + d);
        worst = std::max(worst, std::abs(out[at] - sum[static_cast<size_t>(d)] / total));
        if (out16[at] != bf16_bits(out[at])) fail("bfloat16 output is not the rounded float", out[at], 0);
      }
    }
  }
  const double allowed = (shape.type == KvType::F32 ? 3e-6 : shape.type == KvType::BF16 ? 4e-3 : 2e-4) * largest;
  if (!(worst <= allowed)) fail("attention errs", worst, allowed);
}

void check_rotation() {
  for (int dim = 16; dim <= 256; dim += 16) {
    const size_t n = static_cast<size_t>(dim), half = n / 2;
    std::vector<float> x(n), weight(n, 2.0f), cos(half, 0.0f), sin(half, 1.0f);
    for (float& value : x) value = normal();
    const std::vector<float> before = x;
    norm_rotate(x.data(), dim, nullptr, 0.0f, cos.data(), sin.data());  // by a right angle
    for (size_t d = 0; d < half; ++d) {
      if (x[d] != -before[half + d] || x[half + d] != before[d]) fail("rotation", x[d], before[half + d]);
    }
    norm_rotate(x.data(), dim, weight.data(), 1e-6f, cos.data(), sin.data());
    double squares = 0;
    for (float value : x) squares += static_cast<double>(value) * value;
    if (std::abs(squares / dim - 4.0) > 1e-4) fail("norm", squares / dim, 4.0);
  }
}

}  // namespace

int main() {
  check_rotation();
  for (const KvType type : {KvType::F32, KvType::BF16, KvType::I8}) {
    for (int i = 0; i < 60; ++i) {
      const int length = pick(1, i % 4 ? 80 : 600), rows = i % 3 ? pick(1, std::min(length, 70)) : 1;
      check({type, 16 * pick(1, i % 5 ? 6 : 16), pick(1, 40), pick(1, 2), pick(1, 5), length, rows,
             i % 2 ? 0 : pick(1, 2 * length)});
    }
    check({type, 16, 16, 1, 3, 2 * kSplitKeys + 5, 9, 0});
    check({type, 32, 256, 1, 1, kSplitKeys + 1, 3, 2000});
  }
  std::printf("attention: all right\n");
}
