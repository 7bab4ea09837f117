// SPDX-License-Identifier: BSD-3-Clause
//
// Scalar code for the weight gradient of a gradient that is already pruned. Also runs the kernel.
#pragma once

#include <string>

#include "products.h"

namespace sdgp::test {

enum class Layout { kContiguous, kChannelsLast, kTransposed };

struct WeightProduct {
  const char* name;
  int64_t samples;
  int64_t groups;
  int64_t rows;  // output channels per group
  int64_t cols;  // input channels per group
  sdgp::Axis2d height;
  sdgp::Axis2d width;
  Layout gradient;  // (samples, channels, pixels)
  Layout input;     // (samples, channels, height, width)
  bool channels_last;

  int64_t pixels() const { return height.out * width.out; }
  int64_t taps() const { return height.kernel * width.kernel; }
  int64_t gradient_size() const { return samples * groups * rows * pixels(); }
  int64_t input_size() const { return samples * groups * cols * height.in * width.in; }
  int64_t result_size() const { return groups * rows * cols * taps(); }
};

// Samples are outermost, or innermost in the transposed layout.
inline void set_strides(const WeightProduct& p, sdgp::WeightGradArgs& args) {
  const int64_t channels = p.groups * p.rows;
  const int64_t gradient[][3] = {{channels * p.pixels(), p.pixels(), 1},
                                 {channels * p.pixels(), 1, channels},
                                 {1, p.samples * p.pixels(), p.samples}};
  const int64_t* from = gradient[static_cast<int>(p.gradient)];
  args.gradient.sample_stride = from[0];
  args.gradient.channel_stride = from[1];
  args.gradient.pixel_stride = from[2];
  const int64_t h = p.height.in, w = p.width.in, c = p.groups * p.cols;
  const int64_t input[][4] = {
      {c * h * w, h * w, w, 1}, {c * h * w, 1, w * c, c}, {1, h * w * p.samples, p.samples, h * p.samples}};
  from = input[static_cast<int>(p.input)];
  args.sample_stride = from[0];
  args.col_stride = from[1];
  args.line_stride = from[2];
  args.pixel_stride = from[3];
  args.out_row_stride = p.cols * p.taps();
  args.out_col_stride = p.channels_last ? 1 : p.taps();
  args.out_tap_stride = p.channels_last ? p.cols : 1;
}

inline sdgp::WeightGradArgs describe(const WeightProduct& p, sdgp::DType dtype, const sdgp::Pruning& pruning) {
  sdgp::WeightGradArgs args{};
  args.dtype = dtype;
  args.pruning = pruning;
  args.rows = p.rows;
  args.cols = p.cols;
  args.groups = p.groups;
  args.samples = p.samples;
  args.height = p.height;
  args.width = p.width;
  args.threads = 1;
  set_strides(p, args);
  return args;
}

// Describes the gradient's rows for pruning: one row for each sample and channel. The result has the gradient's layout.
inline sdgp::PruneArgs describe_rows(const WeightProduct& p, const sdgp::WeightGradArgs& args) {
  const sdgp::Gradient& g = args.gradient;
  sdgp::PruneArgs rows{};
  rows.dtype = args.dtype;
  rows.pruning = args.pruning;
  rows.size = p.pixels();
  rows.in_stride = rows.out_stride = g.pixel_stride;
  rows.ndim = 2;
  rows.dims[0] = {p.samples, g.sample_stride, g.sample_stride, p.groups * p.rows, false};
  rows.dims[1] = {p.groups * p.rows, g.channel_stride, g.channel_stride, 1, false};
  return rows;
}

// Adds the terms of one pixel of a sample to all taps of a group's weight.
template <class F>
void add_pixel(const sdgp::WeightGradArgs& args, const typename F::Type* pruned, int64_t sample, int64_t channel,
               int64_t pixel, Sums& sums) {
  const sdgp::Axis2d& h = args.height;
  const sdgp::Axis2d& w = args.width;
  const sdgp::Gradient& g = args.gradient;
  const double value = F::value(pruned[sample * g.sample_stride + channel * g.channel_stride + pixel * g.pixel_stride]);
  if (value == 0) return;
  const int64_t first_col = channel / args.rows * args.cols;
  for (int64_t tap = 0; tap < h.kernel * w.kernel; ++tap) {
    const int64_t y = pixel / w.out * h.stride - h.padding + tap / w.kernel * h.dilation;
    const int64_t x = pixel % w.out * w.stride - w.padding + tap % w.kernel * w.dilation;
    if (y < 0 || y >= h.in || x < 0 || x >= w.in) continue;
    for (int64_t c = 0; c < args.cols; ++c) {
      const int64_t from = sample * args.sample_stride + (first_col + c) * args.col_stride + y * args.line_stride +
                           x * args.pixel_stride;
      const double term = value * F::value(static_cast<const typename F::Type*>(args.input)[from]);
      const auto to =
          static_cast<size_t>(channel * args.out_row_stride + c * args.out_col_stride + tap * args.out_tap_stride);
      sums.exact[to] += term;
      sums.magnitude[to] += std::fabs(term);
    }
  }
}

template <class F>
Sums weight_sums(const WeightProduct& p, const sdgp::WeightGradArgs& args, const typename F::Type* pruned) {
  const auto count = static_cast<size_t>(p.result_size());
  Sums sums{std::vector<double>(count), std::vector<double>(count)};
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    for (int64_t channel = 0; channel < p.groups * p.rows; ++channel) {
      for (int64_t pixel = 0; pixel < p.pixels(); ++pixel) add_pixel<F>(args, pruned, sample, channel, pixel, sums);
    }
  }
  return sums;
}

template <class F>
double error_bound(const WeightProduct& p, const Sums& sums, size_t i) {
  const double epsilon = sizeof(typename F::Type) == 8 ? std::ldexp(1, -52) : std::ldexp(1, -23);
  return static_cast<double>(p.samples * p.pixels() + 2) * epsilon * sums.magnitude[i] +
         0.51 * F::kRounding * std::fabs(sums.exact[i]) + (F::kRounding > 0 ? std::ldexp(1, -14) : 0);
}

inline void multiply(const sdgp::Kernels& table, const sdgp::WeightGradArgs& args, int64_t pieces) {
  in_pieces(table.weight_grad_nm_units(args), pieces, [&](int64_t begin, int64_t end) {
    table.weight_grad_nm(args, begin, end);
    return true;
  });
}

}  // namespace sdgp::test
