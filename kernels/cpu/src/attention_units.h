// What attention needs of the instruction set beyond simd.h: products of int16 pairs, transposition and interleaving.
//
// Keys and values are multiplied in 32-bit units: one float, or a pair of bfloat16, or a pair of int16. A vector of
// units (Vb) holds one unit for each of 16 tokens (keys) or of 16 dimensions (values).
#pragma once

#include "simd.h"

namespace hr {

#if defined(__AVX512F__)

inline void store_i16(int16_t* p, Vi a) {  // saturating
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a.v));
}
// acc[lane] += x[0] * w[lane][0] + x[1] * w[lane][1]; w is 16 pairs of int16, x one pair for all lanes. Exact.
inline Vi dot_i16(Vi acc, Vb w, uint32_t x) {
  const __m512i all = _mm512_set1_epi32(static_cast<int>(x));
#if defined(__AVX512VNNI__)
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(all));  // the intrinsic spills, as in dot_u8s8
  return acc;
#else
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(w.v, all))};
#endif
}
// The signed bytes 0, 2 (1, 3) of every unit as a pair of int16.
inline Vb widen_even(Vb a) { return {_mm512_srai_epi16(_mm512_slli_epi16(a.v, 8), 8)}; }
inline Vb widen_odd(Vb a) { return {_mm512_srai_epi16(a.v, 8)}; }

// Four rows' 16 bytes at `offset`, one row to a 128-bit lane. Loads that broadcast under a mask need no shuffle port.
inline __m512i four_rows(const uint8_t* const* rows, size_t offset) {
  const auto at = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset));
  };
  __m512i a = _mm512_castsi128_si512(at(0));
  a = _mm512_mask_broadcast_i32x4(a, 0x00f0, at(4));
  a = _mm512_mask_broadcast_i32x4(a, 0x0f00, at(8));
  return _mm512_mask_broadcast_i32x4(a, 0xf000, at(12));
}
// Units offset / 4 .. offset / 4 + 3 of 16 rows: out[j] lane i = unit j of row i.
inline void transpose4(const uint8_t* const* rows, size_t offset, Vb* out) {
  const __m512i a = four_rows(rows, offset), b = four_rows(rows + 1, offset);
  const __m512i c = four_rows(rows + 2, offset), d = four_rows(rows + 3, offset);
  const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab2 = _mm512_unpackhi_epi32(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd2 = _mm512_unpackhi_epi32(c, d);
  out[0].v = _mm512_unpacklo_epi64(ab0, cd0);
  out[1].v = _mm512_unpackhi_epi64(ab0, cd0);
  out[2].v = _mm512_unpacklo_epi64(ab2, cd2);
  out[3].v = _mm512_unpackhi_epi64(ab2, cd2);
}
// Units offset / 4 .. offset / 4 + 15 of 16 rows: out[j] lane i = unit j of row i.
inline void transpose16(const uint8_t* const* rows, size_t offset, Vb* out) {
  __m512i four[16];  // [4 * g + j], lane l: unit 4 * l + j of rows 4 * g .. 4 * g + 3
  for (int g = 0; g < 16; g += 4) {
    const __m512i a = _mm512_loadu_si512(rows[g] + offset), b = _mm512_loadu_si512(rows[g + 1] + offset);
    const __m512i c = _mm512_loadu_si512(rows[g + 2] + offset), d = _mm512_loadu_si512(rows[g + 3] + offset);
    const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab2 = _mm512_unpackhi_epi32(a, b);
    const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd2 = _mm512_unpackhi_epi32(c, d);
    four[g] = _mm512_unpacklo_epi64(ab0, cd0);
    four[g + 1] = _mm512_unpackhi_epi64(ab0, cd0);
    four[g + 2] = _mm512_unpacklo_epi64(ab2, cd2);
    four[g + 3] = _mm512_unpackhi_epi64(ab2, cd2);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xdd);
    out[j].v = _mm512_shuffle_i32x4(a, b, 0x88);
    out[4 + j].v = _mm512_shuffle_i32x4(c, d, 0x88);
    out[8 + j].v = _mm512_shuffle_i32x4(a, b, 0xdd);
    out[12 + j].v = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}
inline __m512i interleaving(int first, int second) {  // words first, second, first + 1, second + 1, ...
  const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_add_epi16(_mm512_or_si512(low, _mm512_slli_epi32(low, 16)),
                          _mm512_set1_epi32(first | second << 16));
}
// 16 pairs (a[i], b[i]).
inline Vb interleave(const uint16_t* a, const uint16_t* b) {
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return {_mm512_permutexvar_epi16(interleaving(0, 16), _mm512_inserti64x4(low, high, 1))};
}
inline Vb interleave(const int8_t* a, const int8_t* b) {  // widened to int16
  const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_inserti128_si256(low, high, 1));
  return {_mm512_permutexvar_epi16(interleaving(0, 16), wide)};
}
// 32 pairs.
inline void interleave_words(__m512i a, __m512i b, Vb* out) {
  out[0].v = _mm512_permutex2var_epi16(a, interleaving(0, 32), b);  // words of b count from 32
  out[1].v = _mm512_permutex2var_epi16(a, interleaving(16, 48), b);
}
inline void interleave2(const uint16_t* a, const uint16_t* b, Vb* out) {
  interleave_words(_mm512_loadu_si512(a), _mm512_loadu_si512(b), out);
}
inline void interleave2(const int8_t* a, const int8_t* b, Vb* out) {
  interleave_words(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
                   _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b))), out);
}

#elif defined(__AVX2__)

inline void store_i16(int16_t* p, Vi x) {
  const __m256i mixed = _mm256_packs_epi32(x.a, x.b);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline Vi dot_i16(Vi acc, Vb w, uint32_t x) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, all)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, all))};
}
inline Vb widen_even(Vb x) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(x.a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(x.b, 8), 8)};
}
inline Vb widen_odd(Vb x) { return {_mm256_srai_epi16(x.a, 8), _mm256_srai_epi16(x.b, 8)}; }

inline __m256i two_rows(const uint8_t* const* rows, size_t offset) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[0] + offset));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4] + offset));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline void transpose4_8(const uint8_t* const* rows, size_t offset, __m256i* out) {
  const __m256i a = two_rows(rows, offset), b = two_rows(rows + 1, offset);
  const __m256i c = two_rows(rows + 2, offset), d = two_rows(rows + 3, offset);
  const __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab2 = _mm256_unpackhi_epi32(a, b);
  const __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd2 = _mm256_unpackhi_epi32(c, d);
  out[0] = _mm256_unpacklo_epi64(ab0, cd0);
  out[1] = _mm256_unpackhi_epi64(ab0, cd0);
  out[2] = _mm256_unpacklo_epi64(ab2, cd2);
  out[3] = _mm256_unpackhi_epi64(ab2, cd2);
}
inline void transpose4(const uint8_t* const* rows, size_t offset, Vb* out) {
  __m256i low[4], high[4];
  transpose4_8(rows, offset, low);
  transpose4_8(rows + 8, offset, high);
  for (int j = 0; j < 4; ++j) out[j] = {low[j], high[j]};
}
inline Vb interleave_words(__m256i a, __m256i b) {
  const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
  return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
}
inline Vb interleave(const uint16_t* a, const uint16_t* b) {
  return interleave_words(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
}
inline Vb interleave(const int8_t* a, const int8_t* b) {
  return interleave_words(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a))),
                          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b))));
}

#else  // portable

inline void store_i16(int16_t* p, Vi x) {
  int16_t narrow[16];
  for (int i = 0; i < 16; ++i) {
    narrow[i] = static_cast<int16_t>(x.v[i] > 32767 ? 32767 : x.v[i] < -32768 ? -32768 : x.v[i]);
  }
  std::memcpy(p, narrow, 32);
}
inline Vi dot_i16(Vi acc, Vb w, uint32_t x) {
  int16_t pairs[32], y[2];
  std::memcpy(pairs, w.v, 64);
  std::memcpy(y, &x, 4);
  for (int i = 0; i < 16; ++i) acc.v[i] += pairs[2 * i] * y[0] + pairs[2 * i + 1] * y[1];
  return acc;
}
inline Vb widen(const Vb& x, int first) {
  Vb r;
  for (int i = 0; i < 32; ++i) {
    const int16_t wide = static_cast<int8_t>(x.v[4 * (i / 2) + 2 * (i % 2) + first]);
    std::memcpy(r.v + 2 * i, &wide, 2);
  }
  return r;
}
inline Vb widen_even(Vb x) { return widen(x, 0); }
inline Vb widen_odd(Vb x) { return widen(x, 1); }
inline void transpose4(const uint8_t* const* rows, size_t offset, Vb* out) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) std::memcpy(out[j].v + 4 * i, rows[i] + offset + 4 * j, 4);
  }
}
inline Vb interleave(const uint16_t* a, const uint16_t* b) {
  Vb r;
  for (int i = 0; i < 16; ++i) {
    std::memcpy(r.v + 4 * i, a + i, 2);
    std::memcpy(r.v + 4 * i + 2, b + i, 2);
  }
  return r;
}
inline Vb interleave(const int8_t* a, const int8_t* b) {
  uint16_t wide_a[16], wide_b[16];
  for (int i = 0; i < 16; ++i) {
    wide_a[i] = static_cast<uint16_t>(static_cast<int16_t>(a[i]));
    wide_b[i] = static_cast<uint16_t>(static_cast<int16_t>(b[i]));
  }
  return interleave(wide_a, wide_b);
}

#endif

// Not the builtin: gcc takes a function that only prefetches for one without effect, and removes its calls.
#if defined(__x86_64__)
inline void prefetch(const void* p) { asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p))); }
#else
inline void prefetch(const void*) {}
#endif

#if !defined(__AVX512F__)
inline void transpose16(const uint8_t* const* rows, size_t offset, Vb* out) {
  for (int j = 0; j < 16; j += 4) transpose4(rows, offset + 4 * static_cast<size_t>(j), out + j);
}
template <class T>
inline void interleave2(const T* a, const T* b, Vb* out) {
  out[0] = interleave(a, b);
  out[1] = interleave(a + kLanes, b + kLanes);
}
#endif

}  // namespace hr
