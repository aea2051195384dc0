// The fused block and the inverted bottleneck:
//
//   [dwconv ->] norm -> W1 -> activation -> [GRN] -> W2 -> gamma -> + residual
//
// There are four plans; mlp_plan.h chooses one. Rows are pixels of all images, in order. Sums never depend on
// the number of threads, so neither do the bits of the result.
//
//   tiles    Each thread computes whole tiles of rows, from first step to last; normalised rows and hidden
//            stay in its L2.
//   columns  For few rows and large weights (7x7 images, batch 1): threads share all rows, and each
//            multiplies its own columns, so that each weight is read by one thread only.
//   images   GRN needs the sums over a whole image before W2. Threads divide an image's rows, add the squares
//            of each tile while it is in L2, and keep as much of the hidden as fits their memory; the rest is
//            computed a second time.
//   group    GRN with images that are too small to be divided: the hidden of several images is kept.

#include <time.h>

#include "cpu/activations.h"
#include "cpu/gemm/gemm.h"
#include "cpu/grn.h"
#include "cpu/mlp_plan.h"
#include "cpu/rows.h"

namespace cnk::cpu::CNK_ISA {

namespace {

// Measures a thread's time in each phase: start(), then done(phase) at the end of each part of the work.
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

template <class G>
struct Mlp {
  using Plan = MlpPlan<G>;

  // Rows [begin, end) of the normalised operand, written to `y` from row `row` on.
  template <class T>
  static void produce(const MlpArgs& a, const RowNorm& shared, int64_t begin, int64_t end, float* step,
                      void* y, int64_t row, Clock& clock) {
    const int64_t padded = pad_channels(a.c), most = step_rows(a.c);
    const Axis h = {a.h, a.h, a.kernel_h, a.dilation_h}, w = {a.w, a.w, a.kernel_w, a.dilation_w};
    const DwconvArgs conv = {.dtype = a.dtype,
                             .x = a.x,
                             .y = nullptr,
                             .n = a.n,
                             .c = a.c,
                             .h = h,
                             .w = w,
                             .weight = a.dw_weight,
                             .bias = a.dw_bias,
                             .residual = nullptr,
                             .pairs = a.dw_pairs};
    for (int64_t p = begin, rows; p < end; p += rows) {
      rows = min64(most, end - p);
      RowNorm norm = shared;
      if (a.norm_step) {  // rows of one sample
        const int64_t image = a.h * a.w, sample = p / image;
        rows = min64(rows, (sample + 1) * image - p);
        norm.weight += sample * a.norm_step;
        norm.bias += sample * a.norm_step;
      }
      if (a.kernel_h) {
        if constexpr (__is_same(T, BFloat16)) {
          CNK_DOTS::dwconv_pixels<T>(conv, p, p + rows, step, padded);
        } else {
          CNK_SHARED::dwconv_pixels<T>(conv, p, p + rows, step, padded);
        }
        if (a.kept_y) {
          for (int64_t i = 0; i < rows; ++i) {
            T* y_row = static_cast<T*>(a.kept_y) + (p + i) * a.c;
            for (int64_t c = 0; c < a.c; c += kLanes)
              store_channels(y_row, c, a.c, load(step + i * padded + c));
          }
        }
        clock.done(kConvolve);
        write_normalized<G>(y, a.c, row + p - begin, 0, norm, rows,
                            [&](int64_t i, int64_t c)
                                CNK_INLINE_LAMBDA { return load(step + i * padded + c); });
      } else {
        const T* x = static_cast<const T*>(a.x) + p * a.c;
        write_normalized<G>(y, a.c, row + p - begin, 0, norm, rows,
                            [&](int64_t i, int64_t c)
                                CNK_INLINE_LAMBDA { return load_channels(x + i * a.c, c, a.c); });
      }
      clock.done(kNormalize);
    }
  }

  // gelu(u), u = sum + b1. u is kept as K for the gradient, or not kept if K is Nothing. (One
  // kernel that decides at run time takes twice the time: its sums no longer fit the registers.)
  struct Nothing {};
  template <class K>
  struct Hidden {
    const MlpArgs& a;
    int64_t first;  // pixel of row 0
    CNK_INLINE auto operator()(int64_t row, int64_t column) const {
      K* kept = static_cast<K*>(a.kept_hidden);
      if constexpr (!__is_same(K, Nothing)) kept += (first + row) * a.hidden;
      return [=, bias = load(a.b1 + column), hidden = a.hidden](int64_t r, Vec sum) CNK_INLINE_LAMBDA {
        const Vec u = sum + bias;
        if constexpr (!__is_same(K, Nothing)) store_channels(kept + r * hidden, column, hidden, u);
        return gelu(u, typename G::Element{});
      };
    }
  };

  // The same for the other activations, decided at run time.
  struct OtherHidden {
    const MlpArgs& a;
    int64_t first;
    CNK_INLINE auto operator()(int64_t row, int64_t column) const {
      return [=, *this, bias = load(a.b1 + column)](int64_t r, Vec sum) CNK_INLINE_LAMBDA {
        const Vec u = sum + bias;
        if (a.kept_hidden) {
          const int64_t from = (first + row + r) * a.hidden;
          with_type(a.kept_dtype, [&](auto type) CNK_INLINE_LAMBDA {
            store_channels(static_cast<decltype(type)*>(a.kept_hidden) + from, column, a.hidden, u);
          });
        }
        return activated(u, a.activation);
      };
    }
  };

  // h = act(W1 y + b1) for rows [0, rows) of y, which are
  // the pixels from `first` on, and columns of the panels.
  static void hidden(const MlpArgs& a, const void* y, void* h, int64_t first, int64_t rows,
                     int64_t panel_begin, int64_t panel_end) {
    const auto multiply = [&](auto f) {
      G::product(y, 0, rows, a.w1, panel_begin, panel_end, Stored<G, decltype(f)>{f, h, a.hidden});
    };
    if (a.activation != Activation::kGelu) return multiply(OtherHidden{a, first});
    if (!a.kept_hidden) return multiply(Hidden<Nothing>{a, first});
    with_type(a.kept_dtype, [&](auto type) { multiply(Hidden<decltype(type)>{a, first}); });
  }

  // out[row] = residual + drop * gamma * (sum + b2)
  template <class T>
  struct Output {
    const MlpArgs& a;
    int64_t first;  // pixel of row 0

    struct Column {
      Vec gamma, bias;  // bias: gamma b2
      const T* residual;
      T* out;
      const float* drop_scale;
      int64_t pixel, image, c, left;  // left: columns from this register on
      CNK_INLINE Vec value(int64_t r, Vec v) const {
        v = multiply_add(v, gamma, bias);
        if (drop_scale) v *= splat(drop_scale[(pixel + r) / image]);
        return residual ? v + load_channels(residual + r * c, 0, left) : v;
      }
      CNK_INLINE void operator()(int64_t r, Vec v) const {
        store_channels(out + r * c, 0, left, value(r, v));
      }
    };
    CNK_INLINE Column at(int64_t row, int64_t column) const {
      const int64_t pixel = first + row, from = pixel * a.c + column;
      const Vec gamma = load(a.gamma + column);
      return {gamma,
              gamma * load(a.b2 + column),
              a.residual ? static_cast<const T*>(a.residual) + from : nullptr,
              static_cast<T*>(a.out) + from,
              a.drop_scale,
              pixel,
              a.h * a.w,
              a.c,
              a.c - column};
    }
    CNK_INLINE auto pair(int64_t row, int64_t column) const {
      return [first = at(row, column), second = at(row, column + kLanes)](int64_t r, Vec low, Vec high)
                 CNK_INLINE_LAMBDA {
                   if (second.left < kLanes) return first(r, low), second(r, high);
                   store(first.out + r * first.c, first.value(r, low), second.value(r, high));
                 };
    }
  };

  template <class T>
  static void tiles(const MlpArgs& a, Team& team, const Plan& p) {
    const RowNorm norm(a.c, a.eps, a.norm_weight, a.norm_bias, a.norm);
    const int64_t rows = a.n * a.h * a.w;
    char* own = a.workspace + team.rank() * p.at.per_thread;
    void *y = own + p.at.y, *h = own + p.at.h;
    // The lines of a large result are not in L2 when they are written: they are requested before the products (C 96,
    // 8x56x56, bf16, one thread of an Emerald Rapids: 9.3 -> 8.0 ms; of 1x56x56 it would cost 1 %).
    const int64_t row = a.c * int64_t{sizeof(T)};
    const bool far = rows * row > l2_cache_bytes() / 2;
    Clock clock(a, team.rank());
    for (int64_t begin; (begin = team.next() * p.tile) < rows;) {
      const int64_t count = min64(p.tile, rows - begin);
      produce<T>(a, norm, begin, begin + count, reinterpret_cast<float*>(own), y, 0, clock);
      for (int64_t r = 0; r < count; r += p.chain) {
        const int64_t chain = min64(p.chain, count - r);
        const void* rows_y = static_cast<char*>(y) + G::a_bytes(r, a.c);
        if (far) {
          const char* out = static_cast<const char*>(a.out) + (begin + r) * row;
          for (int64_t i = 0; i < chain * row; i += 64) __builtin_prefetch(out + i, 1, 2);
        }
        hidden(a, rows_y, h, begin + r, chain, 0, G::panels(a.hidden));
        clock.done(kFirstProduct);
        G::product(h, 0, chain, a.w2, 0, G::panels(a.c), Output<T>{a, begin + r});
        clock.done(kSecondProduct);
      }
    }
  }

  template <class T>
  static void columns_or_group(const MlpArgs& a, Team& team, const Plan& p) {
    const RowNorm norm(a.c, a.eps, a.norm_weight, a.norm_bias, a.norm);
    const int64_t all = a.n * a.h * a.w, image = a.h * a.w;
    char* own = a.workspace + team.rank() * p.at.per_thread;
    float* step = reinterpret_cast<float*>(own);
    void *y = own + p.at.y, *shared_y = a.workspace + p.at.shared_y, *h = a.workspace + p.at.shared_h;
    Clock clock(a, team.rank());
    for (int64_t first = 0; first < all; first += p.group) {
      const int64_t rows = min64(p.group, all - first);
      int64_t row_begin, row_end, panel_begin, panel_end;
      team.split(rows, p.way == MlpWay::kColumns ? 1 : G::kRowGrain, &row_begin, &row_end);
      if (p.way == MlpWay::kColumns) {
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
        grn(a, team, h, rows, image, reinterpret_cast<float*>(a.workspace + p.at.shared_sums));
        if (p.way == MlpWay::kColumns) team.barrier();
        clock.done(kGrn);
      }
      if (p.way == MlpWay::kColumns) {
        team.split(G::panels(a.c), 1, &panel_begin, &panel_end);
        G::product(h, 0, rows, a.w2, panel_begin, panel_end, Output<T>{a, first});
      } else {
        for (int64_t r = row_begin; r < row_end; r += p.tile) {
          const int64_t count = min64(p.tile, row_end - r);
          G::product(static_cast<char*>(h) + G::a_bytes(r, a.hidden), 0, count, a.w2, 0, G::panels(a.c),
                     Output<T>{a, first + r});
        }
      }
      clock.done(kSecondProduct);
      team.barrier();  // before the next group overwrites h: its rows may be split differently
      clock.done(kWait);
    }
  }

  // The sums of squares of rows [begin, end) of h, channels c, c + 1, ... One chain of additions, so at most
  // kRun rows: a chain over a whole image has ten times the rounding error of PyTorch's sums.
  static CNK_INLINE Block squares(const MlpArgs& a, const void* h, int64_t begin, int64_t end, int64_t c) {
    Block total = {};
    for (int64_t r = begin; r < end; ++r) {
      const Block b = G::load_block(h, a.hidden, r, c);
      total.add_product(b, b);
    }
    return total;
  }

  // Scale the hidden in place, each thread its own rows. grn_bias is already part of b2.
  static void grn(const MlpArgs& a, Team& team, void* h, int64_t rows, int64_t image, float* sums) {
    const int64_t padded = pad_channels(a.hidden), images = rows / image, groups = padded / kChannelAlign;
    int64_t begin, end;
    team.barrier();
    team.split(images * groups, 1, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, c = item % groups * kChannelAlign;
      Block total = {};
      for (int64_t r = n * image, next; r < (n + 1) * image; r = next) {
        next = min64(r + Plan::kRun, (n + 1) * image);
        total += squares(a, h, r, next, c);
      }
      store(sums + n * padded + c, total);
    }
    team.barrier();
    team.split(images, 1, &begin, &end);
    for (int64_t n = begin; n < end; ++n) grn_factors(sums + n * padded, a.hidden, a.grn_weight, a.grn_eps);
    team.barrier();
    team.split(rows, G::kRowGrain, &begin, &end);
    for (int64_t r = begin; r < end; ++r) scale(a, h, r, r + 1, sums + r / image * padded);
  }

  // Adds the squares of rows [begin, end) of h, which are rows [first, ...) of an image, to the sums of their
  // units (of the padded hidden length each).
  static void add_squares(const MlpArgs& a, const Plan& p, const void* h, int64_t begin, int64_t end,
                          int64_t first, float* units) {
    for (int64_t r = begin, next; r < end; r = next) {
      next = min64(r + Plan::kRun, end);
      float* sums = units + (first + r - begin) / p.unit * pad_channels(a.hidden);
      for (int64_t c = 0; c < pad_channels(a.hidden); c += kChannelAlign) {
        Block total = load_block(sums + c);
        store(sums + c, total += squares(a, h, r, next, c));
      }
    }
  }

  static void scale(const MlpArgs& a, void* h, int64_t begin, int64_t end, const float* factors) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < pad_channels(a.hidden); c += kChannelAlign) {
        Block b = G::load_block(h, a.hidden, r, c);
        G::store_block(h, a.hidden, r, c, b *= load_block(factors + c));
      }
    }
  }

  // From the sums of all units of an image to the factor of each channel, in the first unit's place.
  static void factors(const MlpArgs& a, const Plan& p, Team& team, float* units) {
    const int64_t padded = pad_channels(a.hidden);
    int64_t begin, end;
    team.split(padded, kLanes, &begin, &end);
    for (int64_t c = begin; c < end; c += kLanes) {
      Vec total = load(units + c);
      for (int64_t unit = 1; unit < p.units; ++unit) total += load(units + unit * padded + c);
      store(units + c, total);
    }
    team.barrier();
    if (team.rank() == 0) grn_factors(units, a.hidden, a.grn_weight, a.grn_eps);
    team.barrier();
  }

  template <class T>
  static void images(const MlpArgs& a, Team& team, const Plan& p) {
    const RowNorm norm(a.c, a.eps, a.norm_weight, a.norm_bias, a.norm);
    const int64_t image = a.h * a.w, padded = pad_channels(a.hidden);
    char* own = a.workspace + team.rank() * p.at.per_thread;
    float *step = reinterpret_cast<float*>(own),
          *units = reinterpret_cast<float*>(a.workspace + p.at.shared_sums);
    void* y = own + p.at.y;
    char *kept = own + p.at.h, *passing = kept + G::a_bytes(p.kept, a.hidden);
    Clock clock(a, team.rank());
    int64_t first_unit, last_unit;
    team.split(p.units, 1, &first_unit, &last_unit);
    const int64_t begin = first_unit * p.unit, end = min64(last_unit * p.unit, image);
    for (int64_t n = 0; n < a.n; ++n) {
      const int64_t pixel = n * image;
      for (int64_t c = first_unit * padded; c < last_unit * padded; c += kLanes) store(units + c, Vec{});
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t r = begin, next; r < end; r = next) {
          const bool keep = r - begin < p.kept;
          next = min64(r + p.tile, keep ? min64(begin + p.kept, end) : end);
          if (pass == 0 || !keep) produce<T>(a, norm, pixel + r, pixel + next, step, y, 0, clock);
          for (int64_t i = r; i < next; i += p.chain) {
            const int64_t count = min64(p.chain, next - i);
            char* h = keep ? kept + G::a_bytes(i - begin, a.hidden) : passing;
            if (pass == 0 || !keep) {
              hidden(a, static_cast<char*>(y) + G::a_bytes(i - r, a.c), h, pixel + i, count, 0,
                     G::panels(a.hidden));
              clock.done(kFirstProduct);
            }
            if (pass == 0) {
              add_squares(a, p, h, 0, count, i, units);
            } else {
              scale(a, h, 0, count, units);
            }
            clock.done(kGrn);
            if (pass == 0) continue;
            G::product(h, 0, count, a.w2, 0, G::panels(a.c), Output<T>{a, pixel + i});
            clock.done(kSecondProduct);
          }
        }
        team.barrier();  // after the second pass, before the next image overwrites the factors
        clock.done(kWait);
        if (pass == 0) {
          factors(a, p, team, units);
          clock.done(kGrn);
        }
      }
    }
  }

  static void run(const MlpArgs& a, Team& team) {
    const Plan p(a, team.size());
    with_type(a.dtype, [&](auto type) {
      using T = decltype(type);
      switch (p.way) {
        case MlpWay::kTiles:
          return tiles<T>(a, team, p);
        case MlpWay::kImages:
          return images<T>(a, team, p);
        case MlpWay::kColumns:
        case MlpWay::kGroup:
          return columns_or_group<T>(a, team, p);
      }
    });
  }
};

}  // namespace

void mlp(const MlpArgs& a, Team& team) {
  CNK_SHARED_UNLESS(a.products == Products::kBFloat16, mlp, a, team);
  [[maybe_unused]] const Gemm::Scope scope;
  Mlp<Gemm>::run(a, team);
}

int64_t mlp_workspace(const MlpArgs& a, int threads) {
  CNK_SHARED_UNLESS(a.products == Products::kBFloat16, mlp_workspace, a, threads);
  return MlpPlan<Gemm>::workspace(a, threads);
}

}  // namespace cnk::cpu::CNK_ISA
