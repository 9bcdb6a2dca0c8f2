// Products on AMX tiles: quantised weights (the same integers as everywhere), and bf16 weights by [Note: exact thirds].
#pragma once

#if TRV_AMX
namespace trv {

constexpr int kTileProduct = 6;  // fewer tokens run on vectors; the result is the same

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 … 3 sums and 4, 5 activations, of `rows` rows; 6, 7 weights: `depth` bytes of inputs per row, 16 outputs.
inline void configure_tiles(Scratch& scratch, int rows, int depth) {
  int wanted = rows * 256 + depth;
  if (scratch.tile_rows == wanted) return;
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.bytes[i] = i == 4 || i == 5 ? depth : 64;
    config.rows[i] = i < 6 ? rows : depth / 4;
  }
  // Not _tile_loadconfig: g++ 12 declares that it reads eight bytes, and drops the stores to the others.
  asm volatile("ldtilecfg %0" : : "m"(config));
  scratch.tile_rows = wanted;
}
inline void release_tiles(Scratch& scratch) {
  if (scratch.tile_rows >= 0) _tile_release();
  scratch.tile_rows = -1;
}

// One tile of up to 16 tokens times a panel of int8, group by group, straight from where it lies.
inline void int8_tile(const Matrix& m, int64_t panel, const Prepared& x, const uint8_t* w, int64_t t0, int tokens, float* c,
                     int32_t* sums, bool fetch) {
  const int8_t* a = x.quants + (t0 / kTile) * x.chunks * 1024;
  for (int g = 0; g < x.groups; g++) {
    int64_t begin = (int64_t)g * x.group, end = begin + x.group < m.padded ? begin + x.group : m.padded;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    int64_t step = x.group < 64 ? x.group : 64;
    for (int64_t k = begin; k < end; k += step) {
      const uint8_t* b = w + k * kPanel;
      if (fetch) fetch_far(b, step * kPanel);
      _tile_loadd(4, a + (k / 64) * 1024 + k % 64, 64);
      _tile_loadd(6, b, 256);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, b + 64, 256);
      _tile_dpbsud(1, 4, 7);
      _tile_loadd(6, b + 128, 256);
      _tile_dpbsud(2, 4, 6);
      _tile_loadd(7, b + 192, 256);
      _tile_dpbsud(3, 4, 7);
    }
    _tile_stored(0, sums, 256);
    _tile_stored(1, sums + 16, 256);
    _tile_stored(2, sums + 32, 256);
    _tile_stored(3, sums + 48, 256);
    vf weight_scale[4];
    for (int j = 0; j < 4; j++) weight_scale[j] = m.group ? load_scale(m, panel, x.groups, g, j) : vzero();
    for (int t = 0; t < tokens; t++) {
      int64_t at = x.place(t0 + t, g);
      vi start = viset(-128 * x.sums[at]);
      for (int j = 0; j < 4; j++)
        add_group(m, panel, x.groups, g, j, viadd(viload(sums + t * 64 + j * 16), start), x.scales[at], x.sums[at],
                  weight_scale[j], c + t * kPanel);
    }
  }
}

// [Note: tiles of int4] A slice of the panel, four groups of inputs, is unpacked to signed bytes, sixteen outputs after
// sixteen, so that it lies in the first caches while all tokens pass it; meanwhile the next slice is fetched. A tile of
// tokens and sixteen outputs keep their fp32 sums in registers over the slice, and while these groups are added to them, the
// tiles multiply the next sixteen outputs.
constexpr int kSliceGroups = 4;

struct Int4Slice {
  const Matrix& m;
  const Prepared& x;
  int64_t panel;
  const int8_t* wide;  // [4][depth / 4][16][4], of groups first … last − 1
  int first, last;
  int64_t depth;
};

// The numbers of tiles are part of the instructions.
#define TRV_MULTIPLY(sum, left, right, a, b, to) \
  _tile_zero(sum);                               \
  _tile_loadd(left, a, 64);                      \
  _tile_loadd(right, b, 64);                     \
  _tile_dpbssd(sum, left, right);                \
  if (kGroup > 64) {                             \
    _tile_loadd(left, (a) + 1024, 64);           \
    _tile_loadd(right, (b) + 1024, 64);          \
    _tile_dpbssd(sum, left, right);              \
  }                                              \
  _tile_stored(sum, to, 64)

// The sums of the slice's groups, for outputs 16 · j on, of the tile of tokens at `a`. Groups that the last slice does not
// have are multiplied too and used by nobody: whatever lies there, and in kPastTiles.
template <int kGroup>
TRV_INLINE void multiply_slice(const Int4Slice& s, const int8_t* a, int j, int32_t* sums) {
  const int8_t* w = s.wide + j * s.depth * kLanes;
  a += (int64_t)s.first * kGroup / 64 * 1024;
  constexpr int kNext = kGroup < 64 ? kGroup : kGroup / 64 * 1024, kWeights = kGroup * kLanes;
  constexpr int kPair = kGroup < 64 ? 1024 : 2 * kNext;
  static_assert(kPair + kNext + kNext <= kPastTiles, "the last group's activations lie within what is reserved");
  TRV_MULTIPLY(0, 4, 6, a, w, sums);
  TRV_MULTIPLY(1, 5, 7, a + kNext, w + kWeights, sums + 256);
  TRV_MULTIPLY(2, 4, 6, a + kPair, w + 2 * kWeights, sums + 512);
  TRV_MULTIPLY(3, 5, 7, a + kPair + kNext, w + 3 * kWeights, sums + 768);
}
#undef TRV_MULTIPLY

template <int NR, bool kZeros>
TRV_INLINE void add_slice(const Int4Slice& s, int64_t t0, int j, const int32_t* sums, vf (&acc)[NR]) {
  const int groups = s.x.groups;
  for (int g = s.first; g < s.last; g++, sums += 256) {
    const vf weight_scale = load_scale(s.m, s.panel, groups, g, j);
    const vi zeros = kZeros ? vload_u8(s.m.zeros + (s.panel * groups + g) * kPanel + j * kLanes) : viset(0);
    const float* scales = s.x.scales + s.x.place(t0, g);
    const int32_t* inputs = s.x.sums + s.x.place(t0, g);
    TRV_UNROLL
    for (int t = 0; t < NR; t++) {
      vi dot = viload(sums + t * kLanes);
      if (kZeros) dot = visub(dot, vimul(zeros, viset(inputs[t])));
      acc[t] = vfma(vfloat(dot), vmul(vset(scales[t]), weight_scale), acc[t]);
    }
  }
}

// One tile of NR tokens times the slice; `c` holds the sums of the slices before. `next`, if any: what is fetched.
template <int NR, int kGroup, bool kZeros>
__attribute__((noinline)) void int4_tile(const Int4Slice& s, int64_t t0, float* c, int32_t* sums, const char* next) {
  const int8_t* a = s.x.quants + (t0 / kTile) * s.x.chunks * 1024;
  constexpr int kShare = kSliceGroups * kGroup * kPanel / 8;  // bytes of a quarter of the next slice
  multiply_slice<kGroup>(s, a, 0, sums);
  for (int j = 0; j < 4; j++) {
    vf acc[NR];
    TRV_UNROLL
    for (int t = 0; t < NR; t++) acc[t] = vload(c + t * kPanel + j * kLanes);
    if (next)
      for (int i = 0; i < kShare; i += 64) vprefetch(next + j * kShare + i);
    if (j < 3) multiply_slice<kGroup>(s, a, j + 1, sums + (j + 1) % 2 * 1024);
    add_slice<NR, kZeros>(s, t0, j, sums + j % 2 * 1024, acc);
    TRV_UNROLL
    for (int t = 0; t < NR; t++) vstore(c + t * kPanel + j * kLanes, acc[t]);
  }
}

// Groups `s.first` on of a panel as signed bytes (with zero points: as stored), and zeros to the end of the last one.
inline void unpack_slice(const Int4Slice& s, int64_t k, int64_t depth, int8_t* wide) {
  const vb eight = _mm512_set1_epi8(s.m.zeros ? 0 : 8), none = _mm512_setzero_si512();
  const uint8_t* w = (const uint8_t*)s.m.data + (s.panel * s.m.padded + k) * kPanel / 2;
  for (int64_t i = 0; i < s.depth; i += 8)
    for (int j = 0; j < 4; j++) {
      int8_t* to = wide + (j * s.depth + i) * kLanes;
      vb packed = i < depth ? vbload(w + i * 32 + j * 64) : none;
      _mm512_store_si512(to, i < depth ? _mm512_sub_epi8(vlow4(packed), eight) : none);
      _mm512_store_si512(to + 64, i < depth ? _mm512_sub_epi8(vhigh4(packed), eight) : none);
    }
}

template <int kGroup, bool kZeros>
void int4_groups(const Matrix& m, int64_t panel, const Prepared& x, int64_t t0, int tokens, float* c, Scratch& scratch) {
  int8_t* wide = scratch.weights.get<int8_t>((size_t)kSliceGroups * kGroup * kPanel);
  int32_t* sums = scratch.tiles.get<int32_t>(2048);
  for (int g = 0; g < x.groups; g += kSliceGroups) {
    const int last = g + kSliceGroups < x.groups ? g + kSliceGroups : x.groups;
    const int64_t k = (int64_t)g * kGroup, end = (int64_t)last * kGroup < m.padded ? (int64_t)last * kGroup : m.padded;
    const Int4Slice s{m, x, panel, wide, g, last, (int64_t)(last - g) * kGroup};
    unpack_slice(s, k, end - k, wide);
    const char* next = (const char*)m.data + (panel * m.padded + end) * kPanel / 2;
    for (int t = 0; t < tokens; t += kTile, next = nullptr) {
      const bool half = tokens - t <= kTile / 2;
      configure_tiles(scratch, half ? kTile / 2 : kTile, kGroup < 64 ? kGroup : 64);
      auto tile = half ? int4_tile<kTile / 2, kGroup, kZeros> : int4_tile<kTile, kGroup, kZeros>;
      tile(s, t0 + t, c + t * kPanel, sums, next);
    }
  }
}

inline void int_tiles(const Matrix& m, int64_t panel, const Prepared& x, int64_t t0, int tokens, float* c, Scratch& scratch) {
  if (m.format == kInt4) {
    auto groups = x.group == 32   ? m.zeros ? int4_groups<32, true> : int4_groups<32, false>
                  : x.group == 64 ? m.zeros ? int4_groups<64, true> : int4_groups<64, false>
                                  : m.zeros ? int4_groups<128, true> : int4_groups<128, false>;
    return groups(m, panel, x, t0, tokens, c, scratch);
  }
  const uint8_t* w = (const uint8_t*)m.data + panel * kPanel * m.padded;
  int32_t* sums = scratch.tiles.get<int32_t>(2048);
  configure_tiles(scratch, 16, x.group < 64 ? x.group : 64);
  for (int t = 0; t < tokens; t += kTile)
    int8_tile(m, panel, x, w, t0 + t, tokens - t < kTile ? tokens - t : kTile, c + t * kPanel, sums, t == 0);
}

// c[t] = its three rows of sums, added in order.
TRV_INLINE void join_thirds(const float* sums, int tokens, float* c, int columns) {
  for (int t = 0; t < tokens; t++)
    for (int j = 0; j < columns; j += kLanes) {
      const float* s = sums + t * 3 * 64 + j;
      vstore(c + t * kPanel + j, vadd(vadd(vload(s), vload(s + 64)), vload(s + 128)));
    }
}

inline void thirds_one(const uint16_t* w, const uint16_t* a, int chunks, int tokens, float* c, float* sums) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int k = 0; k < chunks; k++) {
    const uint16_t* b = w + k * 2048;
    fetch_far(b, 4096);
    _tile_loadd(4, a + k * 512, 64);
    _tile_loadd(6, b, 256);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 32, 256);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, b + 64, 256);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, b + 96, 256);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, sums, 256);
  _tile_stored(1, sums + 16, 256);
  _tile_stored(2, sums + 32, 256);
  _tile_stored(3, sums + 48, 256);
  join_thirds(sums, tokens, c, 64);
}

// Two tiles of tokens times half a panel, `chunks` deep: four sums, each operand used twice. `sums` is carried over.
inline void thirds_two(const uint16_t* w, const uint16_t* a, const uint16_t* a2, int chunks, float* sums, float* sums2,
                       bool fresh) {
  if (fresh) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 256); _tile_loadd(1, sums + 16, 256);
    _tile_loadd(2, sums2, 256); _tile_loadd(3, sums2 + 16, 256);
  }
  for (int k = 0; k < chunks; k++) {
    _tile_loadd(4, a + k * 512, 64);
    _tile_loadd(6, w + k * 2048, 256);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + k * 2048 + 32, 256);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a2 + k * 512, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 256); _tile_stored(1, sums + 16, 256);
  _tile_stored(2, sums2, 256); _tile_stored(3, sums2 + 16, 256);
}

inline void thirds_product(const Matrix& m, int64_t panel, const Prepared& x, int t0, int tokens, float* c, Scratch& scratch) {
  const uint16_t* w = (const uint16_t*)m.data + panel * kPanel * m.padded;
  const uint16_t* a = x.thirds + (int64_t)(t0 / kThirdsTile) * x.chunks * 512;
  const int64_t tile = (int64_t)x.chunks * 512;
  int tiles = (tokens + kThirdsTile - 1) / kThirdsTile;
  if (tiles == 1) {
    float* sums = scratch.tiles.get<float>(2048);
    configure_tiles(scratch, 3 * tokens, 64);
    return thirds_one(w, a, x.chunks, tokens, c, sums);
  }
  configure_tiles(scratch, 16, 64);
  // Sums of all tiles stay in memory between slices of the inputs, so that a slice of weights stays in the first cache.
  float* sums = scratch.weights.get<float>((size_t)(kBlock / kThirdsTile + 2) * 1024);
  constexpr int kSlice = 8;
  for (int k = 0; k < x.chunks; k += kSlice) {
    int depth = k + kSlice < x.chunks ? kSlice : x.chunks - k;
    for (int i = 0; i < tiles; i += 2) {
      int other = i + 1 < tiles ? i + 1 : i;  // an odd last tile runs twice
      float* first = sums + (size_t)i * 1024;
      float* second = sums + (size_t)(other == i ? tiles : other) * 1024;
      for (int half = 0; half < 2; half++)
        thirds_two(w + (int64_t)k * 2048 + half * 64, a + i * tile + k * 512, a + other * tile + k * 512, depth,
                   first + half * 32, second + half * 32, k == 0);
    }
  }
  for (int i = 0; i < tiles; i++) {
    int t = i * kThirdsTile;
    join_thirds(sums + (size_t)i * 1024, tokens - t < kThirdsTile ? tokens - t : kThirdsTile, c + t * kPanel, 64);
  }
}

}  // namespace trv
#else
namespace trv {
inline void release_tiles(Scratch&) {}
}  // namespace trv
#endif
