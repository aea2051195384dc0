// A team of threads that runs one function, with a barrier and shared counters.
#pragma once

#include <cstdint>

namespace cnk::cpu {

struct TeamState;

// A running team as one of its threads uses it. All threads must call barrier() equally often.
class Team {
 public:
  Team(int rank, int size, TeamState* state) : rank_(rank), size_(size), state_(state) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  // Wait for all. Spins for about 20 us, then sleeps, so that more threads than cores cost little.
  void barrier();
  // Return 0, 1, 2, ..., each number once, to whichever thread calls.
  int64_t next();
  // The half-open range of `count` items that belongs to this thread, in multiples of `grain`.
  void split(int64_t count, int64_t grain, int64_t* begin, int64_t* end) const {
    const int64_t units = (count + grain - 1) / grain;
    const int64_t first = units * rank_ / size_ * grain, last = units * (rank_ + 1) / size_ * grain;
    *begin = first < count ? first : count;
    *end = last < count ? last : count;
  }

 private:
  int rank_, size_;
  TeamState* state_;
};

using TeamFunction = void (*)(Team& team, const void* argument);

// Run `function` on up to `threads` threads, the caller among them, and return when all are done.
//
// The threads are those of the OpenMP runtime that PyTorch has loaded, if it has loaded one: a second pool
// would compete with PyTorch's, whose idle threads spin for milliseconds on the same cores. A pool of plain
// threads is used if no runtime is loaded, and in a process that was forked after the runtime started (its
// threads are gone, and it does not notice). The team may be smaller than requested.
void parallel(int threads, TeamFunction function, const void* argument);

// The same for a callable, body(team); not for sources that are compiled once per instruction set.
template <class F>
void in_team(int threads, const F& body) {
  parallel(threads, [](Team& team, const void* f) { (*static_cast<const F*>(f))(team); }, &body);
}

// "openmp" or "threads": what parallel() uses in this process now.
const char* parallel_runtime();

}  // namespace cnk::cpu
