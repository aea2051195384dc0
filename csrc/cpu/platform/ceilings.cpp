// Compiled once, without flags for an instruction set. A function that needs one has a target attribute and
// is called only if the CPU has the instruction set.

#include "cpu/platform/ceilings.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/dtype.h"
#include "cpu/platform/isa.h"
#include "cpu/platform/tile_scope.h"

namespace cnk::cpu {

namespace {

// --- Arithmetic. ---

// The value is in a register, and the optimiser must assume that it is unknown from here on.
#if defined(__x86_64__)
#define CNK_OPAQUE(value) asm volatile("" : "+v"(value))
#elif defined(__aarch64__)
#define CNK_OPAQUE(value) asm volatile("" : "+w"(value))
#else
#define CNK_OPAQUE(value) asm volatile("" : "+m"(value))
#endif

// `iterations` times sum = STEP for each of COUNT independent sums. A macro, because templates and lambdas do
// not get the instruction set of the function that uses them.
#define CNK_RUN_SUMS(COUNT, START, STEP)                        \
  decltype(START) sums[COUNT];                                  \
  _Pragma("GCC unroll 32") for (auto& sum : sums) {             \
    sum = START;                                                \
    CNK_OPAQUE(sum);                                            \
  }                                                             \
  for (int64_t i = 0; i < iterations; ++i) {                    \
    _Pragma("GCC unroll 32") for (auto& sum : sums) sum = STEP; \
  }                                                             \
  _Pragma("GCC unroll 32") for (auto& sum : sums) CNK_OPAQUE(sum)

// As many sums as fit into 16 or 32 registers next to the factors. Starting two multiply-adds in each cycle
// needs 8 to 12 sums (latency 4 to 6), and 16 on the Arm cores that start four.
constexpr int kSums16 = 12, kSums32 = 24;

#if defined(__x86_64__)

// sum = sum / 2 + 1/2 converges to 1: no infinities, no denormals.
__attribute__((target("avx512f"))) int64_t fma_avx512(int64_t iterations) {
  __m512 half = _mm512_set1_ps(0.5f);
  CNK_OPAQUE(half);
  CNK_RUN_SUMS(kSums32, half, _mm512_fmadd_ps(sum, half, half));
  return iterations * kSums32 * 16 * 2;
}

__attribute__((target("avx2,fma"))) int64_t fma_avx2(int64_t iterations) {
  __m256 half = _mm256_set1_ps(0.5f);
  CNK_OPAQUE(half);
  CNK_RUN_SUMS(kSums16, half, _mm256_fmadd_ps(sum, half, half));
  return iterations * kSums16 * 8 * 2;
}

// 1/2 * 1/2 - 1/2 * 1/2 is added: the sums do not change.
__attribute__((target("avx512f,avx512bf16"))) int64_t dot_avx512(int64_t iterations) {
  __m512i a = _mm512_set1_epi32(0x3f003f00), b = _mm512_set1_epi32(int(0xbf003f00));
  CNK_OPAQUE(a);
  CNK_OPAQUE(b);
  CNK_RUN_SUMS(kSums32, _mm512_set1_ps(1.0f), _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b));
  return iterations * kSums32 * (16 * 2) * 2;
}

// The same numbers in tiles: 2 x 2 of sums, the operands loaded once.
__attribute__((target("amx-tile,amx-bf16"))) int64_t tile_amx(int64_t iterations) {
  alignas(64) uint32_t a[16][16], b[16][16];
  std::fill_n(&a[0][0], 16 * 16, 0x3f003f00u);
  std::fill_n(&b[0][0], 16 * 16, 0xbf003f00u);
  asm volatile("" ::"r"(a), "r"(b) : "memory");  // g++ 12's _tile_loadd does not say that it reads memory
  const TileScope tiles;
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a, 64);
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return iterations * 4 * (16 * 16 * 32) * 2;
}

#endif

int64_t fma_portable(int64_t iterations) {
#if defined(__aarch64__)
  // 2^-26 is added to 1/2, and rounded away.
  float32x4_t factor = vdupq_n_f32(0x1p-13f);
  CNK_OPAQUE(factor);
  CNK_RUN_SUMS(kSums32, vdupq_n_f32(0.5f), vfmaq_f32(sum, factor, factor));
  return iterations * kSums32 * 4 * 2;
#else
  typedef float Float4 __attribute__((vector_size(16)));
  Float4 half = {0.5f, 0.5f, 0.5f, 0.5f};
  CNK_OPAQUE(half);
  CNK_RUN_SUMS(kSums16, half, sum * half + half);
  return iterations * kSums16 * 4 * 2;
#endif
}

// --- Copies. ---

template <int kBytes>
CNK_INLINE void copy_in(const char* from, char* to, int64_t bytes) {
  typedef char Vec __attribute__((vector_size(kBytes), aligned(1), may_alias));
  constexpr int kUnroll = 4;
  int64_t i = 0;
  for (; i + kUnroll * kBytes <= bytes; i += kUnroll * kBytes) {
    Vec v[kUnroll];
    for (int j = 0; j < kUnroll; ++j) v[j] = *reinterpret_cast<const Vec*>(from + i + j * kBytes);
    for (int j = 0; j < kUnroll; ++j) *reinterpret_cast<Vec*>(to + i + j * kBytes) = v[j];
    asm volatile("" ::: "memory");  // without this the compiler makes a memcpy of the loop
  }
  for (; i < bytes; ++i) {
    to[i] = from[i];
    asm volatile("" ::: "memory");
  }
}

void copy_portable(const char* from, char* to, int64_t bytes) { copy_in<16>(from, to, bytes); }

#if defined(__x86_64__)

__attribute__((target("avx2"))) void copy_avx2(const char* from, char* to, int64_t bytes) {
  copy_in<32>(from, to, bytes);
}

__attribute__((target("avx512f"))) void copy_avx512(const char* from, char* to, int64_t bytes) {
  copy_in<64>(from, to, bytes);
}

#endif

void copy_vectors(const char* from, char* to, int64_t bytes) {
#if defined(__x86_64__)
  if (isa_supported(Isa::kAvx512)) return copy_avx512(from, to, bytes);
  if (isa_supported(Isa::kAvx2)) return copy_avx2(from, to, bytes);
#endif
  copy_portable(from, to, bytes);
}

void copy_streaming(const char* from, char* to, int64_t bytes) {
#if defined(__x86_64__)
  const int64_t head = std::min(int64_t(-uintptr_t(to) % 64), bytes);
  copy_vectors(from, to, head);
  int64_t i = head;
  // A cache line in four stores, which the processor combines into one write.
  for (; i + 64 <= bytes; i += 64) {
    __m128i v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i) + j);
    for (int j = 0; j < 4; ++j) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i) + j, v[j]);
  }
  _mm_sfence();
  copy_vectors(from + i, to + i, bytes - i);
#else
  copy_vectors(from, to, bytes);
#endif
}

void copy_string(const char* from, char* to, int64_t bytes) {
#if defined(__x86_64__)
  asm volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(bytes) : : "memory");
#else
  copy_vectors(from, to, bytes);
#endif
}

using CopyFunction = void (*)(const char* from, char* to, int64_t bytes);

// GB/s read and written by one thread of a Zen 5 with 32 KB, 256 KB and 256 MB: vectors 540, 200, 40;
// streaming 70, 85, 53; the string instruction 330, 270, 59. No method is best everywhere.
constexpr CopyFunction kCopyFunctions[kCopyMethodCount] = {copy_vectors, copy_streaming, copy_string};

// --- Rates. ---

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best rate of a team, in bursts that all its threads start at the same time.
class Bursts {
 public:
  Bursts(int threads, double seconds) : members_(threads), seconds_(seconds) {}

  // Runs on each thread of the team. work(repeats) does its work `repeats` times and returns the amount.
  template <class Work>
  void run(Team& team, const Work& work) {
    Member& me = members_[team.rank()];
    const double start = now();
    for (;;) {
      team.barrier();
      if (done_) return;
      me.begin = now();
      me.amount = work(repeats_);
      me.end = now();
      team.barrier();
      if (team.rank() == 0) take(team.size(), start);
    }
  }
  double best() const { return best_; }

 private:
  static constexpr double kBurst = 1e-3;
  struct alignas(64) Member {
    double begin, end, amount;
  };

  // From the first start to the last end: if there are fewer cores than threads, the threads run in turns,
  // and the sum of their rates would be higher than the machine's.
  void take(int size, double start) {
    double begin = members_[0].begin, end = members_[0].end, amount = 0;
    for (int r = 0; r < size; ++r) {
      begin = std::min(begin, members_[r].begin);
      end = std::max(end, members_[r].end);
      amount += members_[r].amount;
    }
    const double time = std::max(end - begin, 1e-9);
    // The first bursts are too short; they show how many repeats fill a burst.
    if (time >= kBurst / 2) best_ = std::max(best_, amount / time);
    shortest_ = std::min(shortest_, time / double(repeats_));
    repeats_ = std::clamp(int64_t(kBurst / shortest_) + 1, int64_t{1}, repeats_ * 10);
    done_ = best_ > 0 && now() - start >= seconds_;
  }

  std::vector<Member> members_;
  double seconds_, best_ = 0, shortest_ = 1;
  int64_t repeats_ = 1;
  bool done_ = false;
};

constexpr int64_t kLargePage = int64_t{2} << 20;

// Memory that no thread has touched yet. (Requesting large pages makes no difference on a Zen 5.)
class Pages {
 public:
  explicit Pages(int64_t bytes) : size_(size_t(bytes + kLargePage)) {
    base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Pages() { munmap(base_, size_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  char* data() const { return static_cast<char*>(base_) + -uintptr_t(base_) % kLargePage; }

 private:
  size_t size_;
  void* base_;
};

}  // namespace

const char* arithmetic_name(Arithmetic kind) {
  constexpr const char* kNames[kArithmeticCount] = {"fma_fp32", "dot_bf16", "tile_bf16"};
  return kNames[int(kind)];
}

bool arithmetic_supported(Arithmetic kind) {
  return kind == Arithmetic::kFmaFloat32 ||
         (kind == Arithmetic::kDotBFloat16 && isa_supported(Isa::kAvx512Bf16)) ||
         (kind == Arithmetic::kTileBFloat16 && isa_supported(Isa::kAmx));
}

int64_t run_arithmetic(Arithmetic kind, int64_t iterations) {
#if defined(__x86_64__)
  if (kind == Arithmetic::kTileBFloat16) return tile_amx(iterations);
  if (kind == Arithmetic::kDotBFloat16) return dot_avx512(iterations);
  if (isa_supported(Isa::kAvx512)) return fma_avx512(iterations);
  if (isa_supported(Isa::kAvx2)) return fma_avx2(iterations);
#endif
  (void)kind;
  return fma_portable(iterations);
}

void copy(CopyMethod method, const void* from, void* to, int64_t bytes, Team& team) {
  int64_t begin, end;
  team.split(bytes, 64, &begin, &end);
  kCopyFunctions[int(method)](static_cast<const char*>(from) + begin, static_cast<char*>(to) + begin,
                              end - begin);
}

double arithmetic_rate(Arithmetic kind, int threads, double seconds) {
  Bursts bursts(threads, seconds);
  in_team(threads, [&](Team& team) {
    bursts.run(team, [&](int64_t repeats) { return double(run_arithmetic(kind, repeats)); });
  });
  return bursts.best();
}

double copy_rate(int64_t bytes_per_thread, int threads, double seconds) {
  const int64_t half = bytes_per_thread / 2 / 64 * 64;
  // Threads must not share a page that one of them touches first, and large pages have 2 MB.
  const int64_t stride = (2 * half + kLargePage - 1) / kLargePage * kLargePage;
  const Pages pages(stride * threads);
  double best = 0;
  for (CopyFunction function : kCopyFunctions) {
    Bursts bursts(threads, seconds / kCopyMethodCount);
    in_team(threads, [&](Team& team) {
      char* const from = pages.data() + stride * team.rank();
      std::fill_n(from, 2 * half, char(1));
      bursts.run(team, [&](int64_t repeats) {
        for (int64_t i = 0; i < repeats; ++i) function(from, from + half, half);
        return double(repeats) * double(2 * half);
      });
    });
    best = std::max(best, bursts.best());
  }
  return best;
}

}  // namespace cnk::cpu
