#include "cuda/host/shim.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cnk::cuda::host {

dim3 thread_index, block_index, block_size, grid_size;
char* shared_memory;

namespace {

constexpr size_t kStackBytes = 256 << 10;  // the sanitizers' frames are large
constexpr int kWarp = 32;

// Where a fiber continues: on x86-64 a stack pointer, elsewhere a context of swapcontext, which needs two
// system calls for a switch.
#ifdef __x86_64__
struct Context {
  void* sp = nullptr;
};
extern "C" void cnk_switch_fiber(void** from, void* to);
asm(R"(.text
.type cnk_switch_fiber, @function
cnk_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cnk_switch_fiber, .-cnk_switch_fiber
)");
#else
struct Context {
  ucontext_t context;
};
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  bool waiting = false;  // at a barrier of the block or of its warp
};

struct Warp {
  int live = 0, arrived = 0;
  int turn = 0;  // which buffer: two, so that a fast lane's next exchange keeps what a slow lane still reads
  alignas(16) unsigned char exchanged[2][kWarp][kExchangeBytes];
};

// One launch at a time, because the caller holds Python's lock.
struct State {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Context outside;
  int threads = 0, live = 0, arrived = 0, current = 0;
  bool last_first = false, deadlock = false;
  const void* kernel = nullptr;
  const void* params = nullptr;
  Invoke invoke = nullptr;
};
State state;

// Switches to a fiber, or with -1 to the caller of the launch.
void switch_to(Context& from, int target) {
  Context& to = target < 0 ? state.outside : state.fibers[size_t(target)].context;
  if (target >= 0) thread_index.x = unsigned(target);
  state.current = target;
#ifdef __x86_64__
  cnk_switch_fiber(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
}

// The next of `count` fibers from `begin` on that can run, after `from`; -1 if none can.
int next_of(int begin, int count, int from) {
  const int step = state.last_first ? count - 1 : 1;
  for (int k = 1, i = from - begin; k <= count; ++k) {
    i = (i + step) % count;
    const Fiber& fiber = state.fibers[size_t(begin + i)];
    if (!fiber.done && !fiber.waiting) return begin + i;
  }
  return -1;
}

// The next fiber that can run; -1 (the caller) if all are finished or none can run. Lanes of the same warp come
// first: a warp then runs ahead of the others as far as the block's barriers let it, also through shuffles,
// and overwrites what the others still read where a barrier is missing.
int next_fiber(int from) {
  const int begin = from / kWarp * kWarp;
  int next = next_of(begin, std::min(kWarp, state.threads - begin), from);
  if (next < 0) next = next_of(0, state.threads, from);
  if (next < 0) state.deadlock = state.live > 0;
  return next;
}

void release_block() {
  if (state.arrived == 0 || state.arrived < state.live) return;
  state.arrived = 0;
  for (Fiber& f : state.fibers) f.waiting = false;
}

void release_warp(int warp) {
  Warp& w = state.warps[size_t(warp)];
  if (w.arrived == 0 || w.arrived < w.live) return;
  w.arrived = 0;
  const int end = std::min(state.threads, (warp + 1) * kWarp);
  for (int i = warp * kWarp; i < end; ++i) state.fibers[size_t(i)].waiting = false;
}

void wait() {
  const int me = state.current;
  if (!state.fibers[size_t(me)].waiting) return;  // the last one to arrive continues
  switch_to(state.fibers[size_t(me)].context, next_fiber(me));
}

void entry() {
  state.invoke(state.kernel, state.params);
  const int me = state.current;
  state.fibers[size_t(me)].done = true;
  --state.live;
  --state.warps[size_t(me / kWarp)].live;
  release_block();
  release_warp(me / kWarp);
  switch_to(state.fibers[size_t(me)].context, next_fiber(me));
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  fiber.done = fiber.waiting = false;
#ifdef __x86_64__
  auto top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStackBytes) & ~uintptr_t{15};
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // the return address of entry(); keeps the alignment that a call has
  *--sp = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;  // the registers that a switch restores
  fiber.context.sp = sp;
#else
  getcontext(&fiber.context.context);
  fiber.context.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.context.uc_stack.ss_size = kStackBytes;
  fiber.context.context.uc_link = nullptr;
  makecontext(&fiber.context.context, &entry, 0);
#endif
}

}  // namespace

void barrier() {
  state.fibers[size_t(state.current)].waiting = true;
  ++state.arrived;
  release_block();
  wait();
}

void warp_barrier() {
  const int warp = state.current / kWarp;
  state.fibers[size_t(state.current)].waiting = true;
  ++state.warps[size_t(warp)].arrived;
  release_warp(warp);
  wait();
}

const unsigned char* exchange(const void* own, int bytes, void (*combine)(unsigned char* all)) {
  Warp& w = state.warps[size_t(state.current / kWarp)];
  if (w.arrived == 0) w.turn ^= 1;  // the first one to arrive switches to the other buffer
  unsigned char* buffer = &w.exchanged[w.turn][0][0];
  std::memcpy(buffer + kExchangeBytes * (state.current % kWarp), own, size_t(bytes));
  if (combine && w.arrived + 1 == w.live) combine(buffer);
  warp_barrier();
  return buffer;
}

void set_thread_order(bool last_first) { state.last_first = last_first; }

void run(const void* kernel, Invoke invoke, const void* params, unsigned blocks, int threads,
         int64_t shared_bytes) {
  state.kernel = kernel;
  state.invoke = invoke;
  state.params = params;
  state.threads = threads;
  state.fibers.resize(size_t(std::max(threads, int(state.fibers.size()))));
  block_size = {unsigned(threads), 1, 1};
  grid_size = {blocks, 1, 1};
  for (unsigned b = 0; b < blocks; ++b) {
    block_index = {b, 0, 0};
    // A new allocation each time, so that the sanitizer also
    // detects use of shared memory of an earlier block of threads.
    std::unique_ptr<char, decltype(&std::free)> shared(
        static_cast<char*>(shared_bytes ? std::malloc(size_t(shared_bytes)) : nullptr), &std::free);
    if (shared) std::memset(shared.get(), 0xff, size_t(shared_bytes));
    shared_memory = shared.get();
    state.warps.assign(size_t((threads + kWarp - 1) / kWarp), Warp{});
    for (int i = 0; i < threads; ++i) {
      prepare(state.fibers[size_t(i)]);
      ++state.warps[size_t(i / kWarp)].live;
    }
    state.live = threads;
    state.arrived = 0;
    state.deadlock = false;
    switch_to(state.outside, state.last_first ? threads - 1 : 0);
    if (state.deadlock) throw std::logic_error("deadlock: a barrier or shuffle that not all threads reach");
  }
}

}  // namespace cnk::cuda::host
