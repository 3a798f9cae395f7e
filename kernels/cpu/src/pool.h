// A few threads that run one function together and meet at barriers inside it.
//
// Waiting spins for a moment and then sleeps on a futex: between two stages of a step the wait is shorter than a sleep,
// and where threads outnumber cores (two workers on two cores) a spinning thread would burn the very time slice that the
// thread it waits for needs.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace hr {

class Pool {
 public:
  // `threads` in all, the caller of `run` among them. cpus: one per thread to pin it to, or null. The caller is pinned
  // by `run`'s first call. spin: pauses before a wait sleeps.
  Pool(int threads, const int* cpus, int spin);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // body(argument, thread) on every thread, thread 0 being the caller; returns when all have returned. Not reentrant.
  void run(void (*body)(void* argument, int thread), void* argument);

  // Within `run`: no thread passes before all have come.
  void barrier();

 private:
  void serve(int thread);
  void pin(int thread);
  // Until `word` differs from `seen`.
  void wait_while(std::atomic<uint32_t>& word, uint32_t seen, std::atomic<uint32_t>& sleepers);
  void advance(std::atomic<uint32_t>& word, std::atomic<uint32_t>& sleepers);

  const int size_, spin_;
  std::vector<int> cpus_;
  bool caller_pinned_ = false;
  void (*body_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  bool stopping_ = false;

  // Each on a cache line of its own.
  alignas(64) std::atomic<uint32_t> job_{0};
  std::atomic<uint32_t> job_sleepers_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> generation_sleepers_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  std::vector<std::thread> threads_;
};

// Hands out the numbers [0, count) of one stage to whoever asks next.
struct alignas(64) TaskCounter {
  std::atomic<int32_t> next{0};
  int take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

}  // namespace hr
