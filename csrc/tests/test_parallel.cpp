// Teams of threads. Built twice: without and with an OpenMP runtime in the process (then _OPENMP is defined).

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "support.h"

#if defined(_OPENMP)
#include <omp.h>
constexpr const char* kRuntime = "openmp";
// Keeps the OpenMP runtime loaded if the linker drops libraries that nothing calls.
const int kOpenMpThreads = omp_get_max_threads();
#else
constexpr const char* kRuntime = "threads";
#endif

using namespace cnk;
using namespace cnk::test;

namespace {

// A job that uses all features of a team: `rounds` times each thread takes
// work from the counter, then waits for all. Wrong answers are counted and
// not checked here, because this also runs in threads and in forked children.
int failures_of_job(int threads, int rounds, int* size = nullptr) {
  constexpr int64_t kItems = 64;
  std::vector<std::atomic<int>> taken(kItems * rounds);
  std::vector<int> done(threads);  // the last round of each thread: plain ints, ordered only by the barrier
  std::atomic<int> failures{0}, members{0}, ranks{0}, team_size{0};
  in_team(threads, [&](Team& team) {
    members++;
    ranks += team.rank();
    team_size = team.size();
    failures += team.size() < 1 || team.size() > threads || team.rank() < 0 || team.rank() >= team.size();
    for (int64_t item; (item = team.next()) < int64_t(taken.size());) taken[item]++;
    for (int round = 1; round <= rounds; ++round) {
      done[team.rank()] = round;
      team.barrier();
      for (int r = 0; r < team.size(); ++r) failures += done[r] != round;
      team.barrier();
    }
  });
  for (const std::atomic<int>& t : taken) failures += t != 1;
  failures += members != team_size;
  failures += ranks != team_size * (team_size - 1) / 2;
  if (size) *size = team_size;
  return failures;
}

// Runs `body` in a forked child, which must exit with 0 within 100 seconds.
template <class F>
int status_of_child(const F& body) {
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(100);
    _exit(body());
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  return status;  // 0 when it exited with 0; SIGALRM's number when it hung
}

}  // namespace

TEST_CASE("the runtime is the one this process has") {
#if defined(_OPENMP)
  CHECK(kOpenMpThreads >= 1);
#endif
  CHECK(std::string(parallel_runtime()) == kRuntime);
}

TEST_CASE("teams of every size, growing and shrinking, with counters and barriers") {
  for (int threads : {1, 2, 8, 3, 1, 16, 5, 2, 33, 4}) {
    CAPTURE(threads);
    int size = 0;
    CHECK(failures_of_job(threads, 20, &size) == 0);
#if !defined(_OPENMP)
    CHECK(size == threads);
#endif
  }
}

// The last thread arrives at about the time when the others
// stop spinning and sleep, a little later in each round.
TEST_CASE("nobody sleeps through a barrier") {
  constexpr int kRounds = 20000;
  std::atomic<int> rounds{0};
  in_team(2, [&](Team& team) {
    for (int round = 0; round < kRounds; ++round) {
      if (round % team.size() == team.rank()) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(round);
        while (std::chrono::steady_clock::now() < until) continue;
      }
      team.barrier();
      if (team.rank() == 0) rounds++;
    }
  });
  CHECK(rounds == kRounds);
}

TEST_CASE("a job started by a member of a team gets a team that may be smaller") {
  std::atomic<int> failures{0}, jobs{0};
  in_team(3, [&](Team&) {
    failures += failures_of_job(3, 5);
    jobs++;
  });
  CHECK(jobs >= 1);
  CHECK(failures == 0);
}

TEST_CASE("eight threads call at once") {
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i) {
    callers.emplace_back([&failures, i] {
      for (int call = 0; call < 50; ++call) failures += failures_of_job(1 + (i + call) % 4, 3);
    });
  }
  for (std::thread& t : callers) t.join();
  CHECK(failures == 0);
}

TEST_CASE("split covers every item once, in multiples of the grain") {
  int wrong = 0;
  for (int size : {1, 2, 3, 5, 8, 16}) {
    for (int64_t grain : {1, 4, 8, 32}) {
      for (int64_t count : {0, 1, 2, 3, 7, 8, 31, 32, 33, 100, 3136}) {
        int64_t at = 0;
        for (int rank = 0; rank < size; ++rank) {
          int64_t begin, end;
          Team(rank, size, nullptr).split(count, grain, &begin, &end);
          wrong += begin != at || end < begin || end > count;
          wrong += end != count && end % grain != 0;
          at = end;
        }
        wrong += at != count;
      }
    }
  }
  CHECK(wrong == 0);
}

// ThreadSanitizer does not support new threads in a child of a process with threads.
#if !defined(__SANITIZE_THREAD__)

TEST_CASE("a forked child gets threads of its own") {
  REQUIRE(failures_of_job(4, 5) == 0);
  const int status = status_of_child([] {
    int size = 0, failures = failures_of_job(4, 20, &size);
    failures += size != 4;  // plain threads: as many as requested
    failures += std::string(parallel_runtime()) != "threads";
    failures += failures_of_job(6, 5);
    // And a child of the child.
    failures += status_of_child([] { return failures_of_job(4, 5); }) != 0;
    return failures;
  });
  CHECK(status == 0);
  CHECK(std::string(parallel_runtime()) == kRuntime);  // the parent is as before
  CHECK(failures_of_job(4, 5) == 0);
}

TEST_CASE("a fork while other threads are at work") {
  std::atomic<bool> stop{false};
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 2; ++i) {
    callers.emplace_back([&] {
      while (!stop) failures += failures_of_job(3, 2);
    });
  }
  int bad_children = 0;
  for (int i = 0; i < 20; ++i) bad_children += status_of_child([] { return failures_of_job(3, 5); }) != 0;
  stop = true;
  for (std::thread& t : callers) t.join();
  CHECK(bad_children == 0);
  CHECK(failures == 0);
}

#endif
