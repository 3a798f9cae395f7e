// One thread's part of a number of equal pieces of work, for stages too short for a counter.
#pragma once

#include <algorithm>

namespace hr {

struct Share {
  Share(int count, int thread, int threads) {
    const int each = (count + threads - 1) / threads;
    begin = std::min(count, thread * each);
    end = std::min(count, begin + each);
  }
  int begin, end;
};

}  // namespace hr
