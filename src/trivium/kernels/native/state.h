// What all operations of one step share: registers, the batch, prepared activations and work counters.
#pragma once
#include "product.h"

namespace trv {

inline bool meet(const Span& a, const Span& b) { return a.reg == b.reg && a.start < b.start + b.width && b.start < a.start + a.width; }

struct SequenceRun {
  int begin, end;  // tokens of one sequence, adjacent
};

// How an operation takes its turn, decided once when the program is bound.
struct Plan {
  bool barrier = false;        // others' results are needed, or still read
  bool prepare = false;        // makes `prepared` from x before its products
  int prepared = -1;           // which of the program's prepared activations it reads, or writes (norm)
  bool output_rows = false;    // works on R rows, not T
  bool elsewhere = false;      // the next operation does it too
  const Operation* rotation = nullptr;  // attention turns its queries and keys itself
};

struct Preparation {
  Span x;
  Form form;
  int group;
  int buffer;
  bool output_rows;
  int heads = 1, stride = 0;  // HeadLinear: one set of rows per head
};

// [Note: own panels first] Of an operation's items every member has a share of neighbours, so that it reads weights in
// one stream and what it fetches ahead is its own; who is done takes the last ones of another's share. How many were
// taken is one number: from the front by the owner in its low half, from the back by others in its high half.
using Taken = std::atomic<uint64_t>;

struct State {
  Team* team = nullptr;
  const Batch* batch = nullptr;
  const CacheSpec* specs = nullptr;
  std::vector<float*> registers;
  std::vector<int64_t> widths;
  std::vector<Preparation> preparations;
  std::vector<Prepared> prepared;
  std::vector<SequenceRun> runs;
  std::unique_ptr<Taken[]> taken;       // per operation, phase and member
  std::vector<Scratch> scratch;         // one per member
  Buffer slots_x, slots_h, hidden, result, tables;

  float* at(const Span& s, int64_t row) const { return registers[s.reg] + row * widths[s.reg] + s.start; }
  int64_t stride(const Span& s) const { return widths[s.reg]; }
  int64_t rows(const Plan& p) const { return p.output_rows ? batch->rows : batch->tokens; }
};

// One member's view of one operation.
struct Turn {
  State& state;
  const Operation& op;
  const Plan& plan;
  int member;
  Taken* taken;  // of this operation's two phases

  Scratch& scratch() const { return state.scratch[member]; }
  int64_t rows() const { return state.rows(plan); }
  void barrier() const { state.team->barrier(); }
  // An item of `total` that nobody has taken yet, its own ones first; `total` when none is left.
  int64_t take(int phase, int64_t total) const {
    const int size = state.team->size();
    for (int i = 0; i < size; i++) {
      const int whose = member + i < size ? member + i : member + i - size;
      const int64_t begin = total * whose / size, end = total * (whose + 1) / size;
      Taken& share = taken[phase * size + whose];
      if (given(share.load(std::memory_order_relaxed)) >= end - begin) continue;  // it only rises: no need to write
      const uint64_t before = share.fetch_add(i ? (uint64_t)1 << 32 : 1, std::memory_order_relaxed);
      if (given(before) < end - begin) return i ? end - 1 - (int64_t)(before >> 32) : begin + (int64_t)(uint32_t)before;
    }
    return total;
  }
  static int64_t given(uint64_t taken) { return (int64_t)(uint32_t)taken + (int64_t)(taken >> 32); }
  // This member's share of `count` things.
  void share(int64_t count, int64_t& begin, int64_t& end) const {
    int64_t size = state.team->size();
    begin = count * member / size;
    end = count * (member + 1) / size;
  }
  // This member's share of the pieces of `rows` rows: work(row, first piece, last piece + 1).
  template <typename Work>
  void share_pieces(int64_t rows, int pieces, const Work& work) const {
    int64_t begin, end;
    share(rows * pieces, begin, end);
    while (begin < end) {
      const int64_t row = begin / pieces, first = begin % pieces;
      const int64_t last = first + end - begin < pieces ? first + end - begin : pieces;
      work(row, (int)first, (int)last);
      begin += last - first;
    }
  }
};

}  // namespace trv
