// SPDX-License-Identifier: Apache-2.0
// Four-bit weights: where a code lies and what it means. Plain functions that CPU, CUDA and tests share.
//
// W [N, K] is stored as codes [N, 64·⌈K/128⌉] bytes, row by row, in blocks of 128 columns (64 bytes; what a last, shorter
// block lacks holds any code and is never used). The seven bits of a column's place k in its block are named
//     k = i1 i0 j1 j0 t1 t0 h
// and its code is nibble 4h + j of the 32-bit little-endian word 4t + i. So one row and block is one AVX-512 register,
// word by word shifted by 4j it gives 16 pairs of neighbouring columns, as vdpbf16ps takes them; and 16 bytes are what
// thread t of a quad needs for eight steps of mma.m16n8k16 or wgmma, in the order in which they take W from registers.
//
// scales [N, G] with G = ⌈K/g⌉ for groups of g consecutive columns (g a multiple of 32; g >= K: one scale a row).
// w = scale·(code - zero), zero [N, G] uint8 or 8; with a table of 16 float32 (NF4): w = scale·table[code].
// Computed in float32 and rounded once, to the dtype of what it is multiplied with or written to.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FP_HOST_DEVICE __host__ __device__
#else
#define FP_HOST_DEVICE
#endif

namespace fastpost::int4 {

constexpr int kBlock = 128;      // columns
constexpr int kBlockBytes = 64;  // of codes
constexpr int kSymmetricZero = 8;

struct Place {
  int word;    // 32-bit word of the block, 0 to 15
  int nibble;  // of the word, 0 to 7, from the lowest bits
};

FP_HOST_DEVICE constexpr Place place(int column) {  // 0 <= column < 128
  const int h = column & 1, t = column >> 1 & 3, j = column >> 3 & 3, i = column >> 5 & 3;
  return {4 * t + i, 4 * h + j};
}

FP_HOST_DEVICE constexpr int column(int word, int nibble) {  // the other way
  const int t = word >> 2, i = word & 3, h = nibble >> 2, j = nibble & 3;
  return i << 5 | j << 3 | t << 1 | h;
}

FP_HOST_DEVICE constexpr int64_t row_bytes(int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlockBytes; }

FP_HOST_DEVICE constexpr int code_at(const uint8_t* block, int column) {
  const Place p = place(column);
  return block[4 * p.word + p.nibble / 2] >> (p.nibble % 2 * 4) & 15;
}

FP_HOST_DEVICE constexpr float weight(int code, float scale, int zero) {
  return scale * static_cast<float>(code - zero);
}
FP_HOST_DEVICE constexpr float weight(int code, float scale, const float* table) { return scale * table[code]; }

}  // namespace fastpost::int4
