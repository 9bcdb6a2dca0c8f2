// Paged causal attention with online softmax, for prefill and decode alike.
//
// [Note: key tiles] Keys are taken in tiles of 64 by absolute position, whatever the block size, the chunk or the batch:
// a query meets the same tiles in the same order everywhere, and tiles it does not see change nothing. Scores and
// weighted values run through `float_panel`, whose outputs do not depend on the number of rows either.
#pragma once
#include <algorithm>

#include "linear.h"
#include "pages.h"

namespace trv {

constexpr int kKeys = 64;
constexpr int kQueryRows = 64;
// [Note: few queries] For up to so many rows of queries widening a tile costs more than meeting it: they take values from
// the cache as they lie, where these fill whole panels, and bf16 keys transposed but not widened. The arithmetic is the
// same, and its order.
constexpr int kFewRows = 12;

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
  int64_t place[kKeys];  // rows of the cache of the tile's positions

  AttendWork(const Turn& t, const Cache& c) : turn(t), op(t.op), cache(c) {
    depth_values = op.value_dim;
    panels = (op.value_dim + kPanel - 1) / kPanel;
    int64_t head = round_up(op.head_dim, kLanes), value = (int64_t)panels * kPanel;
    float* base = turn.scratch().attention.get<float>(kQueryRows * head + head * kKeys + value * kKeys +
                                                      kQueryRows * (kKeys + value) + 2 * kQueryRows + 16 * head);
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

  // Whether sixteen neighbours lie in one block.
  bool together() const { return cache.block_size % 16 == 0; }

  // Finds where the tile's positions lie in the cache, −1 for those that are not of low … high, and asks for all of them:
  // from page to page the hardware does not fetch ahead.
  void find_rows(const int32_t* table, int kv_head, int64_t start, int64_t low, int64_t high) {
    for (int i = 0; i < kKeys; i++) {
      const int64_t position = start + i;
      if (position < low || position > high) {
        place[i] = -1;
        continue;
      }
      place[i] = together() && i % 16 && place[i - 1] >= 0 ? place[i - 1] + 1 : page(table, position, kv_head);
      fetch_page_row(cache.keys, cache.format, place[i], op.head_dim);
      if (!op.latent) fetch_page_row(cache.values, cache.format, place[i], op.value_dim);
    }
  }

  // The tile's keys, transposed: a panel of fp32 or, for `pairs`, of bf16 as the cache holds it; zero where there is none.
  void load_keys(bool pairs) {
    const int wide = (int)round_up(op.head_dim, kLanes), columns = pairs ? op.head_dim / 2 : op.head_dim;
    const bool straight = pairs || cache.format == kFloat32;  // rows need no conversion
    for (int group = 0; group < kKeys; group += 16) {
      const int64_t* at = place + group;
      float* to = keys + group;
      if (*std::max_element(at, at + 16) < 0) {
        for (int column = 0; column < columns; column++) vstore(to + column * kKeys, vzero());
        continue;
      }
      const float* from = rows;
      int64_t width = wide;
      if (straight && together() && at[0] >= 0 && at[15] >= 0) {
        from = (const float*)cache.keys + at[0] * columns;
        width = columns;
      } else {
        for (int i = 0; i < 16; i++) {
          float* row = rows + i * wide;
          if (at[i] < 0)
            memset(row, 0, (size_t)wide * 4);
          else if (straight)
            memcpy(row, (const float*)cache.keys + at[i] * columns, (size_t)columns * 4);
          else
            read_row(cache.keys, cache.key_scales, cache.format, at[i], op.head_dim, 0, op.head_dim, row);
        }
      }
      int column = 0;
      for (; column + 16 <= columns; column += 16) transpose16(from + column, width, to + column * kKeys, kKeys);
      for (; column < columns; column++)
        for (int i = 0; i < 16; i++) memcpy(to + column * kKeys + i, from + i * width + column, 4);
    }
  }

  // The tile's values as fp32, row by row; zero before the first position, and left alone behind the last: nobody reads them.
  void load_values(int seen) const {
    for (int i = 0; i < seen; i++)
      for (int p = 0; p < panels; p++) {
        const int column = p * kPanel, width = depth_values - column < kPanel ? depth_values - column : kPanel;
        float* to = values + ((int64_t)p * kKeys + i) * kPanel;
        if (width < kPanel || place[i] < 0) memset(to, 0, kPanel * 4);
        if (place[i] < 0) continue;
        if (op.latent)  // values are the first columns of keys
          read_row(cache.keys, cache.key_scales, cache.format, place[i], op.head_dim, column, width, to);
        else
          read_row(cache.values, cache.value_scales, cache.format, place[i], depth_values, column, width, to);
      }
  }

  // out += scores · values.
  void add_values(int count, int seen) {
    if (count <= kFewRows && !op.latent && depth_values % kPanel == 0) {
      if (cache.format == kFloat32) return add_rows<kFloat32>(count, seen);
      if (cache.format == kBfloat16) return add_rows<kBfloat16>(count, seen);
      return add_rows<kInt8>(count, seen);
    }
    load_values(seen);
    for (int p = 0; p < panels; p++)
      float_panel(FromFloat32{values + (int64_t)p * kKeys * kPanel}, seen, scores, kKeys, count, output(p), kPanel);
  }
  template <int kFormat>
  void add_rows(int count, int seen) {
    int first = 0;
    while (first < seen && place[first] < 0) first++;
    for (int p = 0; p < panels; p++)
      float_panel(CacheRows<kFormat>{cache, place + first, depth_values, p * kPanel}, seen - first, scores + first, kKeys, count,
                  output(p), kPanel);
  }
  float* output(int p) const { return out + (int64_t)p * kQueryRows * kPanel; }

  void write(int token, int kv_head, const int32_t* table) const;
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
      float* o = output(p) + (int64_t)row * kPanel;
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
    for (int h = 0; h < item.heads; h++) {
      float* query = queries + (t * item.heads + h) * op.head_dim;
      memcpy(query, turn.state.at(op.x, item.begin + t) + (int64_t)(item.first_head + h) * op.head_dim, (size_t)op.head_dim * 4);
      if (turn.plan.rotation) turn_head(*turn.plan.rotation, batch.positions[item.begin + t], query);
    }
  for (int p = 0; p < panels; p++) memset(output(p), 0, (size_t)count * kPanel * 4);
  for (int r = 0; r < count; r++) {
    best[r] = -INFINITY;
    sum[r] = 0.0f;
  }
  int64_t high = batch.positions[item.end - 1], low = 0;
  if (op.has_window) low = batch.positions[item.begin] - (int64_t)op.window + 1;
  if (low < 0) low = 0;
  const bool pairs = count <= kFewRows && cache.format == kBfloat16 && op.head_dim % 2 == 0;
  for (int64_t start = low / kKeys * kKeys; start <= high; start += kKeys) {
    find_rows(table, item.kv_head, start, low, high);
    load_keys(pairs);
    memset(scores, 0, (size_t)count * kKeys * 4);
    if (pairs)
      float_panel(FromBfloat16{(const uint16_t*)keys}, op.head_dim, queries, op.head_dim, count, scores, kKeys);
    else
      float_panel(FromFloat32{keys}, op.head_dim, queries, op.head_dim, count, scores, kKeys);
    for (int r = 0; r < count; r++)
      soften(r, item.first_head + r % item.heads, batch.positions[item.begin + r / item.heads], start);
    add_values(count, (int)(high - start + 1 < kKeys ? high - start + 1 : kKeys));
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

// One token's key and value of one head into the cache.
inline void AttendWork::write(int token, int kv_head, const int32_t* table) const {
  int64_t position = turn.state.batch->positions[token], block = table[position / cache.block_size];
  int64_t row = (block * op.kv_heads + kv_head) * cache.block_size + position % cache.block_size;
  const float* key = turn.state.at(op.y, token) + (int64_t)kv_head * op.head_dim;
  if (turn.plan.rotation) {
    memcpy(rows, key, (size_t)op.head_dim * 4);
    turn_head(*turn.plan.rotation, position, rows);
    key = rows;
  }
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
  AttendWork work(turn, cache);
  // Where each (sequence, kv head) is one item, the item writes its own keys and values first; else all are written first.
  bool own = head_blocks == 1;
  for (const SequenceRun& run : turn.state.runs) own = own && run.end - run.begin <= block;
  if (!own) {
    int64_t begin, end;
    turn.share(batch.tokens * op.kv_heads, begin, end);
    for (int64_t i = begin; i < end; i++)
      work.write((int)(i / op.kv_heads), (int)(i % op.kv_heads), table_of((int)(i / op.kv_heads)));
    turn.barrier();
  }
  const int per_block = op.kv_heads * head_blocks;
  auto blocks_of = [&](const SequenceRun& run) { return (run.end - run.begin + block - 1) / block; };
  int64_t total = 0;
  for (const SequenceRun& run : turn.state.runs) total += blocks_of(run) * per_block;
  const SequenceRun* run = turn.state.runs.data();
  int64_t base = 0;  // the first item of `run`
  for (int64_t wanted; (wanted = turn.take(0, total)) < total;) {
    while (wanted < base) base -= blocks_of(*--run) * per_block;
    while (wanted >= base + blocks_of(*run) * per_block) base += blocks_of(*run++) * per_block;
    int64_t i = wanted - base;
    AttendItem item;
    // Last blocks first: they see the most keys.
    item.begin = run->begin + (int)(blocks_of(*run) - 1 - i / per_block) * block;
    item.end = item.begin + block < run->end ? item.begin + block : run->end;
    item.kv_head = (int)(i / head_blocks % op.kv_heads);
    int first = (int)(i % head_blocks) * heads;
    item.first_head = item.kv_head * share + first;
    item.heads = share - first < heads ? share - first : heads;
    const int32_t* table = table_of(item.begin);
    if (own)
      for (int t = item.begin; t < item.end; t++) work.write(t, item.kv_head, table);
    work.run(item, table);
  }
}

}  // namespace trv
