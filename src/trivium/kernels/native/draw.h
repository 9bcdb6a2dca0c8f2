// A step's tokens: which rows are read, edited and drawn from, and that nothing is read beside them.
#pragma once
#include "row_draw.h"

namespace trv {

constexpr int64_t kAlone = 1 << 16;  // so many logits are read in about the time in which a thread wakes

// A row with the mask and the edits of draw i, in `out`.
inline void edit_row(const Draws& d, int64_t i, const float* row, float* out) {
  const uint8_t* allowed = d.allowed[i];
  int64_t v = 0;
  if (allowed) {
    // The mask as a ceiling: infinity, or minus infinity.
    for (; v + kLanes <= d.width; v += kLanes) {
      vi some = vshr(viadd(vload_u8(allowed + v), viset(255)), 8);  // 1 where the byte is not 0
      vi ceiling = visub(viset((int32_t)0xff800000), vshl(some, 31));
      vstore(out + v, vmin(vload(row + v), vbits(ceiling)));
    }
    for (; v < d.width; v++) out[v] = allowed[v] ? row[v] : -INFINITY;
  } else {
    memcpy(out, row, (size_t)d.width * 4);
  }
  for (int64_t e = d.edit_ends[i]; e < d.edit_ends[i + 1]; e++)
    if (!allowed || allowed[d.edit_ids[e]]) out[d.edit_ids[e]] = d.edit_values[e];
}

inline void draw_row(const Draws& d, int64_t i, DrawScratch& scratch) {
  const float* row = d.logits + (int64_t)d.rows[i] * d.width;
  const bool edited = d.allowed[i] || d.edit_ends[i + 1] > d.edit_ends[i], draws = d.temperatures[i] > 0.0f;
  const bool in_order = d.top_ks[i] > 0 || d.top_ps[i] < 1.0;
  // Over all in their order min-p sums anew what it leaves; top-k needs no other sum than its own.
  const bool sums = draws && d.top_ks[i] <= 0 && (in_order || !(d.min_ps[i] > 0.0f));
  const bool told = d.tops[i] >= 0;
  RowDraw view(scratch, d.width);
  bool fine = view.read(row, told ? 1.0f : d.temperatures[i], told || (sums && !edited));
  d.tokens[i] = (int32_t)view.best();
  d.bests[i] = d.lefts[i] = view.highest();
  if (!fine) return;
  if (told) {
    d.wholes[i] = view.log_whole();
    view.likeliest(d.tops[i], d.top_ids + i * d.most);
  }
  if (edited) {
    float* out = scratch.row.get<float>((size_t)d.width);
    edit_row(d, i, row, out);
    row = out;
  }
  if (edited || (told && draws && d.temperatures[i] != 1.0f)) {
    fine = view.read(row, d.temperatures[i], sums);
    d.tokens[i] = (int32_t)view.best();
    d.lefts[i] = view.highest();
  }
  if (fine && draws)
    d.tokens[i] = (int32_t)(in_order ? view.draw_in_order(d.top_ks[i], d.top_ps[i], d.min_ps[i], d.uniforms[i])
                                     : view.draw_from_all(d.min_ps[i], d.uniforms[i]));
}

// Whether every row, token and mask that is named is there.
inline bool valid_draws(const Draws& d) {
  auto share = [](double x) { return x >= 0.0 && x <= 1.0; };
  if (d.count < 0 || d.width < 1) return false;
  for (int64_t i = 0; i < d.count; i++) {
    if (d.rows[i] < 0 || d.rows[i] >= d.num_rows || d.tops[i] > d.most || d.tops[i] > d.width || d.edit_ends[i + 1] < d.edit_ends[i]) return false;
    if (!(d.temperatures[i] >= 0.0f) || !share(d.top_ps[i]) || !share(d.min_ps[i]) || !share(d.uniforms[i])) return false;
  }
  for (int64_t e = d.edit_ends[0]; e < d.edit_ends[d.count]; e++)
    if (d.edit_ids[e] < 0 || d.edit_ids[e] >= d.width) return false;
  return true;
}

// Memory for rows of this width: what a thread needs grows here or nowhere.
inline void reserve_draws(DrawScratch& scratch, int64_t width) {
  RowDraw(scratch, width);
  scratch.row.get<float>((size_t)width);
}

}  // namespace trv
