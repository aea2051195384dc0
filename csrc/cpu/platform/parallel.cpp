#include "cpu/platform/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace cnk::cpu {

struct TeamState {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> generation{0};
  alignas(64) std::atomic<int64_t> counter{0};
};

namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  TeamFunction function;
  const void* argument;
  TeamState state;
};

// --- OpenMP, looked up in the running process. Nothing is linked, so there is never a second runtime. ---

struct OpenMp {
  void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  OpenMp() {
    auto load = [](const char* name) { return dlsym(RTLD_DEFAULT, name); };
    gomp_parallel = reinterpret_cast<decltype(gomp_parallel)>(load("GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(load("omp_get_thread_num"));
    num_threads = reinterpret_cast<decltype(num_threads)>(load("omp_get_num_threads"));
  }
  bool found() const { return gomp_parallel && thread_num && num_threads; }
};

const OpenMp& openmp() {
  static const OpenMp instance;
  return instance;
}

void run_openmp_member(void* data) {
  Job& job = *static_cast<Job*>(data);
  Team team(openmp().thread_num(), openmp().num_threads(), &job.state);
  job.function(team, job.argument);
}

// --- Plain threads. ---

class Pool {
 public:
  // Runs the job and returns true, or returns false at once if another caller uses the pool.
  bool run(int threads, Job& job) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(workers_.size()) < threads - 1) {
        const int rank = int(workers_.size()) + 1;
        workers_.emplace_back([this, rank, seen = generation_] { work(rank, seen); });
      }
      job_ = &job;
      size_ = threads;
      running_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    Team team(0, threads, &job.state);
    job.function(team, job.argument);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void work(int rank, uint64_t seen) {
    for (;;) {
      Job* job;
      int size;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        job = job_;
        size = size_;
      }
      if (rank >= size) continue;
      Team team(rank, size, &job->state);
      job->function(team, job->argument);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int size_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

// Never destroyed: its threads wait for work until the process ends. A forked
// child has none of these threads. It makes a new pool and does not touch the
// old one, whose locks may be held by threads that no longer exist.
Pool& plain_pool() {
  Pool* current = pool.load();
  if (!current) {
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(current, made)) return *made;
    delete made;
  }
  return *current;
}

void after_fork_in_child() {
  forked.store(true);
  pool.store(nullptr);
}

const int fork_handler = pthread_atfork(nullptr, nullptr, after_fork_in_child);

bool use_openmp() { return openmp().found() && !forked.load(std::memory_order_relaxed); }

}  // namespace

void Team::barrier() {
  if (size_ == 1) return;
  TeamState& s = *state_;
  const int generation = s.generation.load(std::memory_order_relaxed);
  if (s.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    s.arrived.store(0, std::memory_order_relaxed);
    // Sequentially consistent, because notify_all() reads next whether any thread sleeps, and makes no call
    // if none does. With release order the processor may do that read before others see the store: a thread
    // that goes to sleep in between still reads the old generation, and is never woken.
    s.generation.store(generation + 1, std::memory_order_seq_cst);
    s.generation.notify_all();
    return;
  }
  for (int spin = 0; spin < 1000; ++spin) {
    if (s.generation.load(std::memory_order_acquire) != generation) return;
    pause();
  }
  while (s.generation.load(std::memory_order_acquire) == generation) {
    s.generation.wait(generation, std::memory_order_acquire);
  }
}

int64_t Team::next() { return state_->counter.fetch_add(1, std::memory_order_relaxed); }

void parallel(int threads, TeamFunction function, const void* argument) {
  (void)fork_handler;
  Job job{function, argument, {}};
  if (threads > 1) {
    if (use_openmp()) {
      openmp().gomp_parallel(run_openmp_member, &job, unsigned(threads), 0);
      return;
    }
    if (plain_pool().run(threads, job)) return;
  }
  Team alone(0, 1, &job.state);
  function(alone, argument);
}

const char* parallel_runtime() { return use_openmp() ? "openmp" : "threads"; }

}  // namespace cnk::cpu
