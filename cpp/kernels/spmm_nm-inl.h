// SPDX-License-Identifier: BSD-3-Clause
//
// The product of N:M rows with a dense matrix, and its gather form for convolutions: every result row is a sum, over
// taps, of one N:M row times that tap's matrix. A plain product has one tap. Compiled once per instruction set.
//
// Note [Row kernel]
// A result row's panel of kP vectors stays in registers while the row's kept values pass: each is broadcast and
// multiplied with the row of the dense block that its offset names, one FMA with a memory operand per vector. The block
// (some taps x some reduction rows x the panel) must sit in the first-level cache, so it is small and many result
// rows pass before the next; partial sums wait in the second-level cache. Limits: two loads a cycle, one of which per
// kP is the broadcast's.
#pragma once

#include "prune_nm-inl.h"
#include "scratch-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int kMaxPanel = 8;               // vectors: 2 FMA ports x 4 cycles of latency are in flight
constexpr int64_t kChunkRows = 256;        // result rows that share a trip of the dense operand to that cache
constexpr int64_t kSlabBytes = 1 << 19;    // of kept values and offsets in the second-level cache
constexpr int64_t kResultBytes = 1 << 20;  // of partial sums that wait for the next slab
constexpr int64_t kMinUnits = 64;          // enough for the threads of a large machine

// Of the dense operand in the first-level cache; the rest is for what streams past.
inline int64_t block_bytes() {
  const int64_t wanted = first_level_cache_bytes() / 3 * 2;
  return wanted < 49152 ? wanted : 49152;
}

static_assert(kMaxGroupSize * kMaxPanel * kVectorBytes <= 65536, "an offset into a block has 16 bits");

SDGP_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

SDGP_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// How the dense operand is cut and packed: [group][panel][block][tap][row][panel's columns], all of E, the last
// panel's missing columns zero.
struct DensePlan {
  int64_t taps;
  int64_t panel;  // vectors
  int64_t panels;
  int64_t width;  // columns of a panel
  int64_t rows;   // of the reduction in a block, a multiple of m; the last block may have fewer
  int64_t blocks;
  int64_t tap_set;  // taps that share the first-level cache

  int64_t row_bytes(int64_t element_size) const { return width * element_size; }
  int64_t block_rows(const SpmmArgs& args, int64_t block) const {
    const int64_t left = args.size - block * rows;
    return left < rows ? left : rows;
  }
  int64_t panel_offset(const SpmmArgs& args, int64_t group, int64_t at) const {
    return (group * panels + at) * args.size * taps * width;
  }
  int64_t block_offset(int64_t block) const { return block * rows * taps * width; }
};

template <class E>
DensePlan make_dense_plan(const SpmmArgs& args) {
  DensePlan plan{};
  plan.taps = args.height.kernel * args.width.kernel;
  const int64_t vectors = ceil_div(args.cols, kLanes<E>);
  plan.panels = ceil_div(vectors, kMaxPanel);
  plan.panel = ceil_div(vectors, plan.panels);
  plan.panels = ceil_div(vectors, plan.panel);
  plan.width = plan.panel * kLanes<E>;
  const int64_t groups = ceil_div(args.size, args.m);
  const int64_t group_bytes = args.m * plan.width * static_cast<int64_t>(sizeof(E));
  const int64_t cache = block_bytes();
  const int64_t fit = group_bytes < cache ? cache / group_bytes : 1;
  plan.blocks = ceil_div(groups, fit);
  plan.rows = ceil_div(groups, plan.blocks) * args.m;
  plan.blocks = ceil_div(args.size, plan.rows);
  plan.tap_set = cache / (plan.rows * plan.width * static_cast<int64_t>(sizeof(E)));
  if (plan.tap_set < 1) plan.tap_set = 1;
  if (plan.tap_set > plan.taps) plan.tap_set = plan.taps;
  return plan;
}

// --- packing -----------------------------------------------------------------------------------------------------

template <class C>
SDGP_INLINE typename C::E load_element(const typename C::T* p) {
  if constexpr (sizeof(typename C::T) == sizeof(typename C::E)) {
    return *p;
  } else {
    typename C::T lanes[kLanes<typename C::E>] = {*p};
    return C::load(lanes)[0];
  }
}

template <class C>
SDGP_INLINE void store_element(typename C::T* p, typename C::E value) {
  if constexpr (sizeof(typename C::T) == sizeof(typename C::E)) {
    *p = value;
  } else {
    typename C::T lanes[kLanes<typename C::E>];
    C::store(lanes, C::round(splat<typename C::E>(value)));
    *p = lanes[0];
  }
}

template <class C>
SDGP_INLINE void load_elements(const typename C::T* from, typename C::E* to, int64_t count) {
  constexpr int kL = kLanes<typename C::E>;
  int64_t i = 0;
  for (; i + kL <= count; i += kL) store_bits(to + i, C::load(from + i));
  for (; i < count; ++i) to[i] = load_element<C>(from + i);
}

template <class C>
SDGP_INLINE void store_elements(const typename C::E* from, typename C::T* to, int64_t count) {
  constexpr int kL = kLanes<typename C::E>;
  int64_t i = 0;
  for (; i + kL <= count; i += kL) C::store(to + i, C::round(load_bits<Elem<C>>(from + i)));
  for (; i < count; ++i) store_element<C>(to + i, from[i]);
}

template <class C>
void pack_range(const SpmmArgs& args, int64_t begin, int64_t end) {
  using E = typename C::E;
  const DensePlan plan = make_dense_plan<E>(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % plan.blocks;
    const int64_t panel = unit / plan.blocks % plan.panels;
    const int64_t group = unit / plan.blocks / plan.panels;
    const int64_t first_col = panel * plan.width;
    const int64_t cols = args.cols - first_col < plan.width ? args.cols - first_col : plan.width;
    E* to = static_cast<E*>(args.packed) + plan.panel_offset(args, group, panel) + plan.block_offset(block);
    for (int64_t tap = 0; tap < plan.taps; ++tap) {
      const int64_t at = tap / args.width.kernel * args.dense_height_stride +
                         tap % args.width.kernel * args.dense_width_stride + first_col * args.dense_col_stride;
      for (int64_t k = 0; k < plan.block_rows(args, block); ++k, to += plan.width) {
        const auto* from = static_cast<const typename C::T*>(args.dense) + at +
                           (group * args.size + block * plan.rows + k) * args.dense_row_stride;
        if (args.dense_col_stride == 1) {
          load_elements<C>(from, to, cols);
        } else {
          for (int64_t j = 0; j < cols; ++j) to[j] = load_element<C>(from + j * args.dense_col_stride);
        }
        for (int64_t j = cols; j < plan.width; ++j) to[j] = 0;
      }
    }
  }
}

// --- the row kernel ----------------------------------------------------------------------------------------------

// N:M rows of one block of the reduction, as the row kernel reads them: consecutive, with offsets for indices.
template <class E>
struct KeptBlock {
  const E* values;          // (sources, count)
  const uint16_t* offsets;  // bytes from the beginning of the tap's rows in the dense block
  int64_t count;
};

template <class E>
struct BlockCall {
  // Per result row that has something to add: its number, then for each tap which N:M row it reads, -1: none.
  const int32_t* entries;
  int64_t count;
  int64_t taps;
  KeptBlock<E> kept;
  const char* dense;
  int64_t tap_bytes;
  const E* in;  // partial sums
  int64_t in_stride;
  E* out;
  int64_t out_stride;
  const char* next;  // the following block, fetched into the second-level cache meanwhile
  int64_t next_lines;
};

template <class E, int kP, bool kFirst, int... kI>
SDGP_INLINE void multiply_row(const BlockCall<E>& call, const int32_t* entry, std::integer_sequence<int, kI...>) {
  constexpr int kL = kLanes<E>;
  const E* in = call.in + entry[0] * call.in_stride;
  // An array that is not unrolled everywhere would live on the stack: hence the pack expansions.
  Vec<E> sum[kP] = {(kFirst ? Vec<E>{} : load_bits<Vec<E>>(in + kI * kL))...};
  const char* dense = call.dense;
  for (int64_t tap = 1; tap <= call.taps; ++tap, dense += call.tap_bytes) {
    if (entry[tap] < 0) continue;
    const E* value = call.kept.values + entry[tap] * call.kept.count;
    const uint16_t* offset = call.kept.offsets + entry[tap] * call.kept.count;
    for (const E* const end = value + call.kept.count; value != end; ++value, ++offset) {
      const char* row = dense + *offset;
      const Vec<E> x = splat(*value);
      ((sum[kI] = multiply_add(x, load_bits<Vec<E>>(row + kI * sizeof(Vec<E>)), sum[kI])), ...);
    }
  }
  E* out = call.out + entry[0] * call.out_stride;
  ((store_bits(out + kI * kL, sum[kI])), ...);
}

template <class E, int kP, bool kFirst>
__attribute__((noinline)) void multiply_block(const BlockCall<E>& block) {
  constexpr auto kVectors = std::make_integer_sequence<int, kP>{};
  const BlockCall<E> call = block;  // a copy: nothing that is stored can change it
  const int32_t* entry = call.entries;
  const char* next = call.next;
  for (int64_t i = 0; i < call.count; ++i, entry += 1 + call.taps) {
    for (int64_t line = 0; line < call.next_lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    multiply_row<E, kP, kFirst>(call, entry, kVectors);
  }
}

template <class E>
using BlockFunction = void (*)(const BlockCall<E>&);

template <class E, bool kFirst>
BlockFunction<E> block_function(int64_t panel) {
  return [&]<int... kI>(std::integer_sequence<int, kI...>) {
    constexpr BlockFunction<E> kFunctions[] = {&multiply_block<E, kI + 1, kFirst>...};
    return kFunctions[panel - 1];
  }(std::make_integer_sequence<int, kMaxPanel>{});
}

// --- the product -------------------------------------------------------------------------------------------------

// Work is cut into chunks of result rows x convolution groups x parts of the panels.
struct SpmmPlan {
  DensePlan dense;
  int64_t rows;  // of the result, over all samples
  int64_t chunks;
  int64_t parts;
  int64_t units;
};

template <class E>
SpmmPlan make_spmm_plan(const SpmmArgs& args) {
  SpmmPlan plan{};
  plan.dense = make_dense_plan<E>(args);
  plan.rows = args.samples * args.height.in * args.width.in;
  plan.chunks = ceil_div(plan.rows, kChunkRows);
  const int64_t panel_bytes = kChunkRows * plan.dense.width * static_cast<int64_t>(sizeof(E));
  plan.parts = ceil_div(plan.dense.panels * panel_bytes, kResultBytes);
  const int64_t wanted = ceil_div(kMinUnits, plan.chunks * args.groups);
  const int64_t most = ceil_div(plan.dense.panels, 3);  // each part reads all of the N:M rows again
  const int64_t split = wanted < most ? wanted : most;
  if (plan.parts < split) plan.parts = split;
  plan.units = plan.chunks * args.groups * plan.parts;
  return plan;
}

// Which position of the gradient a position of the result meets at tap `k`; -1: none.
SDGP_INLINE int64_t source_of(const Axis2d& axis, int64_t at, int64_t k) {
  const int64_t padded = at + axis.padding - k * axis.dilation;
  if (padded < 0 || padded % axis.stride != 0) return -1;
  return padded / axis.stride < axis.out ? padded / axis.stride : -1;
}

template <class C>
class Spmm {
  using T = typename C::T;
  using E = typename C::E;

 public:
  static bool run(const SpmmArgs& args, int64_t begin, int64_t end) {
    Spmm spmm(args);
    for (int64_t unit = begin; unit < end; ++unit) spmm.run_unit(unit);
    return spmm.valid_;
  }

 private:
  // Kept values are read this many at a time.
  static constexpr int64_t kStep = 16;
  static constexpr int64_t kAhead = 4;  // rows: a slab's piece of one is too short for the hardware's prefetcher
  using Step = VecType<uint8_t, kStep>::type;
  using WideStep = VecType<uint16_t, 2 * kStep>::type;
  static constexpr VecType<int8_t, kStep>::type kStepLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  struct EntryList {
    const int32_t* entries;
    int64_t count;
    int64_t taps;
  };

  explicit Spmm(const SpmmArgs& args) : args_(args), plan_(make_spmm_plan<E>(args)), dense_(plan_.dense) {
    const Axis2d& w = args.width;
    int32_t* column = columns_.reserve(w.in * w.kernel);
    for (int64_t x = 0; x < w.in; ++x) {
      for (int64_t k = 0; k < w.kernel; ++k) *column++ = static_cast<int32_t>(source_of(w, x, k));
    }
    line_.reserve(args.height.kernel);
  }

  void run_unit(int64_t unit) {
    const int64_t part = unit % plan_.parts;
    group_ = unit / plan_.parts % args_.groups;
    const int64_t chunk = unit / plan_.parts / args_.groups;
    first_row_ = chunk * kChunkRows;
    rows_ = plan_.rows - first_row_ < kChunkRows ? plan_.rows - first_row_ : kChunkRows;
    panel_begin_ = dense_.panels * part / plan_.parts;
    panel_end_ = dense_.panels * (part + 1) / plan_.parts;
    find_sources();
    list_entries();

    const int64_t kept_bytes = static_cast<int64_t>(sizeof(uint16_t) + sizeof(E)) * sources_count_;
    const int64_t block_kept = dense_.rows / args_.m * args_.n;
    int64_t slab_blocks = kSlabBytes / (kept_bytes * block_kept + 1);
    if (slab_blocks < 1) slab_blocks = 1;
    const int64_t slabs = ceil_div(dense_.blocks, slab_blocks);
    E* sums = sums_.reserve(rows_ * dense_.width * (slabs > 1 ? panel_end_ - panel_begin_ : 1));
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t block_begin = dense_.blocks * slab / slabs;
      const int64_t block_end = dense_.blocks * (slab + 1) / slabs;
      read_kept(block_begin, block_end);
      for (int64_t panel = panel_begin_; panel < panel_end_; ++panel) {
        E* panel_sums = slabs > 1 ? sums + (panel - panel_begin_) * rows_ * dense_.width : sums;
        multiply_panel(panel, block_begin, block_end, panel_sums);
      }
    }
  }

  // For each result row and tap: which N:M row, counted from the first that this unit needs.
  void find_sources() {
    const Axis2d& h = args_.height;
    const Axis2d& w = args_.width;
    int32_t* table = sources_.reserve(kChunkRows * dense_.taps);
    int64_t x = first_row_ % w.in;
    int64_t y = first_row_ / w.in % h.in;
    int64_t sample = first_row_ / w.in / h.in;
    first_source_ = sample * h.out * w.out;
    int64_t low = INT32_MAX;
    int64_t high = -1;
    bool new_line = true;
    for (int64_t r = 0; r < rows_; ++r) {
      if (new_line) {
        for (int64_t k = 0; k < h.kernel; ++k) {
          const int64_t source = source_of(h, y, k);
          line_.data[k] = source < 0 ? -1 : (sample * h.out + source) * w.out - first_source_;
        }
      }
      const int32_t* column = columns_.data + x * w.kernel;
      for (int64_t ky = 0; ky < h.kernel; ++ky) {
        for (int64_t kx = 0; kx < w.kernel; ++kx) {
          const int64_t source = line_.data[ky] < 0 || column[kx] < 0 ? -1 : line_.data[ky] + column[kx];
          *table++ = static_cast<int32_t>(source);
          if (source >= 0 && source < low) low = source;
          if (source > high) high = source;
        }
      }
      new_line = ++x == w.in;
      if (new_line) {
        x = 0;
        if (++y == h.in) {
          y = 0;
          ++sample;
        }
      }
    }
    sources_count_ = high < 0 ? 0 : high - low + 1;
    first_source_ += high < 0 ? 0 : low;
    for (int64_t i = 0; i < rows_ * dense_.taps; ++i) {
      if (sources_.data[i] >= 0) sources_.data[i] -= static_cast<int32_t>(low);
    }
  }

  // The rows that each set of taps adds to; the first set begins all of them.
  void list_entries() {
    const int64_t sets = ceil_div(dense_.taps, dense_.tap_set);
    int32_t* entry = entries_.reserve(kChunkRows * (dense_.taps + sets));
    lists_.reserve(sets);
    for (int64_t set = 0; set < sets; ++set) {
      const int64_t first = set * dense_.tap_set;
      const int64_t taps = dense_.taps - first < dense_.tap_set ? dense_.taps - first : dense_.tap_set;
      lists_.data[set] = {entry, 0, taps};
      for (int64_t r = 0; r < rows_; ++r) {
        bool any = set == 0;
        for (int64_t t = 0; t < taps; ++t) {
          entry[1 + t] = sources_.data[r * dense_.taps + first + t];
          any |= entry[1 + t] >= 0;
        }
        if (!any) continue;
        entry[0] = static_cast<int32_t>(r);
        entry += 1 + taps;
        ++lists_.data[set].count;
      }
    }
  }

  int64_t kept_before(int64_t block) const {
    const int64_t groups = ceil_div(args_.size, args_.m);
    const int64_t before = block * (dense_.rows / args_.m);
    return (before < groups ? before : groups) * args_.n;
  }

  // Brings a slab's kept values and offsets into the order of the row kernel: [block][source][kept]. Indices out of
  // range are noted, and read as the last one in it.
  void read_kept(int64_t block_begin, int64_t block_end) {
    const int64_t begin = kept_before(block_begin);
    const int64_t count = kept_before(block_end) - begin;
    const int64_t block_kept = dense_.rows / args_.m * args_.n;
    uint16_t* base = base_.reserve(count + kStep);
    uint8_t* last = last_.reserve(count + kStep);
    const auto row_bytes = static_cast<uint16_t>(dense_.row_bytes(sizeof(E)));
    for (int64_t i = 0; i < count + kStep; ++i) {
      const int64_t first = (begin + i) / args_.n * args_.m;
      const int64_t left = args_.size - first;
      base[i] = static_cast<uint16_t>(first % dense_.rows * row_bytes);
      last[i] = i < count ? static_cast<uint8_t>((left < args_.m ? left : args_.m) - 1) : 255;
    }
    // Whole steps are written: what is too much falls to the next row, which is written later, or to a gap.
    const int64_t blocks = block_end - block_begin;
    uint16_t* offsets = offsets_.reserve(count * sources_count_ + blocks * kStep);
    E* values = values_.reserve(count * sources_count_ + blocks * kStep);
    const int64_t readable = source_offset(first_source_ + sources_count_ - 1) + begin + count;
    Step bad{};
    for (int64_t s = 0; s < sources_count_; ++s) {
      const int64_t at = source_offset(first_source_ + s) + begin;
      int64_t gap = 0;
      for (int64_t i = 0; i < count; i += block_kept, gap += kStep) {
        const int64_t length = count - i < block_kept ? count - i : block_kept;
        const int64_t to = i * sources_count_ + s * length + gap;
        for (int64_t j = 0; j < length; j += kStep) {
          const T* value = static_cast<const T*>(args_.values) + at + i + j;
          const uint8_t* index = args_.indices + at + i + j;
          T value_copy[kStep];
          uint8_t index_copy[kStep];
          __builtin_prefetch(value + kAhead * args_.row_stride);
          __builtin_prefetch(index + kAhead * args_.row_stride);
          if (at + i + j + kStep > readable) [[unlikely]] {
            for (int64_t k = 0; k < kStep; ++k) {
              value_copy[k] = j + k < length ? value[k] : T{};
              index_copy[k] = j + k < length ? index[k] : 0;
            }
            value = value_copy;
            index = index_copy;
          }
          for (int64_t k = 0; k < kStep; k += kLanes<E>) store_bits(values + to + j + k, C::load(value + k));
          const auto at_index = load_bits<Step>(index);
          const auto limit = load_bits<Step>(last + i + j);
          const Step safe = at_index < limit ? at_index : limit;
          const Step inside = (Step)(kStepLanes < static_cast<int8_t>(length - j < kStep ? length - j : kStep));
          bad |= (safe ^ at_index) & inside;
          const auto rows = __builtin_convertvector(safe, WideStep);
          store_bits(offsets + to + j, load_bits<WideStep>(base + i + j) + rows * row_bytes);
        }
      }
    }
    const auto halves = (VecType<uint64_t, 16>::type)bad;
    if (halves[0] | halves[1]) valid_ = false;
  }

  int64_t source_offset(int64_t source) const {
    const int64_t per_sample = args_.height.out * args_.width.out;
    return source / per_sample * args_.sample_stride + source % per_sample * args_.row_stride +
           group_ * args_.group_stride;
  }

  void multiply_panel(int64_t panel, int64_t block_begin, int64_t block_end, E* sums) {
    const int64_t first_col = panel * dense_.width;
    const int64_t cols = args_.cols - first_col < dense_.width ? args_.cols - first_col : dense_.width;
    const int64_t sets = ceil_div(dense_.taps, dense_.tap_set);
    const bool direct = sizeof(T) == sizeof(E) && !args_.out_channels_first && cols == dense_.width &&
                        lists_.data[sets - 1].count == rows_;
    const E* packed = static_cast<const E*>(args_.packed) + dense_.panel_offset(args_, group_, panel);
    BlockCall<E> call{};
    call.in = sums;
    call.in_stride = dense_.width;
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t kept =
          (kept_before(block) - kept_before(block_begin)) * sources_count_ + (block - block_begin) * kStep;
      call.kept = {values_.data + kept, offsets_.data + kept, kept_before(block + 1) - kept_before(block)};
      call.tap_bytes = dense_.block_rows(args_, block) * dense_.row_bytes(sizeof(E));
      const char* dense = reinterpret_cast<const char*>(packed + dense_.block_offset(block));
      for (int64_t set = 0; set < sets; ++set) {
        const EntryList& list = lists_.data[set];
        const bool first = block == 0 && set == 0;
        const bool last = block + 1 == dense_.blocks && set + 1 == sets;
        call.entries = list.entries;
        call.count = list.count;
        call.taps = list.taps;
        call.dense = dense + set * dense_.tap_set * call.tap_bytes;
        call.next = call.dense + call.taps * call.tap_bytes;
        call.next_lines = last ? 0 : ceil_div(call.taps * call.tap_bytes / 64, list.count + 1);
        const bool to_result = last && direct;
        call.out = to_result ? static_cast<E*>(args_.out) + result_offset(first_row_, first_col) : sums;
        call.out_stride = to_result ? args_.groups * args_.cols : dense_.width;
        (first ? block_function<E, true> : block_function<E, false>)(dense_.panel)(call);
      }
    }
    if (block_end == dense_.blocks && !direct) store_panel(sums, first_col, cols);
  }

  int64_t result_offset(int64_t row, int64_t col) const {
    const int64_t channel = group_ * args_.cols + col;
    const int64_t channels = args_.groups * args_.cols;
    if (!args_.out_channels_first) return row * channels + channel;
    const int64_t per_sample = args_.height.in * args_.width.in;
    return (row / per_sample * channels + channel) * per_sample + row % per_sample;
  }

  void store_panel(const E* sums, int64_t first_col, int64_t cols) {
    T* const out = static_cast<T*>(args_.out);
    if (!args_.out_channels_first) {
      for (int64_t r = 0; r < rows_; ++r) {
        store_elements<C>(sums + r * dense_.width, out + result_offset(first_row_ + r, first_col), cols);
      }
      return;
    }
    const int64_t per_sample = args_.height.in * args_.width.in;
    for (int64_t r = 0; r < rows_;) {  // the rows of one sample are consecutive in every channel
      const int64_t left = per_sample - (first_row_ + r) % per_sample;
      const int64_t run = left < rows_ - r ? left : rows_ - r;
      E* column = column_.reserve(kChunkRows);
      for (int64_t j = 0; j < cols; ++j) {
        for (int64_t i = 0; i < run; ++i) column[i] = sums[(r + i) * dense_.width + j];
        store_elements<C>(column, out + result_offset(first_row_ + r, first_col + j), run);
      }
      r += run;
    }
  }

  const SpmmArgs& args_;
  const SpmmPlan plan_;
  const DensePlan& dense_;
  bool valid_ = true;
  int64_t group_ = 0;
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t panel_begin_ = 0;
  int64_t panel_end_ = 0;
  int64_t first_source_ = 0;
  int64_t sources_count_ = 0;
  Scratch<int32_t> columns_;
  Scratch<int64_t> line_;
  Scratch<int32_t> sources_;
  Scratch<int32_t> entries_;
  Scratch<EntryList> lists_;
  Scratch<uint16_t> base_;
  Scratch<uint8_t> last_;
  Scratch<uint16_t> offsets_;
  Scratch<E> values_;
  Scratch<E> sums_;
  Scratch<E> column_;
};

// Element types of the packed operand: 16-bit floats are widened.
inline int64_t packed_size(const SpmmArgs& args) {
  const auto size = [&](const DensePlan& plan) {
    return args.groups * plan.panels * args.size * plan.taps * plan.width;
  };
  return args.dtype == DType::kFloat64 ? size(make_dense_plan<double>(args)) : size(make_dense_plan<float>(args));
}

inline int64_t pack_units(const SpmmArgs& args) {
  const auto units = [&](const DensePlan& plan) { return args.groups * plan.panels * plan.blocks; };
  return args.dtype == DType::kFloat64 ? units(make_dense_plan<double>(args)) : units(make_dense_plan<float>(args));
}

inline void pack(const SpmmArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32: return pack_range<Float32>(args, begin, end);
    case DType::kFloat64: return pack_range<Float64>(args, begin, end);
    case DType::kFloat16: return pack_range<Float16>(args, begin, end);
    case DType::kBFloat16: return pack_range<BFloat16>(args, begin, end);
  }
}

inline int64_t spmm_nm_units(const SpmmArgs& args) {
  return args.dtype == DType::kFloat64 ? make_spmm_plan<double>(args).units : make_spmm_plan<float>(args).units;
}

inline bool spmm_nm(const SpmmArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32: return Spmm<Float32>::run(args, begin, end);
    case DType::kFloat64: return Spmm<Float64>::run(args, begin, end);
    case DType::kFloat16: return Spmm<Float16>::run(args, begin, end);
    case DType::kBFloat16: return Spmm<BFloat16>::run(args, begin, end);
  }
  __builtin_unreachable();
}

}  // namespace sdgp::SDGP_ISA
