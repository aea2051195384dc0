// Gradients of the inverted bottleneck, out = residual + d (gamma * (W2 g + b2)), d the drop scale, with
// z = norm(x), u = W1 z + b1, h = gelu(u) or another activation, g = GRN(h) or h, and e = d * dout:
//
//   G2 = e^T g,  dW2 = gamma * G2,  dgamma = rowsum(W2 * G2) + b2 * sum(e),  db2 = gamma * sum(e)
//   dg = (gamma * W2)^T e,  dh = dg or GRN's,  du = dh * gelu'(u)
//   dW1 = du^T z,  db1 = sum(du),  dz = W1^T du,  dx by LayerNorm's gradient
//
// so W2's output is never needed. Rows are pixels of all images, in order. Each thread computes chunks of a
// group of rows, from x and dout to du and dx, while they are in its L2: u is computed again (or read, if the
// forward pass kept it), and the second product's epilogue computes g and du from it. They become operands of
// the two products over pixels. The columns of these products are divided among the threads: each reads all
// rows of the group, in order, and adds to its own sums.
//
// With GRN the sums over each whole image come first: u and dg are kept for a number of images.
//
// Groups and units (backward.h) depend only on the shape, so the
// bits of the result do not depend on the number of threads.

#include "cpu/activations.h"
#include "cpu/backward.h"
#include "cpu/gemm/gemm.h"
#include "cpu/grn.h"
#include "cpu/layernorm.h"

namespace cnk::cpu::CNK_ISA {

namespace {

template <class G>
struct MlpBackward {
  struct Plan {
    int64_t images;  // GRN: how many have their u and dg kept
    int64_t group;   // rows of the products over pixels
    int64_t groups;  // how many there are
    int64_t chunk;   // rows of a thread at a time
  };

  static Plan plan(const MlpBackwardArgs& a, int threads) {
    const int64_t image = a.pixels, rows = a.n * image;
    const int64_t row_bytes = 2 * (G::a_bytes(32, a.c) + G::a_bytes(32, a.hidden_size)) / 32;
    Plan p;
    p.images = a.grn_weight ? min64(a.n, kGroupBytes / (row_bytes * image) + 1) : a.n;
    const int64_t most = a.grn_weight ? p.images * image : rows;
    p.group = group_rows(most, row_bytes);
    p.groups = ceil_div(a.n, p.images) * ceil_div(most, p.group);
    // Weights of several times the size of L2 are read from L3 once a chunk.
    const int64_t weight_bytes = 3 * G::packed_bytes(a.hidden_size, a.c);
    int64_t chunk = l2_cache_bytes() / 2 / (row_bytes + 4 * pad_channels(a.c));
    const int64_t least = weight_bytes > 2 * l2_cache_bytes() ? 256 : 64;
    chunk = chunk < least ? least : chunk > 256 ? 256 : chunk;
    const int64_t share = ceil_div(p.group, threads);
    p.chunk = round_up(ceil_div(share, ceil_div(share, chunk)), kUnit);
    return p;
  }

  // The sums of a unit: of du, then of e, dz * xhat and dz.
  static int64_t unit_sums(const MlpBackwardArgs& a) {
    return pad_channels(a.hidden_size) + 3 * pad_channels(a.c);
  }

  // Offsets into the workspace.
  struct Layout {
    int64_t dz;                           // of a thread
    int64_t z = 0, e = 0, u = 0, du = 0;  // of a thread; with GRN shared, and du is dg at first
    int64_t per_thread;
    int64_t dut, zb, et, gb;  // operands of the products over pixels: transposed du, z; transposed e, g
    int64_t units, totals;    // sums of the units of a group; of all
    int64_t square = 0, cross = 0, plain = 0;  // GRN: images x padded hidden
    int64_t dgrn_weight = 0, dgrn_bias = 0;    // padded hidden
    int64_t dw1 = 0;                           // fp32 sums of a gradient of 16 bits, (hidden, C)
    int64_t g2 = 0;                            // panels of 32 columns, (C, 32) each
    int64_t total;
    Layout(const MlpBackwardArgs& a, const Plan& p, int threads) {
      Offsets at;
      const auto take = [&at](int64_t bytes) { return at.take(bytes); };
      const int64_t c = a.c, hidden = a.hidden_size, padded = pad_channels(c), wide = pad_channels(hidden);
      const int64_t kept = a.grn_weight ? round_up(p.images * a.pixels, kUnit) + kUnit : 0;
      dz = take(p.chunk * padded * 4);
      if (!a.grn_weight) {
        z = take(G::a_bytes(p.chunk, c));
        e = take(G::a_bytes(p.chunk, c));
        u = take(G::a_bytes(p.chunk, hidden));
        du = take(G::a_bytes(p.chunk, hidden));
      }
      per_thread = at.end;
      at.end *= threads;
      if (a.grn_weight) {
        z = take(G::a_bytes(kept, c));
        e = take(G::a_bytes(kept, c));
        u = take(G::a_bytes(kept, hidden));
        du = take(G::a_bytes(kept, hidden));
        square = take(p.images * wide * 4);
        cross = take(p.images * wide * 4);
        plain = take(p.images * wide * 4);
        dgrn_weight = take(wide * 4);
        dgrn_bias = take(wide * 4);
      }
      dut = take(G::a_bytes(wide, p.group));
      zb = take(G::packed_bytes(c, p.group));
      et = take(G::a_bytes(padded, p.group));
      gb = take(G::packed_bytes(hidden, p.group));
      units = take(p.group / kUnit * unit_sums(a) * 4);
      totals = take(unit_sums(a) * 4);
      if (a.weights) {
        if (a.w2_dtype != DType::kFloat32 && p.groups > 1) dw1 = take(hidden * c * 4);
        g2 = take(round_up(hidden, 32) * c * 4);
      }
      total = at.end;
    }
  };

  static int64_t workspace(const MlpBackwardArgs& a, int threads) {
    return most_bytes(threads, [&](int t) { return Layout(a, plan(a, t), t).total; });
  }

  // u = sum + b1
  struct AddBias {
    const float* b1;
    CNK_INLINE auto operator()(int64_t, int64_t column) const {
      return [bias = load(b1 + column)](int64_t, Vec v) CNK_INLINE_LAMBDA { return v + bias; };
    }
  };
  struct AsIs {
    CNK_INLINE auto operator()(int64_t, int64_t) const {
      return [](int64_t, Vec v) CNK_INLINE_LAMBDA { return v; };
    }
  };

  // gelu(u) and its slope, or those of another activation, decided at run time.
  template <bool kGelu>
  static CNK_INLINE Activated with_slope(Vec u, Activation activation) {
    if constexpr (kGelu) {
      return gelu_with_slope(u);
    } else {
      return activated_with_slope(u, activation);
    }
  }

  // u becomes g = gelu(u), and du = dg * gelu'(u)
  template <bool kGelu>
  struct ActivationEpilogue {
    void *u, *du;
    int64_t hidden;
    Activation activation;
    CNK_INLINE auto at(int64_t row, int64_t column) const {
      return [=, *this](int64_t r, Vec dg) CNK_INLINE_LAMBDA {
        const Activated g = with_slope<kGelu>(G::load_register(u, hidden, row + r, column), activation);
        G::store_register(u, hidden, row + r, column, g.value);
        G::store_register(du, hidden, row + r, column, dg * g.slope);
      };
    }
    CNK_INLINE auto pair(int64_t row, int64_t column) const {
      return [=, *this](int64_t r, Vec low, Vec high) CNK_INLINE_LAMBDA {
        const Block b = G::load_block(u, hidden, row + r, column);
        const Activated first = with_slope<kGelu>(b.v[0], activation),
                        second = with_slope<kGelu>(b.v[1], activation);
        G::store_block(u, hidden, row + r, column, {{first.value, second.value}});
        G::store_block(du, hidden, row + r, column, {{low * first.slope, high * second.slope}});
      };
    }
  };

  // G2 in panels of 32 columns: a block of results is 4 KB in a row. Rows of (C, hidden) are 12 KB apart at
  // C 768, all in the same sets of L1 and each in a page of its own.
  struct PanelSums {
    float* sums;
    int64_t rows;
    bool add;
    static CNK_INLINE int64_t offset(int64_t rows, int64_t row, int64_t column) {
      return (column / 32 * rows + row) * 32 + column % 32;
    }
    CNK_INLINE auto at(int64_t row, int64_t column) const {
      return [first = sums + offset(rows, row, column), add = add](int64_t r, Vec v) CNK_INLINE_LAMBDA {
        float* to = first + r * 32;
        store(to, add ? v + load(to) : v);
      };
    }
  };

  // f(a compile-time bool: whether the activation is the exact GELU)
  template <class F>
  void with_activation(const F& f) const {
    if (a.activation == Activation::kGelu) return f(Int<true>{});
    f(Int<false>{});
  }

  const MlpBackwardArgs& a;
  Team& team;
  const Plan p;
  const Layout at;
  const RowNorm norm;
  char* own;
  float* dw1;  // sums: where the gradient goes, if it is fp32

  MlpBackward(const MlpBackwardArgs& a, Team& team)
      : a(a),
        team(team),
        p(plan(a, team.size())),
        at(a, p, team.size()),
        norm(a.c, a.eps, a.norm_weight, a.norm_bias, a.norm),
        own(a.workspace + team.rank() * at.per_thread),
        dw1(a.w2_dtype == DType::kFloat32 ? static_cast<float*>(a.dw1) : floats(at.dw1)) {}

  float* floats(int64_t offset) const { return reinterpret_cast<float*>(a.workspace + offset); }

  // Rows `row`... of an operand in the thread's own part of the workspace, or with GRN in the shared part.
  void* operand(int64_t offset, int64_t columns, int64_t row) const {
    return a.grn_weight ? a.workspace + offset + G::a_bytes(row, columns) : own + offset;
  }

  // The sums of the unit that contains row `row` of the group: du; e; dz * xhat; dz.
  float* unit(int64_t row) const { return floats(at.units) + row / kUnit * unit_sums(a); }

  // z = LN(x) and e of pixels [pixel, pixel + rows), zeros up to a multiple of kUnit.
  template <class T>
  void read_rows(int64_t pixel, int64_t rows, void* z, void* e) const {
    const T* x = static_cast<const T*>(a.x) + pixel * a.c;
    write_normalized<G>(z, a.c, 0, 0, norm, rows, [&](int64_t i, int64_t c) CNK_INLINE_LAMBDA {
      return load_channels(x + i * a.c, c, a.c);
    });
    for (int64_t i = 0; i < rows; ++i) {
      const T* dout = static_cast<const T*>(a.dout) + (pixel + i) * a.c;
      const float drop = a.drop_scale ? a.drop_scale[(pixel + i) / a.pixels] : 1;
      write_row<G>(e, a.c, i, dout, drop);
    }
    zero_rows<G>(z, a.c, rows, round_up(rows, kUnit));
    zero_rows<G>(e, a.c, rows, round_up(rows, kUnit));
  }

  // u of the same rows: read if it was kept, else computed again from z.
  void read_hidden(int64_t pixel, int64_t rows, const void* z, void* u) const {
    if (!a.hidden) {
      return G::product(z, 0, rows, a.w1, 0, G::panels(a.hidden_size),
                        Stored<G, AddBias>{{a.b1}, u, a.hidden_size});
    }
    with_type(a.hidden_dtype, [&](auto type) {
      for (int64_t i = 0; i < rows; ++i) {
        const auto* row = static_cast<const decltype(type)*>(a.hidden) + (pixel + i) * a.hidden_size;
        write_row<G>(u, a.hidden_size, i, row);
      }
    });
  }

  // From g and du of rows [row, row + rows) of the group (pixels from `pixel` on) computes the operands of
  // the products over pixels, the sums of units, and dx.
  template <class T>
  void finish_rows(int64_t row, int64_t pixel, int64_t rows, int64_t all_rows, void* z, void* e, void* g,
                   void* du) const {
    const int64_t hidden = a.hidden_size, padded = pad_channels(a.c), wide = pad_channels(hidden);
    for (int64_t r = 0; r < rows; r += kUnit) {
      const int64_t end = min64(r + kUnit, rows);
      float* sums = unit(row + r);
      if (a.weights) {
        add_rows<G>(du, hidden, r, end, sums);
        add_rows<G>(e, a.c, r, end, sums + wide);
      }
      for (int64_t c = 0; c < 2 * padded; c += kLanes) store(sums + wide + padded + c, Vec{});
    }
    if (a.weights) {
      zero_rows<G>(g, hidden, rows, round_up(rows, kUnit));
      zero_rows<G>(du, hidden, rows, round_up(rows, kUnit));
      G::rows_to_transposed_a(du, hidden, 0, rows, a.workspace + at.dut, all_rows, row);
      G::rows_to_b(z, a.c, 0, rows, a.workspace + at.zb, all_rows, row);
      G::rows_to_transposed_a(e, a.c, 0, rows, a.workspace + at.et, all_rows, row);
      G::rows_to_b(g, hidden, 0, rows, a.workspace + at.gb, all_rows, row);
    }
    if (!a.dx) return;
    float* dz = reinterpret_cast<float*>(own + at.dz);
    G::product(du, 0, rows, a.w1_back, 0, G::panels(a.c), SumEpilogue<float>{dz, padded, padded, nullptr});
    static_assert(kUnit % kLanes == 0);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const T* x = static_cast<const T*>(a.x) + (pixel + r) * a.c;
      T* dx = static_cast<T*>(a.dx) + (pixel + r) * a.c;
      const float* d = dz + r * padded;
      float* sums = unit(row + r) + wide + padded;
      layernorm_gradient(
          norm, min64(rows - r, kLanes),
          [&](int64_t i, int64_t c) CNK_INLINE_LAMBDA { return load_channels(x + i * a.c, c, a.c); },
          [&](int64_t i, int64_t c) CNK_INLINE_LAMBDA { return load(d + i * padded + c); }, sums,
          sums + padded,
          [&](int64_t i, int64_t c, Vec v) CNK_INLINE_LAMBDA { store_channels(dx + i * a.c, c, a.c, v); });
    }
  }

  // All work on a chunk without GRN.
  template <class T>
  void chunk(int64_t row, int64_t pixel, int64_t rows, int64_t all_rows) const {
    void *z = own + at.z, *e = own + at.e, *u = own + at.u, *du = own + at.du;
    read_rows<T>(pixel, rows, z, e);
    read_hidden(pixel, rows, z, u);
    with_activation([&](auto gelu) {
      G::product(e, 0, rows, a.w2_back, 0, G::panels(a.hidden_size),
                 ActivationEpilogue<gelu.value>{u, du, a.hidden_size, a.activation});
    });
    finish_rows<T>(row, pixel, rows, all_rows, z, e, u, du);
  }

  // The sums over the pixels of h^2, dg h and dg, for items [begin, end) of images x groups of channels.
  template <bool kGelu>
  void sum_responses(int64_t begin, int64_t end) const {
    const int64_t hidden = a.hidden_size, wide = pad_channels(hidden), groups = wide / kChannelAlign;
    float *square = floats(at.square), *cross = floats(at.cross), *plain = floats(at.plain);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, c = item % groups * kChannelAlign;
      const int64_t to = n * wide + c;
      grn_sums(a.pixels, square + to, cross + to, plain + to, [&](int64_t p, Block* h, Block* dg) {
        *dg = G::load_block(operand(at.du, hidden, 0), hidden, n * a.pixels + p, c);
        const Block u = G::load_block(operand(at.u, hidden, 0), hidden, n * a.pixels + p, c);
        unroll<Block::kVecs>(
            [&](auto v) { h->v[v.value] = with_slope<kGelu>(u.v[v.value], a.activation).value; });
      });
    }
  }

  // With GRN, first part: u and dg of `images` images from
  // `first` on, and what their gradients need for each channel.
  template <class T>
  void respond(int64_t first, int64_t images) const {
    const int64_t rows = images * a.pixels, hidden = a.hidden_size, wide = pad_channels(hidden);
    const int64_t groups = wide / kChannelAlign, pixel = first * a.pixels;
    int64_t begin, end;
    team.split(rows, kUnit, &begin, &end);
    for (int64_t r = begin; r < end; r += p.chunk) {
      const int64_t count = min64(p.chunk, end - r);
      void *z = operand(at.z, a.c, r), *e = operand(at.e, a.c, r);
      read_rows<T>(pixel + r, count, z, e);
      read_hidden(pixel + r, count, z, operand(at.u, hidden, r));
      G::product(e, 0, count, a.w2_back, 0, G::panels(hidden),
                 Stored<G, AsIs>{{}, operand(at.du, hidden, r), hidden});
    }
    team.barrier();
    float *square = floats(at.square), *cross = floats(at.cross), *plain = floats(at.plain);
    team.split(images * groups, 1, &begin, &end);
    with_activation([&](auto gelu) { sum_responses<gelu.value>(begin, end); });
    team.barrier();
    if (team.rank() == 0) {  // little work: a few instructions a channel, and sums over the images
      grn_gradients(images, hidden, a.grn_weight, a.grn_eps, square, cross, plain, floats(at.dgrn_weight),
                    floats(at.dgrn_bias));
    }
    team.barrier();
  }

  // With GRN, second part: g and du overwrite u and dg, rows [row, row + rows) of the images kept.
  template <bool kGelu>
  void scale_rows(int64_t row, int64_t rows) const {
    const int64_t hidden = a.hidden_size, wide = pad_channels(hidden);
    void *u = operand(at.u, hidden, row), *du = operand(at.du, hidden, row);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = (row + i) / a.pixels;
      const float *factor = floats(at.square) + n * wide, *change = floats(at.cross) + n * wide;
      for (int64_t c = 0; c < wide; c += kChannelAlign) {
        Block b = G::load_block(u, hidden, i, c), d = G::load_block(du, hidden, i, c);
        unroll<Block::kVecs>([&](auto v) {
          const int64_t k = c + v.value * kLanes;
          const Activated h = with_slope<kGelu>(b.v[v.value], a.activation);
          const Vec f = load(factor + k);
          b.v[v.value] = multiply_add(h.value, f, load(a.grn_bias + k));
          d.v[v.value] = multiply_add(d.v[v.value], f, h.value * load(change + k)) * h.slope;
        });
        G::store_block(u, hidden, i, c, b);
        G::store_block(du, hidden, i, c, d);
      }
    }
  }

  // The products over the pixels of a group, and the sums of its units. Each thread computes rows or columns of the
  // results. With the last group dw1 gets the weights' dtype, and dw2 in finish().
  void sum_group(int64_t rows, bool first, bool last) const {
    if (a.weights) {
      if (last) {
        with_type(a.w2_dtype, [&](auto type) { sum_dw1(rows, static_cast<decltype(type)*>(a.dw1), first); });
      } else {
        sum_dw1(rows, dw1, first);
      }
      const int64_t hidden = a.hidden_size;
      int64_t begin, end;
      team.split(G::panels(hidden), 1, &begin, &end);
      G::product(a.workspace + at.et, 0, a.c, PackedMatrix{a.workspace + at.gb, hidden, rows}, begin, end,
                 PanelSums{floats(at.g2), a.c, !first});
    }
    add_units(team, floats(at.units), ceil_div(rows, kUnit), unit_sums(a), !first, floats(at.totals));
  }

  // Some rows of dut at a time, so that they stay in L2 while all of z goes by.
  template <class T>
  void sum_dw1(int64_t rows, T* out, bool first) const {
    const int64_t most = max64(l2_cache_bytes() / 4 / G::a_bytes(kUnit, rows), 1) * kUnit;
    const PackedMatrix z = {a.workspace + at.zb, a.c, rows};
    int64_t begin, end;
    team.split(a.hidden_size, kUnit, &begin, &end);
    for (int64_t row = begin; row < end; row += most)
      G::product(a.workspace + at.dut, row, min64(row + most, end), z, 0, G::panels(a.c),
                 SumEpilogue<T>{out, a.c, a.c, first ? nullptr : dw1});
  }

  // From G2 rows [begin, end) of dw2, dgamma and db2. Eight rows at a time read lines that follow each other.
  template <class T>
  void finish_dw2(int64_t begin, int64_t end, const float* of_e) const {
    constexpr int64_t kRows = 8;
    const int64_t hidden = a.hidden_size;
    for (int64_t c = begin; c < end; c += kRows) {
      const int64_t rows = min64(kRows, end - c);
      Vec along[kRows][2] = {};
      for (int64_t j = 0; j < hidden; j += 32) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = (c + r) * hidden;
          const float* g2 = floats(at.g2) + PanelSums::offset(a.c, c + r, j);
          for (int64_t i = 0; i < 32 && j + i < hidden; i += kLanes) {
            const Vec v = load(g2 + i);
            Vec& total = along[r][(j + i) / kLanes % 2];
            total = multiply_add(v, load_channels(static_cast<const T*>(a.w2) + row, j + i, hidden), total);
            store_channels(static_cast<T*>(a.dw2) + row, j + i, hidden, v * a.gamma[c + r]);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        a.dgamma[c + r] = sum(along[r][0] + along[r][1]) + a.b2[c + r] * of_e[c + r];
        a.db2[c + r] = a.gamma[c + r] * of_e[c + r];
      }
    }
  }

  // From the sums to the gradients of the parameters.
  void finish() const {
    const int64_t hidden = a.hidden_size, padded = pad_channels(a.c), wide = pad_channels(hidden);
    const float *totals = floats(at.totals), *of_e = totals + wide, *of_norm = of_e + padded;
    int64_t begin, end;
    if (a.weights) {
      team.split(a.c, 1, &begin, &end);
      with_type(a.w2_dtype, [&](auto type) { finish_dw2<decltype(type)>(begin, end, of_e); });
    }
    if (team.rank() == 0) {
      for (int64_t j = 0; a.weights && j < hidden; j += kLanes)
        store_channels(a.db1, j, hidden, load(totals + j));
      for (int64_t c = 0; a.dx && c < a.c; c += kLanes) {
        store_channels(a.dnorm_weight, c, a.c, load(of_norm + c));
        store_channels(a.dnorm_bias, c, a.c, load(of_norm + padded + c));
      }
      for (int64_t c = 0; a.grn_weight && c < hidden; c += kLanes) {
        store_channels(a.dgrn_weight, c, hidden, load(floats(at.dgrn_weight) + c));
        store_channels(a.dgrn_bias, c, hidden, load(floats(at.dgrn_bias) + c));
      }
    }
  }

  template <class T>
  void run() const {
    const int64_t wide = pad_channels(a.hidden_size);
    if (a.grn_weight && team.rank() == 0) {
      for (int64_t c = 0; c < wide; c += kLanes) {
        store(floats(at.dgrn_weight) + c, Vec{});
        store(floats(at.dgrn_bias) + c, Vec{});
      }
    }
    bool none = true;  // of the sums
    for (int64_t image = 0; image < a.n; image += p.images) {
      const int64_t images = min64(p.images, a.n - image), all = images * a.pixels;
      if (a.grn_weight) respond<T>(image, images);
      for (int64_t first = 0; first < all; first += p.group) {
        const int64_t rows = min64(p.group, all - first);
        int64_t begin, end;
        team.split(rows, kUnit, &begin, &end);
        for (int64_t r = begin; r < end; r += p.chunk) {
          const int64_t count = min64(p.chunk, end - r), kept = first + r, pixel = image * a.pixels + kept;
          if (a.grn_weight) {
            with_activation([&](auto gelu) { scale_rows<gelu.value>(kept, count); });
            finish_rows<T>(r, pixel, count, rows, operand(at.z, a.c, kept), operand(at.e, a.c, kept),
                           operand(at.u, a.hidden_size, kept), operand(at.du, a.hidden_size, kept));
          } else {
            chunk<T>(r, pixel, count, rows);
          }
        }
        team.barrier();
        sum_group(rows, none, image + images == a.n && first + rows == all);
        team.barrier();
        none = false;
      }
    }
    finish();
  }
};

}  // namespace

void mlp_backward(const MlpBackwardArgs& a, Team& team) {
  CNK_SHARED_UNLESS(a.products == Products::kBFloat16, mlp_backward, a, team);
  [[maybe_unused]] const Gemm::Scope scope;
  with_type(a.dtype, [&](auto type) { MlpBackward<Gemm>(a, team).run<decltype(type)>(); });
}

int64_t mlp_backward_workspace(const MlpBackwardArgs& a, int threads) {
  CNK_SHARED_UNLESS(a.products == Products::kBFloat16, mlp_backward_workspace, a, threads);
  return MlpBackward<Gemm>::workspace(a, threads);
}

}  // namespace cnk::cpu::CNK_ISA
