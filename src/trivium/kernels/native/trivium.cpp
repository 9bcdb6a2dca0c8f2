// Binds a program once, runs its steps and draws their tokens: the library for one kind of CPU, behind five C functions.
#include "draw.h"
#include "experts.h"

namespace trv {

class Runner {
 public:
  explicit Runner(const Program& p)
      : operations_(p.operations, p.operations + p.num_operations), specs_(p.caches, p.caches + p.num_caches),
        logits_(p.logits), hidden_(p.hidden), threads_(p.threads) {
    state_.widths.assign(p.widths, p.widths + p.num_registers);
    state_.registers.resize(p.num_registers);
    memory_ = std::make_unique<Buffer[]>(p.num_registers);
    state_.scratch = std::vector<Scratch>(threads_);
    state_.taken = std::make_unique<Taken[]>(operations_.size() * 2 * threads_);
    state_.specs = specs_.data();
    plan();
    prepared_memory_ = std::make_unique<Buffer[]>(2);
  }

  int run(const Batch& batch) {
    if (!valid(batch)) return 1;
    try {
      reserve(batch);
    } catch (const std::bad_alloc&) {
      return 2;
    }
    state_.team = &team();
    state_.batch = &batch;
    for (size_t i = 0; i < operations_.size() * 2 * threads_; i++) state_.taken[i].store(0, std::memory_order_relaxed);
    team_->run([this](int member) { walk(member); });
    return 0;
  }

  // Rows are taken one by one, each by one thread; for few logits nobody is woken.
  int draw(const Draws& draws) {
    if (!valid_draws(draws)) return 1;
    const int members = (int)std::min<int64_t>({threads_, draws.count, 1 + draws.count * draws.width / kAlone});
    draw_scratch_.resize(threads_);
    for (int member = 0; member < members; member++) {
      if (!draw_scratch_[member]) draw_scratch_[member] = std::make_unique<DrawScratch>();
      reserve_draws(*draw_scratch_[member], draws.width);
    }
    std::atomic<int64_t> next{0};
    auto work = [&](int member) {
      if (member >= members) return;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < draws.count;)
        draw_row(draws, i, *draw_scratch_[member]);
    };
    if (members > 1)
      team().run(work);
    else
      work(0);
    return 0;
  }

 private:
  Team& team() {
    if (!team_ || !team_->alive()) {
      team_.release();  // after a fork its threads are gone: it cannot be torn down
      team_ = std::make_unique<Team>(threads_);
    }
    return *team_;
  }

  // ---------------------------------------------------------------------------------------------- planning
  static bool meet_any(const Span& a, const std::vector<Span>& others) {
    for (const Span& b : others)
      if (meet(a, b)) return true;
    return false;
  }
  static Form wanted_form(const Operation& op, int& group) {
    if (op.kind != kLinear && op.kind != kGated && op.kind != kHeadLinear) return kPlain;
    group = op.matrix->dot_group;
    return form_of(*op.matrix);
  }

  // Where barriers are needed, and who prepares which activations: [Note: turns] an operation waits only for those
  // since the last barrier that wrote what it reads or touch what it writes.
  void plan() {
    std::vector<Span> reads, writes;  // since the last barrier
    std::vector<uint8_t> late(state_.widths.size());
    int current = -1;  // the prepared activations whose span nobody has written since
    plans_.resize(operations_.size());
    for (size_t i = 0; i + 1 < operations_.size(); i++)
      if (turned_by_attention(i)) {
        plans_[i].elsewhere = true;
        plans_[i + 1].rotation = &operations_[i];
      }
    for (size_t i = 0; i < operations_.size(); i++) {
      const Operation& op = operations_[i];
      Plan& plan = plans_[i];
      if (plan.elsewhere) continue;
      plan.output_rows = op.kind == kRows || (op.kind != kEmbed && late[op.x.reg]);
      std::vector<Span> reading, writing;
      spans(op, reading, writing);
      int group = 0;
      Form form = wanted_form(op, group);
      if (form != kPlain) {
        Preparation how{op.x, form, form == kQuantised ? group : 0, 0, plan.output_rows, 1, 0};
        if (op.kind == kHeadLinear) {
          how.heads = op.count;
          how.stride = op.x_stride;
        }
        if (current >= 0 && same(state_.preparations[current], how)) {
          plan.prepared = current;
        } else {
          how.buffer = state_.preparations.empty() ? 0 : 1 - state_.preparations.back().buffer;
          plan.prepared = current = (int)state_.preparations.size();
          state_.preparations.push_back(how);
          bool fused = i > 0 && operations_[i - 1].kind == kNorm && how.heads == 1 && operations_[i - 1].out.reg == op.x.reg &&
                       operations_[i - 1].out.start == op.x.start && operations_[i - 1].out.width == op.x.width &&
                       plans_[i - 1].output_rows == plan.output_rows;
          if (fused)
            plans_[i - 1].prepared = current;
          else
            plan.prepare = true;
        }
      }
      if (plan.prepare || op.kind == kExperts) {
        // Its first phase reads only; its own barrier follows before it writes.
        for (const Span& s : reading) plan.barrier = plan.barrier || meet_any(s, writes);
        reads.clear();
        writes.clear();
      } else {
        for (const Span& s : reading) plan.barrier = plan.barrier || meet_any(s, writes);
        for (const Span& s : writing) plan.barrier = plan.barrier || meet_any(s, writes) || meet_any(s, reads);
        if (plan.barrier) {
          reads.clear();
          writes.clear();
        }
      }
      reads.insert(reads.end(), reading.begin(), reading.end());
      writes.insert(writes.end(), writing.begin(), writing.end());
      if (current >= 0 && meet_any(state_.preparations[current].x, writing)) current = -1;
      for (const Span& s : writing) late[s.reg] = plan.output_rows;
    }
    state_.prepared.resize(state_.preparations.size());
  }
  // Whether operation i turns just the queries and keys of the attention behind it, and nobody else reads these.
  bool turned_by_attention(size_t i) const {
    const Operation &rope = operations_[i], &attend = operations_[i + 1];
    if (rope.kind != kRope || attend.kind != kAttend) return false;
    const Span &q = attend.x, &k = attend.y, &turned = rope.x;
    if (q.reg != turned.reg || k.reg != turned.reg || q.start != turned.start || k.start != q.start + q.width ||
        q.width + k.width != turned.width || rope.head_dim != attend.head_dim)
      return false;
    if (meet(turned, logits_) || meet(turned, hidden_) || (attend.z.width && meet(turned, attend.z))) return false;
    int32_t begin = turned.start, end = turned.start + turned.width;  // what nobody has written since
    for (size_t j = i + 2; j < operations_.size() && begin < end; j++) {
      std::vector<Span> reading, writing;
      spans(operations_[j], reading, writing);
      if (meet_any(Span{turned.reg, begin, end - begin}, reading)) return false;
      if (operations_[j].kind == kHeadLinear) continue;  // it may leave gaps
      for (const Span& s : writing) {
        if (s.reg != turned.reg) continue;
        if (s.start <= begin) begin = std::max(begin, s.start + s.width);
        if (s.start + s.width >= end) end = std::min(end, s.start);
      }
    }
    return true;
  }
  static bool same(const Preparation& a, const Preparation& b) {
    return a.x.reg == b.x.reg && a.x.start == b.x.start && a.x.width == b.x.width && a.form == b.form && a.group == b.group &&
           a.output_rows == b.output_rows && a.heads == b.heads && a.stride == b.stride;
  }
  static void spans(const Operation& op, std::vector<Span>& reading, std::vector<Span>& writing) {
    if (op.kind != kEmbed) reading.push_back(op.x);
    if (op.y.width) reading.push_back(op.y);
    if (op.z.width) reading.push_back(op.z);
    writing.push_back(op.kind == kRope ? op.x : op.out);
  }

  // ---------------------------------------------------------------------------------------------- one step
  bool valid(const Batch& b) const {
    if (b.tokens < 1 || b.rows < 0) return false;
    for (const Operation& op : operations_) {
      if (op.position_rows && op.position_rows - op.position_offset < last_limit(b)) return false;
      if (op.kind == kEmbed)
        for (int64_t t = 0; t < b.tokens; t++)
          if (b.token_ids[t] < 0 || b.token_ids[t] >= op.table_rows) return false;
    }
    std::vector<uint8_t> seen((size_t)b.num_sequences);
    for (int64_t t = 0; t < b.tokens; t++) {
      int32_t s = b.sequences[t];
      if (b.positions[t] < 0 || s < 0 || s >= b.num_sequences) return false;
      if (t && s == b.sequences[t - 1]) {
        if (b.positions[t] <= b.positions[t - 1]) return false;
      } else {
        if (seen[s]) return false;
        seen[s] = 1;
      }
    }
    for (int64_t r = 0; r < b.rows; r++)
      if (b.output_rows[r] < 0 || b.output_rows[r] >= b.tokens) return false;
    return valid_blocks(b) && valid_routing(b);
  }
  static int64_t last_limit(const Batch& b) {
    int32_t top = 0;
    for (int64_t t = 0; t < b.tokens; t++) top = b.positions[t] > top ? b.positions[t] : top;
    return (int64_t)top + 1;
  }
  bool valid_blocks(const Batch& b) const {
    int64_t last_blocks = -1;
    int last_size = 0, last_window = -1;
    for (const Operation& op : operations_) {
      if (op.kind != kAttend) continue;
      const Cache& cache = b.caches[op.cache];
      int window = op.has_window ? op.window : 0;
      if (cache.blocks == last_blocks && cache.block_size == last_size && window == last_window) continue;
      last_blocks = cache.blocks, last_size = cache.block_size, last_window = window;
      for (int64_t t = 0; t < b.tokens;) {
        int64_t end = t;
        while (end < b.tokens && b.sequences[end] == b.sequences[t]) end++;
        int64_t low = op.has_window && b.positions[t] >= window ? b.positions[t] - window + 1 : 0, high = b.positions[end - 1];
        const int32_t* table = b.block_tables + (int64_t)b.sequences[t] * b.blocks_per_sequence;
        if (high / cache.block_size >= b.blocks_per_sequence) return false;
        for (int64_t i = low / cache.block_size; i <= high / cache.block_size; i++)
          if (table[i] < 0 || table[i] >= cache.blocks) return false;
        t = end;
      }
    }
    return true;
  }
  bool valid_routing(const Batch& b) const {
    for (const Operation& op : operations_) {
      if (op.kind != kExperts || !b.routing[op.layer].replayed) continue;
      for (int64_t i = 0; i < b.tokens * op.top_k; i++)
        if (b.routing[op.layer].replayed[i] < 0 || b.routing[op.layer].replayed[i] >= op.count) return false;
    }
    return true;
  }

  void reserve(const Batch& batch) {
    int64_t rows = batch.tokens > batch.rows ? batch.tokens : batch.rows;
    for (size_t i = 0; i < state_.registers.size(); i++)
      // Vectors read past a row's end, never past the register's.
      state_.registers[i] = memory_[i].get<float>((size_t)(rows * state_.widths[i] + kLanes));
    // Twice: the first round lets the two buffers grow, the second lays all out in them.
    for (int round = 0; round < 2; round++)
      for (size_t i = 0; i < state_.preparations.size(); i++) {
        const Preparation& how = state_.preparations[i];
        int64_t count = how.output_rows ? batch.rows : batch.tokens;
        int64_t all = how.heads * round_up(count, tile_tokens(how.form));
        int columns = how.heads == 1 ? how.x.width : head_columns((int)i);
        state_.prepared[i] = plan_prepared(how.form, all, columns, how.group, prepared_memory_[how.buffer]);
      }
    for (size_t i = 0; i < operations_.size(); i++) {
      const Operation& op = operations_[i];
      if (op.kind != kExperts) continue;
      int64_t slots = slot_limit(op, batch.tokens);
      ExpertTables(state_.tables, batch.tokens * op.top_k, op.count);
      plan_slots(*op.experts[0].up, slots, state_.slots_x);
      plan_slots(*op.experts[0].down, slots, state_.slots_h);
      state_.hidden.get<float>((size_t)slots * op.experts[0].up->rows + kLanes);
      state_.result.get<float>((size_t)slots * op.experts[0].down->rows + kLanes);
    }
    state_.runs.clear();
    for (int64_t t = 0; t < batch.tokens; t++) {
      if (t && batch.sequences[t] == batch.sequences[t - 1])
        state_.runs.back().end = (int)t + 1;
      else
        state_.runs.push_back({(int)t, (int)t + 1});
    }
  }
  int head_columns(int prepared) const {
    for (size_t i = 0; i < operations_.size(); i++)
      if (operations_[i].kind == kHeadLinear && plans_[i].prepared == prepared) return (int)operations_[i].matrix[0].columns;
    return 0;
  }

  void walk(int member) {
    for (size_t i = 0; i < operations_.size(); i++) {
      const Operation& op = operations_[i];
      if (plans_[i].elsewhere) continue;
      if (plans_[i].barrier) team_->barrier();
      Turn turn{state_, op, plans_[i], member, state_.taken.get() + 2 * threads_ * i};
      switch (op.kind) {
        case kEmbed: run_embed(turn); break;
        case kNorm: run_norm(turn); break;
        case kLinear: run_linear(turn); break;
        case kGated: run_gated(turn); break;
        case kHeadLinear: run_head_linear(turn); break;
        case kRope: run_rope(turn); break;
        case kAttend: run_attend(turn); break;
        case kCombine: run_combine(turn); break;
        case kExperts: run_experts(turn); break;
        case kRows: run_rows(turn); break;
      }
    }
    team_->barrier();
    int64_t begin = state_.batch->rows * member / threads_, end = state_.batch->rows * (member + 1) / threads_;
    for (int64_t r = begin; r < end; r++) {
      memcpy(state_.batch->logits + r * logits_.width, state_.at(logits_, r), (size_t)logits_.width * 4);
      memcpy(state_.batch->hidden + r * hidden_.width, state_.at(hidden_, r), (size_t)hidden_.width * 4);
    }
    release_tiles(state_.scratch[member]);
  }

  std::vector<Operation> operations_;
  std::vector<CacheSpec> specs_;
  std::vector<Plan> plans_;
  Span logits_, hidden_;
  int threads_;
  State state_;
  std::unique_ptr<Buffer[]> memory_, prepared_memory_;
  std::vector<std::unique_ptr<DrawScratch>> draw_scratch_;  // one per member
  std::unique_ptr<Team> team_;
};

// What `work` returns; 2: it found no memory; 3: it threw anything else, as where threads cannot be started.
template <typename Work>
int guarded(Work work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return 2;
  } catch (...) {
    return 3;
  }
}

}  // namespace trv

#define TRV_API extern "C" __attribute__((visibility("default")))

TRV_API void* trivium_bind(const trv::Program* program) {
  try {
    return new trv::Runner(*program);
  } catch (...) {
    return nullptr;
  }
}

// 0: done; 1: the batch does not fit the program, nothing ran; 2: out of memory; 3: the threads could not be started.
TRV_API int trivium_run(void* runner, const trv::Batch* batch) {
  return trv::guarded([&] { return static_cast<trv::Runner*>(runner)->run(*batch); });
}

// 0: done; 1: the draws do not fit their rows, nothing was drawn; 2: out of memory; 3: the threads could not be started.
TRV_API int trivium_draw(void* runner, const trv::Draws* draws) {
  return trv::guarded([&] { return static_cast<trv::Runner*>(runner)->draw(*draws); });
}

TRV_API void trivium_free(void* runner) { delete static_cast<trv::Runner*>(runner); }

// Sizes of the structs, in the order of abi.h: Python checks its mirror against them.
TRV_API void trivium_sizes(int64_t* sizes) {
  const int64_t all[] = {sizeof(trv::Span),      sizeof(trv::Matrix), sizeof(trv::Expert),  sizeof(trv::Operation),
                         sizeof(trv::CacheSpec), sizeof(trv::Cache),  sizeof(trv::Program), sizeof(trv::Routing),
                         sizeof(trv::Batch),     sizeof(trv::Draws)};
  memcpy(sizes, all, sizeof all);
}
