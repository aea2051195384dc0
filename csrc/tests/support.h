// What the tests share: the kernels of this machine, tensors of exact size, comparison with a reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "buffer.h"
#include "cpu/ops.h"
#include "probe.h"

namespace cnk::test {

using namespace cnk::cpu;

// --- What runs. ---

struct Kernels {
  Isa isa;
  const IsaOps& ops;
  const Probe& probe;
  bool emulated = false;
  std::string name() const { return std::string(isa_name(isa)) + (emulated ? ", emulated" : ""); }
  bool pairs() const { return isa == Isa::kAvx512Bf16; }  // of taps, of a depthwise convolution in bf16
  std::vector<Products> products() const {
    if (has_bf16_products(isa)) return {Products::kFloat32, Products::kBFloat16};
    return {Products::kFloat32};
  }
};

// One entry per instruction set that this build has and this machine runs. On a machine with AVX-512 also
// those that it lacks, emulated.
inline const std::vector<Kernels>& kernels() {
  static const std::vector<Kernels> all = [] {
    std::vector<Kernels> found;
    for (int i = 0; i < kIsaCount; ++i) {
      if (isa_supported(Isa(i)) && isa_ops(Isa(i)))
        found.push_back({Isa(i), *isa_ops(Isa(i)), *isa_probe(Isa(i))});
    }
    for (Isa isa : {Isa::kAvx512Bf16, Isa::kAmx}) {
      const Emulated twin = isa_emulated(isa);
      if (twin.ops && isa_supported(Isa::kAvx512) && !isa_supported(isa))
        found.push_back({isa, *twin.ops, *twin.probe, true});
    }
    return found;
  }();
  return all;
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr int kTeams[] = {1, 2, 3, 5};
// Below, equal to and above the sizes of registers of 4, 8
// and 16 lanes, the padding of 32, panels of 48 columns.
constexpr int64_t kChannels[] = {1, 3, 15, 16, 17, 31, 32, 33, 48, 96, 100};

inline std::string dtype_name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}
inline std::string products_name(Products products) {
  return products == Products::kFloat32 ? "float32 products" : "bfloat16 products";
}

// parallel() for a callable.
template <class F>
void in_team(int threads, const F& body) {
  parallel(threads, [](Team& team, const void* f) { (*static_cast<const F*>(f))(team); }, &body);
}

// --- Values. Doubles that a float (or the dtype of a tensor) holds exactly. ---

using Values = std::vector<double>;

class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}
  double uniform(double low, double high) { return low + (high - low) * (bits_() * 0x1p-32); }
  uint32_t bits() { return bits_(); }
  // Floats.
  Values floats(int64_t count, double low, double high) {
    Values out(count);
    for (double& v : out) v = float(uniform(low, high));
    return out;
  }

 private:
  std::mt19937 bits_;
};

// --- Tensors. ---

class Tensor {
 public:
  Tensor(DType dtype, int64_t count) : dtype_(dtype), count_(count), buffer_(count * element_size(dtype)) {}
  Tensor(DType dtype, const Values& values) : Tensor(dtype, int64_t(values.size())) {
    for (int64_t i = 0; i < count_; ++i) set(i, values[i]);
  }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  void* data() { return buffer_.as<void>(); }
  const void* data() const { return buffer_.as<void>(); }
  void set(int64_t i, double value) {
    if (dtype_ == DType::kFloat32) {
      buffer_.as<float>()[i] = float(value);
    } else if (dtype_ == DType::kBFloat16) {
      from_float(float(value), buffer_.as<BFloat16>()[i]);
    } else {
      from_float(float(value), buffer_.as<Float16>()[i]);
    }
  }
  double get(int64_t i) const {
    if (dtype_ == DType::kFloat32) return buffer_.as<float>()[i];
    return dtype_ == DType::kBFloat16 ? to_float(buffer_.as<BFloat16>()[i])
                                      : to_float(buffer_.as<Float16>()[i]);
  }
  Values values() const {
    Values out(count_);
    for (int64_t i = 0; i < count_; ++i) out[i] = get(i);
    return out;
  }
  // Whether elements [first, last) have the same bits as other's.
  bool same_bits(const Tensor& other, int64_t first, int64_t last) const {
    const int64_t size = element_size(dtype_);
    return std::memcmp(buffer_.as<char>() + first * size, other.buffer_.as<char>() + first * size,
                       (last - first) * size) == 0;
  }

 private:
  DType dtype_;
  int64_t count_;
  Buffer buffer_;
};

// (rows, columns) floats with zeros up to the padded columns, as the kernels expect their parameters.
inline Buffer padded(const Values& values, int64_t columns) {
  const int64_t rows = int64_t(values.size()) / columns, wide = pad_channels(columns);
  Buffer buffer(rows * wide * 4);
  for (int64_t i = 0; i < rows * wide; ++i) {
    buffer.as<float>()[i] = i % wide < columns ? float(values[i / wide * columns + i % wide]) : 0.0f;
  }
  return buffer;
}

inline Buffer floats(const Values& values) {
  Buffer buffer(int64_t(values.size()) * 4);
  for (size_t i = 0; i < values.size(); ++i) buffer.as<float>()[i] = float(values[i]);
  return buffer;
}

// The weights (K * K, channels) of a depthwise convolution as the kernels read them; empty for kernel_size 0.
inline Buffer packed_taps(const Values& weight, const Axis& h, const Axis& w, int64_t channels) {
  Buffer buffer(packed_taps_bytes(h, w, channels));
  pack_taps(floats(weight).as<float>(), h, w, channels, buffer.as<float>());
  return buffer;
}

// The same for products of pairs; the weights must be bf16 numbers.
inline Buffer packed_pairs(const Buffer& taps, const Axis& h, const Axis& w, int64_t channels,
                           int depth = 1) {
  Buffer buffer(packed_taps_bytes(h, w, channels, depth));
  if (!pack_tap_pairs(taps.as<float>(), h, w, channels, buffer.as<uint32_t>(), depth)) std::abort();
  return buffer;
}

inline Buffer workspace(int64_t bytes) { return Buffer(bytes, 64); }

// --- Comparison. The strings say what is wrong, and are empty if nothing is. ---

// A result before it is rounded to its dtype, and the largest error that fp32 arithmetic may add.
struct Expected {
  Values value, tolerance;
};

// Half a unit in the last place of `dtype` at `value`.
inline double rounding(DType dtype, double value) {
  const int digits = dtype == DType::kFloat32 ? 24 : dtype == DType::kBFloat16 ? 8 : 11;
  const double smallest = std::ldexp(1.0, dtype == DType::kFloat16 ? -25 : -127 - digits);
  return std::max(std::fabs(value) * std::ldexp(1.0, -digits), smallest);
}

inline std::string mismatch(const Tensor& out, const Expected& expected) {
  int64_t wrong = 0, first = -1;
  for (int64_t i = 0; i < out.count(); ++i) {
    const double got = out.get(i), want = expected.value[i];
    const double allowed =
        expected.tolerance[i] + rounding(out.dtype(), std::fabs(want) + expected.tolerance[i]);
    const bool same = std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= allowed;
    if (same) continue;
    if (wrong++ == 0) first = i;
  }
  if (wrong == 0) return "";
  std::ostringstream text;
  text.precision(9);
  text << wrong << " of " << out.count() << " wrong, the first at " << first << ": " << out.get(first)
       << ", expected " << expected.value[first] << " +- " << expected.tolerance[first] << " and rounding to "
       << dtype_name(out.dtype());
  return text.str();
}

inline std::string difference(const Tensor& out, const Tensor& reference) {
  if (out.same_bits(reference, 0, out.count())) return "";
  int64_t i = 0;
  while (out.same_bits(reference, i, i + 1)) ++i;
  std::ostringstream text;
  text.precision(9);
  text << "bits differ, first at " << i << " of " << out.count() << ": " << out.get(i) << " and "
       << reference.get(i);
  return text.str();
}

}  // namespace cnk::test
