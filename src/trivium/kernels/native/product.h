// One panel of 64 outputs times a block of tokens, in every weight format.
//
// [Note: one order] Each output accumulates over its inputs in rising order in a single fp32 accumulator (quantised: one
// addition per group of exact integer sums; thirds: one accumulator per third, added at the end). How many tokens run at
// once only changes which accumulators are held in registers together, so results do not depend on it.
#pragma once
#include "prepare.h"

namespace trv {

constexpr int kPanel = 64;
constexpr int kBlock = 272;      // tokens of the largest block
constexpr int kBlockWanted = 256;
constexpr int kDepth = 128;      // inputs of a panel that many tokens meet at once
constexpr int64_t kAhead = kDepth * kPanel;  // weights that are fetched while as many are used
// [Note: fetching ahead] A step of few tokens waits for weights alone, and the hardware fetches ahead within a page only:
// every line of weights asks for the one this many bytes further on. Scales come in one line for several of weights.
constexpr int64_t kFar = 2048, kScalesFar = 512;

// Asks for the `bytes` that lie kFar behind those at `at`.
TRV_INLINE void fetch_far(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) vprefetch((const char*)at + kFar + i);
}

// Tokens cut into equal blocks of whole tiles (registers hold six tokens of a product in fp32): every block reads all
// weights, so a small last one would cost as much memory traffic as a whole one.
struct Blocks {
  int64_t count, size;
  Blocks(int64_t rows, Form form) {
    int64_t tile = form == kPlain ? 6 : tile_tokens(form), wanted = (rows + kBlockWanted - 1) / kBlockWanted;
    size = round_up((rows + wanted - 1) / (wanted ? wanted : 1), tile);
    count = size ? (rows + size - 1) / size : 0;
  }
};

// A thread's own memory.
struct Scratch {
  Buffer weights, c0, c1, tiles, attention, prepared;
  int tile_rows = -1;  // what the AMX tiles are configured for
};

// ------------------------------------------------------------------------------------------------ fp32 arithmetic
// A source gives inputs 2i (even) and 2i + 1 (odd) of sixteen outputs, where `k` is 2i, and fetches what follows later.
template <typename T>
struct FromPanel {
  const T* w;
  TRV_INLINE void fetch(const FromPanel& s, int64_t k) { fetch_far(s.w + k * kPanel, 2 * kPanel * sizeof(T)); }
};
struct FromFloat32 : FromPanel<float> {
  TRV_INLINE vf even(const FromFloat32& s, int64_t k, int j) { return vload(s.w + k * kPanel + j * kLanes); }
  TRV_INLINE vf odd(const FromFloat32& s, int64_t k, int j) { return vload(s.w + (k + 1) * kPanel + j * kLanes); }
};
struct FromFloat16 : FromPanel<uint16_t> {
  TRV_INLINE vf even(const FromFloat16& s, int64_t k, int j) { return vload_f16(s.w + k * kPanel + j * kLanes); }
  TRV_INLINE vf odd(const FromFloat16& s, int64_t k, int j) { return vload_f16(s.w + (k + 1) * kPanel + j * kLanes); }
};
struct FromBfloat16 : FromPanel<uint16_t> {
  TRV_INLINE vi both(const FromBfloat16& s, int64_t k, int j) { return viload((const int32_t*)(s.w + k * kPanel) + j * kLanes); }
  TRV_INLINE vf even(const FromBfloat16& s, int64_t k, int j) { return vbits(vshl(both(s, k, j), 16)); }
  TRV_INLINE vf odd(const FromBfloat16& s, int64_t k, int j) {
    return vbits(vand(both(s, k, j), viset((int32_t)0xffff0000)));
  }
};

// Loops over registers must be unrolled whole, or the accumulators would live in memory.
#define TRV_UNROLL _Pragma("GCC unroll 16")

template <int NT, int NV>
TRV_INLINE void add_input(vf (&acc)[NT][NV], const vf (&w)[NV], const float* x, int64_t stride) {
  TRV_UNROLL
  for (int t = 0; t < NT; t++) {
    vf a = vset(x[t * stride]);
    TRV_UNROLL
    for (int j = 0; j < NV; j++) acc[t][j] = vfma(a, w[j], acc[t][j]);
  }
}

template <int NT, int NV, typename Source>
TRV_INLINE void float_strip(const Source& w, int64_t depth, const float* x, int64_t stride, float* c, int64_t ldc,
                            int j0) {
  vf acc[NT][NV], line[NV];
  TRV_UNROLL
  for (int t = 0; t < NT; t++) {
    TRV_UNROLL
    for (int j = 0; j < NV; j++) acc[t][j] = vload(c + t * ldc + (j0 + j) * kLanes);
  }
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2) {
    if (NT == 1) Source::fetch(w, k);
    TRV_UNROLL
    for (int j = 0; j < NV; j++) line[j] = Source::even(w, k, j0 + j);
    add_input(acc, line, x + k, stride);
    TRV_UNROLL
    for (int j = 0; j < NV; j++) line[j] = Source::odd(w, k, j0 + j);
    add_input(acc, line, x + k + 1, stride);
  }
  if (k < depth) {
    TRV_UNROLL
    for (int j = 0; j < NV; j++) line[j] = Source::even(w, k, j0 + j);
    add_input(acc, line, x + k, stride);
  }
  TRV_UNROLL
  for (int t = 0; t < NT; t++) {
    TRV_UNROLL
    for (int j = 0; j < NV; j++) vstore(c + t * ldc + (j0 + j) * kLanes, acc[t][j]);
  }
}

template <int NT, typename Source>
__attribute__((noinline)) void float_rows(const Source& w, int64_t depth, const float* x, int64_t stride, float* c,
                                          int64_t ldc) {
  constexpr int NV = NT == 1 ? 4 : kWide;
  for (int j0 = 0; j0 < 4; j0 += NV) float_strip<NT, NV>(w, depth, x, stride, c, ldc, j0);
}

// c [tokens][ldc] += x [tokens][depth] · w [depth][64]; meanwhile `ahead` bytes from `next` on come into the caches.
template <typename Source>
void float_panel(const Source& w, int64_t depth, const float* x, int64_t stride, int tokens, float* c, int64_t ldc,
                 const void* next = nullptr, int64_t ahead = 0) {
  const char* line = (const char*)next;
  const char* end = line + ahead;
  const int64_t share = tokens >= 6 ? round_up(ahead / (tokens / 6) + 1, 64) : 0;
  int t = 0;
  for (; t + 6 <= tokens; t += 6) {
    for (const char* stop = line + share < end ? line + share : end; line < stop; line += 64) __builtin_prefetch(line, 0, 2);
    float_rows<6>(w, depth, x + t * stride, stride, c + t * ldc, ldc);
  }
  x += t * stride;
  c += t * ldc;
  switch (tokens - t) {
    case 5: float_rows<3>(w, depth, x, stride, c, ldc); float_rows<2>(w, depth, x + 3 * stride, stride, c + 3 * ldc, ldc); break;
    case 4: float_rows<4>(w, depth, x, stride, c, ldc); break;
    case 3: float_rows<3>(w, depth, x, stride, c, ldc); break;
    case 2: float_rows<2>(w, depth, x, stride, c, ldc); break;
    case 1: float_rows<1>(w, depth, x, stride, c, ldc); break;
  }
}

template <typename Source>
void float_product(const Source& w, int64_t columns, const Prepared& x, int t0, int tokens, float* c, Scratch& scratch,
                   bool unpack) {
  const float* rows = x.x + t0 * x.stride;
  if (!unpack || tokens <= 4) {
    // In slices of inputs, so that a slice of the panel stays in the first caches over all tokens.
    int64_t depth = tokens <= 6 ? columns : kDepth;
    for (int64_t k = 0; k < columns; k += depth) {
      Source part = w;
      part.w += k * kPanel;
      int64_t count = k + depth < columns ? depth : columns - k;
      float_panel(part, count, rows + k, x.stride, tokens, c, kPanel, part.w + count * kPanel, kAhead * sizeof(*part.w));
    }
    return;
  }
  float* wide = scratch.weights.get<float>((size_t)kDepth * kPanel);
  for (int64_t k = 0; k < columns; k += kDepth) {
    int64_t depth = k + kDepth < columns ? kDepth : columns - k;
    for (int64_t i = 0; i < depth; i += 2)
      for (int j = 0; j < 4; j++) {
        vstore(wide + i * kPanel + j * kLanes, Source::even(w, k + i, j));
        if (i + 1 < depth) vstore(wide + (i + 1) * kPanel + j * kLanes, Source::odd(w, k + i, j));
      }
    const auto* next = w.w + (k + depth) * kPanel;
    float_panel(FromFloat32{wide}, depth, rows + k, x.stride, tokens, c, kPanel, next, kAhead * sizeof(*next));
  }
}

// ------------------------------------------------------------------------------------------------ integer arithmetic
TRV_INLINE vf load_scale(const Matrix& m, int64_t panel, int groups, int g, int j) {
  int64_t at = (panel * groups + g) * kPanel + j * kLanes;
  vprefetch((const char*)m.scales + at * (m.half_scales ? 2 : 4) + kScalesFar);
  return m.half_scales ? vload_f16((const uint16_t*)m.scales + at) : vload((const float*)m.scales + at);
}

// c += float(dot) · scales, where `dot` still holds the weights' offset if `biased`.
TRV_INLINE void add_group(const Matrix& m, int64_t panel, int groups, int g, int j, vi dot, float scale, int32_t sum,
                          vf weight_scale, float* c) {
  if (m.zeros) dot = visub(dot, vimul(vload_u8(m.zeros + (panel * groups + g) * kPanel + j * kLanes), viset(sum)));
  vf s = m.group ? vmul(vset(scale), weight_scale) : vset(scale);
  vstore(c + j * kLanes, vfma(vfloat(dot), s, vload(c + j * kLanes)));
}

TRV_INLINE int32_t dot_start(const Matrix& m, int32_t sum) {
  if (m.format == kInt4) return m.zeros ? 0 : -8 * sum;
  return kBiasedDot ? -128 * sum : 0;
}

template <int NT, int NV, bool kFour>
TRV_INLINE void int_strip(const Matrix& m, int64_t panel, const Prepared& x, int64_t t0, float* c, int j0, bool fetch) {
  const int8_t* rows[NT];
  TRV_UNROLL
  for (int t = 0; t < NT; t++) rows[t] = x.quant_row(t0 + t);
  const int64_t padded = m.padded;
  const uint8_t* w = (const uint8_t*)m.data + panel * kPanel * padded / (kFour ? 2 : 1) + j0 * 64;
  for (int g = 0; g < x.groups; g++) {
    int64_t begin = (int64_t)g * x.group, end = begin + x.group < padded ? begin + x.group : padded;
    vi acc[NT][NV];
    TRV_UNROLL
    for (int t = 0; t < NT; t++)
      TRV_UNROLL
      for (int j = 0; j < NV; j++) acc[t][j] = viset(dot_start(m, x.sums[x.place(t0 + t, g)]));
    for (int64_t k = begin; k < end; k += 32) {
      int64_t at = (k / 64) * 1024 + k % 64;
      const uint8_t* source = w + k * kPanel / (kFour ? 2 : 1);
#pragma GCC unroll 8
      for (int u = 0; u < 32; u += kFour ? 8 : 4) {
        TRV_UNROLL
        for (int j = 0; j < NV; j++) {
          vb packed = vbload(source + j * 64);
          if (fetch) fetch_far(source + j * 64, 64);
          if (kFour) {
            vb low = vlow4(packed), high = vhigh4(packed);
            TRV_UNROLL
            for (int t = 0; t < NT; t++) {
              int32_t a, b;
              memcpy(&a, rows[t] + at + u, 4);
              memcpy(&b, rows[t] + at + u + 4, 4);
              acc[t][j] = dot_w4(dot_w4(acc[t][j], low, vbset(a)), high, vbset(b));
            }
          } else {
            TRV_UNROLL
            for (int t = 0; t < NT; t++) {
              int32_t a;
              memcpy(&a, rows[t] + at + u, 4);
              acc[t][j] = dot_w8(acc[t][j], packed, vbset(a));
            }
          }
        }
        source += 256;
      }
    }
    TRV_UNROLL
    for (int j = 0; j < NV; j++) {
      vf weight_scale = m.group ? load_scale(m, panel, x.groups, g, j0 + j) : vzero();
      TRV_UNROLL
      for (int t = 0; t < NT; t++) {
        int64_t at = x.place(t0 + t, g);
        add_group(m, panel, x.groups, g, j0 + j, acc[t][j], x.scales[at], x.sums[at], weight_scale, c + t * kPanel);
      }
    }
  }
}

template <int NT, bool kFour>
__attribute__((noinline)) void int_rows(const Matrix& m, int64_t panel, const Prepared& x, int64_t t0, float* c, bool fetch) {
  constexpr int NV = NT == 1 ? 4 : kWide;
  for (int j0 = 0; j0 < 4; j0 += NV) int_strip<NT, NV, kFour>(m, panel, x, t0, c, j0, fetch);
}

template <bool kFour>
void int_panel(const Matrix& m, int64_t panel, const Prepared& x, int64_t t0, int tokens, float* c) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4) int_rows<4, kFour>(m, panel, x, t0 + t, c + t * kPanel, t == 0);
  if (tokens - t >= 2) {
    int_rows<2, kFour>(m, panel, x, t0 + t, c + t * kPanel, t == 0);
    t += 2;
  }
  if (tokens - t) int_rows<1, kFour>(m, panel, x, t0 + t, c + t * kPanel, t == 0);
}

}  // namespace trv

#include "amx.h"

namespace trv {

// c [tokens][64] = x[t0 … t0 + tokens] · panelᵀ, scales included. `t0` is a multiple of the form's tile.
inline void product(const Matrix& m, int64_t panel, const Prepared& x, int t0, int tokens, float* c, Scratch& scratch) {
  memset(c, 0, (size_t)tokens * kPanel * 4);
  switch (m.format) {
    case kFloat32:
      return float_product(FromFloat32{(const float*)m.data + panel * kPanel * m.padded}, m.columns, x, t0, tokens, c, scratch, false);
    case kFloat16:
      return float_product(FromFloat16{(const uint16_t*)m.data + panel * kPanel * m.padded}, m.columns, x, t0, tokens, c, scratch, true);
    case kBfloat16:
#if TRV_AMX
      return thirds_product(m, panel, x, t0, tokens, c, scratch);
#else
      return float_product(FromBfloat16{(const uint16_t*)m.data + panel * kPanel * m.padded}, m.columns, x, t0, tokens, c, scratch, true);
#endif
  }
#if TRV_AMX
  if (tokens >= kTileProduct)
    int_tiles(m, panel, x, t0, tokens, c, scratch);
  else
#endif
  if (m.format == kInt8)
    int_panel<false>(m, panel, x, t0, tokens, c);
  else
    int_panel<true>(m, panel, x, t0, tokens, c);
  if (!m.group)
    for (int j = 0; j < 4; j++) {
      vf s = load_scale(m, panel, 1, 0, j);
      for (int t = 0; t < tokens; t++) vstore(c + t * kPanel + j * kLanes, vmul(vload(c + t * kPanel + j * kLanes), s));
    }
}

}  // namespace trv
