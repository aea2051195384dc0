// Gradients of downsampling, out = W patches(LN(x)) + b. z is a
// row of normalised pixels, (kh, kw, padded C) next to each other:
//
//   dW = dout^T z,  db = sum(dout),  dz = dout W,  dx by LayerNorm's gradient, pixel by pixel
//
// Rows are pixels of the result. As in mlp_backward.cpp each thread takes chunks of a group of rows, and then
// columns of the product over the group.

#include "cpu/backward.h"
#include "cpu/gemm/gemm.h"
#include "cpu/layernorm.h"

namespace cnk::cpu::CNK_ISA {

namespace {

template <class G>
struct DownsampleBackward {
  const DownsampleBackwardArgs& a;
  const int64_t padded, patch, width;  // padded C; numbers of a row of z; D

  explicit DownsampleBackward(const DownsampleBackwardArgs& a)
      : a(a), padded(pad_channels(a.c)), patch(int64_t{a.patch} * a.patch * padded), width(a.weight_back.k) {}

  int64_t rows() const { return a.n * (a.h / a.patch) * (a.w / a.patch); }
  int64_t group() const { return group_rows(rows(), (G::a_bytes(32, patch) + G::a_bytes(32, width)) / 32); }
  int64_t chunk(int threads) const {
    int64_t most = l2_cache_bytes() / 2 / ((G::a_bytes(32, patch) + G::a_bytes(32, width)) / 32 + 4 * patch);
    most = most < 32 ? 32 : most > 256 ? 256 : most;
    const int64_t share = ceil_div(group(), threads);
    return round_up(ceil_div(share, ceil_div(share, most)), kUnit);
  }
  // What the units sum: dout, then dz * xhat and dz.
  int64_t unit_sums() const { return pad_channels(width) + 2 * padded; }

  // Offsets into the workspace.
  struct Layout {
    int64_t z, e, dz, per_thread;  // of a thread
    int64_t et, zb, units, totals, total;
    Layout(const DownsampleBackward& d, int threads) {
      Offsets at;
      const auto take = [&at](int64_t bytes) { return at.take(bytes); };
      const int64_t group = d.group(), chunk = d.chunk(threads), wide = pad_channels(d.width);
      z = take(G::a_bytes(chunk, d.patch));
      e = take(G::a_bytes(chunk, d.width));
      dz = take(chunk * d.patch * 4);
      per_thread = at.end;
      at.end *= threads;
      et = take(G::a_bytes(wide, group));
      zb = take(G::packed_bytes(d.patch, group));
      units = take(group / kUnit * d.unit_sums() * 4);
      totals = take(d.unit_sums() * 4);
      total = at.end;
    }
  };

  int64_t workspace(int threads) const {
    return most_bytes(threads, [&](int t) { return Layout(*this, t).total; });
  }

  // Where the first pixels of the patches of rows [first, first + count) are in x.
  void corners(int64_t first, int64_t count, int64_t* corner) const {
    const int64_t out_w = a.w / a.patch, out_h = a.h / a.patch;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = first + i, n = p / (out_h * out_w), h = p / out_w % out_h, w = p % out_w;
      corner[i] = ((n * a.h + h * a.patch) * a.w + w * a.patch) * a.c;
    }
  }

  template <class T, class U>
  void run(Team& team) const {
    const Layout at(*this, team.size());
    const RowNorm norm(a.c, a.eps, a.norm_weight, a.norm_bias, a.norm);
    const int64_t size = group(), step = chunk(team.size()), wide = pad_channels(width), all = rows();
    char* own = a.workspace + team.rank() * at.per_thread;
    void *z = own + at.z, *e = own + at.e, *zb = a.workspace + at.zb, *et = a.workspace + at.et;
    float* dz = reinterpret_cast<float*>(own + at.dz);
    int64_t corner[kLanes];
    float* units = reinterpret_cast<float*>(a.workspace + at.units);
    float* totals = reinterpret_cast<float*>(a.workspace + at.totals);
    int64_t begin, end;
    for (int64_t first = 0; first < all; first += size) {
      const int64_t rows = min64(size, all - first);
      team.split(rows, kUnit, &begin, &end);
      for (int64_t r = begin; r < end; r += step) {
        const int64_t count = min64(step, end - r);
        for (int64_t i = 0; i < count; ++i) {
          write_row<G>(e, width, i, static_cast<const U*>(a.dout) + (first + r + i) * width);
        }
        for (int64_t i = 0; a.weights && i < count; i += kLanes) {
          const int64_t rows_left = min64(count - i, kLanes);
          corners(first + r + i, rows_left, corner);
          for (int64_t k = 0; k < a.patch * a.patch; ++k) {
            const T* x = static_cast<const T*>(a.x) + (k / a.patch * a.w + k % a.patch) * a.c;
            write_normalized<G>(z, patch, i, k * padded, norm, rows_left,
                                [&](int64_t j, int64_t c)
                                    CNK_INLINE_LAMBDA { return load_channels(x + corner[j], c, a.c); });
          }
        }
        for (int64_t i = 0; i < count; i += kUnit) {
          float* sums = units + (r + i) / kUnit * unit_sums();
          add_rows<G>(e, width, i, min64(i + kUnit, count), sums);
          for (int64_t c = 0; c < 2 * padded; c += kLanes) store(sums + wide + c, Vec{});
        }
        if (a.weights) {
          zero_rows<G>(z, patch, count, round_up(count, kUnit));
          zero_rows<G>(e, width, count, round_up(count, kUnit));
          G::rows_to_b(z, patch, 0, count, zb, rows, r);
          G::rows_to_transposed_a(e, width, 0, count, et, rows, r);
        }
        if (!a.dx) continue;
        G::product(e, 0, count, a.weight_back, 0, G::panels(patch),
                   SumEpilogue<float>{dz, patch, patch, nullptr});
        for (int64_t i = 0; i < count; i += kLanes) {
          const int64_t rows_left = min64(count - i, kLanes);
          corners(first + r + i, rows_left, corner);
          float* sums = units + (r + i) / kUnit * unit_sums() + wide;
          for (int64_t k = 0; k < a.patch * a.patch; ++k) {
            const int64_t offset = (k / a.patch * a.w + k % a.patch) * a.c;
            const T* x = static_cast<const T*>(a.x) + offset;
            T* dx = static_cast<T*>(a.dx) + offset;
            const float* d = dz + i * patch + k * padded;
            layernorm_gradient(
                norm, rows_left,
                [&](int64_t j, int64_t c) CNK_INLINE_LAMBDA { return load_channels(x + corner[j], c, a.c); },
                [&](int64_t j, int64_t c) CNK_INLINE_LAMBDA { return load(d + j * patch + c); }, sums,
                sums + padded,
                [&](int64_t j, int64_t c, Vec v)
                    CNK_INLINE_LAMBDA { store_channels(dx + corner[j], c, a.c, v); });
          }
        }
      }
      team.barrier();
      if (a.weights) {
        team.split(G::panels(patch), 1, &begin, &end);
        G::product(et, 0, width, PackedMatrix{zb, patch, rows}, begin, end,
                   SumEpilogue<float>{a.dweight, patch, patch, first > 0 ? a.dweight : nullptr});
      }
      add_units(team, units, ceil_div(rows, kUnit), unit_sums(), first > 0, totals);
      team.barrier();
    }
    if (team.rank() > 0) return;
    for (int64_t c = 0; a.weights && c < width; c += kLanes)
      store_channels(a.dbias, c, width, load(totals + c));
    for (int64_t c = 0; a.dx && c < padded; c += kLanes) {
      store(a.dnorm_weight + c, load(totals + wide + c));
      store(a.dnorm_bias + c, load(totals + wide + padded + c));
    }
  }

  void run(Team& team) const {
    with_type(a.dtype, [&](auto x) {
      with_type(a.out_dtype, [&](auto out) { run<decltype(x), decltype(out)>(team); });
    });
  }
};

}  // namespace

void downsample_backward(const DownsampleBackwardArgs& a, Team& team) {
  CNK_SHARED_UNLESS(a.products == Products::kBFloat16, downsample_backward, a, team);
  [[maybe_unused]] const Gemm::Scope scope;
  DownsampleBackward<Gemm>(a).run(team);
}

int64_t downsample_backward_workspace(const DownsampleBackwardArgs& a, int threads) {
  CNK_SHARED_UNLESS(a.products == Products::kBFloat16, downsample_backward_workspace, a, threads);
  return DownsampleBackward<Gemm>(a).workspace(threads);
}

}  // namespace cnk::cpu::CNK_ISA
