// The gradients of LayerNorm followed by a convolution whose stride is its kernel size.

#include <doctest/doctest.h>

#include "reference_backward.h"

using namespace cnk;
using namespace cnk::test;
using reference::Image;

namespace {

struct Case {
  DType dtype, out_dtype;
  Image image;
  int patch;
  int64_t d;
  int64_t out_h() const { return image.h / patch; }
  int64_t out_w() const { return image.w / patch; }
  int64_t out_pixels() const { return image.n * out_h() * out_w(); }
  int64_t taps() const { return int64_t{patch} * patch; }
  // The pixel of x under a tap of output pixel p.
  int64_t pixel(int64_t p, int64_t tap) const {
    const int64_t n = p / (out_h() * out_w()), h = p / out_w() % out_h(), w = p % out_w();
    return (n * image.h + h * patch + tap / patch) * image.w + w * patch + tap % patch;
  }
};

struct Result {
  Tensor dx, dweight, dbias, dnorm_weight, dnorm_bias;  // empty if not requested
};

struct Problem {
  Case s;
  Tensor x, dout;
  Values norm_weight, norm_bias, weight;  // weight (D, patch, patch, C)
  Buffer norm_weight_, norm_bias_, weight_;
  static constexpr float kEps = 1e-6f;

  Problem(const Case& s, uint32_t seed) : Problem(s, Random(seed)) {}

  struct Expectations {
    Expected dx, dweight, dbias, dnorm_weight, dnorm_bias;
    std::vector<bool> written;  // pixels of dx
  };

  Expectations expected(double relative) const {
    const int64_t c = s.image.c, taps = s.taps();
    const Values in = x.values(), dy = dout.values();
    const Values z = reference::layernorm(in, {}, c, norm_weight, norm_bias, double(kEps)).value;
    reference::Sums dweight(s.d * taps * c), dbias(s.d);
    Values dz(in.size()), dz_terms(in.size());
    Expectations out;
    out.written.assign(s.image.pixels(), false);
    for (int64_t p = 0; p < s.out_pixels(); ++p) {
      for (int64_t j = 0; j < s.d; ++j) dbias.add(j, dy[p * s.d + j]);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t pixel = s.pixel(p, tap);
        out.written[pixel] = true;
        reference::Sums back(c);
        for (int64_t j = 0; j < s.d; ++j) {
          for (int64_t i = 0; i < c; ++i) {
            dweight.add((j * taps + tap) * c + i, dy[p * s.d + j] * z[pixel * c + i]);
            back.add(i, dy[p * s.d + j] * weight[(j * taps + tap) * c + i]);
          }
        }
        for (int64_t i = 0; i < c; ++i) {
          dz[pixel * c + i] = back.value()[i];
          dz_terms[pixel * c + i] = back.terms(i);
        }
      }
    }
    const auto norm = reference::layernorm_gradient(in, dz, dz_terms, c, norm_weight, double(kEps), relative);
    out.dx = norm.x;
    out.dweight = dweight.within(relative);
    out.dbias = dbias.within(relative);
    out.dnorm_weight = norm.weight.within(relative);
    out.dnorm_bias = norm.bias.within(relative);
    return out;
  }

  Result run(const Kernels& k, Products products, int threads, bool dx = true, bool weights = true) {
    const int64_t c = s.image.c, wide = pad_channels(c), depth = s.taps() * wide;
    Tensor dweight(DType::kFloat32, weights ? s.d * depth : 0);
    Tensor dnorm[2] = {Tensor(DType::kFloat32, wide), Tensor(DType::kFloat32, wide)};
    Result out{Tensor(s.dtype, dx ? x.count() : 0), Tensor(DType::kFloat32, weights ? s.d * s.taps() * c : 0),
               Tensor(DType::kFloat32, weights ? s.d : 0), Tensor(DType::kFloat32, dx ? c : 0),
               Tensor(DType::kFloat32, dx ? c : 0)};
    Buffer packed(k.ops.packed_bytes(products, DType::kFloat32, depth, s.d));
    in_team(threads, [&](Team& team) {
      k.ops.pack_transposed(products, DType::kFloat32, weight_.as<float>(), depth, s.d, nullptr,
                            packed.as<void>(), team);
    });
    DownsampleBackwardArgs args = {};
    args.dtype = s.dtype;
    args.out_dtype = s.out_dtype;
    args.products = products;
    args.x = x.data();
    args.dout = dout.data();
    args.n = s.image.n;
    args.h = s.image.h;
    args.w = s.image.w;
    args.c = c;
    args.patch = s.patch;
    args.eps = kEps;
    args.norm_weight = norm_weight_.as<float>();
    args.norm_bias = norm_bias_.as<float>();
    args.weight_back = {packed.as<void>(), depth, s.d};
    args.weights = weights;
    if (dx) {
      args.dx = out.dx.data();
      args.dnorm_weight = static_cast<float*>(dnorm[0].data());
      args.dnorm_bias = static_cast<float*>(dnorm[1].data());
    }
    if (weights) {
      args.dweight = static_cast<float*>(dweight.data());
      args.dbias = static_cast<float*>(out.dbias.data());
    }
    Buffer work = workspace(k.ops.downsample_backward_workspace(args, threads));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.downsample_backward(args, team); });
    for (int64_t i = 0; i < out.dweight.count(); ++i) out.dweight.set(i, dweight.get(i / c * wide + i % c));
    for (int64_t i = 0; dx && i < c; ++i) {
      out.dnorm_weight.set(i, dnorm[0].get(i));
      out.dnorm_bias.set(i, dnorm[1].get(i));
    }
    return out;
  }

 private:
  Problem(const Case& s, Random random)
      : s(s),
        x(s.dtype, random.floats(s.image.count(), -1.5, 2)),
        dout(s.out_dtype, random.floats(s.out_pixels() * s.d, -1, 1)),
        norm_weight(random.floats(s.image.c, -2, 2)),
        norm_bias(random.floats(s.image.c, -1, 1)),
        weight(random.floats(s.d * s.taps() * s.image.c, -1, 1)),
        norm_weight_(padded(norm_weight, s.image.c)),
        norm_bias_(padded(norm_bias, s.image.c)),
        weight_(padded(weight, s.image.c)) {}
};

// Pixels outside of every patch are not written: they keep the NaN that a buffer is filled with.
Tensor with_unwritten(const Tensor& dx, const std::vector<bool>& written, int64_t c, int64_t* touched) {
  Tensor out(dx.dtype(), dx.count());
  const Tensor untouched(dx.dtype(), dx.count());
  for (int64_t i = 0; i < dx.count(); ++i) {
    if (!written[i / c]) *touched += !dx.same_bits(untouched, i, i + 1);
    out.set(i, written[i / c] ? dx.get(i) : 0);
  }
  return out;
}

void check(const Case& s, uint32_t seed) {
  Problem problem(s, seed);
  CAPTURE(dtype_name(s.dtype));
  CAPTURE(dtype_name(s.out_dtype));
  CAPTURE(s.image.n);
  CAPTURE(s.image.h);
  CAPTURE(s.image.w);
  CAPTURE(s.image.c);
  CAPTURE(s.patch);
  CAPTURE(s.d);
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (Products products : k.products()) {
      CAPTURE(products_name(products));
      const Problem::Expectations want = problem.expected(8 * reference::product_unit(products));
      const Result out = problem.run(k, products, 1);
      int64_t touched = 0;
      CHECK(mismatch(with_unwritten(out.dx, want.written, s.image.c, &touched), want.dx) == "");
      CHECK(touched == 0);
      CHECK(mismatch(out.dweight, want.dweight) == "");
      CHECK(mismatch(out.dbias, want.dbias) == "");
      CHECK(mismatch(out.dnorm_weight, want.dnorm_weight) == "");
      CHECK(mismatch(out.dnorm_bias, want.dnorm_bias) == "");
      const auto same = [&](const Result& other) {
        if (other.dx.count()) {
          CHECK(difference(other.dx, out.dx) == "");
          CHECK(difference(other.dnorm_weight, out.dnorm_weight) == "");
          CHECK(difference(other.dnorm_bias, out.dnorm_bias) == "");
        }
        if (other.dweight.count()) {
          CHECK(difference(other.dweight, out.dweight) == "");
          CHECK(difference(other.dbias, out.dbias) == "");
        }
      };
      for (int threads : kTeams) {
        CAPTURE(threads);
        if (threads > 1) same(problem.run(k, products, threads));
      }
      same(problem.run(k, products, 2, false, true));
      same(problem.run(k, products, 2, true, false));
    }
  }
}

}  // namespace

TEST_CASE("every channel count, in and out, in every dtype") {
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int patch : {1, 2, 3, 4}) {
        ++seed;
        const int64_t d = kChannels[(seed * 7) % std::size(kChannels)];
        // Sizes that are no multiple of the patch: the remainder is neither read nor written.
        check({dtype, kDTypes[seed / 3 % 3], {2, 5, 6 + seed % 3, c}, patch, d}, seed);
      }
    }
  }
}

TEST_CASE("one patch, images one patch high or wide, several groups of patches") {
  for (DType dtype : kDTypes) {
    check({dtype, dtype, {1, 2, 2, 17}, 2, 33}, 1);
    check({dtype, dtype, {1, 2, 57, 5}, 2, 7}, 2);
    check({dtype, dtype, {1, 57, 3, 5}, 2, 7}, 3);
  }
  check({DType::kFloat32, DType::kFloat32, {3, 57, 55, 5}, 2, 6}, 4);
}
