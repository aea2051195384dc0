#include "cpu/platform/affinity.h"

#include <stdexcept>

#if defined(__linux__)
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#endif

#include "cpu/platform/parallel.h"

namespace cnk::cpu {

#if defined(__linux__)

namespace {

// A set for any number of CPUs: cpu_set_t has only 1024.
class CpuSet {
 public:
  explicit CpuSet(int cpus) : bytes_(CPU_ALLOC_SIZE(cpus)), set_(CPU_ALLOC(cpus)) {
    if (!set_) throw std::bad_alloc();
    CPU_ZERO_S(bytes_, set_.get());
  }
  size_t bytes() const { return bytes_; }
  cpu_set_t* get() const { return set_.get(); }

 private:
  struct Free {
    void operator()(cpu_set_t* set) const { CPU_FREE(set); }
  };
  size_t bytes_;
  std::unique_ptr<cpu_set_t, Free> set_;
};

// Both act on the calling thread and return 0 or errno.

int get_mask(CpuMask* mask) {
  // Linux refuses a set that is smaller than its own, and does not report the size of its own.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    const CpuSet set(cpus);
    if (sched_getaffinity(0, set.bytes(), set.get()) == 0) {
      mask->clear();
      for (int cpu = 0; cpu < int(set.bytes() * 8); ++cpu) {
        if (CPU_ISSET_S(cpu, set.bytes(), set.get())) mask->push_back(cpu);
      }
      return 0;
    }
    if (errno != EINVAL) return errno;
  }
  return EINVAL;
}

int set_mask(const CpuMask& mask) {
  const CpuSet set(mask.empty() ? 1 : *std::max_element(mask.begin(), mask.end()) + 1);
  for (int cpu : mask) CPU_SET_S(cpu, set.bytes(), set.get());
  return sched_setaffinity(0, set.bytes(), set.get()) == 0 ? 0 : errno;
}

struct Change {
  const std::vector<CpuMask>& masks;
  std::vector<CpuMask> previous;
  std::vector<int> errors;
  int team_size = 0;

  void run(Team& team) {
    if (team.rank() == 0) team_size = team.size();
    if (team.size() != int(masks.size())) return;
    int& error = errors[team.rank()];
    error = get_mask(&previous[team.rank()]);
    const bool known = error == 0;
    if (known) error = set_mask(masks[team.rank()]);
    team.barrier();
    if (known && failed() != errors.end()) set_mask(previous[team.rank()]);
  }
  std::vector<int>::iterator failed() {
    return std::find_if(errors.begin(), errors.end(), [](int error) { return error != 0; });
  }
};

}  // namespace

std::vector<CpuMask> set_affinity(const std::vector<CpuMask>& masks) {
  const int threads = int(masks.size());
  Change change = {masks, std::vector<CpuMask>(threads), std::vector<int>(threads)};
  in_team(threads, [&change](Team& team) { change.run(team); });
  if (change.team_size != threads) {
    throw std::runtime_error("set_affinity: a team of " + std::to_string(threads) +
                             " threads was asked for, " + std::to_string(change.team_size) + " came");
  }
  if (const auto failed = change.failed(); failed != change.errors.end()) {
    throw std::runtime_error("set_affinity: the system refuses the mask of thread " +
                             std::to_string(failed - change.errors.begin()) + ": " + std::strerror(*failed));
  }
  return change.previous;
}

#else

std::vector<CpuMask> set_affinity(const std::vector<CpuMask>&) {
  throw std::runtime_error("set_affinity: not supported on this system (it is Linux's sched_setaffinity)");
}

#endif

}  // namespace cnk::cpu
