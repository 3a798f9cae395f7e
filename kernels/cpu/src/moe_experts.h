// The MLPs of several experts, each on its own rows, by all threads together.
#pragma once

#include <vector>

#include "moe.h"
#include "pool.h"
#include "scratch.h"

namespace hr {

struct ExpertRows {
  const Expert* expert;
  int32_t begin, end;  // of the rows of the input
};

class GroupedMlp {
 public:
  static size_t bytes(const Expert& like, int max_rows);
  GroupedMlp(Arena& arena, Pool* pool, const Expert& like, int max_rows);

  // By one thread, before a barrier: which rows go to which expert, at most max_rows in all.
  void plan(const ExpertRows* experts, size_t count);

  // By all threads. Row i of `x`, in the form that the experts read -> out[i] [hidden]. Returns after a barrier.
  void run(const Activations& x, const Gate& gate, float* const* out, int thread, bool use_tiles);

 private:
  struct Chunk {
    const Expert* expert;
    int32_t begin, end;
  };

  void gate_up(const Activations& x, const Gate& gate, bool use_tiles);
  Activations inner(int thread);
  void down(const Activations& x, float* const* out, bool use_tiles);

  Pool* const pool_;
  const Format format_;
  const int hidden_, gate_up_panels_, down_panels_, inner_stride_;
  void* inner_;                 // [rows][inner_stride] bfloat16 or float
  ActivationBuffer quantized_;  // of `inner_`, where the experts read whole numbers
  int rows_ = 0;
  std::vector<Chunk> chunks_;
  TaskCounter gate_up_tasks_, down_tasks_;
};

}  // namespace hr
