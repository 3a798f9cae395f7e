// Layers with experts of random shapes in buffers of exact sizes, with and without an exchange, against a naive loop.
// Compiled with sanitizers by tests/kernels/cpu/test_sanitizers.py: a read past an end is a failure too.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "gemm.h"
#include "moe_layer.h"
#include "simd.h"

extern "C" {
void* hr_pool_new(int threads, const int* cpus, int spin);
void hr_pool_delete(void* pool);
void* hr_moe_new(const hr::Moe* moe, void* pool, int max_tokens);
void hr_moe_delete(void* block);
void hr_moe_run(void* block, const float* x, int rows, int hidden, float* out, int use_tiles,
                const hr::ExchangeHook* exchange, hr::StepResult* result);
}

namespace {

using hr::Format;

std::mt19937 generator(11);

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }
int round_up(int value, int to) { return (value + to - 1) / to * to; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Weights [n, k] as floats and packed, on cache lines and not a byte longer.
struct Weights {
  int n, k;
  std::vector<float> values;
  std::unique_ptr<uint8_t, Free> data;
  hr::Matrix matrix{};

  Weights(Format format, int rows, int columns, const std::vector<int32_t>& order = {}) : n(rows), k(columns) {
    const int features = order.empty() ? n : static_cast<int>(order.size());
    const int n_pad = round_up(features, hr::kPanel), k_pad = round_up(k, hr::kDepth), panels = n_pad / hr::kPanel;
    for (int i = 0; i < n * k; ++i) values.push_back(hr::bf16_value(hr::bf16_bits(normal() / std::sqrt(static_cast<float>(k)))));
    data.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(panels) * hr::panel_bytes(format, k_pad))));
    std::vector<int32_t> padded(order);
    if (!order.empty()) padded.resize(static_cast<size_t>(n_pad), -1);
    const int32_t* const which = order.empty() ? nullptr : padded.data();
    if (format == Format::F32) {
      hr::pack_f32(values.data(), k, k, k_pad, which, n, 0, panels, data.get());
    } else {
      std::vector<uint16_t> bits;
      for (float value : values) bits.push_back(hr::bf16_bits(value));
      hr::pack_bf16(bits.data(), k, k, k_pad, which, n, 0, panels, data.get());
    }
    matrix = {format, features, k, n_pad, k_pad, 0, data.get(), nullptr, nullptr};
  }

  float dot(int row, const float* x) const {
    float sum = 0.0f;
    for (int i = 0; i < k; ++i) sum += values[static_cast<size_t>(row * k + i)] * x[i];
    return sum;
  }
};

// As kernels/cpu/layout.py: gate_up_rows.
std::vector<int32_t> halves(int intermediate) {
  std::vector<int32_t> rows;
  for (int begin = 0; begin < intermediate; begin += 32) {
    for (int up = 0; up < 2; ++up) {
      for (int i = begin; i < begin + 32; ++i) rows.push_back(i < intermediate ? i + up * intermediate : -1);
    }
  }
  return rows;
}

struct Expert {
  Weights gate_up, down;
  Expert(Format format, int hidden, int intermediate)
      : gate_up(format, 2 * intermediate, hidden, halves(intermediate)), down(format, hidden, intermediate) {}

  void add(const float* x, float weight, float* out) const {
    std::vector<float> inner;
    for (int i = 0; i < down.k; ++i) {
      const float gate = gate_up.dot(i, x);
      inner.push_back(gate / (1.0f + std::exp(-gate)) * gate_up.dot(i + down.k, x));
    }
    for (int i = 0; i < down.n; ++i) out[i] += weight * down.dot(i, inner.data());
  }
};

// Ranks of one: what is sent is received, in another order, and computed into a buffer of this one's.
struct Alone {
  std::vector<const void*> rows;
  std::vector<int32_t> slots;
  std::vector<float> results;
  std::vector<float*> outputs;
  std::vector<const float*> returned;
  int calls = 0;

  static int32_t call(void* context, int32_t phase, hr::Exchange* e) {
    auto* self = static_cast<Alone*>(context);
    if (phase != self->calls++ % 4) std::abort();
    const int count = e->num_rows * e->top_k;
    if (phase == static_cast<int32_t>(hr::Phase::Receive)) {
      self->results.assign(static_cast<size_t>(count * e->hidden), NAN);
      self->rows.clear(), self->slots.clear(), self->outputs.clear();
      self->returned.assign(static_cast<size_t>(count), nullptr);
      for (int i = count - 1; i >= 0; --i) {
        const size_t at = static_cast<size_t>(i / e->top_k * e->row_stride) * (e->rows_bf16 ? 2 : 4);
        self->rows.push_back(static_cast<const uint8_t*>(e->rows) + at);
        self->slots.push_back(e->experts[i]);
        self->outputs.push_back(self->results.data() + i * e->hidden);
        self->returned[static_cast<size_t>(i)] = self->outputs.back();
      }
      e->num_received = count;
      e->received = self->rows.data(), e->slots = self->slots.data(), e->outputs = self->outputs.data();
    }
    if (phase == static_cast<int32_t>(hr::Phase::Collect)) e->returned = self->returned.data();
    return 0;
  }
};

void try_one(Format format) {
  const int hidden = pick(1, 150), intermediate = pick(1, 90), experts = pick(1, 9), top_k = pick(1, experts);
  const int shared_width = pick(0, 1) * pick(1, 100), most = pick(1, 40), rows = pick(0, most);
  const bool gated = shared_width > 0 && pick(0, 1) == 1;
  std::vector<Expert> all;
  std::vector<hr::Expert> slots;
  std::vector<int32_t> slot_of;
  for (int i = 0; i < experts; ++i) {
    all.emplace_back(format, hidden, intermediate);
    slots.push_back({all.back().gate_up.matrix, all.back().down.matrix});
    slot_of.push_back(i);
  }
  const Expert shared(format, hidden, std::max(1, shared_width));
  const hr::Expert shared_struct{shared.gate_up.matrix, shared.down.matrix};
  const Weights router(Format::F32, experts + gated, hidden);
  std::vector<int64_t> chosen(static_cast<size_t>(experts)), computed(static_cast<size_t>(experts));
  hr::Moe moe{};
  moe.routing = {experts, top_k, hr::Scoring::Softmax, hr::GroupScore::Max, 1, 1, 1, 1.5f};
  moe.num_slots = experts, moe.shared_gated = gated, moe.router = router.matrix;
  moe.like = slots[0];
  moe.slots = slots.data(), moe.slot_of = slot_of.data(), moe.shared = shared_width > 0 ? &shared_struct : nullptr;
  moe.expert_counts = chosen.data(), moe.slot_counts = computed.data();

  std::vector<float> x;
  for (int i = 0; i < rows * hidden; ++i) x.push_back(hr::bf16_value(hr::bf16_bits(normal())));
  std::vector<float> out(x.size()), exchanged(x.size());
  void* const pool = hr_pool_new(pick(1, 3), nullptr, 100);
  void* const block = hr_moe_new(&moe, pool, most);
  hr::StepResult result{};
  const hr::ExchangeHook none{nullptr, nullptr};
  hr_moe_run(block, x.data(), rows, hidden, out.data(), 1, &none, &result);
  if (result.status != hr::StepStatus::Done) std::abort();
  Alone alone;
  const hr::ExchangeHook hook{Alone::call, &alone};
  hr_moe_run(block, x.data(), rows, hidden, exchanged.data(), 1, &hook, &result);
  if (result.status != hr::StepStatus::Done || alone.calls != 4 || out != exchanged || chosen != computed) std::abort();

  for (int t = 0; t < rows; ++t) {
    const float* const row = x.data() + t * hidden;
    std::vector<float> logits, wanted(static_cast<size_t>(hidden)), scratch(static_cast<size_t>(2 * experts));
    for (int i = 0; i < router.n; ++i) logits.push_back(router.dot(i, row));
    std::vector<float> weights(static_cast<size_t>(top_k));
    std::vector<int32_t> taken(static_cast<size_t>(top_k));
    hr::route_row(logits.data(), moe.routing, nullptr, scratch.data(), weights.data(), taken.data());
    for (int j = 0; j < top_k; ++j) all[static_cast<size_t>(taken[static_cast<size_t>(j)])].add(row, weights[static_cast<size_t>(j)], wanted.data());
    if (shared_width > 0) shared.add(row, gated ? 1.0f / (1.0f + std::exp(-logits.back())) : 1.0f, wanted.data());
    for (int i = 0; i < hidden; ++i) {
      const float error = std::fabs(out[static_cast<size_t>(t * hidden + i)] - wanted[static_cast<size_t>(i)]);
      if (!(error < (format == Format::F32 ? 1e-4f : 0.05f))) {
        std::printf("hidden %d, inner %d, experts %d, k %d: off by %g\n", hidden, intermediate, experts, top_k, error);
        std::exit(1);
      }
    }
  }
  hr_moe_delete(block);
  hr_pool_delete(pool);
}

}  // namespace

int main() {
  for (int i = 0; i < 60; ++i) try_one(i % 2 ? Format::BF16 : Format::F32);
  std::puts("ok");
}
