// What Python hands over: plain structs, mirrored field by field in trivium/kernels/native_abi.py.
#pragma once
#include <cstdint>

namespace trv {

enum Format { kFloat32, kBfloat16, kFloat16, kInt8, kInt4 };
enum Kind { kEmbed, kNorm, kLinear, kGated, kHeadLinear, kRope, kAttend, kCombine, kExperts, kRows };
enum CombineKind { kActivate, kAdd, kMultiply, kScale, kClip, kSoftcap };
enum Scores { kSoftmax, kSigmoidScores, kChosen };

struct Span {
  int32_t reg, start, width;
};

struct Matrix {
  int32_t format, group;         // group 0: one scale per row, or none
  int64_t rows, columns, padded;  // padded: columns as stored
  const void* data;
  const void* scales;
  const uint8_t* zeros;
  int32_t half_scales, dot_group;
};

struct Expert {
  const Matrix *up, *gate, *down;
  const float *up_bias, *gate_bias, *down_bias;
};

struct Operation {
  int32_t kind, activation, combine, count;
  Span x, y, z, out;  // y: b, k, logits or add; z: v, or the add of experts
  int32_t heads, kv_heads, head_dim, value_dim, window, cache, has_window, latent;
  int32_t group, layer_norm, interleaved, first, half, x_stride, out_stride, layer;
  int32_t top_k, scores, renormalise, groups, top_groups, by_max, has_clamp, has_add;
  int32_t table_format, positions_format, table_rows, position_rows, position_offset, weight_period;
  float scale, eps, offset, softcap, renormalise_eps, gate_scale, clamp, padding;
  const void *table, *positions;          // embedding tables; `table` is also rope's
  const float *weight, *bias, *bias2, *slopes, *sinks, *correction, *biases;  // biases [heads][first]
  const Matrix *matrix, *matrix2;         // Gated: gate, up; HeadLinear: an array of `count`
  const Expert* experts;                  // an array of `count`
};

struct CacheSpec {
  int32_t kv_heads, head_dim, value_dim, padding;
};

struct Cache {
  void *keys, *values;
  float *key_scales, *value_scales;
  int64_t blocks;
  int32_t block_size, format;  // kFloat32, kBfloat16 or kInt8
};

struct Program {
  const int32_t* widths;
  const Operation* operations;
  const CacheSpec* caches;
  int32_t num_registers, num_operations, num_caches, num_moe_layers;
  Span logits, hidden;
  int32_t threads, padding;
};

struct Routing {
  const int32_t* replayed;  // [T, top_k] or null
  int32_t* experts;         // [T, top_k], written
  float* weights;
};

struct Batch {
  const int32_t *token_ids, *positions, *sequences, *block_tables, *output_rows;
  int64_t tokens, num_sequences, blocks_per_sequence, rows;
  const Cache* caches;
  const Routing* routing;
  float *logits, *hidden;  // [rows, width], written
};

// One token wanted of each of `count` rows of logits; a row may be asked several times.
struct Draws {
  const float* logits;             // [num_rows, width]
  const int32_t* rows;             // [count]
  const float *temperatures, *min_ps;  // temperature 0: the likeliest token
  const double *top_ps, *uniforms;
  const int32_t *top_ks, *tops;    // tops: so many likeliest tokens with the log of all weights' sum, or -1: neither
  const uint8_t* const* allowed;   // [count] masks [width], null where every token may be chosen
  const int32_t* edit_ids;         // tokens whose logits are replaced,
  const float* edit_values;        // by these:
  const int64_t* edit_ends;        // those of draw i are edit_ends[i] to edit_ends[i + 1]
  int64_t count, num_rows, width, most;
  int32_t* tokens;                 // [count], written
  float *bests, *lefts;            // the row's largest logit (NaN: it has one), and after edits and mask
  double* wholes;                  // where tops is not -1
  int32_t* top_ids;                // [count, most]
};

}  // namespace trv
