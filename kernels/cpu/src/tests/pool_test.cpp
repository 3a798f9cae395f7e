// The thread pool under load: every thread runs every job, no thread passes a barrier early, sleeping threads wake.
#include "pool.h"

#include <unistd.h>

#include <cstdio>
#include <vector>

namespace {

struct Job {
  hr::Pool* pool;
  int rounds;
  std::vector<long> counts;         // by thread; read by all others after each barrier
  std::vector<long> errors;
};

void work(void* argument, int thread) {
  auto* job = static_cast<Job*>(argument);
  const auto own = static_cast<size_t>(thread);
  for (int round = 1; round <= job->rounds; ++round) {
    ++job->counts[own];
    job->pool->barrier();
    for (long count : job->counts) job->errors[own] += count % job->rounds != round % job->rounds;
    job->pool->barrier();
  }
}

}  // namespace

int main() {
  long errors = 0;
  for (const int threads : {1, 2, 3, 5}) {
    for (const int spin : {0, 50, 4000}) {
      hr::Pool pool(threads, nullptr, spin);
      const auto size = static_cast<size_t>(threads);
      Job job{&pool, 20, std::vector<long>(size), std::vector<long>(size)};
      for (int run = 0; run < 50; ++run) {
        pool.run(work, &job);
        if (run % 10 == 0) usleep(1000);  // long enough for the others to fall asleep
      }
      for (size_t i = 0; i < size; ++i) errors += job.errors[i] + (job.counts[i] != 50 * 20);
    }
  }
  if (errors) std::printf("%ld errors\n", errors);
  return errors != 0;
}
