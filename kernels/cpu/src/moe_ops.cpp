// Experts outside of a decoder's step: routing alone and one layer alone, for tests and benchmarks.
#include <cstring>
#include <vector>

#include "moe_layer.h"

namespace hr {
namespace {

class Block {
 public:
  Block(const Moe& moe, Pool* pool, int max_tokens)
      : moe_(moe), pool_(pool), arena_(MoeLayer::bytes(moe, max_tokens, pool->size()) + 4096), layer_(arena_, pool, moe, max_tokens) {}

  StepResult run(const MoeInput& in) {
    in_ = &in;
    pool_->run([](void* self, int thread) { static_cast<Block*>(self)->body(thread); }, this);
    return {status_, 0, layer_.fault()};
  }

 private:
  void body(int thread) {
    const StepStatus status = layer_.run(moe_, *in_, thread);
    if (thread == 0) status_ = status;
  }

  const Moe& moe_;
  Pool* const pool_;
  Arena arena_;
  MoeLayer layer_;
  const MoeInput* in_ = nullptr;
  StepStatus status_ = StepStatus::Done;
};

}  // namespace
}  // namespace hr

extern "C" {

// logits [rows][num_experts] -> weights, experts [rows][top_k].
void hr_moe_route(const float* logits, int rows, const hr::Routing* routing, const float* bias, float* weights,
                  int32_t* experts) {
  std::vector<float> scratch(static_cast<size_t>(routing->num_experts) * 2);
  for (int row = 0; row < rows; ++row) {
    const auto in = static_cast<size_t>(row) * static_cast<size_t>(routing->num_experts);
    const auto out = static_cast<size_t>(row) * static_cast<size_t>(routing->top_k);
    hr::route_row(logits + in, *routing, bias, scratch.data(), weights + out, experts + out);
  }
}

// `moe` and what it points to must outlive the block. Null when memory is short.
void* hr_moe_new(const hr::Moe* moe, void* pool, int max_tokens) {
  try {
    return new hr::Block(*moe, static_cast<hr::Pool*>(pool), max_tokens);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void hr_moe_delete(void* block) { delete static_cast<hr::Block*>(block); }

// out [rows][hidden] += the layer of x [rows][hidden], without a norm.
void hr_moe_run(void* block, const float* x, int rows, int hidden, float* out, int use_tiles,
                const hr::ExchangeHook* exchange, hr::StepResult* result) {
  const hr::MoeInput in{x, hidden, nullptr, 0.0f, rows, out, use_tiles != 0, *exchange};
  *result = static_cast<hr::Block*>(block)->run(in);
}

}  // extern "C"
