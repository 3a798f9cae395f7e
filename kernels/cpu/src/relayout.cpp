// Copies of blocks in as few and as long runs as both layouts allow, and the rows of the wire's compressed form.
#include "relayout.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hr {

namespace {

// ---- copies ---------------------------------------------------------------------------------------------------------

// Shorter runs are left to memcpy. Measured on Zen 5, blocks in random order out of 512 MiB, GB/s of memcpy and of this:
// 1 KiB 8 and 11, 12 KiB 13 and 17, 64 KiB 21 and 23, 1 MiB and more 20 and 26.
constexpr int64_t kStreamRun = 1024;

#if defined(__AVX2__)
// Past the caches: what is written is not read first, and the caches keep what they have.
void stream_run(uint8_t* to, const uint8_t* from, int64_t bytes) {
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  std::memcpy(to, from, static_cast<size_t>(head));
  // The processor's own prefetching stops at each page; ours goes ahead of it, in short runs by less, for what is
  // fetched beyond the end is fetched for nothing.
  const int64_t ahead = std::min<int64_t>(4096, std::max<int64_t>(1024, bytes / 12));
  int64_t at = head;
  for (; at + 256 <= bytes; at += 256) {
    if (at + ahead + 256 <= bytes) {
      for (int line = 0; line < 256; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(from + at + ahead + line), _MM_HINT_NTA);
      }
    }
#if defined(__AVX512F__)
    const __m512i a = _mm512_loadu_si512(from + at), b = _mm512_loadu_si512(from + at + 64);
    const __m512i c = _mm512_loadu_si512(from + at + 128), d = _mm512_loadu_si512(from + at + 192);
    auto* into = reinterpret_cast<__m512i*>(to + at);
    _mm512_stream_si512(into, a);
    _mm512_stream_si512(into + 1, b);
    _mm512_stream_si512(into + 2, c);
    _mm512_stream_si512(into + 3, d);
#else
    const auto* of = reinterpret_cast<const __m256i*>(from + at);
    auto* into = reinterpret_cast<__m256i*>(to + at);
    __m256i lines[8];
    for (int i = 0; i < 8; ++i) lines[i] = _mm256_loadu_si256(of + i);
    for (int i = 0; i < 8; ++i) _mm256_stream_si256(into + i, lines[i]);
#endif
  }
  std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
}
// Streaming stores are not ordered with later ones, by which another thread may be told that the bytes are there.
void end_stream() { _mm_sfence(); }
constexpr bool kHasStream = true;
#else
void stream_run(uint8_t*, const uint8_t*, int64_t) {}
void end_stream() {}
constexpr bool kHasStream = false;
#endif

// A block as runs of bytes: one at each point of up to four nested loops, the outermost first.
struct Runs {
  struct Loop {
    int64_t count = 1, to = 0, from = 0;  // strides
  };
  Loop loops[4];
  int64_t bytes;

  Runs(const CacheView& to, const CacheView& from) : bytes(to.row_bytes) {
    add(to.num_tokens, to.token_stride, from.token_stride);
    add(to.num_heads, to.head_stride, from.head_stride);
    add(2, to.kv_stride, from.kv_stride);
    add(to.num_layers, to.layer_stride, from.layer_stride);
  }

  bool whole() const { return used_ == 0; }

  template <class Copy>
  void each(uint8_t* to, const uint8_t* from, const Copy& copy) const {
    for (int64_t a = 0; a < loops[0].count; ++a)
      for (int64_t b = 0; b < loops[1].count; ++b)
        for (int64_t c = 0; c < loops[2].count; ++c)
          for (int64_t d = 0; d < loops[3].count; ++d) {
            copy(to + a * loops[0].to + b * loops[1].to + c * loops[2].to + d * loops[3].to,
                 from + a * loops[0].from + b * loops[1].from + c * loops[2].from + d * loops[3].from);
          }
  }

 private:
  int used_ = 0;

  // From the innermost outwards: into the run, or into the loop inside it, where it continues that on both sides.
  void add(int64_t count, int64_t to, int64_t from) {
    if (count == 1) return;
    if (used_ == 0 && to == bytes && from == bytes) {
      bytes *= count;
      return;
    }
    if (used_ > 0) {
      Loop& last = loops[4 - used_];
      if (to == last.to * last.count && from == last.from * last.count) {
        last.count *= count;
        return;
      }
    }
    ++used_;
    loops[4 - used_] = {count, to, from};
  }
};

// ---- rows of the wire -----------------------------------------------------------------------------------------------
//
// Plain loops, which the compiler turns into the variant's vectors; each computes the same bits in all. It does so only
// where it sees no branch, hence `choose`.

template <class T>
inline T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class To, class From>
inline To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

inline uint32_t choose(bool first, uint32_t a, uint32_t b) { return b ^ ((a ^ b) & (0u - static_cast<uint32_t>(first))); }

constexpr uint32_t kInfinity = 0x7f800000u, kSize = 0x7fffffffu;

inline float half_value(uint16_t half) {
  const uint32_t bits = half, size = (bits & 0x7fffu) << 13;
  const uint32_t normal = size + (112u << 23);
  const uint32_t small = as<uint32_t>(static_cast<float>(static_cast<int32_t>(bits & 0x7fffu)) * 0x1p-24f);
  const uint32_t above = choose(size >= (31u << 23), normal + (112u << 23), normal);
  return as<float>(choose(size < (1u << 23), small, above) | (bits & 0x8000u) << 16);
}

inline uint16_t half_bits(float value) {
  const uint32_t bits = as<uint32_t>(value), size = bits & kSize;
  const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t small = as<uint32_t>(as<float>(size) + 0.5f) - 0x3f000000u;  // steps of 2^-24
  const uint32_t finite = choose(size < (113u << 23), small, normal);
  const uint32_t above = choose(size > kInfinity, 0x7e00u, 0x7c00u);
  return static_cast<uint16_t>(choose(size >= (143u << 23), above, finite) | (bits >> 16 & 0x8000u));
}

inline uint16_t bfloat_bits(float value) {
  const uint32_t bits = as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(choose((bits & kSize) > kInfinity, 0x7fc0u, rounded));
}

// |value| at most a little above 448, the largest there is.
inline uint8_t e4m3_bits(float value) {
  const uint32_t bits = as<uint32_t>(value), size = bits & kSize;
  const uint32_t normal = (size + 0x7ffffu + ((size >> 20) & 1u) - (120u << 23)) >> 20;
  const uint32_t small = as<uint32_t>(as<float>(size) + 16384.0f) - 0x46800000u;  // steps of 2^-9 below 2^-6
  return static_cast<uint8_t>(choose(size < (121u << 23), small, normal) | (bits >> 24 & 0x80u));
}

inline float e4m3_value(uint8_t byte) {
  const uint32_t bits = byte, size = bits & 0x7fu;
  const uint32_t small = as<uint32_t>(static_cast<float>(static_cast<int32_t>(size)) * 0x1p-9f);
  const uint32_t normal = choose(size == 0x7fu, 0x7fc00000u, (size << 20) + (120u << 23));
  return as<float>(choose(size < 8u, small, normal) | (bits & 0x80u) << 24);
}

template <RowType type>
void widen(const uint8_t* __restrict row, int64_t dim, float* __restrict out) {
  if (type == RowType::F32) std::memcpy(out, row, static_cast<size_t>(dim) * 4);
  if (type == RowType::BF16)
    for (int64_t i = 0; i < dim; ++i) out[i] = as<float>(static_cast<uint32_t>(read<uint16_t>(row + 2 * i)) << 16);
  if (type == RowType::F16)
    for (int64_t i = 0; i < dim; ++i) out[i] = half_value(read<uint16_t>(row + 2 * i));
}

template <RowType type>
void narrow(const float* __restrict values, int64_t dim, uint8_t* __restrict row) {
  if (type == RowType::F32) std::memcpy(row, values, static_cast<size_t>(dim) * 4);
  if (type == RowType::F32) return;
  for (int64_t i = 0; i < dim; ++i) {
    const uint16_t bits = type == RowType::BF16 ? bfloat_bits(values[i]) : half_bits(values[i]);
    std::memcpy(row + 2 * i, &bits, 2);
  }
}

// Returns the scale.
template <WireType type>
float compress_row(const float* __restrict x, int64_t dim, uint8_t* __restrict q) {
  constexpr float kLargest = type == WireType::I8 ? 127.0f : 448.0f;
  int32_t most = 0;  // bits of floats without a sign are in order, those that are not finite last
  for (int64_t i = 0; i < dim; ++i) most = std::max(most, static_cast<int32_t>(as<uint32_t>(x[i]) & kSize));
  const float amax = as<float>(most);
  const bool finite = most < static_cast<int32_t>(kInfinity);
  if (!finite || !(amax > 1e-30f)) {  // below, kLargest / amax would overflow
    std::memset(q, 0, static_cast<size_t>(dim));
    return finite ? 0.0f : as<float>(0x7fc00000u);
  }
  const float inverse = kLargest / amax;
  for (int64_t i = 0; i < dim; ++i) {
    const float y = x[i] * inverse;
    if (type == WireType::I8) {
      q[i] = static_cast<uint8_t>(as<uint32_t>(y + 12582912.0f));  // 1.5 * 2^23: the last byte is the rounded integer
    } else {
      q[i] = e4m3_bits(y);
    }
  }
  return amax / kLargest;
}

template <WireType type>
void restore_row(const uint8_t* __restrict q, float scale, int64_t dim, float* __restrict x) {
  for (int64_t i = 0; i < dim; ++i) {
    x[i] = scale * (type == WireType::I8 ? static_cast<float>(static_cast<int8_t>(q[i])) : e4m3_value(q[i]));
  }
}

// work(first row of a tile in the cache, the tile on the wire)
template <class Byte, class Work>
void for_tiles(const CacheView& view, const int64_t* blocks, int64_t count, Byte* wire, int64_t tile, const Work& work) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t layer = 0; layer < view.num_layers; ++layer)
      for (int64_t kv = 0; kv < 2; ++kv)
        for (int64_t head = 0; head < view.num_heads; ++head, wire += tile) {
          work(view.address + blocks[i] * view.block_stride + layer * view.layer_stride + kv * view.kv_stride +
                   head * view.head_stride,
               wire);
        }
}

template <RowType rows, WireType type>
void compress(uint8_t* wire, const CacheView& from, const int64_t* blocks, int64_t count) {
  const int64_t dim = from.row_bytes / (rows == RowType::F32 ? 4 : 2), tokens = from.num_tokens;
  std::vector<float> values(static_cast<size_t>(dim));
  for_tiles(from, blocks, count, wire, tokens * (dim + 4), [&](const uint8_t* row, uint8_t* tile) {
    uint8_t* const scales = tile + tokens * dim;
    for (int64_t t = 0; t < tokens; ++t) {
      widen<rows>(row + t * from.token_stride, dim, values.data());
      const float scale = compress_row<type>(values.data(), dim, tile + t * dim);
      std::memcpy(scales + t * 4, &scale, 4);
    }
  });
}

template <RowType rows, WireType type>
void restore(const CacheView& to, const int64_t* blocks, const uint8_t* wire, int64_t count) {
  const int64_t dim = to.row_bytes / (rows == RowType::F32 ? 4 : 2), tokens = to.num_tokens;
  std::vector<float> values(static_cast<size_t>(dim));
  for_tiles(to, blocks, count, wire, tokens * (dim + 4), [&](uint8_t* row, const uint8_t* tile) {
    const uint8_t* const scales = tile + tokens * dim;
    for (int64_t t = 0; t < tokens; ++t) {
      restore_row<type>(tile + t * dim, read<float>(scales + t * 4), dim, values.data());
      narrow<rows>(values.data(), dim, row + t * to.token_stride);
    }
  });
}

using Compress = void (*)(uint8_t*, const CacheView&, const int64_t*, int64_t);
using Restore = void (*)(const CacheView&, const int64_t*, const uint8_t*, int64_t);

constexpr Compress kCompress[3][2] = {
    {compress<RowType::F32, WireType::I8>, compress<RowType::F32, WireType::F8>},
    {compress<RowType::BF16, WireType::I8>, compress<RowType::BF16, WireType::F8>},
    {compress<RowType::F16, WireType::I8>, compress<RowType::F16, WireType::F8>},
};
constexpr Restore kRestore[3][2] = {
    {restore<RowType::F32, WireType::I8>, restore<RowType::F32, WireType::F8>},
    {restore<RowType::BF16, WireType::I8>, restore<RowType::BF16, WireType::F8>},
    {restore<RowType::F16, WireType::I8>, restore<RowType::F16, WireType::F8>},
};

}  // namespace

void copy_blocks(const CacheView& to, const int64_t* to_blocks, const CacheView& from, const int64_t* from_blocks,
                 int64_t count, bool stream) {
  const Runs runs(to, from);
  const bool adjoin = runs.whole() && to.block_stride == runs.bytes && from.block_stride == runs.bytes;
  bool streamed = false;
  for (int64_t first = 0, last; first < count; first = last) {
    last = first + 1;
    if (adjoin) {
      while (last < count && to_blocks[last] == to_blocks[last - 1] + 1 && from_blocks[last] == from_blocks[last - 1] + 1) {
        ++last;
      }
    }
    const int64_t bytes = runs.bytes * (last - first);
    uint8_t* const into = to.address + to_blocks[first] * to.block_stride;
    const uint8_t* const of = from.address + from_blocks[first] * from.block_stride;
    if (stream && kHasStream && bytes >= kStreamRun) {
      streamed = true;
      runs.each(into, of, [bytes](uint8_t* a, const uint8_t* b) { stream_run(a, b, bytes); });
    } else {
      runs.each(into, of, [bytes](uint8_t* a, const uint8_t* b) { std::memcpy(a, b, static_cast<size_t>(bytes)); });
    }
  }
  if (streamed) end_stream();
}

void compress_blocks(uint8_t* wire, const CacheView& from, const int64_t* blocks, int64_t count, RowType rows,
                     WireType type) {
  kCompress[static_cast<int>(rows)][static_cast<int>(type)](wire, from, blocks, count);
}

void restore_blocks(const CacheView& to, const int64_t* blocks, const uint8_t* wire, int64_t count, RowType rows,
                    WireType type) {
  kRestore[static_cast<int>(rows)][static_cast<int>(type)](to, blocks, wire, count);
}

}  // namespace hr

extern "C" {

void hr_copy_blocks(const hr::CacheView* to, const int64_t* to_blocks, const hr::CacheView* from,
                    const int64_t* from_blocks, int64_t count, int32_t stream) {
  hr::copy_blocks(*to, to_blocks, *from, from_blocks, count, stream != 0);
}

// False when memory is short.
int32_t hr_compress_blocks(uint8_t* wire, const hr::CacheView* from, const int64_t* blocks, int64_t count, int32_t rows,
                           int32_t type) {
  try {
    hr::compress_blocks(wire, *from, blocks, count, static_cast<hr::RowType>(rows), static_cast<hr::WireType>(type));
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

int32_t hr_restore_blocks(const hr::CacheView* to, const int64_t* blocks, const uint8_t* wire, int64_t count,
                          int32_t rows, int32_t type) {
  try {
    hr::restore_blocks(*to, blocks, wire, count, static_cast<hr::RowType>(rows), static_cast<hr::WireType>(type));
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
}
