// A mixture-of-experts layer, as the caller (kernels/cpu/moe.py) lays it out in memory, and what a step asks of the
// other ranks where its experts are spread over several.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace hr {

enum class Scoring : int32_t { Softmax = 0, Sigmoid = 1, SoftmaxAfterTopK = 2 };
enum class GroupScore : int32_t { Max = 0, Top2Sum = 1 };
enum class GateKind : int32_t { Silu = 0, ClampedSwiglu = 1 };

struct Routing {  // kernels/reference_moe.py says what each means
  int32_t num_experts, top_k;
  Scoring scoring;
  GroupScore group_score;
  int32_t num_groups, top_groups;
  int32_t normalize;
  float scale;
};

struct Gate {
  GateKind kind;
  float alpha, limit;  // ClampedSwiglu only
};

struct Expert {
  Matrix gate_up;  // each panel: 32 gate columns, then the 32 up columns that belong to them
  Matrix down;     // [hidden, intermediate]
};

// All experts of a model have the shape and the format of `like`; so have the shared ones, but for their width.
struct Moe {
  Routing routing;
  Gate gate;
  int32_t num_slots;
  int32_t shared_gated;          // the router has one output more: what the shared expert's weight is the sigmoid of
  int32_t index;                 // among the model's layers that have experts
  Matrix router;                 // F32 [num_experts or one more, hidden]
  const float* correction_bias;  // [num_experts] or null
  Expert like;                   // no data
  const Expert* slots;           // [num_slots] physical experts; no data: the slot is empty
  const int32_t* slot_of;        // [num_experts] where an expert is while there is no exchange, -1: nowhere
  const Expert* shared;          // or null
  int64_t* expert_counts;        // [num_experts], to which this rank's own tokens are added, once for each choice
  int64_t* slot_counts;          // [num_slots], to which the rows computed here are added
};

// What a step and its exchange with other ranks hand each other at one layer. In the order of the calls:
enum class Phase : int32_t {
  Send = 0,     // the fields up to `weights` are set. To be sent off; waiting is for later, work may be done meanwhile.
  Receive = 1,  // wait; set `num_received` and what follows it up to `outputs`. Own tokens for own experts are among them.
  Return = 2,   // `outputs` are written. To be sent back.
  Collect = 3,  // wait; set `returned`
};

// Rows are pointed to one by one, so that they can stay where others have put them or will look for them.
struct Exchange {
  int32_t layer;       // Moe::index
  int32_t num_rows, hidden, top_k;
  int32_t rows_bf16;   // rows are bfloat16, else float; the same at all ranks. Outputs are float.
  int32_t row_stride;  // of `rows`, in values
  const void* rows;        // [num_rows][row_stride] this rank's tokens, after the norm
  const int32_t* experts;  // [num_rows][top_k] logical
  const float* weights;    // [num_rows][top_k]

  int64_t num_received;
  const void* const* received;  // [num_received] rows [hidden], in any order; one may be there several times
  const int32_t* slots;         // [num_received] which physical expert of this rank is to compute it
  float* const* outputs;        // [num_received] rows [hidden], to be written here

  const float* const* returned;  // [num_rows * top_k] rows [hidden], in the order of `experts`
};

// 0: done. Anything else ends the step; thread 0 of the step makes all calls.
using ExchangeCall = int32_t (*)(void* context, int32_t phase, Exchange* exchange);

struct ExchangeHook {
  ExchangeCall call;  // null: this rank has all experts
  void* context;
};

enum class StepStatus : int32_t { Done = 0, ExchangeFailed = 1, NoExpert = 2 };

struct StepResult {
  StepStatus status;
  int32_t layer;   // at which it ended early
  int32_t expert;  // NoExpert: the slot that is empty or out of range, or -1 - the expert that is in none
};

}  // namespace hr
