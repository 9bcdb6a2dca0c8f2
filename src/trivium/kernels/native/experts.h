// The experts of a step: choice, token-to-expert table, then only the experts that were hit, each over its tokens.
//
// DeepSpeed-MoE section 5.4. Experts are reached through a table of pointers, so they may lie anywhere. A token's parts are
// added in the order of its choice, so its output does not depend on the other tokens.
#pragma once
#include "attention.h"

namespace trv {

// NaN counts as the highest, so that a poisoned token still gets experts that exist.
TRV_INLINE bool better(float a, float b) { return a > b || (a != a && b == b); }

inline int best_free(const float* values, const uint8_t* taken, int count) {
  int best = -1;
  for (int i = 0; i < count; i++)
    if (!taken[i] && (best < 0 || better(values[i], values[best]))) best = i;
  return best;
}

inline void gate_scores(const Operation& op, const float* logits, int experts, float* scores) {
  if (op.scores == kChosen) {
    memcpy(scores, logits, (size_t)experts * 4);
    return;
  }
  if (op.scores == kSigmoidScores) {
    for (int i = 0; i < experts; i += kLanes) store_at(scores, i, experts, vsigmoid(load_at(logits, i, experts)));
    return;
  }
  float top = logits[0], total = 0.0f;
  for (int i = 1; i < experts; i++) top = logits[i] > top ? logits[i] : top;
  for (int i = 0; i < experts; i += kLanes) store_at(scores, i, experts, vexp(vsub(load_at(logits, i, experts), vset(top))));
  for (int i = 0; i < experts; i++) total += scores[i];
  for (int i = 0; i < experts; i++) scores[i] /= total;
}

// The experts and weights of one token; `replayed` experts are kept as given.
inline void choose(const Operation& op, const float* logits, const int32_t* replayed, int32_t* chosen, float* weights,
                   std::vector<float>& values, std::vector<uint8_t>& taken) {
  const int experts = op.count;
  values.resize((size_t)experts * 2 + op.groups + kLanes);
  taken.assign((size_t)experts + op.groups, 0);
  float *scores = values.data(), *ranked = scores + experts, *tops = ranked + experts;
  gate_scores(op, logits, experts, scores);
  for (int i = 0; i < experts; i++) ranked[i] = op.correction ? scores[i] + op.correction[i] : scores[i];
  if (op.groups > 1 && !replayed) {
    const int size = experts / op.groups;
    uint8_t* group_taken = taken.data() + experts;
    for (int g = 0; g < op.groups; g++) {
      const float* group = ranked + g * size;
      int first = best_free(group, taken.data() + g * size, size);
      tops[g] = group[first];
      if (!op.by_max && size > 1) {
        taken[g * size + first] = 1;
        tops[g] += group[best_free(group, taken.data() + g * size, size)];
        taken[g * size + first] = 0;
      }
    }
    for (int i = 0; i < op.top_groups; i++) group_taken[best_free(tops, group_taken, op.groups)] = 1;
    for (int i = 0; i < experts; i++)
      if (!group_taken[i / size]) ranked[i] = -INFINITY;
  }
  for (int j = 0; j < op.top_k; j++) {
    chosen[j] = replayed ? replayed[j] : best_free(ranked, taken.data(), experts);
    taken[chosen[j]] = 1;
    weights[j] = scores[chosen[j]];
  }
  if (op.scores == kChosen) {
    float top = weights[0], total = 0.0f;
    for (int j = 1; j < op.top_k; j++) top = weights[j] > top ? weights[j] : top;
    for (int j = 0; j < op.top_k; j++) total += weights[j] = exp1(weights[j] - top);
    for (int j = 0; j < op.top_k; j++) weights[j] /= total;
  }
  float total = 0.0f;
  for (int j = 0; j < op.top_k; j++) total += weights[j];
  for (int j = 0; j < op.top_k; j++) {
    if (op.renormalise) weights[j] /= total + op.renormalise_eps;
    weights[j] *= op.gate_scale;
  }
}

struct Hit {
  int32_t expert, start, count;
};

// Tables of one step's experts, in `State::tables`; `slot` numbers rows sorted by expert, each expert at a whole tile.
struct ExpertTables {
  int32_t *slots, *starts, *counts, *num_hits;
  Hit* hits;

  ExpertTables(Buffer& buffer, int64_t choices, int experts) {
    int32_t* base = buffer.get<int32_t>((size_t)(choices + 5 * experts + 1));
    slots = base;
    starts = slots + choices;
    counts = starts + experts;
    num_hits = counts + experts;
    hits = (Hit*)(num_hits + 1);
  }
  void build(const int32_t* chosen, int64_t choices, int experts, int align) {
    memset(counts, 0, (size_t)experts * 4);
    for (int64_t i = 0; i < choices; i++) counts[chosen[i]]++;
    int32_t next = 0;
    *num_hits = 0;
    for (int e = 0; e < experts; e++) {
      starts[e] = next;
      if (!counts[e]) continue;
      hits[(*num_hits)++] = {e, next, counts[e]};
      next += (int32_t)round_up(counts[e], align);
      counts[e] = 0;
    }
    for (int64_t i = 0; i < choices; i++) slots[i] = starts[chosen[i]] + counts[chosen[i]]++;
  }
};

inline int slot_alignment(const Operation& op) {
  int align = 1;
  for (const Matrix* m : {op.experts[0].up, op.experts[0].down}) {
    int tile = form_of(*m) == kPlain ? 1 : tile_tokens(form_of(*m));
    align = align == 1 || align == tile ? tile : tile == 1 ? align : 80;
  }
  return align;
}
inline int64_t slot_limit(const Operation& op, int64_t tokens) {
  int64_t choices = tokens * op.top_k, hits = choices < op.count ? choices : op.count;
  return choices + hits * (slot_alignment(op) - 1);
}

// Rows of slots as a product wants them; kPlain rows are gathered.
inline Prepared plan_slots(const Matrix& m, int64_t slots, Buffer& buffer) {
  Prepared p = plan_prepared(form_of(m), slots, (int)m.columns, m.dot_group, buffer);
  if (p.form == kPlain) {
    p.x = buffer.get<float>((size_t)slots * m.columns);
    p.stride = m.columns;
  }
  return p;
}

inline void fill_slot(const Prepared& p, const float* x, int64_t slot) {
  if (p.form == kPlain)
    memcpy((float*)p.x + slot * p.stride, x, (size_t)p.columns * 4);
  else
    prepare_row(p, x, slot);
}

// Calls work(expert, first slot, tokens, panel) for every block of every hit expert, shared out among the members.
template <typename Work>
void each_panel(const Turn& turn, int phase, const ExpertTables& tables, const Work& work, bool down) {
  auto items_of = [&](int i) {
    const Expert& expert = turn.op.experts[tables.hits[i].expert];
    const Matrix& matrix = down ? *expert.down : *expert.up;
    return panels_of(matrix) * Blocks(tables.hits[i].count, form_of(matrix)).count;
  };
  int64_t total = 0;
  for (int i = 0; i < *tables.num_hits; i++) total += items_of(i);
  int at = 0;
  int64_t base = 0;  // the first item of hit `at`
  for (int64_t item; (item = turn.take(phase, total)) < total;) {
    while (item < base) base -= items_of(--at);
    while (item >= base + items_of(at)) base += items_of(at++);
    const Hit& hit = tables.hits[at];
    const Expert& expert = turn.op.experts[hit.expert];
    const Matrix& matrix = down ? *expert.down : *expert.up;
    const int64_t panels = panels_of(matrix);
    const Blocks blocks(hit.count, form_of(matrix));
    int first = (int)((item - base) / panels * blocks.size), left = hit.count - first;
    work(expert, hit.start + first, left < blocks.size ? left : (int)blocks.size, (item - base) % panels);
  }
}

inline void expert_inner(const Turn& turn, const Prepared& x, const Expert& expert, int start, int tokens, int64_t panel,
                         float* hidden) {
  const Operation& op = turn.op;
  const int64_t width = expert.up->rows;
  float* c0 = turn.scratch().c0.get<float>(kBlock * kPanel);
  float* c1 = turn.scratch().c1.get<float>(kBlock * kPanel);
  if (expert.gate) product(*expert.gate, panel, x, start, tokens, c0, turn.scratch());
  product(*expert.up, panel, x, start, tokens, c1, turn.scratch());
  for (int t = 0; t < tokens; t++)
    for (int j = 0; j < kPanel && panel * kPanel + j < width; j += kLanes) {
      int n = (int)(panel * kPanel + j);
      vf u = vload(c1 + t * kPanel + j);
      if (expert.up_bias) u = vadd(u, load_at(expert.up_bias, n, (int)width));
      if (expert.gate) {
        vf g = vload(c0 + t * kPanel + j);
        if (expert.gate_bias) g = vadd(g, load_at(expert.gate_bias, n, (int)width));
        u = join_gate(op.activation, op.has_clamp, op.clamp, g, u);
      } else {
        u = activate(op.activation, u);
      }
      store_at(hidden + (start + t) * width, n, (int)width, u);
    }
}

inline void expert_down(const Turn& turn, const Prepared& h, const Expert& expert, int start, int tokens, int64_t panel,
                        float* result) {
  const int64_t width = expert.down->rows;
  float* c = turn.scratch().c0.get<float>(kBlock * kPanel);
  product(*expert.down, panel, h, start, tokens, c, turn.scratch());
  for (int t = 0; t < tokens; t++)
    for (int j = 0; j < kPanel && panel * kPanel + j < width; j += kLanes) {
      int n = (int)(panel * kPanel + j);
      vf v = vload(c + t * kPanel + j);
      if (expert.down_bias) v = vadd(v, load_at(expert.down_bias, n, (int)width));
      store_at(result + (start + t) * width, n, (int)width, v);
    }
}

inline void gate_tokens(const Turn& turn, int64_t begin, int64_t end) {
  const Operation& op = turn.op;
  const Routing& routing = turn.state.batch->routing[op.layer];
  std::vector<float> values;
  std::vector<uint8_t> taken;
  for (int64_t t = begin; t < end; t++)
    choose(op, turn.state.at(op.y, t), routing.replayed ? routing.replayed + t * op.top_k : nullptr,
           routing.experts + t * op.top_k, routing.weights + t * op.top_k, values, taken);
}

inline void fill_slots(const Turn& turn, const ExpertTables& tables, const Prepared& x, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) fill_slot(x, turn.state.at(turn.op.x, i / turn.op.top_k), tables.slots[i]);
}

inline void combine_parts(const Turn& turn, const ExpertTables& tables, const float* result, int64_t width) {
  const Operation& op = turn.op;
  const Routing& routing = turn.state.batch->routing[op.layer];
  int64_t begin, end;
  turn.share(turn.rows(), begin, end);
  for (int64_t t = begin; t < end; t++) {
    float* out = turn.state.at(op.out, t);
    const float* add = op.z.width ? turn.state.at(op.z, t) : nullptr;
    for (int i = 0; i < width; i += kLanes) {
      vf sum = vzero();
      for (int j = 0; j < op.top_k; j++) {
        int64_t at = t * op.top_k + j;
        sum = vfma(vset(routing.weights[at]), load_at(result + tables.slots[at] * width, i, (int)width), sum);
      }
      store_at(out, i, (int)width, add ? vadd(sum, load_at(add, i, (int)width)) : sum);
    }
  }
}

inline void run_experts(const Turn& turn) {
  const Operation& op = turn.op;
  State& state = turn.state;
  const int64_t tokens = turn.rows(), choices = tokens * op.top_k, slots = slot_limit(op, tokens);
  const Expert& one = op.experts[0];
  const int32_t* chosen = state.batch->routing[op.layer].experts;
  // All buffers were reserved before the step began: these calls only lay them out.
  ExpertTables tables(state.tables, choices, op.count);
  Prepared x = plan_slots(*one.up, slots, state.slots_x), h = plan_slots(*one.down, slots, state.slots_h);
  float* hidden = state.hidden.get<float>((size_t)slots * one.up->rows);
  float* result = state.result.get<float>((size_t)slots * one.down->rows);
  int64_t begin, end;
  if (choices <= 64) {
    if (turn.member == 0) {
      gate_tokens(turn, 0, tokens);
      tables.build(chosen, choices, op.count, slot_alignment(op));
      fill_slots(turn, tables, x, 0, choices);
    }
    turn.barrier();
  } else {
    turn.share(tokens, begin, end);
    gate_tokens(turn, begin, end);
    turn.barrier();
    if (turn.member == 0) tables.build(chosen, choices, op.count, slot_alignment(op));
    turn.barrier();
    turn.share(choices, begin, end);
    fill_slots(turn, tables, x, begin, end);
    turn.barrier();
  }
  each_panel(turn, 0, tables, [&](const Expert& e, int start, int count, int64_t panel) {
    expert_inner(turn, x, e, start, count, panel, hidden);
  }, false);
  turn.barrier();
  if (h.form == kPlain) {
    h.x = hidden;
  } else {
    turn.share(choices, begin, end);
    for (int64_t i = begin; i < end; i++) fill_slot(h, hidden + tables.slots[i] * one.up->rows, tables.slots[i]);
    turn.barrier();
  }
  each_panel(turn, 1, tables, [&](const Expert& e, int start, int count, int64_t panel) {
    expert_down(turn, h, e, start, count, panel, result);
  }, true);
  turn.barrier();
  combine_parts(turn, tables, result, one.down->rows);
}

}  // namespace trv
