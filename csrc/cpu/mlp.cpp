// The fused block and the inverted bottleneck: [dwconv ->] LN -> W1 -> GELU -> [GRN] -> W2 -> gamma -> +
// residual.
//
// Three plans, one per row of the table; rows are pixels of all images, in order. Sums never depend on the
// number of threads, so neither do the bits of the result.
//
//   tiles    each thread takes tiles of rows through the whole chain; normalised rows and hidden stay in its
//   L2. columns  few rows and large weights (7x7 images, batch 1): threads share all rows, and each
//   multiplies its own
//            columns, so that each weight is read by one thread only.
//   grn      the hidden of a group of images is kept, since GRN needs the sums over each whole image before
//   W2.

#include <time.h>

#include "cpu/gelu.h"
#include "cpu/gemm_f32.h"
#include "cpu/grn.h"
#include "cpu/rows.h"
#if defined(__AVX512BF16__)
#include "cpu/gemm_bf16.h"
#endif

namespace cnk::cpu::CNK_ISA {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t align64(int64_t bytes) { return round_up(bytes, 64); }
int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Charges a thread's time to phases: start(), then at the end of each stretch of work done(phase).
class Clock {
 public:
  Clock(const MlpArgs& a, int rank) : phases_(a.phases ? a.phases + rank * kMlpPhases : nullptr) { start(); }
  void start() {
    if (phases_) last_ = now();
  }
  void done(MlpPhase phase) {
    if (!phases_) return;
    const double time = now();
    phases_[phase] += time - last_;
    last_ = time;
  }

 private:
  static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }
  double* phases_;
  double last_ = 0;
};

struct Plan {
  bool columns;
  int64_t tile;   // rows that are convolved and normalised at a time
  int64_t chain;  // rows of a tile that go through both products at a time
  int64_t group;  // rows of the shared buffers: "columns" all of them, GRN a number of whole images
};

template <class G>
struct Mlp {
  static Plan plan(const MlpArgs& a, int threads) {
    const int64_t rows = a.n * a.h * a.w;
    const int64_t row_bytes = G::a_bytes(32, a.c) / 32 + G::a_bytes(32, a.hidden) / 32;
    const int64_t weight_bytes = G::packed_bytes(a.hidden, a.c) + G::packed_bytes(a.c, a.hidden);
    Plan p;
    // Half of L2 for the tile leaves room for weights and x passing through. Weights of several times L2 come
    // from L3 once a tile, and then fewer, larger tiles win (C 768, batch 8, fp32: 12.4 -> 11.8 ms; the
    // others lose by it).
    const int64_t budget =
        weight_bytes > 4 * l2_cache_bytes() ? l2_cache_bytes() * 3 / 2 : l2_cache_bytes() * 5 / 8;
    int64_t tile = budget / row_bytes;
    if (tile < 64) tile = 64;
    const int64_t tiles = round_up(ceil_div(rows, tile), threads);
    p.tile = round_up(ceil_div(rows, tiles), G::kRowGrain);
    // Weights that stay in L2 are cheap to read again, so a short chain keeps the hidden near (C 96,
    // bf16: 1.05 -> 0.93 ms on one core); larger weights want as many rows as possible to each reading.
    p.chain = weight_bytes <= l2_cache_bytes() / 4 ? min64(p.tile, 128) : p.tile;
    // Too few rows to spread the cost of reading the weights, which do not stay in L2.
    p.columns = threads > 1 && rows <= 64 * threads && weight_bytes > l2_cache_bytes();
    p.group = rows;
    if (a.grn_weight) {
      const int64_t image = a.h * a.w;
      const int64_t images = (int64_t{4} << 20) * threads / (G::a_bytes(32, a.hidden) / 32 * image);
      p.group = min64(images < 1 ? 1 : images, a.n) * image;
    }
    return p;
  }

  // Offsets into the workspace.
  struct Layout {
    int64_t step, y, h, scale, per_thread, shared_y, shared_h, shared_scale, total;
    Layout(const MlpArgs& a, const Plan& p, int threads) {
      const bool shared_hidden = p.columns || a.grn_weight;
      int64_t at = align64(step_bytes(a.c));
      y = at;
      at += p.columns ? 0 : align64(G::a_bytes(p.tile, a.c));
      h = at;
      at += shared_hidden ? 0 : align64(G::a_bytes(p.chain, a.hidden));
      per_thread = at;
      step = 0;
      at *= threads;
      shared_y = at;
      at += p.columns ? align64(G::a_bytes(p.group, a.c)) : 0;
      shared_h = at;
      at += shared_hidden ? align64(G::a_bytes(p.group, a.hidden)) : 0;
      shared_scale = at;
      at += a.grn_weight ? align64(p.group / (a.h * a.w) * pad_channels(a.hidden) * 4) : 0;
      total = at;
    }
  };

  static int64_t workspace(const MlpArgs& a, int threads) {
    // Not monotonic in the size of the team, which may turn out smaller than asked for.
    int64_t most = 0;
    for (int t = 1; t <= threads; ++t) {
      const int64_t total = Layout(a, plan(a, t), t).total;
      if (total > most) most = total;
    }
    return most;
  }

  // Rows [begin, end) of the normalised operand, into rows from `row` on of `y`.
  template <class T>
  static void produce(const MlpArgs& a, const Norm& norm, int64_t begin, int64_t end, float* step, void* y,
                      int64_t row, Clock& clock) {
    const int64_t padded = pad_channels(a.c), most = step_rows(a.c);
    const DwconvArgs conv = {a.dtype, a.x,           nullptr,    a.n,         a.h,       a.w,
                             a.c,     a.kernel_size, a.dilation, a.dw_weight, a.dw_bias, nullptr};
    for (int64_t p = begin; p < end; p += most) {
      const int64_t rows = min64(most, end - p);
      if (a.kernel_size) {
        dwconv_pixels<T>(conv, p, p + rows, step, padded);
        if (a.kept_y) {
          for (int64_t i = 0; i < rows; ++i) {
            T* y_row = static_cast<T*>(a.kept_y) + (p + i) * a.c;
            for (int64_t c = 0; c < a.c; c += kLanes)
              store_channels(y_row, c, a.c, load(step + i * padded + c));
          }
        }
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          read_row(static_cast<const T*>(a.x) + (p + i) * a.c, a.c, step + i * padded);
        }
      }
      clock.done(kConvolve);
      for (int64_t i = 0; i < rows; ++i) {
        G::write_normalized(y, a.c, row + p - begin + i, 0, norm, step + i * padded);
      }
      clock.done(kNormalize);
    }
  }

  static constexpr Accuracy kAccuracy =
      sizeof(typename G::Element) == 4 ? Accuracy::kFloat32 : Accuracy::kBFloat16;

  // hidden[row] = gelu(u), u = sum + b1; u is kept as K where the gradient wants it, and not where K is
  // Nothing. (One kernel that decides at run time takes twice the time: its sums no longer fit the
  // registers.)
  struct Nothing {};
  template <class K>
  struct HiddenEpilogue {
    const MlpArgs& a;
    void* h;
    int64_t first;  // pixel of row 0
    CNK_INLINE Vec operator()(Vec sum, int64_t row, int64_t column) const {
      const Vec u = sum + load(a.b1 + column);
      if constexpr (!__is_same(K, Nothing)) {
        store_channels(static_cast<K*>(a.kept_hidden) + (first + row) * a.hidden, column, a.hidden, u);
      }
      return gelu<kAccuracy>(u);
    }
    CNK_INLINE void operator()(int64_t row, int64_t column, Vec v) const {
      store(static_cast<float*>(h) + row * GemmF32::stride(a.hidden) + column, (*this)(v, row, column));
    }
    CNK_INLINE void operator()(int64_t row, int64_t column, Vec low, Vec high) const {
      low = (*this)(low, row, column);
      high = (*this)(high, row, column + kLanes);
      G::store_block(h, a.hidden, row, column, {{low, high}});
    }
  };

  // h = gelu(W1 y + b1) for rows [0, rows) of y, the pixels from `first` on, and columns of the panels.
  static void hidden(const MlpArgs& a, const void* y, void* h, int64_t first, int64_t rows,
                     int64_t panel_begin, int64_t panel_end) {
    if (!a.kept_hidden) {
      return G::product(y, 0, rows, a.w1, panel_begin, panel_end, HiddenEpilogue<Nothing>{a, h, first});
    }
    with_type(a.kept_dtype, [&](auto type) {
      G::product(y, 0, rows, a.w1, panel_begin, panel_end, HiddenEpilogue<decltype(type)>{a, h, first});
    });
  }

  // out[row] = residual + drop * gamma * (sum + b2)
  template <class T>
  struct OutEpilogue {
    const MlpArgs& a;
    int64_t first;  // pixel of row 0
    CNK_INLINE void operator()(int64_t row, int64_t column, Vec v) const {
      if (column >= a.c) return;
      const int64_t p = first + row;
      v = (v + load(a.b2 + column)) * load(a.gamma + column);
      if (a.drop_scale) v *= splat(a.drop_scale[p / (a.h * a.w)]);
      if (a.residual) v += load_channels(static_cast<const T*>(a.residual) + p * a.c, column, a.c);
      store_channels(static_cast<T*>(a.out) + p * a.c, column, a.c, v);
    }
    CNK_INLINE void operator()(int64_t row, int64_t column, Vec low, Vec high) const {
      (*this)(row, column, low);
      (*this)(row, column + kLanes, high);
    }
  };

  template <class T>
  static void tiles(const MlpArgs& a, Team& team, const Plan& p, const Layout& at) {
    const Norm norm(a.c, a.eps, a.norm_weight, a.norm_bias);
    const int64_t rows = a.n * a.h * a.w;
    char* own = a.workspace + team.rank() * at.per_thread;
    void *y = own + at.y, *h = own + at.h;
    Clock clock(a, team.rank());
    for (int64_t begin; (begin = team.next() * p.tile) < rows;) {
      const int64_t count = min64(p.tile, rows - begin);
      produce<T>(a, norm, begin, begin + count, reinterpret_cast<float*>(own), y, 0, clock);
      for (int64_t r = 0; r < count; r += p.chain) {
        const int64_t chain = min64(p.chain, count - r);
        const void* rows_y = static_cast<char*>(y) + G::a_bytes(r, a.c);
        hidden(a, rows_y, h, begin + r, chain, 0, G::panels(a.hidden));
        clock.done(kFirstProduct);
        G::product(h, 0, chain, a.w2, 0, G::panels(a.c), OutEpilogue<T>{a, begin + r});
        clock.done(kSecondProduct);
      }
    }
  }

  template <class T>
  static void columns_or_grn(const MlpArgs& a, Team& team, const Plan& p, const Layout& at) {
    const Norm norm(a.c, a.eps, a.norm_weight, a.norm_bias);
    const int64_t all = a.n * a.h * a.w, image = a.h * a.w;
    char* own = a.workspace + team.rank() * at.per_thread;
    float* step = reinterpret_cast<float*>(own);
    void *y = own + at.y, *shared_y = a.workspace + at.shared_y, *h = a.workspace + at.shared_h;
    Clock clock(a, team.rank());
    for (int64_t first = 0; first < all; first += p.group) {
      const int64_t rows = min64(p.group, all - first);
      int64_t row_begin, row_end, panel_begin, panel_end;
      team.split(rows, G::kRowGrain, &row_begin, &row_end);
      if (p.columns) {
        produce<T>(a, norm, first + row_begin, first + row_end, step, shared_y, row_begin, clock);
        team.barrier();
        clock.done(kWait);
        team.split(G::panels(a.hidden), 1, &panel_begin, &panel_end);
        hidden(a, shared_y, h, first, rows, panel_begin, panel_end);
        clock.done(kFirstProduct);
        team.barrier();
        clock.done(kWait);
      } else {
        for (int64_t r = row_begin; r < row_end; r += p.tile) {
          const int64_t count = min64(p.tile, row_end - r);
          produce<T>(a, norm, first + r, first + r + count, step, y, 0, clock);
          hidden(a, y, static_cast<char*>(h) + G::a_bytes(r, a.hidden), first + r, count, 0,
                 G::panels(a.hidden));
          clock.done(kFirstProduct);
        }
      }
      if (a.grn_weight) {
        grn(a, team, h, rows, image, reinterpret_cast<float*>(a.workspace + at.shared_scale));
        if (p.columns) team.barrier();
        clock.done(kGrn);
      }
      if (p.columns) {
        team.split(G::panels(a.c), 1, &panel_begin, &panel_end);
        G::product(h, 0, rows, a.w2, panel_begin, panel_end, OutEpilogue<T>{a, first});
      } else {
        for (int64_t r = row_begin; r < row_end; r += p.tile) {
          const int64_t count = min64(p.tile, row_end - r);
          G::product(static_cast<char*>(h) + G::a_bytes(r, a.hidden), 0, count, a.w2, 0, G::panels(a.c),
                     OutEpilogue<T>{a, first + r});
        }
      }
      clock.done(kSecondProduct);
      team.barrier();  // before the next group overwrites h: its rows may be split otherwise
      clock.done(kWait);
    }
  }

  // Scale the hidden in place; each thread leaves with its own rows scaled. grn_bias is part of b2 by now.
  static void grn(const MlpArgs& a, Team& team, void* h, int64_t rows, int64_t image, float* scale) {
    const int64_t padded = pad_channels(a.hidden), images = rows / image, groups = padded / kChannelAlign;
    int64_t begin, end;
    team.barrier();
    team.split(images * groups, 1, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, c = item % groups * kChannelAlign;
      typename G::Block total = {};
      for (int64_t r = n * image; r < (n + 1) * image; ++r) {
        const typename G::Block b = G::load_block(h, a.hidden, r, c);
        unroll<kChannelAlign / kLanes>(
            [&](auto i) { total.v[i.value] = multiply_add(b.v[i.value], b.v[i.value], total.v[i.value]); });
      }
      unroll<kChannelAlign / kLanes>(
          [&](auto i) { store(scale + n * padded + c + i.value * kLanes, total.v[i.value]); });
    }
    team.barrier();
    team.split(images, 1, &begin, &end);
    for (int64_t n = begin; n < end; ++n) grn_factors(scale + n * padded, a.hidden, a.grn_weight, a.grn_eps);
    team.barrier();
    team.split(rows, G::kRowGrain, &begin, &end);
    for (int64_t r = begin; r < end; ++r) {
      const float* factors = scale + r / image * padded;
      for (int64_t c = 0; c < padded; c += kChannelAlign) {
        typename G::Block b = G::load_block(h, a.hidden, r, c);
        unroll<kChannelAlign / kLanes>([&](auto i) { b.v[i.value] *= load(factors + c + i.value * kLanes); });
        G::store_block(h, a.hidden, r, c, b);
      }
    }
  }

  static void run(const MlpArgs& a, Team& team) {
    const Plan p = plan(a, team.size());
    const Layout at(a, p, team.size());
    with_type(a.dtype, [&](auto type) {
      using T = decltype(type);
      if (p.columns || a.grn_weight) {
        columns_or_grn<T>(a, team, p, at);
      } else {
        tiles<T>(a, team, p, at);
      }
    });
  }
};

}  // namespace

void mlp(const MlpArgs& a, Team& team) {
#if defined(__AVX512BF16__)
  if (a.products == Products::kBFloat16) {
    [[maybe_unused]] const GemmBf16::Scope scope;
    return Mlp<GemmBf16>::run(a, team);
  }
#endif
  Mlp<GemmF32>::run(a, team);
}

int64_t mlp_workspace(const MlpArgs& a, int threads) {
#if defined(__AVX512BF16__)
  if (a.products == Products::kBFloat16) return Mlp<GemmBf16>::workspace(a, threads);
#endif
  return Mlp<GemmF32>::workspace(a, threads);
}

}  // namespace cnk::cpu::CNK_ISA
