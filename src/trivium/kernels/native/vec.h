// Sixteen fp32 (vf) or int32 (vi) lanes on AVX-512, AVX2, NEON or plain vectors: all that the kernels know of a CPU.
//
// Every operation here rounds the same way wherever it is used, so an output depends only on the order of the calls.
// min and max return their second operand where one is NaN; vge has a bit for each lane whose a is at least b.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define TRV_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TRV_AVX2 1
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define TRV_NEON 1
#include <arm_neon.h>
#endif

#define TRV_INLINE static inline __attribute__((always_inline))

namespace trv {

constexpr int kLanes = 16;

#if TRV_AVX512
// ---------------------------------------------------------------------------------------------------- AVX-512
typedef __m512 vf;
typedef __m512i vi;
constexpr bool kBiasedDot = true;  // dot_w8 multiplies q + 128
constexpr int kWide = 4;           // vectors of a panel that a product of many tokens holds at once
TRV_INLINE vf vzero() { return _mm512_setzero_ps(); }
TRV_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
TRV_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
TRV_INLINE void vstore(float* p, vf a) { _mm512_storeu_ps(p, a); }
TRV_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
TRV_INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
TRV_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
TRV_INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
TRV_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
TRV_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
TRV_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
TRV_INLINE uint32_t vge(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
TRV_INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
TRV_INLINE vf vround(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TRV_INLINE vi vint(vf a) { return _mm512_cvtps_epi32(a); }
TRV_INLINE vf vfloat(vi a) { return _mm512_cvtepi32_ps(a); }
TRV_INLINE vi viset(int32_t x) { return _mm512_set1_epi32(x); }
TRV_INLINE vi viload(const int32_t* p) { return _mm512_loadu_si512(p); }
TRV_INLINE void vistore(int32_t* p, vi a) { _mm512_storeu_si512(p, a); }
TRV_INLINE vi viadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
TRV_INLINE vi visub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
TRV_INLINE vi vimul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
TRV_INLINE vf vbits(vi a) { return _mm512_castsi512_ps(a); }
TRV_INLINE vi vints(vf a) { return _mm512_castps_si512(a); }
TRV_INLINE vi vshl(vi a, int n) { return _mm512_slli_epi32(a, n); }
TRV_INLINE vi vshr(vi a, int n) { return _mm512_srli_epi32(a, n); }
TRV_INLINE vi vand(vi a, vi b) { return _mm512_and_si512(a, b); }
TRV_INLINE vf vload_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
TRV_INLINE vf vload_bf16(const uint16_t* p) {
  return vbits(vshl(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
TRV_INLINE vi vload_s8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
TRV_INLINE vi vload_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
TRV_INLINE void vstore_s8(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
TRV_INLINE void vstore_u16(uint16_t* p, vi a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }
typedef __m512i vb;  // 16 × 4 weights
TRV_INLINE vb vbload(const void* p) { return _mm512_loadu_si512(p); }
TRV_INLINE vb vlow4(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
TRV_INLINE vb vhigh4(vb a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
TRV_INLINE vb vbset(int32_t x) { return _mm512_set1_epi32(x); }
TRV_INLINE vi dot_w8(vi acc, vb w, vb x) { return _mm512_dpbusd_epi32(acc, w, x); }
TRV_INLINE vi dot_w4(vi acc, vb w, vb x) { return _mm512_dpbusd_epi32(acc, w, x); }
// [Note: which cache] What is fetched ahead goes into the first cache with AMX, as was best on an Intel core that has it, and
// into the second without, as is best on Zen 4, the only such core that was measured (docs/log.md).
#if defined(__AMX_TILE__)
TRV_INLINE void vprefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
#else
TRV_INLINE void vprefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
#endif

#elif TRV_AVX2
// ---------------------------------------------------------------------------------------------------- AVX2
struct vf { __m256 a, b; };
struct vi { __m256i a, b; };
typedef vi vb;
constexpr bool kBiasedDot = false;
constexpr int kWide = 1;
TRV_INLINE vf vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TRV_INLINE vf vset(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
TRV_INLINE vf vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TRV_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
#define TRV_PAIR(name, op) \
  TRV_INLINE vf name(vf x, vf y) { return {op(x.a, y.a), op(x.b, y.b)}; }
TRV_PAIR(vadd, _mm256_add_ps)
TRV_PAIR(vsub, _mm256_sub_ps)
TRV_PAIR(vmul, _mm256_mul_ps)
TRV_PAIR(vdiv, _mm256_div_ps)
TRV_PAIR(vmin, _mm256_min_ps)
TRV_PAIR(vmax, _mm256_max_ps)
#undef TRV_PAIR
#define TRV_PAIR(name, op) \
  TRV_INLINE vi name(vi x, vi y) { return {op(x.a, y.a), op(x.b, y.b)}; }
TRV_PAIR(viadd, _mm256_add_epi32)
TRV_PAIR(visub, _mm256_sub_epi32)
TRV_PAIR(vimul, _mm256_mullo_epi32)
TRV_PAIR(vand, _mm256_and_si256)
#undef TRV_PAIR
TRV_INLINE vf vfma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
TRV_INLINE vf vabs(vf x) {
  __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
TRV_INLINE uint32_t vge(vf x, vf y) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ)) |
         (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)) << 8;
}
TRV_INLINE vf vround(vf x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TRV_INLINE vi vint(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
TRV_INLINE vf vfloat(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
TRV_INLINE vi viset(int32_t x) { __m256i v = _mm256_set1_epi32(x); return {v, v}; }
TRV_INLINE vi viload(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
TRV_INLINE void vistore(int32_t* p, vi x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
TRV_INLINE vf vbits(vi x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
TRV_INLINE vi vints(vf x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
TRV_INLINE vi vshl(vi x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
TRV_INLINE vi vshr(vi x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
TRV_INLINE vf vload_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
TRV_INLINE vf vload_bf16(const uint16_t* p) {
  vi x = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
  return vbits(vshl(x, 16));
}
TRV_INLINE vi vload_s8(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
TRV_INLINE vi vload_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
TRV_INLINE void vstore_u16(uint16_t* p, vi x) {
  __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  _mm256_storeu_si256((__m256i*)p, w);
}
TRV_INLINE void vstore_s8(int8_t* p, vi x) {
  __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
TRV_INLINE vb vbload(const void* p) { return viload((const int32_t*)p); }
TRV_INLINE vb vlow4(vb x) { return vand(x, {_mm256_set1_epi8(15), _mm256_set1_epi8(15)}); }
TRV_INLINE vb vhigh4(vb x) {
  __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
TRV_INLINE vb vbset(int32_t x) { return viset(x); }
TRV_INLINE __m256i dot_u(__m256i acc, __m256i u, __m256i s) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
// |q| · (x with q's sign): two products reach at most 2 · 127 · 127, within int16. q = −128 never is packed.
TRV_INLINE __m256i dot_s(__m256i acc, __m256i w, __m256i x) {
  __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
  return dot_u(acc, _mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
}
TRV_INLINE vi dot_w8(vi acc, vb w, vb x) { return {dot_s(acc.a, w.a, x.a), dot_s(acc.b, w.b, x.b)}; }
TRV_INLINE vi dot_w4(vi acc, vb w, vb x) { return {dot_u(acc.a, w.a, x.a), dot_u(acc.b, w.b, x.b)}; }
TRV_INLINE void vprefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

#else
// ---------------------------------------------------------------------------------------------------- four lanes × 4
typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
struct vf { f4 v[4]; };
struct vi { i4 v[4]; };
struct vb { uint8_t v[64]; };
constexpr bool kBiasedDot = false;
constexpr int kWide = 1;
#define TRV_FOUR(type, expr) \
  type r; \
  for (int i = 0; i < 4; i++) r.v[i] = (expr); \
  return r;
TRV_INLINE vf vset(float x) { TRV_FOUR(vf, ((f4){x, x, x, x})) }
TRV_INLINE vf vzero() { return vset(0.0f); }
TRV_INLINE vf vload(const float* p) { vf r; memcpy(&r, p, 64); return r; }
TRV_INLINE void vstore(float* p, vf a) { memcpy(p, &a, 64); }
TRV_INLINE vf vadd(vf a, vf b) { TRV_FOUR(vf, a.v[i] + b.v[i]) }
TRV_INLINE vf vsub(vf a, vf b) { TRV_FOUR(vf, a.v[i] - b.v[i]) }
TRV_INLINE vf vmul(vf a, vf b) { TRV_FOUR(vf, a.v[i] * b.v[i]) }
TRV_INLINE vf vdiv(vf a, vf b) { TRV_FOUR(vf, a.v[i] / b.v[i]) }
#if TRV_NEON
TRV_INLINE vf vfma(vf a, vf b, vf c) { TRV_FOUR(vf, (f4)vfmaq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i])) }
#else
TRV_INLINE vf vfma(vf a, vf b, vf c) { TRV_FOUR(vf, a.v[i] * b.v[i] + c.v[i]) }
#endif
TRV_INLINE f4 pick(i4 mask, f4 a, f4 b) { return (f4)((mask & (i4)a) | (~mask & (i4)b)); }
TRV_INLINE vf vmin(vf a, vf b) { TRV_FOUR(vf, pick(a.v[i] < b.v[i], a.v[i], b.v[i])) }
TRV_INLINE vf vmax(vf a, vf b) { TRV_FOUR(vf, pick(a.v[i] > b.v[i], a.v[i], b.v[i])) }
TRV_INLINE uint32_t vge(vf a, vf b) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; i++) {
    i4 at_least = (a.v[i] >= b.v[i]) & (i4){1, 2, 4, 8};
    bits |= (uint32_t)(at_least[0] | at_least[1] | at_least[2] | at_least[3]) << 4 * i;
  }
  return bits;
}
TRV_INLINE vf vabs(vf a) { TRV_FOUR(vf, (f4)((i4)a.v[i] & 0x7fffffff)) }
// Round to nearest even by adding 1.5 · 2^23: for |a| < 2^22, all that the kernels round.
TRV_INLINE vf vround(vf a) { TRV_FOUR(vf, (a.v[i] + 12582912.0f) - 12582912.0f) }
TRV_INLINE vi vint(vf a) { TRV_FOUR(vi, ((i4)(a.v[i] + 12582912.0f) - 0x4b400000)) }
TRV_INLINE vf vfloat(vi a) { TRV_FOUR(vf, __builtin_convertvector(a.v[i], f4)) }
TRV_INLINE vi viset(int32_t x) { TRV_FOUR(vi, ((i4){x, x, x, x})) }
TRV_INLINE vi viload(const int32_t* p) { vi r; memcpy(&r, p, 64); return r; }
TRV_INLINE void vistore(int32_t* p, vi a) { memcpy(p, &a, 64); }
TRV_INLINE vi viadd(vi a, vi b) { TRV_FOUR(vi, a.v[i] + b.v[i]) }
TRV_INLINE vi visub(vi a, vi b) { TRV_FOUR(vi, a.v[i] - b.v[i]) }
TRV_INLINE vi vimul(vi a, vi b) { TRV_FOUR(vi, a.v[i] * b.v[i]) }
TRV_INLINE vf vbits(vi a) { vf r; memcpy(&r, &a, 64); return r; }
TRV_INLINE vi vints(vf a) { vi r; memcpy(&r, &a, 64); return r; }
TRV_INLINE vi vshl(vi a, int n) { TRV_FOUR(vi, a.v[i] << n) }
typedef uint32_t u4 __attribute__((vector_size(16)));
TRV_INLINE vi vshr(vi a, int n) { TRV_FOUR(vi, (i4)((u4)a.v[i] >> n)) }
TRV_INLINE vi vand(vi a, vi b) { TRV_FOUR(vi, a.v[i] & b.v[i]) }
TRV_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
  float magnitude;
  if (exponent == 0) {
    magnitude = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
  }
  memcpy(&magnitude, &bits, 4);
  return magnitude;
}
TRV_INLINE vf vload_f16(const uint16_t* p) {
#if TRV_NEON
  vf r;
  for (int i = 0; i < 4; i++) r.v[i] = (f4)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return r;
#else
  float t[16];
  for (int i = 0; i < 16; i++) t[i] = half_to_float(p[i]);
  return vload(t);
#endif
}
TRV_INLINE vf vload_bf16(const uint16_t* p) {
  int32_t t[16];
  for (int i = 0; i < 16; i++) t[i] = (int32_t)((uint32_t)p[i] << 16);
  return vbits(viload(t));
}
TRV_INLINE vi vload_s8(const int8_t* p) {
  int32_t t[16];
  for (int i = 0; i < 16; i++) t[i] = p[i];
  return viload(t);
}
TRV_INLINE vi vload_u8(const uint8_t* p) {
  int32_t t[16];
  for (int i = 0; i < 16; i++) t[i] = p[i];
  return viload(t);
}
TRV_INLINE void vstore_s8(int8_t* p, vi a) {
  int32_t t[16];
  vistore(t, a);
  for (int i = 0; i < 16; i++) p[i] = (int8_t)t[i];
}
TRV_INLINE void vstore_u16(uint16_t* p, vi a) {
  int32_t t[16];
  vistore(t, a);
  for (int i = 0; i < 16; i++) p[i] = (uint16_t)t[i];
}
TRV_INLINE vb vbload(const void* p) { vb r; memcpy(&r, p, 64); return r; }
TRV_INLINE vb vlow4(vb a) {
  vb r;
  for (int i = 0; i < 64; i++) r.v[i] = a.v[i] & 15;
  return r;
}
TRV_INLINE vb vhigh4(vb a) {
  vb r;
  for (int i = 0; i < 64; i++) r.v[i] = a.v[i] >> 4;
  return r;
}
TRV_INLINE vb vbset(int32_t x) {
  vb r;
  for (int i = 0; i < 16; i++) memcpy(r.v + 4 * i, &x, 4);
  return r;
}
#if TRV_NEON && defined(__ARM_FEATURE_DOTPROD)
TRV_INLINE vi dot_s8(vi acc, vb w, vb x, uint8_t flip) {
  vi r;
  for (int i = 0; i < 4; i++) {
    int8x16_t s = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w.v + 16 * i), vdupq_n_u8(flip)));
    r.v[i] = (i4)vdotq_s32((int32x4_t)acc.v[i], s, vreinterpretq_s8_u8(vld1q_u8(x.v + 16 * i)));
  }
  return r;
}
TRV_INLINE vi dot_w8(vi acc, vb w, vb x) { return dot_s8(acc, w, x, 128); }
TRV_INLINE vi dot_w4(vi acc, vb w, vb x) { return dot_s8(acc, w, x, 0); }
#else
TRV_INLINE vi dot_s8(vi acc, vb w, vb x, int bias) {
  int32_t t[16];
  vistore(t, acc);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) t[i] += ((int)w.v[4 * i + j] - bias) * (int)(int8_t)x.v[4 * i + j];
  return viload(t);
}
TRV_INLINE vi dot_w8(vi acc, vb w, vb x) { return dot_s8(acc, w, x, 128); }
TRV_INLINE vi dot_w4(vi acc, vb w, vb x) { return dot_s8(acc, w, x, 0); }
#endif
TRV_INLINE void vprefetch(const void* p) { __builtin_prefetch(p); }
#undef TRV_FOUR
#endif

// Horizontal sums and maxima in one fixed order: the upper half upon the lower one, until one lane is left.
#if TRV_AVX512 || TRV_AVX2
#define TRV_FOLD(op) \
  __m128 quarter = _mm_##op##_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)); \
  quarter = _mm_##op##_ps(quarter, _mm_movehl_ps(quarter, quarter)); \
  return _mm_cvtss_f32(_mm_##op##_ss(quarter, _mm_movehdup_ps(quarter)));
#if TRV_AVX512
TRV_INLINE __m256 lower(vf a) { return _mm512_castps512_ps256(a); }
TRV_INLINE __m256 upper(vf a) { return _mm512_extractf32x8_ps(a, 1); }
#else
TRV_INLINE __m256 lower(vf a) { return a.a; }
TRV_INLINE __m256 upper(vf a) { return a.b; }
#endif
TRV_INLINE float hsum(vf a) {
  __m256 half = _mm256_add_ps(lower(a), upper(a));
  TRV_FOLD(add)
}
// Of lanes none of which is NaN.
TRV_INLINE float htop(vf a) {
  __m256 half = _mm256_max_ps(lower(a), upper(a));
  TRV_FOLD(max)
}
#undef TRV_FOLD
#else
TRV_INLINE float hsum(vf a) {
  f4 quarter = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
TRV_INLINE f4 top4(f4 a, f4 b) { return pick(a > b, a, b); }
TRV_INLINE float htop(vf a) {
  f4 quarter = top4(top4(a.v[0], a.v[2]), top4(a.v[1], a.v[3]));
  float low = quarter[0] > quarter[2] ? quarter[0] : quarter[2], high = quarter[1] > quarter[3] ? quarter[1] : quarter[3];
  return low > high ? low : high;
}
#endif
// NaN where a lane is.
TRV_INLINE float hmax(vf a) { return vge(a, a) == 0xffff ? htop(a) : NAN; }
#if TRV_AVX512
TRV_INLINE int32_t hisum(vi a) { return _mm512_reduce_add_epi32(a); }
#elif TRV_AVX2
TRV_INLINE int32_t hisum(vi a) {
  __m256i half = _mm256_add_epi32(a.a, a.b);
  __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  quarter = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1)));
}
#else
TRV_INLINE int32_t hisum(vi a) {
  i4 quarter = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
#endif

// The first n < 16 lanes; the others are zero on loading and left alone on storing.
TRV_INLINE vf vload_n(const float* p, int n) {
  float t[16] = {};
  memcpy(t, p, (size_t)n * 4);
  return vload(t);
}
TRV_INLINE void vstore_n(float* p, vf a, int n) {
  float t[16];
  vstore(t, a);
  memcpy(p, t, (size_t)n * 4);
}

}  // namespace trv
