// One row of logits: its likeliest tokens, or one drawn by temperature, top-k, top-p, min-p and a number below 1.
//
// [Note: draws] A row is one thread's from its beginning to its end and every sum has one order, so that a token depends on
// its row, its settings and its number alone. Reading a row leaves each block's maximum and sum of weights; what follows
// reads few blocks, or bins that stand in the order of the logits (flat rows: every block once more). Weights are
// e^((logit - highest) / temperature): the likeliest token's is 1 at any temperature.
#pragma once
#include <algorithm>
#include <cfloat>

#include "state.h"

namespace trv {

constexpr int kDrawBlock = 128, kBins = 1024;
constexpr int64_t kFew = 2048;  // so many candidates are sorted outright

struct Bin {
  double mass;
  int64_t count;
};

// A thread's own memory.
struct DrawScratch {
  Buffer row, maxima, sums, ranked, keys, bins;
};

// Smaller keys are likelier tokens, of equal ones the first.
TRV_INLINE uint64_t key_of(float x, int64_t id) {
  uint32_t bits;
  x += 0.0f;  // -0 is 0
  memcpy(&bits, &x, 4);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return (uint64_t)(uint32_t)~bits << 32 | (uint32_t)id;
}
TRV_INLINE float value_of(uint64_t key) {
  uint32_t bits = ~(uint32_t)(key >> 32);
  bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

class RowDraw {
 public:
  RowDraw(DrawScratch& scratch, int64_t width)
      : width_(width), blocks_((width + kDrawBlock - 1) / kDrawBlock), padded_((blocks_ + kLanes - 1) / kLanes * kLanes),
        maxima_(scratch.maxima.get<float>(padded_)), sums_(scratch.sums.get<float>(padded_)),
        ranked_(scratch.ranked.get<float>(padded_)), keys_(scratch.keys.get<uint64_t>(width)),
        bins_(scratch.bins.get<Bin>(kBins + 1)) {}

  // Reads the row; with `sums` the weights too, and their whole. False: its largest logit is not a finite number.
  bool read(const float* row, float temperature, bool sums) {
    row_ = row;
    heat_ = std::min(std::max(temperature, 1e-30f), 1e30f);
    rate_ = (float)(1.4426950408889634 / heat_);
    for (int i = 0; i < kDrawBlock; i++) {
      int64_t id = (blocks_ - 1) * kDrawBlock + i;
      tail_[i] = id < width_ ? row[id] : -INFINITY;
    }
    bool spoilt = sums ? pass<true>() : pass<false>();
    for (int64_t b = blocks_; b < padded_; b++) maxima_[b] = -INFINITY, sums_[b] = 0.0f;
    if (spoilt) {
      highest_ = NAN;
      for (best_ = 0; row[best_] == row[best_];) best_++;
      return false;
    }
    vf top = vload(maxima_);
    for (int64_t b = kLanes; b < padded_; b += kLanes) top = vmax(top, vload(maxima_ + b));
    highest_ = htop(top);
    int64_t b = 0;
    while (maxima_[b] != highest_) b++;
    for (best_ = b * kDrawBlock; row[best_] != highest_;) best_++;
    if (!std::isfinite(highest_)) return false;
    if (!sums) return true;
    whole_ = 0.0;
    for (b = 0; b < padded_; b += kLanes) vstore(sums_ + b, vmul(vload(sums_ + b), weights(vload(maxima_ + b))));
    for (b = 0; b < blocks_; b++) whole_ += sums_[b];
    return true;
  }
  int64_t best() const { return best_; }
  float highest() const { return highest_; }
  double log_whole() const { return highest_ + std::log(whole_); }

  // The `count` likeliest tokens, in their order.
  void likeliest(int64_t count, int32_t* ids) {
    if (count < 1) return;
    sort_first(collect(count < blocks_ ? ranked(count) : -INFINITY, width_), count);
    for (int64_t i = 0; i < count; i++) ids[i] = (int32_t)keys_[i];
  }

  // Over the vocabulary in its own order: first the block, then the token in it.
  int64_t draw_from_all(float min_p, double uniform) {
    float weight[kDrawBlock];
    double total = 0.0, running = 0.0;
    if (min_p > 0.0f) {
      const float low = low_of(min_p);
      for (int64_t b = 0; b < blocks_; b++) sums_[b] = maxima_[b] >= low ? block_weights(b, min_p, weight) : 0.0f;
    }
    for (int64_t b = 0; b < blocks_; b++) total += sums_[b];
    const double target = uniform * total;
    int64_t found = best_ / kDrawBlock, token = best_;
    double before = 0.0;
    for (int64_t b = 0; b < blocks_; b++) {
      if (!(running + sums_[b] > running)) continue;  // it adds nothing: not drawn, whatever is rounded
      found = b, before = running;
      running += sums_[b];
      if (running > target) break;
    }
    // The block's sum was rounded in another order: its share of the number is what counts.
    block_weights(found, min_p, weight);
    double end = 0.0;
    for (float one : weight) end += one;
    const double inside = std::min((target - before) * (end / sums_[found]), end);
    running = 0.0;
    for (int i = 0; i < kDrawBlock && running <= inside; i++) {
      if (!(running + weight[i] > running)) continue;
      token = found * kDrawBlock + i;
      running += weight[i];
    }
    return token;
  }

  // Over what top-k, top-p and min-p leave, likeliest first.
  int64_t draw_in_order(int64_t top_k, double top_p, float min_p, double uniform) {
    Cut kept;
    if (top_k > 0) {
      if (top_k > width_) top_k = width_;
      kept = arrange(top_k < blocks_ ? std::max(ranked(top_k), zero()) : zero(), top_k);
      kept = advance(kept, [&](int bin, double, int64_t count) { return count + bins_[bin].count < top_k; },
                     [&](uint64_t, float, double, int64_t count) { return count == top_k ? kAfter : kOn; });
      if (top_p < 1.0) kept = cut_mass(kept, top_p * kept.mass);
    } else {
      kept = nucleus(top_p, min_p);
    }
    if (min_p > 0.0f)
      kept = advance(kept, [&](int bin, double, int64_t) { return least_in(bin) >= min_p; },
                     [&](uint64_t, float weight, double, int64_t) { return weight < min_p ? kBefore : kOn; });
    const double target = uniform * kept.mass;
    int64_t token = best_;
    advance(kept, [&](int bin, double mass, int64_t) { return mass + bins_[bin].mass <= target; },
            [&](uint64_t key, float weight, double mass, int64_t) {
              if (mass > mass - weight) token = (int64_t)(uint32_t)key;
              return mass > target ? kAfter : kOn;
            });
    return token;
  }

 private:
  // A beginning of all candidates in their order: the bins before `bin`, and `taken` of its tokens.
  struct Cut {
    int bin;
    int64_t taken;
    double mass;
  };
  enum Verdict { kOn, kBefore, kAfter };  // go on; end before this token; end after it

  const float* block(int64_t b) const { return b + 1 < blocks_ ? row_ + b * kDrawBlock : tail_; }
  vf weights(vf x) const { return vexp2_falling(vmul(vsub(x, vset(highest_)), vset(rate_))); }
  // Below it weights are zero.
  float zero() const { return (float)(highest_ - 88.0 * heat_); }
  // Surely below the logit whose weight this is.
  float low_of(double weight) const { return (float)(highest_ + heat_ * (std::log(weight) - 1e-3)); }

  template <bool kSums>
  bool pass() {
    const vf rate = vset(rate_);
    vf spoilt = vzero();  // NaN where a logit was: of all others no sum of negative parts can be
    for (int64_t b = 0; b < blocks_; b++) {
      const float* x = block(b);
      vf v[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) v[i] = vload(x + i * kLanes);
      vf top[4], low[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        top[i] = vmax(v[i], v[i + 4]);
        low[i] = vadd(vmin(vzero(), v[i]), vmin(vzero(), v[i + 4]));
      }
      spoilt = vadd(spoilt, vadd(vadd(low[0], low[1]), vadd(low[2], low[3])));
      maxima_[b] = htop(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
      if (kSums) {
        const vf reference = vset(std::max(maxima_[b], -FLT_MAX));
        vf sum = vzero(), sum2 = vzero();
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
          sum = vadd(sum, vexp2_falling(vmul(vsub(v[i], reference), rate)));
          sum2 = vadd(sum2, vexp2_falling(vmul(vsub(v[i + 1], reference), rate)));
        }
        sums_[b] = hsum(vadd(sum, sum2));
      }
    }
    float lanes[16];
    vstore(lanes, spoilt);
    bool found = false;
    for (float lane : lanes) found = found || lane != lane;
    return found;
  }

  // A block's weights, those below `least` zero, and their sum.
  float block_weights(int64_t b, float least, float* weight) const {
    const float* x = block(b);
    vf sum = vzero();
    for (int i = 0; i < kDrawBlock; i += kLanes) {
      vstore(weight + i, weights(vload(x + i)));
      for (int j = i; j < i + kLanes; j++) weight[j] = weight[j] >= least ? weight[j] : 0.0f;
      sum = vadd(sum, vload(weight + i));
    }
    return hsum(sum);
  }

  // The `rank`-th largest of the blocks' maxima: so many tokens at least are as likely.
  float ranked(int64_t rank) {
    memcpy(ranked_, maxima_, (size_t)blocks_ * 4);
    std::nth_element(ranked_, ranked_ + rank - 1, ranked_ + blocks_, std::greater<float>());
    return ranked_[rank - 1];
  }

  template <typename Mask>
  int64_t append(int64_t b, int64_t n, Mask mask) {
    const float* x = block(b);
    const int64_t first = b * kDrawBlock;
    const int lanes = (int)std::min<int64_t>(kDrawBlock, width_ - first);
    for (int i = 0; i < lanes; i += kLanes) {
      uint32_t bits = mask(vload(x + i));
      if (lanes - i < kLanes) bits &= (1u << (lanes - i)) - 1;
      for (; bits; bits &= bits - 1) {
        const int at = i + __builtin_ctz(bits);
        keys_[n++] = key_of(x[at], first + at);
      }
    }
    return n;
  }
  // Keys of all logits from `low` up; -1 where they are more than `most`.
  int64_t collect(float low, int64_t most) {
    const vf bound = vset(low);
    int64_t n = 0;
    for (int64_t b = 0; b < blocks_; b++) {
      if (maxima_[b] < low) continue;
      n = append(b, n, [&](vf x) { return vge(x, bound); });
      if (n > most) return -1;
    }
    return n;
  }
  // Of n keys the first `count` in their order.
  void sort_first(int64_t n, int64_t count) {
    if (count < n) std::nth_element(keys_, keys_ + count, keys_ + n);
    std::sort(keys_, keys_ + std::min(n, count));
  }
  // The first `count` of n keys as the only bin.
  Cut single(int64_t n, int64_t count) {
    sort_first(n, count);
    if (n > count) n = count;
    bins_[0] = {INFINITY, n};
    num_bins_ = 1, opened_ = 0;
    return {0, n, INFINITY};
  }
  // All candidates from `low` up, of which `count` matter: sorted if they are few, else in bins.
  Cut arrange(float low, int64_t count) {
    int64_t n = collect(low, kFew);
    if (n >= 0) return single(n, count);
    double span = std::max((double)highest_ - low, std::max((double)std::fabs(highest_), 1e-20) * 1e-6);
    scale_ = (float)((kBins - 1) / std::min(span, 3e38));
    for (int i = 0; i <= kBins; i++) bins_[i] = {0.0, 0};
    for (int64_t b = 0; b < blocks_; b++) {
      if (maxima_[b] < low) continue;
      const float* x = block(b);
      for (int i = 0; i < kDrawBlock; i += kLanes) {
        int32_t at[16];
        float weight[16];
        vistore(at, vint(bin_of(vload(x + i))));
        vstore(weight, weights(vload(x + i)));
        for (int j = 0; j < kLanes; j++) {
          bins_[at[j]].mass += weight[j];
          bins_[at[j]].count++;
        }
      }
    }
    num_bins_ = kBins, opened_ = -1;
    double mass = 0.0;
    for (int i = 0; i < kBins; i++) mass += bins_[i].mass;
    return {kBins - 1, bins_[kBins - 1].count, mass};
  }
  // Whole numbers that rise as logits fall; kBins and what is there lie below all candidates.
  vf bin_of(vf x) const {
    return vround(vmin(vmul(vsub(vset(highest_), x), vset(scale_)), vset((float)kBins)));
  }
  // No weight in a bin is smaller.
  double least_in(int bin) const {
    return num_bins_ == 1 ? 0.0 : 0.999 * std::exp(-(bin + 0.5) / scale_ / heat_);
  }
  // A bin's keys, sorted.
  void open(int bin) {
    if (opened_ == bin) return;
    opened_ = bin;
    const vf from = vset((float)bin), to = vset((float)(bin + 1));
    int64_t n = 0;
    for (int64_t b = 0; b < blocks_; b++) {
      if ((highest_ - maxima_[b]) * scale_ > (float)bin + 0.5f) continue;
      n = append(b, n, [&](vf x) {
        vf at = bin_of(x);
        return vge(at, from) & ~vge(at, to);
      });
    }
    if (!std::is_sorted(keys_, keys_ + n)) std::sort(keys_, keys_ + n);
  }

  // How far the candidates in `limit` reach until `judge`(key, weight, mass and count with it) ends them. Bins that
  // `skip`(bin, mass and count before it) are taken whole, unsorted.
  template <typename Skip, typename Judge>
  Cut advance(const Cut& limit, Skip skip, Judge judge) {
    double mass = 0.0;
    int64_t count = 0;
    int before = -1;  // the last bin with anything in it: where it ends is where the next begins
    for (int bin = 0; bin <= limit.bin; before = bins_[bin].count ? bin : before, bin++) {
      const int64_t n = bin < limit.bin ? bins_[bin].count : limit.taken;
      if (n == 0) continue;
      if (bin < limit.bin && skip(bin, mass, count)) {
        mass += bins_[bin].mass;
        count += n;
        continue;
      }
      open(bin);
      for (int64_t i = 0; i < n; i += kLanes) {
        const int lanes = (int)std::min<int64_t>(kLanes, n - i);
        float weight[16] = {};
        for (int j = 0; j < lanes; j++) weight[j] = value_of(keys_[i + j]);
        vstore(weight, weights(vload(weight)));
        for (int j = 0; j < lanes; j++) {
          Verdict verdict = judge(keys_[i + j], weight[j], mass + weight[j], count + 1);
          if (verdict == kBefore && i + j == 0 && before >= 0) return {before, bins_[before].count, mass};
          if (verdict == kBefore) return {bin, i + j, mass};
          mass += weight[j], count++;
          if (verdict == kAfter) return {bin, i + j + 1, mass};
        }
      }
    }
    return {limit.bin, limit.taken, mass};
  }
  Cut cut_mass(const Cut& limit, double target) {
    return advance(limit, [&](int bin, double mass, int64_t) { return mass + bins_[bin].mass < target; },
                   [&](uint64_t, float, double mass, int64_t) { return mass >= target ? kAfter : kOn; });
  }
  // The least candidates that have `top_p` of all weight; more than those may be cut by min-p, where it cuts more.
  Cut nucleus(double top_p, float min_p) {
    const double target = top_p * whole_;
    // What lies below this has less than half of the weight that top-p leaves out.
    float low = std::max(zero(), low_of((1.0 - top_p) * whole_ / (2.0 * width_)));
    if (min_p > 0.0f) low = std::max(low, low_of(min_p));
    for (int64_t rank : {64, 512}) {
      if (rank >= blocks_) break;
      const float first = ranked(rank);
      if (!(first > low)) break;
      int64_t n = collect(first, kFew);
      if (n < 0) break;
      Cut kept = cut_mass(single(n, n), target);
      if (kept.mass >= target) return kept;
      if (12.0 * kept.mass < target) break;  // ten times as many, all less likely, would not do
    }
    return cut_mass(arrange(low, width_), target);
  }

  const int64_t width_, blocks_, padded_;
  float *maxima_, *sums_, *ranked_;
  uint64_t* keys_;
  Bin* bins_;
  float tail_[kDrawBlock];
  const float* row_ = nullptr;
  float heat_ = 1.0f, rate_ = 1.0f, highest_ = 0.0f, scale_ = 1.0f;
  double whole_ = 0.0;
  int64_t best_ = 0;
  int num_bins_ = 0, opened_ = -1;
};

}  // namespace trv
