// Paged causal attention with online softmax, for prefill and decode alike.
//
// [Note: key tiles] Keys are taken in tiles of 64 by absolute position, whatever the block size, the chunk or the batch:
// a query meets the same tiles in the same order everywhere, and tiles it does not see change nothing. Scores and
// weighted values run through `float_panel`, whose outputs do not depend on the number of rows either.
#pragma once
#include "linear.h"

namespace trv {

constexpr int kKeys = 64;
constexpr int kQueryRows = 64;

#if TRV_AVX512
TRV_INLINE void transpose16(const float* const* rows, int64_t column, float* out, int64_t stride) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(rows[i] + column);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_ps(out + i * stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(out + (i + 8) * stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_ps(out + (i + 4) * stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_ps(out + (i + 12) * stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#elif TRV_AVX2
TRV_INLINE void transpose8(const float* const* rows, int64_t column, float* out, int64_t stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows[i] + column);
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
TRV_INLINE void transpose16(const float* const* rows, int64_t column, float* out, int64_t stride) {
  for (int half = 0; half < 16; half += 8)
    for (int part = 0; part < 16; part += 8) transpose8(rows + half, column + part, out + part * stride + half, stride);
}
#else
TRV_INLINE void transpose16(const float* const* rows, int64_t column, float* out, int64_t stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[j * stride + i] = rows[i][column + j];
}
#endif

// A page's row as fp32: the page itself where it is, else converted into `to`.
inline const float* page_row(const void* pages, const float* scales, int format, int64_t row, int width, float* to) {
  if (format == kFloat32) return (const float*)pages + row * width;
  for (int i = 0; i < width; i += kLanes) {
    bool whole = i + kLanes <= width;
    if (format == kBfloat16) {
      const uint16_t* p = (const uint16_t*)pages + row * width + i;
      uint16_t tail[16] = {};
      if (!whole) memcpy(tail, p, (size_t)(width - i) * 2);
      vstore(to + i, vload_bf16(whole ? p : tail));
    } else {
      const int8_t* p = (const int8_t*)pages + row * width + i;
      int8_t tail[16] = {};
      if (!whole) memcpy(tail, p, (size_t)(width - i));
      vstore(to + i, vmul(vfloat(vload_s8(whole ? p : tail)), vset(scales[row])));
    }
  }
  return to;
}

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
  float largest = hmax(best);
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

// One (sequence run, kv head, block of its tokens, block of the heads that share the kv head).
struct AttendItem {
  int begin, end, kv_head, first_head, heads;
};

struct AttendWork {
  const Turn& turn;
  const Operation& op;
  const Cache& cache;
  int depth_values, panels;  // value_dim, and in panels of 64
  float *queries, *keys, *values, *scores, *out, *best, *sum, *rows;

  AttendWork(const Turn& t, const Cache& c) : turn(t), op(t.op), cache(c) {
    depth_values = op.value_dim;
    panels = (op.value_dim + kPanel - 1) / kPanel;
    int64_t head = round_up(op.head_dim, kLanes), value = (int64_t)panels * kPanel;
    int64_t wide = head > value ? head : value;
    float* base = turn.scratch().attention.get<float>(kQueryRows * head + head * kKeys + value * kKeys +
                                                      kQueryRows * (kKeys + value) + 2 * kQueryRows + 18 * wide);
    queries = base;
    keys = queries + kQueryRows * head;
    values = keys + head * kKeys;
    scores = values + value * kKeys;
    out = scores + kQueryRows * kKeys;
    best = out + kQueryRows * value;
    sum = best + kQueryRows;
    rows = sum + kQueryRows;
  }

  int64_t page(const int32_t* table, int64_t position, int kv_head) const {
    int64_t block = table[position / cache.block_size], slot = position % cache.block_size;
    return (block * op.kv_heads + kv_head) * cache.block_size + slot;
  }

  // Keys of positions low … high of the tile at `start`, transposed; values row by row; the rest zero.
  void load_tile(const int32_t* table, int kv_head, int64_t start, int64_t low, int64_t high) {
    const int wide = (int)round_up(op.head_dim, kLanes);
    const int buffer = wide > panels * kPanel ? wide : panels * kPanel;
    float* zero = rows + 16 * buffer;
    memset(zero, 0, (size_t)buffer * 4);
    for (int group = 0; group < kKeys; group += 16) {
      const float* from[16];
      for (int i = 0; i < 16; i++) {
        int64_t position = start + group + i;
        float* value = values + (group + i) * kPanel;
        if (position < low || position > high) {
          from[i] = zero;
          for (int p = 0; p < panels; p++) memset(value + (int64_t)p * kKeys * kPanel, 0, kPanel * 4);
          continue;
        }
        int64_t at = page(table, position, kv_head);
        float* buffered = rows + i * buffer;
        from[i] = page_row(cache.keys, cache.key_scales, cache.format, at, op.head_dim, buffered);
        if (op.latent) {
          spread(from[i], value);
        } else {
          spread(page_row(cache.values, cache.value_scales, cache.format, at, depth_values, rows + 17 * buffer), value);
        }
      }
      int column = 0;
      for (; column + 16 <= op.head_dim; column += 16) transpose16(from, column, keys + column * kKeys + group, kKeys);
      for (; column < op.head_dim; column++)
        for (int i = 0; i < 16; i++) keys[column * kKeys + group + i] = from[i][column];
    }
  }

  // A row of values into its place in every panel of 64 columns; columns past the last are zero.
  void spread(const float* v, float* to) const {
    for (int p = 0; p < panels; p++) {
      int n = depth_values - p * kPanel < kPanel ? depth_values - p * kPanel : kPanel;
      float* at = to + (int64_t)p * kKeys * kPanel;
      memcpy(at, v + p * kPanel, (size_t)n * 4);
      if (n < kPanel) memset(at + n, 0, (size_t)(kPanel - n) * 4);
    }
  }

  void run(const AttendItem& item, const int32_t* table);
  void soften(int row, int head, int64_t position, int64_t start);
  void finish(const AttendItem& item, int count);
};

// Sixty-four 0 then sixty-four −inf, and the other way round: masks at any offset.
struct MaskTable {
  float after[128], before[128];
  MaskTable() {
    for (int i = 0; i < 128; i++) {
      after[i] = i < 64 ? 0.0f : -INFINITY;
      before[i] = i < 64 ? -INFINITY : 0.0f;
    }
  }
};

// One row's scores of a tile become weights; its sum, maximum and output so far are rescaled.
inline void AttendWork::soften(int row, int head, int64_t position, int64_t start) {
  static const MaskTable masks;
  float* s = scores + row * kKeys;
  int64_t last = position - start;  // the last lane that is seen
  int64_t first = op.has_window ? position - op.window + 1 - start : 0;
  if (last < 0 || first >= kKeys) {
    memset(s, 0, kKeys * 4);
    return;
  }
  if (first < 0) first = 0;
  vf v[4], top = vset(-INFINITY);
  for (int j = 0; j < 4; j++) {
    v[j] = vmul(vload(s + j * kLanes), vset(op.scale));
    if (op.softcap > 0.0f) v[j] = vmul(vset(op.softcap), vtanh(vdiv(v[j], vset(op.softcap))));
    if (op.slopes) {
      int32_t distance[16];
      for (int i = 0; i < 16; i++) distance[i] = (int32_t)(start + j * kLanes + i - position);
      v[j] = vfma(vset(op.slopes[head]), vfloat(viload(distance)), v[j]);
    }
    if (op.biases) v[j] = vadd(v[j], vload(op.biases + (int64_t)head * op.first + start + j * kLanes));
    if (last < kKeys - 1) v[j] = vadd(v[j], vload(masks.after + 63 - last + j * kLanes));
    if (first > 0) v[j] = vadd(v[j], vload(masks.before + 64 - first + j * kLanes));
    top = vmax(top, v[j]);
  }
  float tile_best = hmax(top), old = best[row];
  float now = tile_best > old || tile_best != tile_best ? tile_best : old;
  vf total = vzero();
  for (int j = 0; j < 4; j++) {
    vf e = vexp(vsub(v[j], vset(now)));
    vstore(s + j * kLanes, e);
    total = vadd(total, e);
  }
  if (now != old) {
    float shrink = exp1(old - now);
    sum[row] *= shrink;
    for (int p = 0; p < panels; p++) {
      float* o = out + ((int64_t)p * kQueryRows + row) * kPanel;
      for (int j = 0; j < kPanel; j += kLanes) vstore(o + j, vmul(vload(o + j), vset(shrink)));
    }
  }
  sum[row] += hsum(total);
  best[row] = now;
}

inline void AttendWork::run(const AttendItem& item, const int32_t* table) {
  const Batch& batch = *turn.state.batch;
  const int tokens = item.end - item.begin, count = tokens * item.heads;
  for (int t = 0; t < tokens; t++)
    for (int h = 0; h < item.heads; h++)
      memcpy(queries + (t * item.heads + h) * op.head_dim,
             turn.state.at(op.x, item.begin + t) + (int64_t)(item.first_head + h) * op.head_dim, (size_t)op.head_dim * 4);
  for (int p = 0; p < panels; p++) memset(out + (int64_t)p * kQueryRows * kPanel, 0, (size_t)count * kPanel * 4);
  for (int r = 0; r < count; r++) {
    best[r] = -INFINITY;
    sum[r] = 0.0f;
  }
  int64_t high = batch.positions[item.end - 1], low = 0;
  if (op.has_window) low = batch.positions[item.begin] - (int64_t)op.window + 1;
  if (low < 0) low = 0;
  for (int64_t start = low / kKeys * kKeys; start <= high; start += kKeys) {
    load_tile(table, item.kv_head, start, low, high);
    memset(scores, 0, (size_t)count * kKeys * 4);
    float_panel(FromFloat32{keys}, op.head_dim, queries, op.head_dim, count, scores, kKeys);
    for (int r = 0; r < count; r++)
      soften(r, item.first_head + r % item.heads, batch.positions[item.begin + r / item.heads], start);
    int64_t seen = high - start + 1 < kKeys ? high - start + 1 : kKeys;
    for (int p = 0; p < panels; p++)
      float_panel(FromFloat32{values + (int64_t)p * kKeys * kPanel}, seen, scores, kKeys, count,
                  out + (int64_t)p * kQueryRows * kPanel, kPanel);
  }
  finish(item, count);
}

inline void AttendWork::finish(const AttendItem& item, int count) {
  for (int r = 0; r < count; r++) {
    int head = item.first_head + r % item.heads;
    float total = sum[r], shrink = 1.0f;
    if (op.sinks) {
      float sink = op.sinks[head], now = sink > best[r] ? sink : best[r];
      shrink = exp1(best[r] - now);
      total = total * shrink + exp1(sink - now);
    }
    vf inverse = vset(shrink / total);
    float* to = turn.state.at(op.out, item.begin + r / item.heads) + (int64_t)head * depth_values;
    for (int i = 0; i < depth_values; i += kLanes) {
      const float* o = out + ((int64_t)(i / kPanel) * kQueryRows + r) * kPanel + i % kPanel;
      store_at(to, i, depth_values, vmul(vload(o), inverse));
    }
  }
}

inline void write_cache(const Turn& turn, const Cache& cache, int token, int kv_head, const int32_t* table) {
  const Operation& op = turn.op;
  int64_t position = turn.state.batch->positions[token], block = table[position / cache.block_size];
  int64_t row = (block * op.kv_heads + kv_head) * cache.block_size + position % cache.block_size;
  const float* key = turn.state.at(op.y, token) + (int64_t)kv_head * op.head_dim;
  write_page_row(cache.keys, cache.key_scales, cache.format, row, op.head_dim, key);
  if (op.latent) return;
  const float* value = turn.state.at(op.z, token) + (int64_t)kv_head * op.value_dim;
  write_page_row(cache.values, cache.value_scales, cache.format, row, op.value_dim, value);
}

inline void run_attend(const Turn& turn) {
  const Operation& op = turn.op;
  const Batch& batch = *turn.state.batch;
  const Cache& cache = batch.caches[op.cache];
  const int share = op.heads / op.kv_heads;
  const int heads = share < kQueryRows ? share : kQueryRows;
  const int head_blocks = (share + heads - 1) / heads, block = kQueryRows / heads;
  auto table_of = [&](int token) { return batch.block_tables + (int64_t)batch.sequences[token] * batch.blocks_per_sequence; };
  // Where each (sequence, kv head) is one item, the item writes its own keys and values first; else all are written first.
  bool own = head_blocks == 1;
  for (const SequenceRun& run : turn.state.runs) own = own && run.end - run.begin <= block;
  if (!own) {
    int64_t begin, end;
    turn.share(batch.tokens * op.kv_heads, begin, end);
    for (int64_t i = begin; i < end; i++)
      write_cache(turn, cache, (int)(i / op.kv_heads), (int)(i % op.kv_heads), table_of((int)(i / op.kv_heads)));
    turn.barrier();
  }
  AttendWork work(turn, cache);
  int64_t base = 0, wanted = turn.take(0);
  for (const SequenceRun& run : turn.state.runs) {
    int64_t blocks = (run.end - run.begin + block - 1) / block, items = blocks * op.kv_heads * head_blocks;
    for (; wanted < base + items; wanted = turn.take(0)) {
      int64_t i = wanted - base;
      AttendItem item;
      // Last blocks first: they see the most keys.
      item.begin = run.begin + (int)(blocks - 1 - i / (op.kv_heads * head_blocks)) * block;
      item.end = item.begin + block < run.end ? item.begin + block : run.end;
      item.kv_head = (int)(i / head_blocks % op.kv_heads);
      int first = (int)(i % head_blocks) * heads;
      item.first_head = item.kv_head * share + first;
      item.heads = share - first < heads ? share - first : heads;
      const int32_t* table = table_of(item.begin);
      if (own)
        for (int t = item.begin; t < item.end; t++) write_cache(turn, cache, t, item.kv_head, table);
      work.run(item, table);
    }
    base += items;
  }
}

}  // namespace trv
