// What all operations of one step share: registers, the batch, prepared activations and work counters.
#pragma once
#include "product.h"

namespace trv {

struct SequenceRun {
  int begin, end;  // tokens of one sequence, adjacent
};

// How an operation takes its turn, decided once when the program is bound.
struct Plan {
  bool barrier = false;        // others' results are needed, or still read
  bool prepare = false;        // makes `prepared` from x before its products
  int prepared = -1;           // which of the program's prepared activations it reads, or writes (norm)
  bool output_rows = false;    // works on R rows, not T
};

struct Preparation {
  Span x;
  Form form;
  int group;
  int buffer;
  bool output_rows;
  int heads = 1, stride = 0;  // HeadLinear: one set of rows per head
};

struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
};

struct State {
  Team* team = nullptr;
  const Batch* batch = nullptr;
  const CacheSpec* specs = nullptr;
  std::vector<float*> registers;
  std::vector<int64_t> widths;
  std::vector<Preparation> preparations;
  std::vector<Prepared> prepared;
  std::vector<SequenceRun> runs;
  std::unique_ptr<Counter[]> counters;  // four per operation
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
  Counter* counters;

  Scratch& scratch() const { return state.scratch[member]; }
  int64_t rows() const { return state.rows(plan); }
  void barrier() const { state.team->barrier(); }
  int64_t take(int phase, int64_t count = 1) const {
    return counters[phase].next.fetch_add(count, std::memory_order_relaxed);
  }
  // This member's share of `count` things.
  void share(int64_t count, int64_t& begin, int64_t& end) const {
    int64_t size = state.team->size();
    begin = count * member / size;
    end = count * (member + 1) / size;
  }
};

}  // namespace trv
