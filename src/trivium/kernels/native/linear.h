// Linear, gated and per-head products: panels are taken one by one ([Note: own panels first]), with all that follows
// a product (bias, activation, scale, residual) done on the panel while it is in the first cache.
#pragma once
#include "pointwise.h"

namespace trv {

// Fills the operation's prepared activations; every member must call it, and a barrier follows.
inline void run_prepare(const Turn& turn) {
  const Preparation& how = turn.state.preparations[turn.plan.prepared];
  const Prepared& p = turn.state.prepared[turn.plan.prepared];
  int64_t rows = turn.rows();
  int64_t padded = round_up(rows, tile_tokens(how.form));
  turn.share_pieces(rows * how.heads, pieces_of(p), [&](int64_t i, int first, int last) {
    int64_t head = i / rows, t = i % rows;
    prepare_pieces(p, turn.state.at(how.x, t) + head * how.stride, head * padded + t, first, last);
  });
  turn.barrier();
}

// The x of a product over rows of a span: prepared, or the register itself.
inline Prepared operand(const Turn& turn, const Span& x, int columns) {
  if (turn.plan.prepared >= 0) return turn.state.prepared[turn.plan.prepared];
  Prepared p;
  p.x = turn.state.at(x, 0);
  p.stride = turn.state.stride(x);
  p.columns = columns;
  return p;
}

inline void finish_linear(const Turn& turn, const Span& out, int64_t rows_of_matrix, int64_t panel, int64_t t0, int tokens,
                          const float* c) {
  const Operation& op = turn.op;
  const vf scale = vset(op.scale);
  for (int t = 0; t < tokens; t++) {
    float* to = turn.state.at(out, t0 + t);
    const float* add = op.has_add ? turn.state.at(op.y, t0 + t) : nullptr;
    for (int j = 0; j < kPanel; j += kLanes) {
      int64_t n = panel * kPanel + j;
      if (n >= rows_of_matrix) break;
      vf v = vload(c + t * kPanel + j);
      if (op.bias) v = vadd(v, load_at(op.bias, (int)n, (int)rows_of_matrix));
      v = activate(op.activation, v);
      if (op.scale != 1.0f) v = vmul(v, scale);
      if (add) v = vadd(v, load_at(add, (int)n, (int)rows_of_matrix));
      store_at(to, (int)n, (int)rows_of_matrix, v);
    }
  }
}

inline int64_t panels_of(const Matrix& m) { return (m.rows + kPanel - 1) / kPanel; }

inline void run_linear(const Turn& turn) {
  if (turn.plan.prepare) run_prepare(turn);
  const Matrix& m = *turn.op.matrix;
  const Prepared x = operand(turn, turn.op.x, (int)m.columns);
  const int64_t rows = turn.rows(), panels = panels_of(m);
  const Blocks blocks(rows, x.form);
  float* c = turn.scratch().c0.get<float>(kBlock * kPanel);
  const int64_t items = panels * blocks.count;
  for (int64_t item; (item = turn.take(0, items)) < items;) {
    int64_t t0 = item / panels * blocks.size, panel = item % panels;
    int tokens = (int)(rows - t0 < blocks.size ? rows - t0 : blocks.size);
    product(m, panel, x, (int)t0, tokens, c, turn.scratch());
    finish_linear(turn, turn.op.out, m.rows, panel, t0, tokens, c);
  }
}

// gate ← activation(gate + bias) ∘ (up + bias); `clamp` as in `Experts`.
TRV_INLINE vf join_gate(int activation, bool has_clamp, float clamp, vf gate, vf up) {
  if (!has_clamp) return vmul(activate(activation, gate), up);
  gate = vmin(vset(clamp), gate);
  up = vmax(vset(-clamp), vmin(vset(clamp), up));
  return vmul(vadd(up, vset(1.0f)), vmul(gate, vsigmoid(vmul(vset(1.702f), gate))));
}

inline void run_gated(const Turn& turn) {
  if (turn.plan.prepare) run_prepare(turn);
  const Operation& op = turn.op;
  const Matrix& gate = *op.matrix;
  const Matrix& up = *op.matrix2;
  const Prepared x = operand(turn, op.x, (int)gate.columns);
  const int64_t rows = turn.rows(), panels = panels_of(gate);
  const Blocks blocks(rows, x.form);
  float* c0 = turn.scratch().c0.get<float>(kBlock * kPanel);
  float* c1 = turn.scratch().c1.get<float>(kBlock * kPanel);
  const int64_t items = panels * blocks.count;
  for (int64_t item; (item = turn.take(0, items)) < items;) {
    int64_t t0 = item / panels * blocks.size, panel = item % panels;
    int tokens = (int)(rows - t0 < blocks.size ? rows - t0 : blocks.size);
    product(gate, panel, x, (int)t0, tokens, c0, turn.scratch());
    product(up, panel, x, (int)t0, tokens, c1, turn.scratch());
    for (int t = 0; t < tokens; t++) {
      float* out = turn.state.at(op.out, t0 + t);
      for (int j = 0; j < kPanel && panel * kPanel + j < gate.rows; j += kLanes) {
        int n = (int)(panel * kPanel + j);
        vf g = vload(c0 + t * kPanel + j), u = vload(c1 + t * kPanel + j);
        if (op.bias) g = vadd(g, load_at(op.bias, n, (int)gate.rows));
        if (op.bias2) u = vadd(u, load_at(op.bias2, n, (int)gate.rows));
        store_at(out, n, (int)gate.rows, join_gate(op.activation, false, 0.0f, g, u));
      }
    }
  }
}

inline void run_head_linear(const Turn& turn) {
  if (turn.plan.prepare) run_prepare(turn);
  const Operation& op = turn.op;
  const int64_t rows = turn.rows(), panels = panels_of(op.matrix[0]);
  const Blocks blocks(rows, form_of(op.matrix[0]));
  float* c = turn.scratch().c0.get<float>(kBlock * kPanel);
  const int64_t items = op.count * panels * blocks.count;
  for (int64_t item; (item = turn.take(0, items)) < items;) {
    int64_t head = item / (panels * blocks.count), t0 = item / panels % blocks.count * blocks.size, panel = item % panels;
    int tokens = (int)(rows - t0 < blocks.size ? rows - t0 : blocks.size);
    const Matrix& m = op.matrix[head];
    Span from = op.x, out = op.out;
    from.start += (int32_t)head * op.x_stride;
    out.start += (int32_t)head * op.out_stride;
    Prepared x = operand(turn, from, (int)m.columns);
    int64_t first = turn.plan.prepared < 0 ? 0 : head * round_up(rows, tile_tokens(x.form));
    product(m, panel, x, (int)(first + t0), tokens, c, turn.scratch());
    finish_linear(turn, out, m.rows, panel, t0, tokens, c);
  }
}

}  // namespace trv
