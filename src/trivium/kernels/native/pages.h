// Rows of the paged cache: written, fetched, read as fp32, transposed, or taken as they lie for a product.
#pragma once
#include "product.h"

namespace trv {

// out[j · stride + i] = rows[i · width + j] for sixteen i and j; the bits alone are moved.
#if TRV_AVX512
TRV_INLINE void transpose16(const float* rows, int64_t width, float* out, int64_t stride) {
  __m512 r[16], t[16];
  TRV_UNROLL
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(rows + i * width);
  TRV_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  TRV_UNROLL
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  TRV_UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  TRV_UNROLL
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_ps(out + i * stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(out + (i + 8) * stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_ps(out + (i + 4) * stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_ps(out + (i + 12) * stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#elif TRV_AVX2
TRV_INLINE void transpose8(const float* rows, int64_t width, float* out, int64_t stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows + i * width);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
TRV_INLINE void transpose16(const float* rows, int64_t width, float* out, int64_t stride) {
  for (int half = 0; half < 16; half += 8)
    for (int part = 0; part < 16; part += 8) transpose8(rows + half * width + part, width, out + part * stride + half, stride);
}
#else
TRV_INLINE void transpose16(const float* rows, int64_t width, float* out, int64_t stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) memcpy(out + j * stride + i, rows + i * width + j, 4);
}
#endif

// Columns first … first + width of a page's row as fp32, at `to`; lanes past `width` are zero up to whole vectors
// (NaN where the row's scale is).
inline void read_row(const void* pages, const float* scales, int format, int64_t row, int whole, int first, int width,
                     float* to) {
  const int64_t at = row * whole + first;
  if (format == kFloat32) {
    const float* p = (const float*)pages + at;
    for (int i = 0; i < width; i += kLanes) vstore(to + i, load_at(p, i, width));
    return;
  }
  for (int i = 0; i < width; i += kLanes) {
    const int left = width - i;
    if (format == kBfloat16) {
      const uint16_t* p = (const uint16_t*)pages + at + i;
      uint16_t tail[16] = {};
      if (left < kLanes) memcpy(tail, p, (size_t)left * 2);
      vstore(to + i, vload_bf16(left < kLanes ? tail : p));
    } else {
      const int8_t* p = (const int8_t*)pages + at + i;
      int8_t tail[16] = {};
      if (left < kLanes) memcpy(tail, p, (size_t)left);
      vstore(to + i, vmul(vfloat(vload_s8(left < kLanes ? tail : p)), vset(scales[row])));
    }
  }
}

inline int64_t page_bytes(int format, int64_t width) { return width * (format == kFloat32 ? 4 : format == kBfloat16 ? 2 : 1); }

inline void fetch_page_row(const void* pages, int format, int64_t row, int width) {
  const int64_t bytes = page_bytes(format, width);
  for (int64_t i = 0; i < bytes; i += 64) vprefetch((const char*)pages + row * bytes + i);
}

// Values as the cache holds them, at the rows `place`, as a panel of 64 columns from `first` on.
template <int kFormat>
struct CacheRows {
  const Cache& cache;
  const int64_t* place;
  int64_t width;
  int first;
  TRV_INLINE vf one(const CacheRows& s, int64_t k, int j) {
    const int64_t row = s.place[k], at = row * s.width + s.first + j * kLanes;
    if (kFormat == kFloat32) return vload((const float*)s.cache.values + at);
    if (kFormat == kBfloat16) return vload_bf16((const uint16_t*)s.cache.values + at);
    return vmul(vfloat(vload_s8((const int8_t*)s.cache.values + at)), vset(s.cache.value_scales[row]));
  }
  TRV_INLINE vf even(const CacheRows& s, int64_t k, int j) { return one(s, k, j); }
  TRV_INLINE vf odd(const CacheRows& s, int64_t k, int j) { return one(s, k + 1, j); }
  TRV_INLINE void fetch(const CacheRows&, int64_t) {}  // they were asked for before
};

inline void write_page_row(void* pages, float* scales, int format, int64_t row, int width, const float* x) {
  if (format == kFloat32) {
    memcpy((float*)pages + row * width, x, (size_t)width * 4);
    return;
  }
  if (format == kBfloat16) {
    uint16_t* to = (uint16_t*)pages + row * width;
    for (int i = 0; i < width; i++) {
      uint32_t bits;
      memcpy(&bits, x + i, 4);
      bool nan = (bits & 0x7fffffff) > 0x7f800000;
      to[i] = nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    return;
  }
  int8_t* to = (int8_t*)pages + row * width;
  vf best = vzero(), odd = vzero();
  for (int i = 0; i < width; i += kLanes) {
    vf v = load_at(x, i, width);
    best = vmax(best, vabs(v));
    odd = vfma(v, vzero(), odd);
  }
  float largest = htop(best);
  bool finite = hsum(odd) == 0.0f;
  float inverse = finite && largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int i = 0; i < width; i += kLanes) {
    int8_t lanes[16];
    vf v = finite ? load_at(x, i, width) : vzero();
    vstore_s8(lanes, vint(vmax(vset(-127.0f), vmin(vset(127.0f), vmul(v, vset(inverse))))));
    memcpy(to + i, lanes, (size_t)(width - i < kLanes ? width - i : kLanes));
  }
  scales[row] = finite ? largest * (1.0f / 127.0f) : NAN;
}

}  // namespace trv
