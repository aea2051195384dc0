// Downsampling: LayerNorm or another norm of every pixel, then a KxK convolution with stride K. The convolution is one matrix
// product whose rows are patches, (kh, kw, padded C) next to each other. The norm writes a tile of patches
// directly as an operand of the product.
//
// Few patches and large weights (the last downsampling of ConvNeXt-T at batch 1: 49 rows, 4.7 MB): threads
// share all rows and each multiplies its own columns, so that each weight is read by one thread only.

#include "cpu/gemm/gemm.h"
#include "cpu/rows.h"

namespace cnk::cpu::CNK_ISA {

namespace {

template <class G>
struct Downsample {
  static int64_t out_rows(const DownsampleArgs& a) { return a.n * (a.h / a.patch) * (a.w / a.patch); }

  struct Plan {
    bool columns;
    int64_t tile, per_thread, total;
    Plan(const DownsampleArgs& a, int threads) {
      const int64_t rows = out_rows(a), pixel = align64(pad_channels(a.c) * 4);
      columns =
          threads > 1 && rows <= 64 * threads && G::packed_bytes(a.weight.n, a.weight.k) > l2_cache_bytes();
      const int64_t room = max64(l2_cache_bytes() / 4 / (G::a_bytes(32, a.weight.k) / 32), 32);
      const int64_t tiles = round_up(ceil_div(rows, room), threads);
      tile = columns ? rows : ceil_div(rows, tiles);
      const int64_t y = align64(G::a_bytes(tile, a.weight.k));
      per_thread = columns ? pixel : pixel + y;
      total = threads * per_thread + (columns ? y : 0);
    }
  };

  static int64_t workspace(const DownsampleArgs& a, int threads) {
    return most_bytes(threads, [&](int t) { return Plan(a, t).total; });
  }

  template <class U>
  struct Output {
    const DownsampleArgs& a;
    int64_t first;
    CNK_INLINE void operator()(int64_t row, int64_t column, Vec v) const {
      U* out = static_cast<U*>(a.out) + (first + row) * a.weight.n;
      if (column < a.weight.n) store_channels(out, column, a.weight.n, v + load(a.bias + column));
    }
  };

  template <class T>
  static void produce(const DownsampleArgs& a, const RowNorm& norm, int64_t begin, int64_t end, float* pixel,
                      void* y, int64_t row) {
    const int64_t out_w = a.w / a.patch, out_h = a.h / a.patch;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = p / (out_h * out_w), h = p / out_w % out_h, w = p % out_w;
      for (int64_t i = 0; i < a.patch; ++i) {
        const T* x = static_cast<const T*>(a.x) + ((n * a.h + h * a.patch + i) * a.w + w * a.patch) * a.c;
        for (int64_t j = 0; j < a.patch; ++j) {
          read_row(x + j * a.c, a.c, pixel);
          G::write_normalized(y, a.weight.k, row + p - begin, (i * a.patch + j) * pad_channels(a.c), norm,
                              pixel);
        }
      }
    }
  }

  static void run(const DownsampleArgs& a, Team& team) {
    const RowNorm norm(a.c, a.eps, a.norm_weight, a.norm_bias, a.norm);
    const Plan p(a, team.size());
    char* own = a.workspace + team.rank() * p.per_thread;
    float* pixel = reinterpret_cast<float*>(own);
    const int64_t rows = out_rows(a);
    const auto produce_rows = [&](int64_t begin, int64_t end, void* y, int64_t row) {
      with_type(a.dtype, [&](auto type) { produce<decltype(type)>(a, norm, begin, end, pixel, y, row); });
    };
    const auto multiply = [&](const void* y, int64_t first, int64_t count, int64_t panel,
                              int64_t last_panel) {
      with_type(a.out_dtype, [&](auto type) {
        G::product(y, 0, count, a.weight, panel, last_panel, ForEach<Output<decltype(type)>>{{a, first}});
      });
    };
    int64_t begin, end;
    if (p.columns) {
      void* y = a.workspace + team.size() * p.per_thread;
      team.split(rows, 1, &begin, &end);
      produce_rows(begin, end, y, begin);
      team.barrier();
      team.split(G::panels(a.weight.n), 1, &begin, &end);
      multiply(y, 0, rows, begin, end);
      return;
    }
    void* y = own + align64(pad_channels(a.c) * 4);
    while ((begin = team.next() * p.tile) < rows) {
      end = min64(begin + p.tile, rows);
      produce_rows(begin, end, y, 0);
      multiply(y, begin, end - begin, 0, G::panels(a.weight.n));
    }
  }
};

}  // namespace

void downsample(const DownsampleArgs& a, Team& team) {
  CNK_SHARED_UNLESS(a.products == Products::kBFloat16, downsample, a, team);
  [[maybe_unused]] const Gemm::Scope scope;
  Downsample<Gemm>::run(a, team);
}

int64_t downsample_workspace(const DownsampleArgs& a, int threads) {
  CNK_SHARED_UNLESS(a.products == Products::kBFloat16, downsample_workspace, a, threads);
  return Downsample<Gemm>::workspace(a, threads);
}

}  // namespace cnk::cpu::CNK_ISA
