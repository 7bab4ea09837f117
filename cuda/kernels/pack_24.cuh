// SPDX-License-Identifier: BSD-3-Clause
//
// Prunes a matrix of 16-bit floats along its rows and packs it, in one pass, as the 2:4 operand of a sparse tensor core
// product: [kept values (rows, cols / 2)][metadata].
//
// Note [Pack tile]
// A block of 256 threads takes kTileRows x kTileCols elements, which are whole words of metadata in every layout. A
// thread takes 16 bytes of a row at a time or, if a group is larger, one group. It writes the values straight to memory
// and the nibbles to a table in shared memory. The threads then combine the nibbles into words in the order of the
// layout. Elements beyond the matrix, up to whole tiles, count as zeros.
//
// Two quads are packed at a time (Note [Pairs of groups]). If columns and not rows are contiguous in memory (the output
// gradient, transposed for the weight gradient), a thread takes the same elements of two neighboring rows, so that a
// warp reads consecutive memory, and the values go through shared memory, too.
#pragma once

#include "metadata.cuh"
#include "prune_nm.cuh"

namespace sdgp::cuda {

constexpr int kTileThreads = 256;
static_assert(kTileWords == kTileThreads, "one word of metadata a thread");

// Packs two quads, in four words of two elements. `kept` flags the elements that stay, at most two in each quad. Their
// magnitudes are raised to `least`, which is a pair, too, if kRaise. Returns a nibble in each half of a word.
template <bool kRaise>
SDGP_HOST_DEVICE uint32_t pack_quads(const uint32_t* word, const uint32_t* kept, const uint32_t* least,
                                     uint32_t* values) {
  const uint32_t two = (kept[0] & kept[1]) | (kept[2] & kept[3]) | ((kept[0] | kept[1]) & (kept[2] | kept[3]));
  // Two places. If fewer elements stay, place 0 and then place 1 fill up, with zeros.
  const uint32_t from_0 = kept[0] | ~two;          // the first place is 0, else 1 or 2
  const uint32_t second_odd = kept[3] | ~kept[2];  // the second place is 1 or 3
  const uint32_t second_high = kept[3] | kept[2];  // 2 or 3
  const uint32_t places = ((~from_0 & kept[1]) >> 15 & 0x10001u) | ((~from_0 & ~kept[1]) >> 14 & 0x20002u) |
                          (second_odd >> 13 & 0x40004u) | (second_high >> 12 & 0x80008u);
  const uint32_t bytes = (places & 0x30003u) * 0x22u + (places >> 2 & 0x30003u) * 0x2200u + 0x10101010u;
  const uint32_t first = two | kept[0], second = (kept[1] | second_high) & (two | ~kept[0]);  // flag what stays
  SDGP_UNROLL
  for (int quad = 0; quad < 2; ++quad) {
    const uint32_t raw = permute(word[2 * quad], word[2 * quad + 1], quad == 0 ? bytes : bytes >> 16);
    values[quad] = (kRaise ? raised(raw, least[quad]) : raw) & permute(first, second, quad == 0 ? 0xdd99 : 0xffbb);
  }
  return places;
}

// Loads 8 elements, or as many as are left in the row, and zeros.
template <class Bits>
SDGP_HOST_DEVICE void load_8(const Bits* from, int left, bool vectors, uint32_t* word) {
  if (vectors && left >= 8) return load_vectors<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from), word);
  SDGP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < left ? from[2 * i] : 0, high = 2 * i + 1 < left ? from[2 * i + 1] : 0;
    word[i] = low | high << 16;
  }
}

// Whether packing raises the magnitudes of what stays. Other methods, and groups of two, change the values when they
// prune.
template <Method kMethod, int kM>
constexpr bool raises = kMethod == Method::kMvue && kM >= 4;

// Selects in kSpan elements of a row, whole groups, with these magnitudes. `left` is the number of elements up to the
// end of the row. Sets which stay and, if it raises, the least magnitude of what stays for each quad; otherwise it
// changes `x`.
template <class C, Method kMethod, int kM, int kSpan>
SDGP_HOST_DEVICE void select_span(typename C::Bits* x, const typename C::E* magnitude, const Pruning& mixed, int left,
                                  uint64_t first_group, bool* keep, uint32_t* least) {
  SDGP_UNROLL
  for (int g = 0; g < kSpan / kM; ++g) {
    const uint64_t group = first_group + static_cast<uint64_t>(g);
    if constexpr (raises<kMethod, kM>) {
      const MvueChoice<C, kM> choice(x + g * kM, magnitude + g * kM, mixed.n, mixed.seed, group);
      SDGP_UNROLL
      for (int j = 0; j < kM; ++j) {
        keep[g * kM + j] = choice.keep[j];
        least[(g * kM + j) / 4] = choice.least;
      }
    } else {
      const int length = left < (g + 1) * kM ? left - g * kM : kM;
      prune_group<C, kMethod, kM>(x + g * kM, mixed, length, group);
      SDGP_UNROLL
      for (int j = 0; j < kM; ++j) keep[g * kM + j] = x[g * kM + j] != 0;
    }
  }
}

SDGP_HOST_DEVICE uint32_t flags_of(bool low, bool high) { return (low ? 0x8000u : 0) | (high ? 0x80000000u : 0); }

// Whether a quad is a group that is selected by its flags alone.
template <Method kMethod, int kM>
constexpr bool by_flags = kMethod == Method::kMagnitude && kM == 4;

// Prunes and packs kSpan elements of a row, in words of two.
template <class C, Method kMethod, int kM, int kSpan>
SDGP_HOST_DEVICE void pack_span(uint32_t* word, const Pruning& mixed, int left, uint64_t first_group, uint32_t* values,
                                uint8_t* nibbles) {
  using Bits = typename C::Bits;
  uint32_t kept[kSpan / 2], least[kSpan / 4] = {};
  if constexpr (by_flags<kMethod, kM>) {
    uint32_t pair[4];
    to_pairs<4>(word, word + 2, pair);
    flag_largest<4>(pair, mixed.n, kept);
  } else {
    Bits x[kSpan];
    typename C::E magnitude[kSpan];
    bool keep[kSpan];
    SDGP_UNROLL
    for (int i = 0; i < kSpan; ++i) x[i] = static_cast<Bits>(word[i / 2] >> (i % 2 * 16));
    SDGP_UNROLL
    for (int i = 0; i < kSpan; i += 2) magnitudes_of<C>(word[i / 2], magnitude[i], magnitude[i + 1]);
    select_span<C, kMethod, kM, kSpan>(x, magnitude, mixed, left, first_group, keep, least);
    SDGP_UNROLL
    for (int i = 0; i < kSpan / 2; ++i) {
      const int at = i / 4 * 8 + i % 4;
      word[i] = x[2 * i] | static_cast<uint32_t>(x[2 * i + 1]) << 16;
      kept[i] = flags_of(keep[at], keep[at + 4]);
    }
  }
  SDGP_UNROLL
  for (int at = 0; at < kSpan / 8; ++at) {
    const uint32_t pair[2] = {least[2 * at] * 0x10001u, least[2 * at + 1] * 0x10001u};
    const uint32_t places = pack_quads<raises<kMethod, kM>>(word + 4 * at, kept + 4 * at, pair, values + 2 * at);
    nibbles[at] = static_cast<uint8_t>(places | places >> 12);
  }
}

SDGP_HOST_DEVICE bool rows_lie_in_vectors(const PackArgs& args) {
  return reinterpret_cast<uintptr_t>(args.in) % 16 == 0 && args.row_stride % 8 == 0;
}

SDGP_HOST_DEVICE int at_most(int64_t value, int most) { return value < most ? static_cast<int>(value) : most; }

// Does one thread's share of the first half of a block's work. `nibbles` is (kTileRows, kTileQuads / 2), two per byte.
template <class C, Method kMethod, int kM>
SDGP_HOST_DEVICE void pack_values(const PackArgs& args, const Pruning& mixed, int64_t tile_row, int64_t tile_col,
                                  int thread, uint8_t* nibbles) {
  using Bits = typename C::Bits;
  constexpr int kSpan = kM < 8 ? 8 : kM;
  constexpr int kSpans = kTileCols / kSpan;
  constexpr int kStep = kTileThreads / kSpans;  // rows from a thread's span to its next one
  const bool vectors = rows_lie_in_vectors(args);
  const int tile_span = thread % kSpans;
  const int64_t row = tile_row + thread / kSpans, col = tile_col + tile_span * kSpan;
  const int rows = at_most(args.in_rows - row, kTileRows), cols = at_most(args.in_cols - col, kSpan);  // of the matrix
  const int64_t groups = ceil_div<int64_t>(args.in_cols, kM);
  const Bits* from = static_cast<const Bits*>(args.in) + row * args.row_stride + col;
  Bits* to = static_cast<Bits*>(args.packed) + row * (args.cols / 2) + col / 2;
  nibbles += thread / kSpans * (kTileQuads / 2) + tile_span * (kSpan / 8);
  [[maybe_unused]] constexpr int kTimes =
      kM == 4 ? kTileRows / kStep : 1;  // of other sizes the code would only be larger
  SDGP_UNROLL_BY(kTimes)
  for (int i = 0; i < kTileRows / kStep; ++i) {
    const int left = i * kStep < rows ? cols : 0;
    uint32_t word[kSpan / 2], values[kSpan / 4];
    SDGP_UNROLL
    for (int at = 0; at < kSpan; at += 8) load_8(from + at, left - at, vectors, word + at / 2);
    const auto first_group = static_cast<uint64_t>((row + i * kStep) * groups + col / kM);
    pack_span<C, kMethod, kM, kSpan>(word, mixed, left, first_group, values, nibbles);
    store_vectors<uint32_t, kSpan / 4>(values, reinterpret_cast<uint32_t*>(to));
    from += kStep * args.row_stride;
    to += kStep * (args.cols / 2);
    nibbles += kStep * (kTileQuads / 2);
  }
}

constexpr int kRowWords = kTileCols / 4;     // of the values in a tile
constexpr int kSharedWords = kRowWords + 1;  // one more: only two rows of a warp begin in the same bank

// Prunes and packs kSpan elements of two neighboring rows. pair[j] holds element j of both. `values` and `nibbles` are
// those of the first row; the second one follows in the tables.
template <class C, Method kMethod, int kM, int kSpan>
SDGP_HOST_DEVICE void pack_pair_span(uint32_t* pair, const Pruning& mixed, int left, uint64_t first_group,
                                     uint64_t row_groups, uint32_t* values, uint8_t* nibbles) {
  using Bits = typename C::Bits;
  uint32_t kept[kSpan], least[2][kSpan / 4] = {};
  if constexpr (by_flags<kMethod, kM>) {
    SDGP_UNROLL
    for (int at = 0; at < kSpan; at += 4) flag_largest<4>(pair + at, mixed.n, kept + at);
  } else {
    Bits x[2][kSpan];
    typename C::E magnitude[2][kSpan];
    bool keep[2][kSpan];
    SDGP_UNROLL
    for (int j = 0; j < kSpan; ++j) {
      x[0][j] = static_cast<Bits>(pair[j]);
      x[1][j] = static_cast<Bits>(pair[j] >> 16);
      magnitudes_of<C>(pair[j], magnitude[0][j], magnitude[1][j]);
    }
    SDGP_UNROLL
    for (int v = 0; v < 2; ++v) {
      select_span<C, kMethod, kM, kSpan>(x[v], magnitude[v], mixed, left,
                                         first_group + static_cast<uint64_t>(v) * row_groups, keep[v], least[v]);
    }
    SDGP_UNROLL
    for (int j = 0; j < kSpan; ++j) {
      pair[j] = x[0][j] | static_cast<uint32_t>(x[1][j]) << 16;
      kept[j] = flags_of(keep[0][j], keep[1][j]);
    }
  }
  SDGP_UNROLL
  for (int at = 0; at < kSpan / 8; ++at) {
    uint32_t places[2];
    SDGP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int quad = 2 * at + half;
      uint32_t word[4], both[2];
      from_pairs<4>(pair + 4 * quad, word, word + 2);
      const uint32_t raised[2] = {least[0][quad] * 0x10001u, least[1][quad] * 0x10001u};
      places[half] = pack_quads<raises<kMethod, kM>>(word, kept + 4 * quad, raised, both);
      values[quad] = both[0];
      values[kSharedWords + quad] = both[1];
    }
    const uint32_t bytes = places[0] | places[1] << 4;
    nibbles[at] = static_cast<uint8_t>(bytes);
    nibbles[kTileQuads / 2 + at] = static_cast<uint8_t>(bytes >> 16);
  }
}

// Loads kSpan elements of two neighboring rows, or as many as are in the matrix, and zeros.
template <class Bits, int kSpan>
SDGP_HOST_DEVICE void load_pairs(const Bits* from, int64_t stride, int left, int rows, bool aligned, uint32_t* pair) {
  if (aligned && rows == 2 && left == kSpan) {
    SDGP_UNROLL
    for (int j = 0; j < kSpan; ++j) pair[j] = *reinterpret_cast<const uint32_t*>(from + j * stride);
    return;
  }
  SDGP_UNROLL
  for (int j = 0; j < kSpan; ++j) {
    pair[j] = 0;
    if (j < left) pair[j] = from[j * stride] | (rows == 2 ? static_cast<uint32_t>(from[j * stride + 1]) << 16 : 0);
  }
}

// Does pack_values' work for a matrix whose columns are contiguous. `values` is (kTileRows, kSharedWords).
template <class C, Method kMethod, int kM>
SDGP_HOST_DEVICE void pack_columns(const PackArgs& args, const Pruning& mixed, int64_t tile_row, int64_t tile_col,
                                   int thread, uint32_t* values, uint8_t* nibbles) {
  using Bits = typename C::Bits;
  constexpr int kSpan = kM < 8 ? 8 : kM;
  constexpr int kPairs = kTileRows / 2;
  const bool aligned = reinterpret_cast<uintptr_t>(args.in) % 4 == 0 && args.col_stride % 2 == 0;
  const int row = thread % kPairs * 2;
  const int rows = at_most(args.in_rows - tile_row - row, 2);
  const auto groups = static_cast<uint64_t>(ceil_div<int64_t>(args.in_cols, kM));
  SDGP_UNROLL
  for (int i = 0; i < ceil_div(kPairs * kTileCols / kSpan, kTileThreads); ++i) {
    const int span = thread / kPairs + i * (kTileThreads / kPairs);
    if (span >= kTileCols / kSpan) continue;
    const int64_t col = tile_col + span * kSpan;
    const int left = rows > 0 ? at_most(args.in_cols - col, kSpan) : 0;
    const Bits* from = static_cast<const Bits*>(args.in) + tile_row + row + col * args.col_stride;
    uint32_t pair[kSpan];
    load_pairs<Bits, kSpan>(from, args.col_stride, left, rows, aligned, pair);
    const auto first_group = static_cast<uint64_t>(tile_row + row) * groups + static_cast<uint64_t>(col / kM);
    pack_pair_span<C, kMethod, kM, kSpan>(pair, mixed, left, first_group, groups,
                                          values + row * kSharedWords + span * (kSpan / 4),
                                          nibbles + row * (kTileQuads / 2) + span * (kSpan / 8));
  }
}

// Writes a thread's share of a tile's values, after all threads finished pack_columns.
template <class Bits>
SDGP_HOST_DEVICE void store_values(const PackArgs& args, int64_t tile_row, int64_t tile_col, int thread,
                                   const uint32_t* values) {
  constexpr int kVectors = kRowWords / 4;  // of a row
  SDGP_UNROLL
  for (int i = 0; i < kTileRows * kVectors / kTileThreads; ++i) {
    const int vector = thread + i * kTileThreads;
    const int row = vector / kVectors, at = vector % kVectors * 4;
    uint32_t word[4];
    SDGP_UNROLL
    for (int j = 0; j < 4; ++j) word[j] = values[row * kSharedWords + at + j];
    Bits* to = static_cast<Bits*>(args.packed) + (tile_row + row) * (args.cols / 2) + tile_col / 2 + 2 * at;
    store_vectors<uint32_t, 4>(word, reinterpret_cast<uint32_t*>(to));
  }
}

// Does one thread's share of the second half, after all threads finished the first: writes one word of metadata.
SDGP_HOST_DEVICE void pack_metadata(const PackArgs& args, int64_t tile_row, int64_t tile_col, int thread,
                                    const uint8_t* nibbles) {
  const TileWord word = tile_word(args.layout, args.rows, args.cols, tile_row, tile_col, thread);
  static_cast<uint32_t*>(args.packed)[args.rows * args.cols / 4 + word.at] =
      combine(args.layout, nibbles + (word.row * kTileQuads + word.quad) / 2);
}

// Calls `call` with the method and the group size of the compiled kernel for these arguments.
template <class Call>
void visit_pack(const PackArgs& args, const Call& call) {
  visit(FixedGroupMethods{}, args.pruning.method, [&]<Method kMethod>(Constant<kMethod> method) {
    visit(PackedSizes{}, args.pruning.m, [&]<int kM>(Constant<kM> size) { call(method, size); });
  });
}

}  // namespace sdgp::cuda
