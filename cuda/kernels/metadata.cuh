// SPDX-License-Identifier: BSD-3-Clause
//
// Where a 2:4 operand's metadata goes. A quad of four elements keeps two; their places in it are one nibble, the first
// in its low bits. A layout orders the nibbles of a matrix.
//
// Note [Layout24 layouts]
// cuSPARSELt documents none: its two were read off its compressor, by others, on Ampere and on Hopper, and sdgp
// compares them with that compressor before it uses them (python/sdgp/semi_structured.py). CUTLASS's for compute
// capability 8.x is that of torch/sparse/_semi_structured_conversions.py. In each, a tile of kTileRows x kTileCols
// elements owns whole 32-bit words, kTileWords of them, so here every word says which quads it holds.
#pragma once

#include "cuda_kernels.h"
#include "host_device.cuh"

namespace sdgp::cuda {

constexpr int kTileQuads = kTileCols / 4;
constexpr int kTileWords = kTileRows * kTileQuads / 8;

struct TileWord {
  int64_t at;  // in the metadata, in words
  int row;     // of its nibble 0, in the tile
  int quad;
};

// The tile's `word`-th word; the operand has rows x cols elements.
SDGP_HOST_DEVICE TileWord tile_word(Layout24 layout, int64_t rows, int64_t cols, int64_t tile_row, int64_t tile_col,
                                    int word) {
  if (layout == Layout24::kCusparseLtSm90) {
    // Blocks of 64 rows x 32 columns, along rows of blocks. Two words hold rows r and r + 8 of the 32 columns.
    const int half = word % 2, row = word / 2 % 8, row16 = word / 16 % 4, col32 = word / 64 % 2, row64 = word / 128;
    const int64_t at = (tile_row / 64 + row64) * 2 * cols + (tile_col / 32 + col32) * 64 + word % 64;
    return {at, row64 * 64 + row16 * 16 + row, col32 * 8 + half * 2};
  }
  // Squares of 32 x 32. A word holds rows r and r + 8 of 16 columns; then come the next 16, then rows r + 16 and r
  // + 24.
  const int col16 = word % 2, row16 = word / 2 % 2, row = word / 4 % 8, row32 = word / 32 % 4, col32 = word / 128;
  const int first_row = row32 * 32 + row16 * 16 + row;
  const int first_quad = col32 * 8 + col16 * 4;
  if (layout == Layout24::kCutlassSm80) {  // down the columns of squares
    return {(tile_col / 32 + col32) * rows + tile_row + word % 128, first_row, first_quad};
  }
  // Tiles of 4 x 2 squares, down the columns inside and out.
  return {(tile_col / 64 * (rows / 128) + tile_row / 128) * kTileWords + word, first_row, first_quad};
}

// Where nibble i of a word lies from its nibble 0.
struct NibbleStep {
  int row;
  int quad;
};

SDGP_HOST_DEVICE NibbleStep nibble_step(Layout24 layout, int i) {
  // Hopper: the two rows side by side, quads 0 4 1 5 (then 2 6 3 7); Ampere: four quads of a row, then of the other.
  if (layout == Layout24::kCusparseLtSm90) return {i % 2 * 8, i / 4 + i / 2 % 2 * 4};
  return {i / 4 * 8, i % 4};
}

}  // namespace sdgp::cuda
