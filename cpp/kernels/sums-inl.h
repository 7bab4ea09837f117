// SPDX-License-Identifier: BSD-3-Clause
//
// Computes the sums of rescale and multiplies by its factors, over three nested axes, some of which share a factor.
// This file deals with memory and factors, not with groups.
#pragma once

#include <limits>

#include "select_nm-inl.h"
#include "stage-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int64_t kPartialSum = 1024;  // rows per partial sum, to keep the rounding error small

// A dimension of a block, the pruned one included, as the sums see it.
struct Axis {
  int64_t size;
  int64_t in_stride;
  int64_t out_stride;
  int64_t factor_stride;  // 0: all elements share a factor
};

// Sums run in vectors of E: double for double, otherwise float. Arrays of sums and factors have room for one more
// vector than they hold.
template <class C>
struct FactorSums {
  using T = typename C::T;
  using E = typename C::E;
  static constexpr int kL = kLanes<E>;

  // Returns true in the last `count` lanes.
  static SDGP_INLINE Key<C> last_lanes(int64_t count) {
    Key<C> lane{};
    for (int i = 0; i < kL; ++i) lane[i] = static_cast<typename C::K>(i);
    return lane >= static_cast<typename C::K>(kL - count);
  }

  static SDGP_INLINE Elem<C> absolute(Elem<C> x) { return (Elem<C>)magnitude_key<C>(x); }

  // all / kept. If `kept` is subnormal the quotient may overflow. The largest finite factor then keeps the products
  // finite, because no kept element is larger than `kept`.
  static SDGP_INLINE Elem<C> ratio(Elem<C> all, Elem<C> kept) {
    constexpr E kLargest = std::numeric_limits<E>::max();
    const Elem<C> largest = splat<E>(kLargest);
    const Elem<C> quotient = kept == 0 ? splat<E>(1) : all / kept;
    return (all <= largest) & (quotient > largest) ? largest : quotient;
  }

  // A pruned element stays 0 even if its factor is inf or NaN.
  static SDGP_INLINE Elem<C> times(Elem<C> x, Elem<C> factor) { return keep_if(x != 0, C::round(x * factor)); }

  // Lines of at least kL contiguous elements are summed and multiplied in place. The last vector ends with the line. It
  // may overlap the one before it, but no element counts twice.

  static E sum_line(const T* p, int64_t size) {
    Elem<C> sum[2] = {};  // two chains hide the latency of the additions
    int64_t i = 0;
    for (; i + 2 * kL <= size; i += 2 * kL) {
      sum[0] += absolute(C::load(p + i));
      sum[1] += absolute(C::load(p + i + kL));
    }
    if (i + kL <= size) {
      sum[0] += absolute(C::load(p + i));
      i += kL;
    }
    if (i < size) sum[1] += absolute(keep_if(last_lanes(size - i), C::load(p + size - kL)));
    return sum_lanes(sum[0] + sum[1]);
  }

  // Adds `rows` rows, `row_stride` apart, to the sums of kChains vectors of columns, in the lanes of `mask`. Each
  // column has its own factor.
  template <int kChains>
  static SDGP_INLINE void sum_vectors(const T* p, int64_t rows, int64_t row_stride, Key<C> mask, E* sums) {
    Elem<C> sum[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = load_bits<Elem<C>>(sums + c * kL);
    for (int64_t first = 0; first < rows; first += kPartialSum) {
      const int64_t last = at_most(first + kPartialSum, rows);
      Elem<C> part[kChains] = {};
      for (int64_t r = first; r < last; ++r) {
        for (int c = 0; c < kChains; ++c) part[c] += absolute(C::load(p + r * row_stride + c * kL));
      }
      for (int c = 0; c < kChains; ++c) sum[c] = add_if(mask, sum[c], part[c]);
    }
    for (int c = 0; c < kChains; ++c) store_bits(sums + c * kL, sum[c]);
  }

  static void sum_columns(const T* p, int64_t rows, int64_t row_stride, int64_t size, E* sums) {
    const Key<C> all = last_lanes(kL);
    int64_t i = 0;
    for (; i + 4 * kL <= size; i += 4 * kL) sum_vectors<4>(p + i, rows, row_stride, all, sums + i);
    for (; i + kL <= size; i += kL) sum_vectors<1>(p + i, rows, row_stride, all, sums + i);
    const int64_t last = size - kL;
    if (i < size) sum_vectors<1>(p + last, rows, row_stride, last_lanes(size - i), sums + last);
  }

  static void sum_sheet(const T* p, const int64_t* stride, const Axis* axes, E* sums) {
    const Axis& rows = axes[0];
    const Axis& line = axes[1];
    if (line.factor_stride != 0 && rows.factor_stride == 0) {
      return sum_columns(p, rows.size, stride[0], line.size, sums);
    }
    for (int64_t r = 0; r < rows.size; ++r, p += stride[0], sums += rows.factor_stride) {
      if (line.factor_stride == 0) {
        *sums += sum_line(p, line.size);
      } else {
        sum_columns(p, 1, 0, line.size, sums);
      }
    }
  }

  template <class Factor>
  static SDGP_INLINE void multiply_line(T* p, int64_t size, Factor factor) {
    const int64_t last = size - kL;
    const Elem<C> end = C::load(p + last);
    int64_t i = 0;
    for (; i <= last; i += kL) C::store(p + i, times(C::load(p + i), factor(i)));
    if (i < size) C::store(p + last, last_lanes(size - i) ? times(end, factor(last)) : C::load(p + last));
  }

  static void multiply_sheet(T* p, const int64_t* stride, const Axis* axes, const E* factors) {
    for (int64_t r = 0; r < axes[0].size; ++r, p += stride[0], factors += axes[0].factor_stride) {
      if (axes[1].factor_stride == 0) {
        const Elem<C> factor = splat(*factors);
        multiply_line(p, axes[1].size, [&](int64_t) { return factor; });
      } else {
        multiply_line(p, axes[1].size, [&](int64_t i) { return load_bits<Elem<C>>(factors + i); });
      }
    }
  }

  // Everything else (short lines, strides with gaps) goes through a buffer, as many whole lines at a time as it holds.
  struct Buffer {
    static constexpr int64_t kSize = 2048;
    T raw[kSize + kL];
    E value[kSize + kL];  // the magnitudes, or the factor of each element
  };

  // Calls part(element offset, factor offset, sizes) for each part of a slab. A part fits the buffer.
  template <class Part>
  static SDGP_INLINE void for_each_part(const int64_t* stride, const Axis* axes, Part part) {
    Box box;
    int64_t at[3];
    for (at[2] = 0; at[2] < axes[2].size; at[2] += box.size[2]) {
      box.size[2] = at_most(axes[2].size - at[2], Buffer::kSize);
      for (at[1] = 0; at[1] < axes[1].size; at[1] += box.size[1]) {
        box.size[1] = at_most(axes[1].size - at[1], Buffer::kSize / box.size[2]);
        for (at[0] = 0; at[0] < axes[0].size; at[0] += box.size[0]) {
          box.size[0] = at_most(axes[0].size - at[0], Buffer::kSize / (box.size[1] * box.size[2]));
          int64_t element = 0;
          int64_t factor = 0;
          for (int d = 0; d < 3; ++d) {
            element += at[d] * stride[d];
            factor += at[d] * axes[d].factor_stride;
          }
          part(element, factor, box);
        }
      }
    }
  }

  // Copies a part from or to the buffer, in as few runs as the strides allow.
  template <class Copy>
  static SDGP_INLINE void copy_part(const int64_t* stride, Box box, Copy copy) {
    Strides tensor{{stride[0], stride[1], stride[2]}};
    for (int d = 1; d >= 0; --d) {
      if (tensor.axis[d] != box.size[2] * tensor.axis[2] || (d == 0 && box.size[1] != 1)) break;
      box.size[2] *= box.size[d];
      box.size[d] = 1;
    }
    copy(Strides{{box.size[1] * box.size[2], box.size[2], 1}}, tensor, box);
  }

  static void sum_part(const E* value, const Box& box, const Axis* axes, E* part_sums) {
    const int64_t size = box.size[2];
    for (int64_t i = 0; i < box.size[0]; ++i) {
      E* sums = part_sums + i * axes[0].factor_stride;
      if (axes[2].factor_stride != 0 && axes[1].factor_stride == 0) {
        for (int64_t j = 0; j < size; j += kL) {
          Elem<C> sum{};
#pragma GCC unroll 4
          for (int64_t r = 0; r < box.size[1]; ++r) sum += load_bits<Elem<C>>(value + r * size + j);
          for (int64_t k = j; k < size && k < j + kL; ++k) sums[k * axes[2].factor_stride] += sum[k - j];
        }
        value += box.size[1] * size;
        continue;
      }
      for (int64_t r = 0; r < box.size[1]; ++r, value += size, sums += axes[1].factor_stride) {
        if (axes[2].factor_stride == 0) {
          *sums += sum_values(value, size);
        } else {
          for (int64_t j = 0; j < size; ++j) sums[j * axes[2].factor_stride] += value[j];
        }
      }
    }
  }

  static SDGP_INLINE E sum_values(const E* value, int64_t size) {
    E total = 0;
    int64_t i = 0;
    if (size >= kL) {
      Elem<C> sum{};
      for (; i + kL <= size; i += kL) sum += load_bits<Elem<C>>(value + i);
      total = sum_lanes(sum);
    }
    for (; i < size; ++i) total += value[i];
    return total;
  }

  static void sum_slab(const T* p, const int64_t* stride, const Axis* axes, E* sums) {
    Buffer buffer;
    for_each_part(stride, axes, [&](int64_t element, int64_t factor, const Box& box) {
      copy_part(stride, box, [&](const Strides& to, const Strides& from, const Box& runs) {
        copy_box(buffer.raw, to, p + element, from, runs);
      });
      for (int64_t i = 0; i < box.volume(); i += kL) store_bits(buffer.value + i, absolute(C::load(buffer.raw + i)));
      sum_part(buffer.value, box, axes, sums + factor);
    });
  }

  // Writes the factor of each element of a part. Vectors overlap in ascending order: the next line overwrites the
  // excess.
  static void spread(const E* factors, const Box& box, const Axis* axes, E* value) {
    const int64_t size = box.size[2];
    const int64_t stride = axes[2].factor_stride;
    const auto each_line = [&](auto line) {
      for (int64_t i = 0; i < box.size[0]; ++i) {
        const E* f = factors + i * axes[0].factor_stride;
        for (int64_t r = 0; r < box.size[1]; ++r, value += size, f += axes[1].factor_stride) line(value, f);
      }
    };
    if (stride == 0 && size <= kL) {
      each_line([](E* to, const E* f) { store_bits(to, splat(*f)); });
    } else if (stride == 1 && size <= kL) {
      each_line([](E* to, const E* f) { store_bits(to, load_bits<Elem<C>>(f)); });
    } else {
      each_line([&](E* to, const E* f) {
        for (int64_t j = 0; j < size; ++j) to[j] = f[j * stride];
      });
    }
  }

  static void multiply_slab(T* p, const int64_t* stride, const Axis* axes, const E* factors) {
    Buffer buffer;
    for_each_part(stride, axes, [&](int64_t element, int64_t factor, const Box& box) {
      spread(factors + factor, box, axes, buffer.value);
      copy_part(stride, box, [&](const Strides& to, const Strides& from, const Box& runs) {
        copy_box(buffer.raw, to, p + element, from, runs);
      });
      for (int64_t i = 0; i < box.volume(); i += kL) {
        C::store(buffer.raw + i, times(C::load(buffer.raw + i), load_bits<Elem<C>>(buffer.value + i)));
      }
      copy_part(stride, box, [&](const Strides& from, const Strides& to, const Box& runs) {
        copy_box(p + element, to, buffer.raw, from, runs);
      });
    });
  }

  static bool lies_in_lines(const int64_t* stride, const Axis* axes) {
    return stride[2] == 1 && axes[2].size >= kL && axes[2].factor_stride <= 1;
  }

  // sums[f] += the sum of |x| over all elements that share factor f, in three axes.
  static void sum(const T* p, const int64_t* stride, const Axis* axes, E* sums) {
    if (!lies_in_lines(stride, axes)) return sum_slab(p, stride, axes, sums);
    for (int64_t i = 0; i < axes[0].size; ++i) {
      sum_sheet(p + i * stride[0], stride + 1, axes + 1, sums + i * axes[0].factor_stride);
    }
  }

  static void multiply(T* p, const int64_t* stride, const Axis* axes, const E* factors) {
    if (!lies_in_lines(stride, axes)) return multiply_slab(p, stride, axes, factors);
    for (int64_t i = 0; i < axes[0].size; ++i) {
      multiply_sheet(p + i * stride[0], stride + 1, axes + 1, factors + i * axes[0].factor_stride);
    }
  }
};

}  // namespace sdgp::SDGP_ISA
