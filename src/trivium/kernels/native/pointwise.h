// Embedding, norm (with the next product's preparation), rotary embedding, element-wise operations, picking rows.
#pragma once
#include "state.h"

namespace trv {

TRV_INLINE vf load_stored(const void* base, int format, int64_t at) {
  if (format == kFloat32) return vload((const float*)base + at);
  if (format == kBfloat16) return vload_bf16((const uint16_t*)base + at);
  return vload_f16((const uint16_t*)base + at);
}

TRV_INLINE float load_stored_one(const void* base, int format, int64_t at) {
  if (format == kFloat32) return ((const float*)base)[at];
  uint16_t pair[16] = {((const uint16_t*)base)[at]};
  float out[16];
  vstore(out, format == kBfloat16 ? vload_bf16(pair) : vload_f16(pair));
  return out[0];
}

inline void run_embed(const Turn& turn) {
  const Operation& op = turn.op;
  const Batch& batch = *turn.state.batch;
  int64_t begin, end;
  turn.share(batch.tokens, begin, end);
  for (int64_t t = begin; t < end; t++) {
    float* out = turn.state.at(op.out, t);
    int64_t row = (int64_t)batch.token_ids[t] * op.out.width;
    int64_t position = ((int64_t)batch.positions[t] + op.position_offset) * op.out.width;
    int i = 0;
    for (; i + kLanes <= op.out.width; i += kLanes) {
      vf v = vmul(load_stored(op.table, op.table_format, row + i), vset(op.scale));
      if (op.positions) v = vadd(v, load_stored(op.positions, op.positions_format, position + i));
      vstore(out + i, v);
    }
    for (; i < op.out.width; i++) {
      float v = load_stored_one(op.table, op.table_format, row + i) * op.scale;
      if (op.positions) v += load_stored_one(op.positions, op.positions_format, position + i);
      out[i] = v;
    }
  }
}

TRV_INLINE vf load_at(const float* p, int i, int n) { return i + kLanes <= n ? vload(p + i) : vload_n(p + i, n - i); }
TRV_INLINE void store_at(float* p, int i, int n, vf v) {
  if (i + kLanes <= n)
    vstore(p + i, v);
  else
    vstore_n(p + i, v, n - i);
}

// Columns begin … end − 1 of the group that starts at `column` of its row: whole vectors but for the group's last. Its
// statistics are always the whole group's.
inline void norm_group(const Operation& op, const float* x, float* out, int column, int begin, int end) {
  const int n = op.group;
  float mean = 0.0f;
  if (op.layer_norm) {
    vf sum = vzero();
    for (int i = 0; i < n; i += kLanes) sum = vadd(sum, load_at(x, i, n));
    mean = hsum(sum) / (float)n;
  }
  vf squares = vzero(), squares2 = vzero(), centre = vset(mean);
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    vf a = vsub(vload(x + i), centre), b = vsub(vload(x + i + kLanes), centre);
    squares = vfma(a, a, squares);
    squares2 = vfma(b, b, squares2);
  }
  float rest = 0.0f;
  for (; i + kLanes <= n; i += kLanes) {
    vf a = vsub(vload(x + i), centre);
    squares = vfma(a, a, squares);
  }
  for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
  float variance = (hsum(vadd(squares, squares2)) + rest) / (float)n;
  vf inverse = vset(1.0f / std::sqrt(variance + op.eps)), offset = vset(op.offset);
  int at = op.weight_period ? column % op.weight_period : 0;
  for (i = begin; i < end; i += kLanes) {
    vf v = vmul(vsub(load_at(x, i, n), centre), inverse);
    if (op.weight)
      v = vmul(v, vadd(offset, load_at(op.weight + at, i, n)));
    else if (op.offset != 0.0f)
      v = vmul(v, offset);
    if (op.bias) v = vadd(v, load_at(op.bias + at, i, n));
    store_at(out, i, n, v);
  }
}

// [Note: pieces of a row] The members share a norm of whole rows, and what is prepared of it, by pieces of rows: a step of
// one token has one row. Each then reads all of a row, so none may be written in place.
inline void run_norm(const Turn& turn) {
  const Operation& op = turn.op;
  const Prepared* p = turn.plan.prepared >= 0 ? &turn.state.prepared[turn.plan.prepared] : nullptr;
  const int width = op.x.width, piece = p ? piece_columns(*p) : 64;
  const bool apart = op.group == width && !meet(op.x, op.out);
  turn.share_pieces(turn.rows(), apart ? (width + piece - 1) / piece : 1, [&](int64_t t, int first, int last) {
    const float* x = turn.state.at(op.x, t);
    float* out = turn.state.at(op.out, t);
    if (apart)
      norm_group(op, x, out, 0, first * piece, last * piece < width ? last * piece : width);
    else
      for (int column = 0; column < width; column += op.group) norm_group(op, x + column, out + column, column, 0, op.group);
    if (p && apart) prepare_pieces(*p, out, t, first, last);
    if (p && !apart) prepare_row(*p, out, t);
  });
}

// Turns one head by a position's angles.
inline void turn_head(const Operation& rope, int64_t position, float* head) {
  const int half = rope.half;
  const float* cosines = (const float*)rope.table + position * 2 * half;
  const float* sines = cosines + half;
  float* x = head + rope.first;
  if (rope.interleaved) {
    for (int i = 0; i < half; i++) {
      float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
    return;
  }
  for (int i = 0; i < half; i += kLanes) {
    vf a = load_at(x, i, half), b = load_at(x + half, i, half);
    vf c = load_at(cosines, i, half), s = load_at(sines, i, half);
    store_at(x, i, half, vsub(vmul(a, c), vmul(b, s)));
    store_at(x + half, i, half, vadd(vmul(b, c), vmul(a, s)));
  }
}

inline void run_rope(const Turn& turn) {
  const Operation& op = turn.op;
  const Batch& batch = *turn.state.batch;
  int64_t begin, end;
  turn.share(turn.rows(), begin, end);
  for (int64_t t = begin; t < end; t++) {
    const int64_t position = batch.positions[turn.plan.output_rows ? batch.output_rows[t] : t];
    for (int h = 0; h < op.heads; h++) turn_head(op, position, turn.state.at(op.x, t) + h * op.head_dim);
  }
}

inline void run_combine(const Turn& turn) {
  const Operation& op = turn.op;
  constexpr int kChunk = 4096;
  const int64_t chunks = (op.out.width + kChunk - 1) / kChunk;
  int64_t begin, end;
  turn.share(turn.rows() * chunks, begin, end);
  const vf scale = vset(op.scale);
  for (int64_t item = begin; item < end; item++) {
    int64_t t = item / chunks;
    int first = (int)(item % chunks) * kChunk, last = first + kChunk < op.out.width ? first + kChunk : op.out.width;
    const float* a = turn.state.at(op.x, t);
    const float* b = op.y.width ? turn.state.at(op.y, t) : nullptr;
    const bool spread = op.y.width == 1 && op.out.width > 1;
    float* out = turn.state.at(op.out, t);
    for (int i = first; i < last; i += kLanes) {
      vf v = load_at(a, i, last), w = !b ? vzero() : spread ? vset(b[0]) : load_at(b, i, last);
      switch (op.combine) {
        case kAdd: v = vfma(scale, w, v); break;
        case kMultiply: v = vmul(vmul(scale, v), w); break;
        case kScale: v = vmul(scale, v); break;
        case kClip: v = vmax(vset(-op.scale), vmin(scale, v)); break;
        case kSoftcap: v = vmul(scale, vtanh(vdiv(v, scale))); break;
        default: v = activate(op.activation, v);
      }
      store_at(out, i, last, v);
    }
  }
}

inline void run_rows(const Turn& turn) {
  const Batch& batch = *turn.state.batch;
  int64_t begin, end;
  turn.share(batch.rows, begin, end);
  for (int64_t r = begin; r < end; r++)
    memcpy(turn.state.at(turn.op.out, r), turn.state.at(turn.op.x, batch.output_rows[r]), (size_t)turn.op.x.width * 4);
}

}  // namespace trv
