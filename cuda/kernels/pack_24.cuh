// SPDX-License-Identifier: BSD-3-Clause
//
// Prunes a matrix of 16-bit floats along its rows and packs it, in one pass, as the 2:4 operand of a sparse tensor core
// product: [kept values (rows, cols / 2)][metadata].
//
// Note [Pack tile]
// A block of 256 threads takes kTileRows x kTileCols elements, which are whole words of metadata in every layout. A
// thread takes 16 bytes of a row at a time or, if a group is larger, one group. It writes the values straight to memory
// and the nibbles to a table in shared memory, one byte each. The threads then combine the nibbles into words in the
// order of the layout. Elements beyond the matrix, up to whole tiles, count as zeros.
#pragma once

#include "metadata.cuh"
#include "prune_nm.cuh"

namespace sdgp::cuda {

constexpr int kTileThreads = 256;
static_assert(kTileWords == kTileThreads, "one word of metadata a thread");

// Returns, as a nibble, the places of the two kept elements of a quad: those that are not +0, else the lowest places.
template <class Bits>
SDGP_HOST_DEVICE int places_of(const Bits* quad) {
  int kept[2] = {-1, -1};
  SDGP_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (quad[j] == 0) continue;
    if (kept[0] < 0) {
      kept[0] = j;
    } else if (kept[1] < 0) {
      kept[1] = j;
    }
  }
  if (kept[0] < 0) return 0b0100;                                // none: places 0 and 1
  if (kept[1] < 0) return kept[0] == 0 ? 0b0100 : kept[0] << 2;  // one: it and the lowest other place
  return kept[0] | kept[1] << 2;
}

// Writes kM pruned elements: the values to memory, the nibbles to the tile's table.
template <class Bits, int kM>
SDGP_HOST_DEVICE void pack_group(const Bits* x, Bits* values, uint8_t* nibbles) {
  Bits kept[kM / 2];
  SDGP_UNROLL
  for (int q = 0; q < kM / 4; ++q) {
    const int places = places_of(x + 4 * q);
    nibbles[q] = static_cast<uint8_t>(places);
    SDGP_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int place = places >> (2 * i) & 3;
      Bits value = x[4 * q];
      SDGP_UNROLL
      for (int j = 1; j < 4; ++j) value = place == j ? x[4 * q + j] : value;
      kept[2 * q + i] = value;
    }
  }
  if constexpr (kM == 4) {
    memcpy(values, kept, sizeof kept);
  } else {
    store_vectors<Bits, kM / 2>(kept, values);
  }
}

// Prunes kSpan elements, which are one or more groups of kM <= kSpan elements.
template <class C, Method kMethod, int kM, int kSpan>
SDGP_HOST_DEVICE void prune_span(typename C::Bits* x, const PackArgs& args, const Pruning& mixed, int64_t row,
                                 int64_t col) {
  SDGP_UNROLL
  for (int g = 0; g < kSpan / kM; ++g) {
    const int64_t first = col + g * kM;
    if (first >= args.in_cols) break;
    const int64_t groups = ceil_div<int64_t>(args.in_cols, kM);
    const auto group = static_cast<uint64_t>(row * groups + first / kM);
    prune_group<C, kMethod, kM>(x + g * kM, mixed, group_length(kM, args.in_cols, first / kM), group);
  }
}

SDGP_HOST_DEVICE bool rows_lie_in_vectors(const PackArgs& args) {
  return reinterpret_cast<uintptr_t>(args.in) % 16 == 0 && args.row_stride % 8 == 0;
}

// Does one thread's share of the first half of a block's work. `nibbles` is (kTileRows, kTileQuads).
template <class C, Method kMethod, int kM>
SDGP_HOST_DEVICE void pack_values(const PackArgs& args, int64_t tile_row, int64_t tile_col, int thread,
                                  uint8_t* nibbles) {
  using Bits = typename C::Bits;
  constexpr int kSpan = kM < 8 ? 8 : kM;
  constexpr int kSpans = kTileCols / kSpan;
  const bool vectors = rows_lie_in_vectors(args);
  Pruning mixed = with_mixed_seed<kMethod>(args.pruning, args.seed);
  mixed.scale = false;  // an operand has no multipliers; the constant removes their code
  for (int i = thread; i < kTileRows * kSpans; i += kTileThreads) {
    const int64_t row = tile_row + i / kSpans;
    const int64_t col = tile_col + i % kSpans * kSpan;
    Bits x[1][kSpan] = {};
    if (row < args.in_rows && col < args.in_cols) {
      const int64_t left = args.in_cols - col;
      const int length = left < kSpan ? static_cast<int>(left) : kSpan;
      const Bits* from = static_cast<const Bits*>(args.in) + row * args.row_stride + col;
      load_group<Bits, kSpan, 1>(from, 1, length, vectors && length == kSpan, x);
      prune_span<C, kMethod, kM, kSpan>(x[0], args, mixed, row, col);
    }
    pack_group<Bits, kSpan>(x[0], static_cast<Bits*>(args.packed) + row * (args.cols / 2) + col / 2,
                            nibbles + (row - tile_row) * kTileQuads + (col - tile_col) / 4);
  }
}

// Does one thread's share of the second half, after all threads finished the first: writes one word of metadata.
SDGP_HOST_DEVICE void pack_metadata(const PackArgs& args, int64_t tile_row, int64_t tile_col, int thread,
                                    const uint8_t* nibbles) {
  const TileWord first = tile_word(args.layout, args.rows, args.cols, tile_row, tile_col, thread);
  uint32_t word = 0;
  SDGP_UNROLL
  for (int i = 0; i < 8; ++i) {
    const NibbleStep step = nibble_step(args.layout, i);
    word |= static_cast<uint32_t>(nibbles[(first.row + step.row) * kTileQuads + first.quad + step.quad]) << (4 * i);
  }
  static_cast<uint32_t*>(args.packed)[args.rows * args.cols / 4 + first.at] = word;
}

// Calls `call` with the method and the group size of the compiled kernel for these arguments.
template <class Call>
void visit_pack(const PackArgs& args, const Call& call) {
  visit(GroupMethods{}, args.pruning.method, [&]<Method kMethod>(Constant<kMethod> method) {
    visit(PackedSizes{}, args.pruning.m, [&]<int kM>(Constant<kM> size) { call(method, size); });
  });
}

}  // namespace sdgp::cuda
