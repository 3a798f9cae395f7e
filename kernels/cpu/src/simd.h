// Sixteen lanes, one name for each operation: the same kernels compile to AVX-512, AVX2 and plain C++.
//
// What an operation computes does not hang on the instruction set, but for the order of roundings inside dot_bf16.
// Everything is inline: a kernel is compiled once per variant of the library (see build.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hr {

constexpr int kLanes = 16;

#if defined(__AVX512F__)  // ------------------------------------------------------------------------------------------

struct Vf { __m512 v; };   // 16 x float32
struct Vi { __m512i v; };  // 16 x int32
struct Vb { __m512i v; };  // 64 bytes

inline __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vf zero_f() { return {_mm512_setzero_ps()}; }
inline Vf set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vf load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline void store(float* p, Vf a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, Vf a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
inline Vf operator+(Vf a, Vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vf operator-(Vf a, Vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vf operator*(Vf a, Vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vf operator/(Vf a, Vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vf fma(Vf a, Vf b, Vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vf max(Vf a, Vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vf min(Vf a, Vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vf abs(Vf a) { return {_mm512_abs_ps(a.v)}; }
inline float reduce_add(Vf a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vf a) { return _mm512_reduce_max_ps(a.v); }
inline Vf round(Vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vf scale_by_power(Vf a, Vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n integral

inline Vi zero_i() { return {_mm512_setzero_si512()}; }
inline Vi set1_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Vi operator+(Vi a, Vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Vf to_float(Vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Vi to_int(Vf a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest even
inline Vf as_float(Vi a) { return {_mm512_castsi512_ps(a.v)}; }  // the same bits
inline Vi as_int(Vf a) { return {_mm512_castps_si512(a.v)}; }
inline int32_t reduce_add(Vi a) { return _mm512_reduce_add_epi32(a.v); }
inline void store_i8(int8_t* p, Vi a) {  // saturating
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}
inline Vf load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

inline Vf load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline void store_bf16(uint16_t* p, Vf a) {  // nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#endif
}
inline Vf load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline Vb load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(void* p, Vb a) { _mm512_storeu_si512(p, a.v); }
inline Vb low_nibbles(Vb a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0x0f))}; }
inline Vb high_nibbles(Vb a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(0x0f))};
}

// acc[lane] += x[0] * w[lane][0] + x[1] * w[lane][1]; w is 16 pairs of bfloat16, x one pair for all lanes.
inline Vf dot_bf16(Vf acc, Vb w, uint32_t x) {
#if defined(__AVX512BF16__)
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)))};
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 x0 = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x << 16)));
  const __m512 x1 = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x & 0xffff0000u)));
  acc.v = _mm512_fmadd_ps(x0, _mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16)), acc.v);
  acc.v = _mm512_fmadd_ps(x1, _mm512_castsi512_ps(_mm512_and_si512(w.v, high)), acc.v);
  return acc;
#endif
}

// acc[lane] += sum of w[lane][j] * x[j], j = 0..3; w unsigned bytes, x four signed bytes for all lanes. Exact.
inline Vi dot_u8s8(Vi acc, Vb w, int32_t x) {
  const __m512i all = _mm512_set1_epi32(x);
#if defined(__AVX512VNNI__)
  // Not the intrinsic: gcc 12 copies and spills its accumulators, which halves the speed of a register block.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(all));
  return acc;
#else
  const __m512i even = _mm512_and_si512(w.v, _mm512_set1_epi16(0x00ff));
  const __m512i odd = _mm512_srli_epi16(w.v, 8);
  const __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8);
  const __m512i x_odd = _mm512_srai_epi16(all, 8);
  const __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd));
  return {_mm512_add_epi32(acc.v, sum)};
#endif
}

#elif defined(__AVX2__)  // -------------------------------------------------------------------------------------------

struct Vf { __m256 a, b; };
struct Vi { __m256i a, b; };
struct Vb { __m256i a, b; };

inline Vf zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vf set1(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
inline Vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vf x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline Vf load_n(const float* p, int n) {
  float t[16] = {};
  std::memcpy(t, p, static_cast<size_t>(n) * 4);
  return load(t);
}
inline void store_n(float* p, Vf x, int n) {
  float t[16];
  store(t, x);
  std::memcpy(p, t, static_cast<size_t>(n) * 4);
}
inline Vf operator+(Vf x, Vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Vf operator-(Vf x, Vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Vf operator*(Vf x, Vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Vf operator/(Vf x, Vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Vf fma(Vf x, Vf y, Vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Vf max(Vf x, Vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Vf min(Vf x, Vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Vf abs(Vf x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline float reduce_add(Vf x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float reduce_max(Vf x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
inline Vf round(Vf x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
inline __m256 scale_by_power_8(__m256 x, __m256 n) {  // n in [-252, 254]: two factors, each a normal power of two
  const __m256i i = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half), bias = _mm256_set1_epi32(127);
  const __m256 f = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 g = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(x, f), g);
}
inline Vf scale_by_power(Vf x, Vf n) { return {scale_by_power_8(x.a, n.a), scale_by_power_8(x.b, n.b)}; }

inline Vi zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Vi set1_i(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
inline Vi operator+(Vi x, Vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Vf to_float(Vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Vi to_int(Vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Vf as_float(Vi x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline Vi as_int(Vf x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline int32_t reduce_add(Vi x) {
  const __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
inline void store_i8(int8_t* p, Vi x) {
  const __m128i lo = _mm_packs_epi32(_mm256_castsi256_si128(x.a), _mm256_extracti128_si256(x.a, 1));
  const __m128i hi = _mm_packs_epi32(_mm256_castsi256_si128(x.b), _mm256_extracti128_si256(x.b, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(lo, hi));
}
inline Vf load_i8(const int8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
}
inline __m256 load_bf16_8(const uint16_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
inline Vf load_bf16(const uint16_t* p) { return {load_bf16_8(p), load_bf16_8(p + 8)}; }
inline void store_bf16_8(uint16_t* p, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store_bf16(uint16_t* p, Vf x) { store_bf16_8(p, x.a); store_bf16_8(p + 8, x.b); }
inline Vf load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline Vb load_bytes(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_bytes(void* p, Vb x) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
}
inline Vb low_nibbles(Vb x) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Vb high_nibbles(Vb x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline __m256 dot_bf16_8(__m256 acc, __m256i w, __m256 x0, __m256 x1) {
  acc = _mm256_fmadd_ps(x0, _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), acc);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm256_fmadd_ps(x1, _mm256_castsi256_ps(_mm256_and_si256(w, high)), acc);
}
inline Vf dot_bf16(Vf acc, Vb w, uint32_t x) {
  const __m256 x0 = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(x << 16)));
  const __m256 x1 = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(x & 0xffff0000u)));
  return {dot_bf16_8(acc.a, w.a, x0, x1), dot_bf16_8(acc.b, w.b, x0, x1)};
}
inline __m256i dot_u8s8_8(__m256i acc, __m256i w, __m256i x_even, __m256i x_odd) {
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(0x00ff));
  const __m256i odd = _mm256_srli_epi16(w, 8);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
}
inline Vi dot_u8s8(Vi acc, Vb w, int32_t x) {
  const __m256i all = _mm256_set1_epi32(x);
  const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), x_odd = _mm256_srai_epi16(all, 8);
  return {dot_u8s8_8(acc.a, w.a, x_even, x_odd), dot_u8s8_8(acc.b, w.b, x_even, x_odd)};
}

// As dot_u8s8 for weights of 0..15: pairs of their products fit 16 bits.
inline __m256i dot_u4s8_8(__m256i acc, __m256i w, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
#define HR_DOT_U4S8 1
inline Vi dot_u4s8(Vi acc, Vb w, int32_t x) {
  const __m256i all = _mm256_set1_epi32(x);
  return {dot_u4s8_8(acc.a, w.a, all), dot_u4s8_8(acc.b, w.b, all)};
}

#else  // portable ---------------------------------------------------------------------------------------------------

struct Vf { float v[16]; };
struct Vi { int32_t v[16]; };
struct Vb { uint8_t v[64]; };

#define HR_LANES for (int i = 0; i < 16; ++i)
inline Vf zero_f() { return {}; }
inline Vf set1(float x) { Vf r; HR_LANES r.v[i] = x; return r; }
inline Vf load(const float* p) { Vf r; std::memcpy(r.v, p, 64); return r; }
inline void store(float* p, Vf x) { std::memcpy(p, x.v, 64); }
inline Vf load_n(const float* p, int n) { Vf r{}; std::memcpy(r.v, p, static_cast<size_t>(n) * 4); return r; }
inline void store_n(float* p, Vf x, int n) { std::memcpy(p, x.v, static_cast<size_t>(n) * 4); }
inline Vf operator+(Vf x, Vf y) { HR_LANES x.v[i] += y.v[i]; return x; }
inline Vf operator-(Vf x, Vf y) { HR_LANES x.v[i] -= y.v[i]; return x; }
inline Vf operator*(Vf x, Vf y) { HR_LANES x.v[i] *= y.v[i]; return x; }
inline Vf operator/(Vf x, Vf y) { HR_LANES x.v[i] /= y.v[i]; return x; }
inline Vf fma(Vf x, Vf y, Vf z) { HR_LANES z.v[i] += x.v[i] * y.v[i]; return z; }
inline Vf max(Vf x, Vf y) { HR_LANES x.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i]; return x; }
inline Vf min(Vf x, Vf y) { HR_LANES x.v[i] = x.v[i] < y.v[i] ? x.v[i] : y.v[i]; return x; }
inline Vf abs(Vf x) { HR_LANES x.v[i] = std::fabs(x.v[i]); return x; }
inline float reduce_add(Vf x) {
  for (int n = 8; n; n /= 2) for (int i = 0; i < n; ++i) x.v[i] += x.v[i + n];
  return x.v[0];
}
inline float reduce_max(Vf x) {
  for (int n = 8; n; n /= 2) for (int i = 0; i < n; ++i) x.v[i] = x.v[i] > x.v[i + n] ? x.v[i] : x.v[i + n];
  return x.v[0];
}
inline Vf round(Vf x) { HR_LANES x.v[i] = std::nearbyintf(x.v[i]); return x; }
inline float power_of_two(int32_t n) {  // n in [-126, 127]
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline Vf scale_by_power(Vf x, Vf n) {
  HR_LANES {
    const int32_t k = static_cast<int32_t>(n.v[i]), half = k >> 1;
    x.v[i] = x.v[i] * power_of_two(half) * power_of_two(k - half);
  }
  return x;
}
inline Vi zero_i() { return {}; }
inline Vi set1_i(int32_t x) { Vi r; HR_LANES r.v[i] = x; return r; }
inline Vi operator+(Vi x, Vi y) { HR_LANES x.v[i] += y.v[i]; return x; }
inline Vf to_float(Vi x) { Vf r; HR_LANES r.v[i] = static_cast<float>(x.v[i]); return r; }
inline Vi to_int(Vf x) { Vi r; HR_LANES r.v[i] = static_cast<int32_t>(std::nearbyintf(x.v[i])); return r; }
inline Vf as_float(Vi x) { Vf r; std::memcpy(r.v, x.v, 64); return r; }
inline Vi as_int(Vf x) { Vi r; std::memcpy(r.v, x.v, 64); return r; }
inline int32_t reduce_add(Vi x) { int32_t s = 0; HR_LANES s += x.v[i]; return s; }
inline void store_i8(int8_t* p, Vi x) {
  HR_LANES p[i] = static_cast<int8_t>(x.v[i] > 127 ? 127 : x.v[i] < -128 ? -128 : x.v[i]);
}
inline Vf load_i8(const int8_t* p) { Vf r; HR_LANES r.v[i] = static_cast<float>(p[i]); return r; }
inline float bf16_to_float(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline Vf load_bf16(const uint16_t* p) { Vf r; HR_LANES r.v[i] = bf16_to_float(p[i]); return r; }
inline void store_bf16(uint16_t* p, Vf x) {
  HR_LANES {
    uint32_t bits;
    std::memcpy(&bits, &x.v[i], 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i] = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal
    const float f = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -f : f;
  }
  const uint32_t bits = exponent == 31 ? sign | 0x7f800000u | mantissa << 13 : sign | (exponent + 112u) << 23 | mantissa << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline Vf load_f16(const uint16_t* p) { Vf r; HR_LANES r.v[i] = half_to_float(p[i]); return r; }
inline Vb load_bytes(const void* p) { Vb r; std::memcpy(r.v, p, 64); return r; }
inline void store_bytes(void* p, Vb x) { std::memcpy(p, x.v, 64); }
inline Vb low_nibbles(Vb x) { for (auto& b : x.v) b &= 0x0f; return x; }
inline Vb high_nibbles(Vb x) { for (auto& b : x.v) b = static_cast<uint8_t>(b >> 4); return x; }
inline Vf dot_bf16(Vf acc, Vb w, uint32_t x) {
  const float x0 = bf16_to_float(static_cast<uint16_t>(x)), x1 = bf16_to_float(static_cast<uint16_t>(x >> 16));
  uint16_t pairs[32];
  std::memcpy(pairs, w.v, 64);
  HR_LANES acc.v[i] += x0 * bf16_to_float(pairs[2 * i]);
  HR_LANES acc.v[i] += x1 * bf16_to_float(pairs[2 * i + 1]);
  return acc;
}
inline Vi dot_u8s8(Vi acc, Vb w, int32_t x) {
  int8_t s[4];
  std::memcpy(s, &x, 4);
  HR_LANES acc.v[i] += w.v[4 * i] * s[0] + w.v[4 * i + 1] * s[1] + w.v[4 * i + 2] * s[2] + w.v[4 * i + 3] * s[3];
  return acc;
}
#undef HR_LANES

#endif  // --------------------------------------------------------------------------------------------------------------

#if !defined(HR_DOT_U4S8)
inline Vi dot_u4s8(Vi acc, Vb w, int32_t x) { return dot_u8s8(acc, w, x); }
#endif

// e^x within 2 units in the last place (Cephes' polynomial for expf); 0 below -87.3, saturated above 88.
inline Vf exp(Vf x) {
  x = max(min(x, set1(88.0f)), set1(-104.0f));
  const Vf n = round(x * set1(1.44269504f));
  Vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return scale_by_power(p, n);
}

// Two bfloat16 values as dot_bf16 wants them.
inline uint32_t load_pair(const uint16_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
inline int32_t load_quad(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

inline float bf16_value(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t bf16_bits(float f) {  // nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_value(uint16_t h) {
  uint16_t in[16] = {h};
  float out[16];
  store(out, load_f16(in));
  return out[0];
}

}  // namespace hr
