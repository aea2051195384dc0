// Downsampling: LayerNorm of every pixel, then a KxK convolution with stride K, which is one matrix product
// whose rows are patches: (kh, kw, padded C) side by side. A tile of patches is normalised straight into the
// product's operand.

#include "cpu/gemm_f32.h"
#include "cpu/rows.h"
#if defined(__AVX512BF16__)
#include "cpu/gemm_bf16.h"
#endif

namespace cnk::cpu::CNK_ISA {

namespace {

template <class G>
struct Downsample {
  static int64_t out_rows(const DownsampleArgs& a) { return a.n * (a.h / a.patch) * (a.w / a.patch); }

  static int64_t tile_rows(const DownsampleArgs& a, int threads) {
    int64_t tile = l2_cache_bytes() / 4 / (G::a_bytes(32, a.weight.k) / 32);
    if (tile < 32) tile = 32;
    const int64_t tiles = ((out_rows(a) + tile - 1) / tile + threads - 1) / threads * threads;
    const int64_t even = (out_rows(a) + tiles - 1) / tiles;
    return (even + G::kRowGrain - 1) / G::kRowGrain * G::kRowGrain;
  }

  static int64_t bytes_per_thread(const DownsampleArgs& a, int threads) {
    return (pad_channels(a.c) * 4 + G::a_bytes(tile_rows(a, threads), a.weight.k) + 63) / 64 * 64;
  }

  static int64_t workspace(const DownsampleArgs& a, int threads) {
    int64_t most = 0;
    for (int t = 1; t <= threads; ++t) {
      const int64_t total = t * bytes_per_thread(a, t);
      if (total > most) most = total;
    }
    return most;
  }

  template <class U>
  struct Epilogue {
    const DownsampleArgs& a;
    int64_t first;
    CNK_INLINE void operator()(int64_t row, int64_t column, Vec v) const {
      U* out = static_cast<U*>(a.out) + (first + row) * a.weight.n;
      if (column < a.weight.n) store_channels(out, column, a.weight.n, v + load(a.bias + column));
    }
    CNK_INLINE void operator()(int64_t row, int64_t column, Vec low, Vec high) const {
      (*this)(row, column, low);
      (*this)(row, column + kLanes, high);
    }
  };

  template <class T>
  static void produce(const DownsampleArgs& a, const Norm& norm, int64_t begin, int64_t end, float* pixel,
                      void* y) {
    const int64_t out_w = a.w / a.patch, out_h = a.h / a.patch;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = p / (out_h * out_w), h = p / out_w % out_h, w = p % out_w;
      for (int64_t i = 0; i < a.patch; ++i) {
        const T* x = static_cast<const T*>(a.x) + ((n * a.h + h * a.patch + i) * a.w + w * a.patch) * a.c;
        for (int64_t j = 0; j < a.patch; ++j) {
          read_row(x + j * a.c, a.c, pixel);
          G::write_normalized(y, a.weight.k, p - begin, (i * a.patch + j) * pad_channels(a.c), norm, pixel);
        }
      }
    }
  }

  static void run(const DownsampleArgs& a, Team& team) {
    const Norm norm(a.c, a.eps, a.norm_weight, a.norm_bias);
    char* own = a.workspace + team.rank() * bytes_per_thread(a, team.size());
    float* pixel = reinterpret_cast<float*>(own);
    void* y = own + pad_channels(a.c) * 4;
    const int64_t tile = tile_rows(a, team.size()), rows = out_rows(a);
    for (int64_t begin; (begin = team.next() * tile) < rows;) {
      const int64_t end = begin + tile < rows ? begin + tile : rows;
      with_type(a.dtype, [&](auto type) { produce<decltype(type)>(a, norm, begin, end, pixel, y); });
      with_type(a.out_dtype, [&](auto type) {
        G::product(y, 0, end - begin, a.weight, 0, G::panels(a.weight.n), Epilogue<decltype(type)>{a, begin});
      });
    }
  }
};

}  // namespace

void downsample(const DownsampleArgs& a, Team& team) {
#if defined(__AVX512BF16__)
  if (a.products == Products::kBFloat16) {
    [[maybe_unused]] const GemmBf16::Scope scope;
    return Downsample<GemmBf16>::run(a, team);
  }
#endif
  Downsample<GemmF32>::run(a, team);
}

int64_t downsample_workspace(const DownsampleArgs& a, int threads) {
#if defined(__AVX512BF16__)
  if (a.products == Products::kBFloat16) return Downsample<GemmBf16>::workspace(a, threads);
#endif
  return Downsample<GemmF32>::workspace(a, threads);
}

}  // namespace cnk::cpu::CNK_ISA
