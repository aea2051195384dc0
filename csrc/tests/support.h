// What the tests share: the kernels of this machine, tensors of exact size, comparison with a reference.
#pragma once

#include <doctest/doctest.h>

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
// Below, equal to and above the sizes of registers of 4, 8
// and 16 lanes, the padding of 32, panels of 48 columns.
constexpr int64_t kChannels[] = {1, 3, 15, 16, 17, 31, 32, 33, 48, 96, 100};

inline std::string dtype_name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}
inline std::string products_name(Products products) {
  return products == Products::kFloat32 ? "float32 products" : "bfloat16 products";
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

// Every value must be a number, and within `relative` of the largest one; of 0.1 where a sum of terms of about 1 cancels.
inline std::string apart(const Tensor& out, const Tensor& reference, double relative) {
  double largest = 0.1;
  for (int64_t i = 0; i < out.count(); ++i) largest = std::max(largest, std::fabs(reference.get(i)));
  for (int64_t i = 0; i < out.count(); ++i) {
    if (std::fabs(out.get(i) - reference.get(i)) <= relative * largest) continue;
    std::ostringstream text;
    text << "at " << i << " of " << out.count() << ": " << out.get(i) << ", expected " << reference.get(i)
         << " +- " << relative * largest;
    return text.str();
  }
  return "";
}

// The real channels of rows with padded channels.
inline Tensor without_padding(const Tensor& t, int64_t c) {
  const int64_t wide = pad_channels(c), rows = t.count() / wide;
  Tensor out(t.dtype(), rows * c);
  for (int64_t i = 0; i < rows * c; ++i) out.set(i, t.get(i / c * wide + i % c));
  return out;
}

// Sizes of teams, beside one thread: every one, or in loops of many cases one after the other.
using Teams = std::vector<int>;
inline Teams every_team() { return {2, 3, 5}; }
inline Teams one_team(uint32_t turn) { return {every_team()[turn % 3]}; }

// What `run` (kernels, products, threads) gives: of one set of instructions the same bits in every team, and near
// those of the first set, whose values tests/ops compares with PyTorch's. Here the point is memory (Buffer), teams,
// and sets that this machine lacks. An empty tensor is a result that was not asked for.
template <class Run>
void check_sets(DType dtype, const Run& run, const Teams& teams, bool products = true) {
  std::vector<Tensor> first;
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (Products of : products ? k.products() : std::vector<Products>{Products::kFloat32}) {
      CAPTURE(products_name(of));
      std::vector<Tensor> out = run(k, of, 1);
      for (int threads : teams) {
        CAPTURE(threads);
        const std::vector<Tensor> again = run(k, of, threads);
        for (size_t i = 0; i < again.size(); ++i) CHECK(difference(again[i], out[i]) == "");
      }
      const bool is_first = first.empty();  // it is compared with itself: a NaN differs from itself
      if (is_first) first.swap(out);
      const std::vector<Tensor>& found = is_first ? first : out;
      for (size_t i = 0; i < found.size(); ++i) {
        CAPTURE(i);
        // of the largest value: in a sum over thousands of pixels that cancels, roundings of bf16 reach 4 %
        const bool exact =
            dtype == DType::kFloat32 && of == Products::kFloat32 && found[i].dtype() == DType::kFloat32;
        if (found[i].count() == first[i].count()) CHECK(apart(found[i], first[i], exact ? 1e-4 : 5e-2) == "");
      }
    }
  }
}

template <class... Tensors>
std::vector<Tensor> results(Tensors&&... tensors) {
  std::vector<Tensor> all;
  (all.push_back(std::move(tensors)), ...);
  return all;
}

}  // namespace cnk::test
