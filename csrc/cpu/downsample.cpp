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
      const int64_t rows = out_rows(a);
      columns =
          threads > 1 && rows <= 64 * threads && G::packed_bytes(a.weight.n, a.weight.k) > l2_cache_bytes();
      const int64_t room = max64(l2_cache_bytes() / 4 / (G::a_bytes(32, a.weight.k) / 32), 32);
      const int64_t tiles = round_up(ceil_div(rows, room), threads);
      tile = columns ? rows : ceil_div(rows, tiles);
      const int64_t y = align64(G::a_bytes(tile, a.weight.k));
      per_thread = columns ? 0 : y;
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
    CNK_INLINE auto at(int64_t row, int64_t column) const {
      U* out = static_cast<U*>(a.out) + (first + row) * a.weight.n;
      return [=, bias = load(a.bias + column), n = a.weight.n](int64_t r, Vec v)
                 CNK_INLINE_LAMBDA { store_channels(out + r * n, column, n, v + bias); };
    }
  };

  template <class T>
  static void produce(const DownsampleArgs& a, const RowNorm& norm, int64_t begin, int64_t end, void* y,
                      int64_t row) {
    const int64_t out_w = a.w / a.patch, out_h = a.h / a.patch;
    for (int64_t p = begin; p < end; p += kLanes) {
      const int64_t count = min64(kLanes, end - p);
      const T* corner[kLanes];
      for (int64_t r = 0; r < count; ++r) {
        const int64_t n = (p + r) / (out_h * out_w), h = (p + r) / out_w % out_h, w = (p + r) % out_w;
        corner[r] = static_cast<const T*>(a.x) + ((n * a.h + h * a.patch) * a.w + w * a.patch) * a.c;
      }
      for (int64_t k = 0; k < a.patch * a.patch; ++k) {
        const int64_t offset = (k / a.patch * a.w + k % a.patch) * a.c;
        write_normalized<G>(y, a.weight.k, row + p - begin, k * pad_channels(a.c), norm, count,
                            [&](int64_t r, int64_t c)
                                CNK_INLINE_LAMBDA { return load_channels(corner[r] + offset, c, a.c); });
      }
    }
  }

  static void run(const DownsampleArgs& a, Team& team) {
    const RowNorm norm(a.c, a.eps, a.norm_weight, a.norm_bias, a.norm);
    const Plan p(a, team.size());
    char* own = a.workspace + team.rank() * p.per_thread;
    const int64_t rows = out_rows(a);
    const auto produce_rows = [&](int64_t begin, int64_t end, void* y, int64_t row) {
      with_type(a.dtype, [&](auto type) { produce<decltype(type)>(a, norm, begin, end, y, row); });
    };
    const auto multiply = [&](const void* y, int64_t first, int64_t count, int64_t panel,
                              int64_t last_panel) {
      with_type(a.out_dtype, [&](auto type) {
        G::product(y, 0, count, a.weight, panel, last_panel, Output<decltype(type)>{a, first});
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
    while ((begin = team.next() * p.tile) < rows) {
      end = min64(begin + p.tile, rows);
      produce_rows(begin, end, own, 0);
      multiply(own, begin, end - begin, 0, G::panels(a.weight.n));
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
