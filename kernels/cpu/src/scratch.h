// Memory that is allocated once, when a runtime is made, and handed out in pieces.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "matrix.h"

namespace hr {

// Zeroed, because padding of activations is read and must be finite; aligned to huge pages.
class Arena {
 public:
  explicit Arena(size_t bytes) : size_((bytes + kHuge - 1) / kHuge * kHuge) {
    base_ = static_cast<uint8_t*>(std::aligned_alloc(kHuge, size_));
    if (base_ == nullptr) throw std::bad_alloc();
    madvise(base_, size_, MADV_HUGEPAGE);  // a refusal costs only speed
    std::memset(base_, 0, size_);
  }
  ~Arena() { std::free(base_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(size_t count) {
    T* taken = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    if (used_ > size_) throw std::bad_alloc();
    return taken;
  }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  size_t size_, used_ = 0;
  uint8_t* base_;
};

// Room for `rows` rows of activations in any format: layers may differ in theirs.
struct ActivationBuffer {
  uint8_t* data = nullptr;
  float* scale = nullptr;
  float* sum = nullptr;

  static size_t bytes(int k_pad, int rows) {
    return static_cast<size_t>(rows) * (static_cast<size_t>(k_pad) * 4 + static_cast<size_t>(k_pad / kGroup) * 8) + 256;
  }
  ActivationBuffer() = default;
  ActivationBuffer(Arena& arena, int k_pad, int rows)
      : data(arena.take<uint8_t>(static_cast<size_t>(rows) * static_cast<size_t>(k_pad) * 4)),
        scale(arena.take<float>(static_cast<size_t>(rows) * static_cast<size_t>(k_pad / kGroup))),
        sum(arena.take<float>(static_cast<size_t>(rows) * static_cast<size_t>(k_pad / kGroup))) {}

  // In memory of bytes(k_pad, rows), on a cache line.
  static ActivationBuffer in(uint8_t* memory, int k_pad, int rows) {
    const size_t values = static_cast<size_t>(rows) * static_cast<size_t>(k_pad), scales = values / kGroup;
    ActivationBuffer buffer;
    buffer.data = memory;
    buffer.scale = reinterpret_cast<float*>(memory + values * 4);
    buffer.sum = buffer.scale + scales;
    return buffer;
  }

  Activations as(const Matrix& w) const { return {w.format, w.k_pad, data, scale, sum}; }
};

}  // namespace hr
