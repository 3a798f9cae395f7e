#include "pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace hr {

namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

uint32_t* address(std::atomic<uint32_t>& word) {
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain word");
  return reinterpret_cast<uint32_t*>(&word);
}

}  // namespace

Pool::Pool(int threads, const int* cpus, int spin) : size_(threads), spin_(spin) {
  if (cpus != nullptr) cpus_.assign(cpus, cpus + threads);
  for (int thread = 1; thread < size_; ++thread) threads_.emplace_back([this, thread] { serve(thread); });
}

Pool::~Pool() {
  stopping_ = true;
  advance(job_, job_sleepers_);
  for (auto& thread : threads_) thread.join();
}

void Pool::run(void (*body)(void*, int), void* argument) {
  if (!caller_pinned_) {
    caller_pinned_ = true;
    pin(0);
  }
  body_ = body;
  argument_ = argument;
  if (size_ > 1) advance(job_, job_sleepers_);
  body(argument, 0);
  barrier();
}

void Pool::barrier() {
  if (size_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    advance(generation_, generation_sleepers_);
  } else {
    wait_while(generation_, generation, generation_sleepers_);
  }
}

void Pool::serve(int thread) {
  pin(thread);
  uint32_t seen = 0;
  for (;;) {
    wait_while(job_, seen, job_sleepers_);
    ++seen;
    if (stopping_) return;
    body_(argument_, thread);
    barrier();
  }
}

void Pool::pin(int thread) {
  if (cpus_.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<size_t>(cpus_[static_cast<size_t>(thread)]), &set);
  sched_setaffinity(0, sizeof set, &set);  // a refusal (a cgroup without that core) leaves the thread where it is
}

void Pool::wait_while(std::atomic<uint32_t>& word, uint32_t seen, std::atomic<uint32_t>& sleepers) {
  for (int i = 0; i < spin_; ++i) {
    if (word.load(std::memory_order_acquire) != seen) return;
    pause_cpu();
  }
  // Sequentially consistent on both sides: either `advance` sees the sleeper, or the sleeper sees the new word.
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  while (word.load(std::memory_order_seq_cst) == seen) {
    syscall(SYS_futex, address(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  }
  sleepers.fetch_sub(1, std::memory_order_relaxed);
}

void Pool::advance(std::atomic<uint32_t>& word, std::atomic<uint32_t>& sleepers) {
  word.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) != 0) {
    syscall(SYS_futex, address(word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
}

}  // namespace hr

extern "C" {

void* hr_pool_new(int threads, const int* cpus, int spin) { return new hr::Pool(threads, cpus, spin); }
void hr_pool_delete(void* pool) { delete static_cast<hr::Pool*>(pool); }

// Nanoseconds of one barrier, the mean of many: what a stage boundary costs.
double hr_pool_barrier_ns(void* pool, int repeats) {
  struct Job {
    hr::Pool* pool;
    int repeats;
  } job{static_cast<hr::Pool*>(pool), repeats};
  timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  job.pool->run(
      [](void* argument, int) {
        auto* self = static_cast<Job*>(argument);
        for (int i = 0; i < self->repeats; ++i) self->pool->barrier();
      },
      &job);
  clock_gettime(CLOCK_MONOTONIC, &end);
  return (static_cast<double>(end.tv_sec - begin.tv_sec) * 1e9 + static_cast<double>(end.tv_nsec - begin.tv_nsec)) /
         repeats;
}
}
