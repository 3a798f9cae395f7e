// What becomes of a head between the QKV projection and attention: norm, rotation, the write into the cache.
#include "attention.h"
#include "simd.h"

namespace hr {

void norm_row(float* x, int n, const float* weight, float eps) {
  Vf squares = zero_f();
  for (int i = 0; i < n; i += kLanes) {
    const Vf v = load(x + i);
    squares = fma(v, v, squares);
  }
  const Vf inverse = set1(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(n) + eps));
  for (int i = 0; i < n; i += kLanes) store(x + i, load(x + i) * inverse * load(weight + i));
}

void norm_rotate(float* head, int head_dim, const float* weight, float eps, const float* cos, const float* sin) {
  if (weight) norm_row(head, head_dim, weight, eps);
  const int half = head_dim / 2;
  for (int d = 0; d < half; d += kLanes) {
    const int n = half - d < kLanes ? half - d : kLanes;  // half of a head may be 8 more than a multiple of 16
    const Vf x1 = load_n(head + d, n), x2 = load_n(head + half + d, n);
    const Vf c = load_n(cos + d, n), s = load_n(sin + d, n);
    store_n(head + d, fma(x1, c, zero_f() - x2 * s), n);
    store_n(head + half + d, fma(x2, c, x1 * s), n);
  }
}

void write_kv(const KvCache& kv, int layer, int k_or_v, int kv_head, int64_t slot, const float* head) {
  const int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
  uint8_t* const to = tile(kv, static_cast<int>(block), layer, k_or_v, kv_head);
  const int dim = kv.head_dim;
  const size_t at = static_cast<size_t>(offset) * static_cast<size_t>(dim);
  if (kv.type == KvType::F32) {
    std::memcpy(to + at * 4, head, static_cast<size_t>(dim) * 4);
    return;
  }
  if (kv.type == KvType::BF16) {
    uint16_t* values = reinterpret_cast<uint16_t*>(to) + at;
    for (int d = 0; d < dim; d += kLanes) store_bf16(values + d, load(head + d));
    return;
  }
  Vf most = zero_f();
  for (int d = 0; d < dim; d += kLanes) most = max(most, abs(load(head + d)));
  const float largest = reduce_max(most);
  const float scale = largest > 1e-30f ? largest / 127.0f : 0.0f;  // below, 127 / largest would overflow
  const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
  int8_t* values = reinterpret_cast<int8_t*>(to) + at;
  for (int d = 0; d < dim; d += kLanes) store_i8(values + d, to_int(load(head + d) * set1(inverse)));
  std::memcpy(to + static_cast<size_t>(kv.block_size) * static_cast<size_t>(dim) + static_cast<size_t>(offset) * 4,
              &scale, 4);
}

}  // namespace hr
