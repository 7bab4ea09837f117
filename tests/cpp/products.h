// SPDX-License-Identifier: BSD-3-Clause
//
// Scalar code for the compressing kernels: element types and their values, packed groups, and the sums of a product.
// Also runs a product.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "kernels/table.h"
#include "rows.h"

namespace sdgp::test {

inline std::mt19937 generator(7);

inline int64_t below(int64_t end) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(end)); }

template <class T>
struct Real {
  using Type = T;
  static constexpr sdgp::DType kDType = sizeof(T) == 4 ? sdgp::DType::kFloat32 : sdgp::DType::kFloat64;
  static constexpr double kRounding = 0;
  static T draw() { return static_cast<T>(std::normal_distribution<double>()(generator)); }
  static double value(T x) { return x; }
};

// One sign bit, kExponent exponent bits, then the mantissa.
template <sdgp::DType dtype, int kExponent>
struct Short {
  using Type = uint16_t;
  static constexpr sdgp::DType kDType = dtype;
  static constexpr int kMantissa = 15 - kExponent;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr double kRounding = 1.0 / (1 << kMantissa);
  static uint16_t draw() {  // magnitudes from 1/8 to 8
    const auto exponent = static_cast<uint32_t>(kBias - 3 + below(6));
    return static_cast<uint16_t>((generator() & 1) << 15 | exponent << kMantissa |
                                 (generator() & ((1u << kMantissa) - 1)));
  }
  static double value(uint16_t x) {
    const int exponent = x >> kMantissa & ((1 << kExponent) - 1);
    const int mantissa = x & ((1 << kMantissa) - 1);
    const int whole = exponent ? mantissa + (1 << kMantissa) : mantissa;
    return (x >> 15 ? -1 : 1) * std::ldexp(whole, (exponent ? exponent : 1) - kBias - kMantissa);
  }
};
using Half = Short<sdgp::DType::kFloat16, 5>;
using BFloat16 = Short<sdgp::DType::kBFloat16, 8>;

template <class F>
std::vector<typename F::Type> draw(int64_t count, double zeros = 0) {
  std::vector<typename F::Type> x(static_cast<size_t>(count));
  for (auto& value : x) value = static_cast<double>(generator() % 1000) < 1000 * zeros ? 0 : F::draw();
  return x;
}

template <class T>
struct Compressed {
  std::vector<T> values;
  std::vector<uint8_t> indices;
  bool operator==(const Compressed& other) const {
    return indices == other.indices && std::memcmp(values.data(), other.values.data(), values.size() * sizeof(T)) == 0;
  }
};

// Packs a group into n slots in order of index: all values whose bits differ from +0, then zeros at the lowest indices.
// The unused slots of a short group hold 0 at index 0.
template <class T>
void pack_group(const T* x, int64_t length, int n, Compressed<T>& to) {
  const T zero{};
  const auto kept = [&](int64_t j) { return std::memcmp(&x[j], &zero, sizeof zero) != 0; };
  int64_t fill = n < length ? n : length;
  for (int64_t j = 0; j < length; ++j) fill -= kept(j);
  int slots = 0;
  for (int64_t j = 0; j < length; ++j) {
    if (!kept(j) && fill-- <= 0) continue;
    to.values.push_back(x[j]);
    to.indices.push_back(static_cast<uint8_t>(j));
    ++slots;
  }
  for (; slots < n; ++slots) {
    to.values.push_back(zero);
    to.indices.push_back(0);
  }
}

enum class Weight { kContiguous, kChannelsLast, kTransposed };

struct Product {
  const char* name;
  int64_t samples;
  int64_t groups;
  int64_t size;
  int64_t cols;
  sdgp::Axis2d height;
  sdgp::Axis2d width;
  Weight weight;
  bool channels_first;
};

constexpr sdgp::Axis2d kPoint{1, 1, 1, 1, 0, 1};

// Sets the weight's strides for rows, columns, height and width.
inline void set_weight_strides(const Product& p, sdgp::SpmmArgs& args) {
  const int64_t h = p.height.kernel;
  const int64_t w = p.width.kernel;
  const int64_t rows = p.groups * p.size;
  const int64_t strides[][4] = {{p.cols * h * w, h * w, w, 1},            // (rows, cols, h, w)
                                {p.cols * h * w, 1, w * p.cols, p.cols},  // (rows, h, w, cols)
                                {1, h * w * rows, w * rows, rows}};       // (cols, h, w, rows)
  const int64_t* chosen = strides[static_cast<int>(p.weight)];
  args.dense.row_stride = chosen[0];
  args.dense.col_stride = chosen[1];
  args.dense.height_stride = chosen[2];
  args.dense.width_stride = chosen[3];
}

inline sdgp::SpmmArgs describe(const Product& p, sdgp::DType dtype, const sdgp::Pruning& pruning) {
  const auto [n, m] = std::pair(pruning.n, pruning.m);
  const bool apart = p.groups > 1 && p.size % m != 0;
  const int64_t kept = (apart ? ceil_div(p.size, m) : ceil_div(p.size * p.groups, m)) * n;
  const int64_t pixels = p.height.out * p.width.out;
  sdgp::SpmmArgs args{};
  args.compressed.row_stride = kept;
  args.compressed.sample_stride = pixels * kept * (apart ? p.groups : 1);
  args.compressed.group_stride = apart ? pixels * kept : kept / p.groups;
  args.out_channels_first = p.channels_first;
  args.dtype = dtype;
  args.pruning = pruning;
  args.size = p.size;
  args.cols = p.cols;
  args.groups = p.groups;
  args.samples = p.samples;
  args.height = p.height;
  args.width = p.width;
  set_weight_strides(p, args);
  return args;
}

// Describes the rows of a product's gradient for pruning. No group of m values crosses two convolution groups.
inline sdgp::PruneArgs describe_rows(const Product& p, sdgp::DType dtype, const sdgp::Pruning& pruning,
                                     bool channels_first) {
  const bool apart = p.groups > 1 && p.size % pruning.m != 0;
  const int64_t pixels = p.height.out * p.width.out;
  const int64_t channels = p.groups * p.size;
  const int64_t channel_stride = channels_first ? pixels : 1;
  const int64_t pixel_stride = channels_first ? 1 : channels;
  const int64_t group_stride = p.size * channel_stride;
  const int64_t rows = apart ? p.groups * pixels : pixels;  // rows of one sample
  sdgp::PruneArgs args{};
  args.dtype = dtype;
  args.pruning = pruning;
  args.size = apart ? p.size : channels;
  args.in_stride = args.out_stride = channel_stride;
  if (p.samples > 1) args.dims[args.ndim++] = {p.samples, channels * pixels, channels * pixels, rows, false};
  if (apart) args.dims[args.ndim++] = {p.groups, group_stride, group_stride, pixels, false};
  if (pixels > 1) args.dims[args.ndim++] = {pixels, pixel_stride, pixel_stride, 1, false};
  return args;
}

inline sdgp::Gradient describe_gradient(const Product& p, const sdgp::PruneArgs& rows) {
  const int64_t pixels = p.height.out * p.width.out;
  const int64_t channels = p.groups * p.size;
  return {.data = rows.in,
          .sample_stride = channels * pixels,
          .pixel_stride = rows.in_stride == 1 ? channels : 1,
          .channel_stride = rows.in_stride,
          .by_conv_group = p.groups > 1 && p.size % rows.pruning.m != 0};
}

struct Sums {
  std::vector<double> exact;
  std::vector<double> magnitude;
};

inline int64_t result_offset(const sdgp::SpmmArgs& args, int64_t sample, int64_t y, int64_t x, int64_t channel) {
  const int64_t channels = args.cols * args.groups;
  if (!args.out_channels_first) return ((sample * args.height.in + y) * args.width.in + x) * channels + channel;
  return ((sample * channels + channel) * args.height.in + y) * args.width.in + x;
}

// Adds the terms of one kept value to all columns of the result's pixel (y, x).
template <class F>
void add_slot(const sdgp::SpmmArgs& args, int64_t group, int64_t at, int64_t slot, int64_t dense, int64_t sample,
              int64_t y, int64_t x, Sums& sums) {
  using T = typename F::Type;
  const double value = F::value(static_cast<const T*>(args.compressed.values)[at + slot]);
  const int64_t k = slot / args.pruning.n * args.pruning.m + args.compressed.indices[at + slot];
  for (int64_t c = 0; c < args.cols; ++c) {
    const int64_t from = dense + (group * args.size + k) * args.dense.row_stride + c * args.dense.col_stride;
    const double term = value * F::value(static_cast<const T*>(args.dense.data)[from]);
    const auto to = static_cast<size_t>(result_offset(args, sample, y, x, group * args.cols + c));
    sums.exact[to] += term;
    sums.magnitude[to] += std::fabs(term);
  }
}

template <class F>
Sums product_sums(const sdgp::SpmmArgs& args) {
  const sdgp::Axis2d& h = args.height;
  const sdgp::Axis2d& w = args.width;
  const auto count = static_cast<size_t>(args.samples * args.groups * args.cols * h.in * w.in);
  Sums sums{std::vector<double>(count), std::vector<double>(count)};
  const int64_t slots = ceil_div(args.size, args.pruning.m) * args.pruning.n;
  for (int64_t i = 0; i < args.samples * args.groups * h.out * w.out * h.kernel * w.kernel; ++i) {
    const int64_t kx = i % w.kernel;
    const int64_t ky = i / w.kernel % h.kernel;
    const int64_t pixel = i / (w.kernel * h.kernel) % (h.out * w.out);
    const int64_t group = i / (w.kernel * h.kernel * h.out * w.out) % args.groups;
    const int64_t sample = i / (w.kernel * h.kernel * h.out * w.out * args.groups);
    const int64_t y = pixel / w.out * h.stride - h.padding + ky * h.dilation;
    const int64_t x = pixel % w.out * w.stride - w.padding + kx * w.dilation;
    if (y < 0 || y >= h.in || x < 0 || x >= w.in) continue;
    const int64_t at = sample * args.compressed.sample_stride + group * args.compressed.group_stride +
                       pixel * args.compressed.row_stride;
    const int64_t dense = ky * args.dense.height_stride + kx * args.dense.width_stride;
    for (int64_t slot = 0; slot < slots; ++slot) add_slot<F>(args, group, at, slot, dense, sample, y, x, sums);
  }
  return sums;
}

// A buffer with the op's alignment and exactly the size that the kernel asks for.
struct Packed {
  explicit Packed(int64_t bytes) : data(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})) {}
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
  ~Packed() { ::operator delete(data, std::align_val_t{64}); }
  void* data;
};

template <class T>
bool multiply(const sdgp::Kernels& table, sdgp::SpmmArgs args, std::vector<T>& out, int64_t pieces) {
  const Packed packed(table.packed_bytes(args));
  args.packed = packed.data;
  args.out = out.data();
  in_pieces(table.pack_units(args), pieces, [&](int64_t begin, int64_t end) {
    table.pack(args, begin, end);
    return true;
  });
  return in_pieces(table.spmm_nm_units(args), pieces,
                   [&](int64_t begin, int64_t end) { return table.spmm_nm(args, begin, end); });
}

}  // namespace sdgp::test
