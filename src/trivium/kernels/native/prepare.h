// Activations as a product wants them: as they are, quantised to int8, or split in three bf16 parts for AMX.
//
// [Note: exact thirds] A fp32 number is the sum of three bf16 numbers of 8 significant bits each (cut, not rounded), so
// bf16 weights times fp32 activations are three bf16 products each exact in fp32: fp32 arithmetic on bf16 units.
#pragma once
#include "abi.h"
#include "mathvec.h"
#include "pool.h"

#if TRV_AVX512 && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define TRV_AMX 1
#endif

namespace trv {

enum Form { kPlain, kQuantised, kThirds };
constexpr int kTile = 16;    // rows of a tile of activations
constexpr int kThirdsTile = 5;  // tokens of a tile of thirds: 15 of its 16 rows

inline Form form_of(const Matrix& m) {
  if (m.format == kInt8 || m.format == kInt4) return kQuantised;
#if TRV_AMX
  if (m.format == kBfloat16) return kThirds;
#endif
  return kPlain;
}

// Quantised: tiles [tile][chunk of 64 columns][16 rows][64], scales and sums [tile][groups][16 rows].
// Thirds: tiles of 5 tokens [tile][chunk of 32 columns][16 rows][32], rows 3t, 3t + 1, 3t + 2 of token t.
struct Prepared {
  Form form = kPlain;
  const float* x = nullptr;
  int64_t stride = 0;
  int columns = 0, group = 0, groups = 0, chunks = 0;
  int8_t* quants = nullptr;
  float* scales = nullptr;
  int32_t* sums = nullptr;
  uint16_t* thirds = nullptr;

  int8_t* quant_row(int64_t t) const { return quants + (t / kTile) * chunks * 1024 + (t % kTile) * 64; }
  // Where the scale and the sum of a row's group are.
  int64_t place(int64_t t, int g) const { return ((t / kTile) * groups + g) * kTile + t % kTile; }
};

// Bytes behind the tiles that a product of int4 may read, without using them: [Note: tiles of int4].
constexpr int64_t kPastTiles = 8 * 1024;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int tile_tokens(Form form) { return form == kThirds ? kThirdsTile : kTile; }

// Lays the pieces of `rows` rows out in one buffer.
inline Prepared plan_prepared(Form form, int64_t rows, int columns, int group, Buffer& buffer) {
  Prepared p;
  p.form = form;
  p.columns = columns;
  if (form == kQuantised) {
    p.group = group;
    p.groups = (columns + group - 1) / group;
    p.chunks = (columns + 63) / 64;
    size_t tiles = (size_t)round_up(rows, kTile) / kTile * p.chunks * 1024;
    size_t table = (size_t)round_up(rows, kTile) * p.groups * 4;
    char* base = buffer.get<char>(tiles + 2 * table + kPastTiles);
    p.quants = (int8_t*)base;
    p.scales = (float*)(base + tiles);
    p.sums = (int32_t*)(base + tiles + table);
  } else if (form == kThirds) {
    p.chunks = (columns + 31) / 32;
    size_t tiles = (size_t)((rows + kThirdsTile - 1) / kThirdsTile) * p.chunks * 512;
    p.thirds = buffer.get<uint16_t>(tiles);
  }
  return p;
}

TRV_INLINE vf load_tail(const float* x, int at, int columns) {
  return at + kLanes <= columns ? vload(x + at) : at < columns ? vload_n(x + at, columns - at) : vzero();
}

// Groups first … last − 1 of a row as int8, with their scales and sums.
inline void quantise_groups(const Prepared& p, const float* x, int64_t t, int first, int last) {
  int8_t* row = p.quant_row(t);
  for (int g = first; g < last; g++) {
    int begin = g * p.group, end = begin + p.group;
    if (end > p.chunks * 64) end = p.chunks * 64;
    vf best = vzero(), odd = vzero();
    for (int k = begin; k < end; k += kLanes) {
      vf v = load_tail(x, k, p.columns);
      best = vmax(best, vabs(v));
      odd = vfma(v, vzero(), odd);  // NaN where v is not finite
    }
    float largest = htop(best);
    bool finite = hsum(odd) == 0.0f;
    float inverse = finite && largest > 0.0f ? 127.0f / largest : 0.0f;
    vf lo = vset(-127.0f), hi = vset(127.0f);
    vi sum = viset(0);
    for (int k = begin; k < end; k += kLanes) {
      vf v = finite ? load_tail(x, k, p.columns) : vzero();
      vi q = vint(vmax(lo, vmin(hi, vmul(v, vset(inverse)))));
      sum = viadd(sum, q);
      vstore_s8(row + (k / 64) * 1024 + (k % 64), q);
    }
    p.scales[p.place(t, g)] = finite ? largest * (1.0f / 127.0f) : NAN;
    p.sums[p.place(t, g)] = hisum(sum);
  }
}

// Columns begin … end − 1 of a row, both multiples of 32, as bf16 thirds.
inline void split_columns(const Prepared& p, const float* x, int64_t t, int begin, int end) {
  uint16_t* tile = p.thirds + (t / kThirdsTile) * p.chunks * 512 + (t % kThirdsTile) * 3 * 32;
  vi top = viset((int32_t)0xffff0000);
  for (int k = begin; k < end; k += kLanes) {
    vf v = load_tail(x, k, p.columns);
    uint16_t* at = tile + (k / 32) * 512 + k % 32;
    for (int part = 0; part < 3; part++) {
      vi bits = vand(vints(v), top);
      vstore_u16(at + part * 32, vshr(bits, 16));
      v = vsub(v, vbits(bits));
    }
  }
}

// A row falls into pieces of so many columns, which may be prepared apart.
inline int piece_columns(const Prepared& p) { return p.form == kQuantised && p.group > 64 ? p.group : 64; }
inline int pieces_of(const Prepared& p) { return (p.columns + piece_columns(p) - 1) / piece_columns(p); }

inline void prepare_pieces(const Prepared& p, const float* x, int64_t t, int first, int last) {
  const int begin = first * piece_columns(p), end = last * piece_columns(p);
  if (p.form == kQuantised) {
    const int groups = (end + p.group - 1) / p.group;
    quantise_groups(p, x, t, begin / p.group, groups < p.groups ? groups : p.groups);
  }
  if (p.form == kThirds) split_columns(p, x, t, begin, end < p.chunks * 32 ? end : p.chunks * 32);
}

inline void prepare_row(const Prepared& p, const float* x, int64_t t) { prepare_pieces(p, x, t, 0, pieces_of(p)); }

}  // namespace trv
