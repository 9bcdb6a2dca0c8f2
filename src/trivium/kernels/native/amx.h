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

// One tile of up to 16 tokens times the panel, group by group.
inline void int_tile(const Matrix& m, int64_t panel, const Prepared& x, const uint8_t* w, int64_t t0, int tokens, float* c,
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
      int64_t at = (t0 + t) * x.groups + g;
      vi start = viset(m.format == kInt4 ? (m.zeros ? 0 : -8 * x.sums[at]) : -128 * x.sums[at]);
      for (int j = 0; j < 4; j++)
        add_group(m, panel, x.groups, g, j, viadd(viload(sums + t * 64 + j * 16), start), x.scales[at], x.sums[at],
                  weight_scale[j], c + t * kPanel);
    }
  }
}

inline void int_tiles(const Matrix& m, int64_t panel, const Prepared& x, int64_t t0, int tokens, float* c, Scratch& scratch) {
  const uint8_t* w = (const uint8_t*)m.data + panel * kPanel * m.padded / (m.format == kInt4 ? 2 : 1);
  if (m.format == kInt4) {
    uint8_t* wide = scratch.weights.get<uint8_t>((size_t)m.padded * kPanel);
    for (int64_t k = 0; k < m.padded; k += 8)
      for (int j = 0; j < 4; j++) {
        vb packed = vbload(w + k * 32 + j * 64);
        fetch_far(w + k * 32 + j * 64, 64);
        _mm512_storeu_si512(wide + k * kPanel + j * 64, vlow4(packed));
        _mm512_storeu_si512(wide + (k + 4) * kPanel + j * 64, vhigh4(packed));
      }
    w = wide;
  }
  int32_t* sums = scratch.tiles.get<int32_t>(2048);
  configure_tiles(scratch, 16, x.group < 64 ? x.group : 64);
  for (int t = 0; t < tokens; t += kTile)
    int_tile(m, panel, x, w, t0 + t, tokens - t < kTile ? tokens - t : kTile, c + t * kPanel, sums, t == 0 && m.format == kInt8);
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
