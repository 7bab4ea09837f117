// SPDX-License-Identifier: BSD-3-Clause
//
// Tells where the metadata of a 2:4 operand goes. A quad of four elements keeps two. One nibble holds their places in
// the quad, the first place in the low bits. A layout is an order of the nibbles of a matrix.
//
// Note [Metadata layouts]
// cuSPARSELt does not document its layouts. Other projects derived two layouts from the output of its compressor on
// Ampere and Hopper. sdgp compares them with that compressor before it uses them (python/sdgp/_semi_structured.py). The
// layout of CUTLASS for compute capability 8.x is the one in torch/sparse/_semi_structured_conversions.py. In each
// layout, a tile of kTileRows x kTileCols elements owns kTileWords whole 32-bit words. The functions below therefore
// tell for each word which quads it holds.
#pragma once

#include "cuda_kernels.h"
#include "host_device.cuh"

namespace sdgp::cuda {

constexpr int kTileQuads = kTileCols / 4;
constexpr int kTileWords = kTileRows * kTileQuads / 8;

struct TileWord {
  int64_t at;  // offset in the metadata, in words
  int row;     // of nibble 0, in the tile
  int quad;
};

// Describes the word number `word` of the tile. The operand has rows x cols elements.
SDGP_HOST_DEVICE TileWord tile_word(Layout24 layout, int64_t rows, int64_t cols, int64_t tile_row, int64_t tile_col,
                                    int word) {
  if (layout == Layout24::kCusparseLtSm90) {
    // Blocks of 64 rows x 32 columns, in row-major order. Two words hold rows r and r + 8 of the 32 columns: quads 0,
    // 1, 4 and 5, then the others.
    const int half = word % 2, row = word / 2 % 8, row16 = word / 16 % 4, col32 = word / 64 % 2, row64 = word / 128;
    const int64_t at = (tile_row / 64 + row64) * 2 * cols + (tile_col / 32 + col32) * 64 + word % 64;
    return {at, row64 * 64 + row16 * 16 + row, col32 * 8 + half * 2};
  }
  // Squares of 32 x 32 elements. A word holds rows r and r + 8 of 16 columns. The next word holds the same rows of the
  // next 16 columns. Then come rows r + 16 and r + 24.
  const int col16 = word % 2, row16 = word / 2 % 2, row = word / 4 % 8, row32 = word / 32 % 4, col32 = word / 128;
  const int first_row = row32 * 32 + row16 * 16 + row;
  const int first_quad = col32 * 8 + col16 * 4;
  if (layout == Layout24::kCutlassSm80) {  // squares in column-major order
    return {(tile_col / 32 + col32) * rows + tile_row + word % 128, first_row, first_quad};
  }
  // Tiles of 4 x 2 squares. The tiles, and the squares in a tile, are in column-major order.
  return {(tile_col / 64 * (rows / 128) + tile_row / 128) * kTileWords + word, first_row, first_quad};
}

// Combines the nibbles of a word. `nibbles` is where its first quad is in a table (kTileRows, kTileQuads / 2) with two
// quads per byte.
SDGP_HOST_DEVICE uint32_t combine(Layout24 layout, const uint8_t* nibbles) {
  const uint8_t* lower = nibbles + 8 * (kTileQuads / 2);
  if (layout == Layout24::kCusparseLtSm90) {  // alternates between the two rows, over quads 0 4 1 5
    const uint32_t row = nibbles[0] | uint32_t{nibbles[2]} << 8, row8 = lower[0] | uint32_t{lower[2]} << 8;
    return (row & 0x0f0fu) | (row8 & 0x0f0fu) << 4 | ((row >> 4 & 0x0f0fu) | (row8 & 0xf0f0u)) << 16;
  }
  // four quads of one row, then four of the other
  return nibbles[0] | uint32_t{nibbles[1]} << 8 | uint32_t{lower[0]} << 16 | uint32_t{lower[1]} << 24;
}

}  // namespace sdgp::cuda
