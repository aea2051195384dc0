// A team of threads that runs one function, with a barrier and shared counters.
#pragma once

#include <cstdint>

namespace cnk::cpu {

struct TeamState;

// What one thread of a running team sees. Every thread calls the same sequence of barrier().
class Team {
 public:
  Team(int rank, int size, TeamState* state) : rank_(rank), size_(size), state_(state) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  // Wait for all; spins for about 20 us, then sleeps, so that more threads than cores stay correct and cheap.
  void barrier();
  // Hand out 0, 1, 2, ... once each, to whichever thread asks.
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
// The threads are those of the OpenMP runtime that PyTorch has loaded, where it has loaded one: a pool of our
// own would fight with PyTorch's, whose idle threads spin for milliseconds on the very cores we want. In a
// process forked after that runtime started (its threads are gone, and it does not notice) and where none is
// loaded, a pool of plain threads serves. The team may be smaller than asked for.
void parallel(int threads, TeamFunction function, const void* argument);

// "openmp" or "threads": which of the two parallel() uses in this process now.
const char* parallel_runtime();

}  // namespace cnk::cpu
