// SPDX-License-Identifier: Apache-2.0
// Four-bit codes to pairs of 16-bit floats in registers, for kernels that feed tensor cores. cpp/int4.h has the layout.
#pragma once

#include "cpp/int4.h"
#include "cuda/core/launch.h"
#include "cuda/core/mma.cuh"
#include "cuda/core/vec.cuh"

namespace fastpost::cuda {

// W as kernels take it. Strides are in elements.
struct Int4Matrix {
  int64_t n, k;  // columns that exist; codes are whole blocks
  const uint8_t* codes;
  int64_t codes_stride;
  const void* scales;
  DType scales_dtype;
  int64_t scales_stride;
  const uint8_t* zeros;  // or null
  int64_t zeros_stride;
  const float* table;  // or null
  int group_units;     // a group's columns / 32
  int group_shift;     // its logarithm, -1 if it has none
  int groups;          // of a row
};

inline Int4Matrix int4_matrix(const Tensor& codes, const Tensor& scales, const Tensor& zeros, const Tensor& table,
                              int64_t group_size, int64_t columns) {
  Int4Matrix w = {};
  w.n = codes.size(0);
  w.k = columns;
  w.codes = codes.ptr<const uint8_t>();
  w.codes_stride = codes.stride(0);
  w.scales = scales.data;
  w.scales_dtype = scales.dtype;
  w.scales_stride = scales.stride(0);
  if (zeros.defined()) {
    w.zeros = zeros.ptr<const uint8_t>();
    w.zeros_stride = zeros.stride(0);
  }
  if (table.defined()) w.table = table.ptr<const float>();
  w.groups = static_cast<int>(scales.size(1));
  // One scale a row: no group ends before the row does, whatever its size.
  const int64_t whole = (columns + int4::kBlock - 1) / int4::kBlock * int4::kBlock;
  w.group_units = static_cast<int>((w.groups == 1 && group_size < whole ? whole : group_size) / 32);
  w.group_shift = -1;
  for (int shift = 0; shift < 31; ++shift) {
    if (w.group_units == 1 << shift) w.group_shift = shift;
  }
  return w;
}

// A scale as it lies in memory; not converted before it is needed, so that loading it stops nobody.
__device__ inline uint32_t int4_scale_bits(const Int4Matrix& w, int64_t row, int group) {
  const int64_t at = row * w.scales_stride + group;
  return w.scales_dtype == DType::Float32 ? static_cast<const uint32_t*>(w.scales)[at]
                                          : static_cast<const uint16_t*>(w.scales)[at];
}
__device__ inline float int4_scale(const Int4Matrix& w, uint32_t bits) {
  if (w.scales_dtype == DType::BFloat16) return to_float(bfloat16{static_cast<uint16_t>(bits)});
  if (w.scales_dtype == DType::Float16) return to_float(float16{static_cast<uint16_t>(bits)});
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

__device__ inline uint32_t int4_zero(const Int4Matrix& w, int64_t row, int group) {
  return w.zeros ? w.zeros[row * w.zeros_stride + group] : int4::kSymmetricZero;
}

// The group that 32 columns belong to; a power of two, as group sizes are, needs no division.
__device__ inline int int4_group(const Int4Matrix& w, int unit) {
  return w.group_shift >= 0 ? unit >> w.group_shift : unit / w.group_units;
}

// Scales and zeros of two rows, group after group. What comes next is loaded long before it is needed, as bits: a load that
// is converted at once would stop the thread.
class Int4Groups {
 public:
  __device__ Int4Groups(const Int4Matrix& w, const int64_t (&row)[2], int group) : w_(w), left_(w.groups - group) {
    const int size = w.scales_dtype == DType::Float32 ? 4 : 2;
    FP_UNROLL
    for (int half = 0; half < 2; ++half) {
      scales_[half] = static_cast<const char*>(w.scales) + (row[half] * w.scales_stride + group) * size;
      zeros_[half] = w.zeros ? w.zeros + row[half] * w.zeros_stride + group : nullptr;
      zero_bits_[half] = int4::kSymmetricZero;
    }
    load();
  }

  // The group that was loaded, and starts to load the next.
  template <class F>
  __device__ void next(F&& use) {
    FP_UNROLL
    for (int half = 0; half < 2; ++half) use(half, scale_bits_[half], static_cast<float>(zero_bits_[half]));
    if (--left_ > 0) load();
  }

 private:
  __device__ void load() {
    const bool wide = w_.scales_dtype == DType::Float32;
    FP_UNROLL
    for (int half = 0; half < 2; ++half) {
      scale_bits_[half] =
          wide ? *reinterpret_cast<const uint32_t*>(scales_[half]) : *reinterpret_cast<const uint16_t*>(scales_[half]);
      scales_[half] += wide ? 4 : 2;
      if (w_.zeros) zero_bits_[half] = *zeros_[half]++;
    }
  }

  const Int4Matrix& w_;
  int left_;
  const char* scales_[2];
  const uint8_t* zeros_[2];
  uint32_t scale_bits_[2], zero_bits_[2];
};

// After how many units of 32 columns a group can end: f(std::integral_constant) with 4, 2 or 1.
template <class F>
void with_group_step(const Int4Matrix& w, F&& f) {
  if (w.group_units % 4 == 0) return f(std::integral_constant<int, 4>{});
  if (w.group_units % 2 == 0) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

// Bits of both halves of a pair. kMagic + code is exact, because a step of the float is 1 there.
template <class T>
struct Pair {
  static constexpr bool kBrain = std::is_same_v<T, bfloat16>;
  static constexpr uint32_t kMagic = kBrain ? 0x43004300u : 0x64006400u, kOne = kBrain ? 0x3f803f80u : 0x3c003c00u;
  static constexpr float kMagicValue = kBrain ? 128.0f : 1024.0f;
};

template <class T>
__device__ inline uint32_t pair_of(float x) {
  const uint32_t bits = from_float<T>(x).bits;
  return bits | bits << 16;
}

// A word of eight codes -> code - zero, pairs j = 0 to 3 (columns 8j and 8j + 1 from the word's first on). offset is the
// pair of -(magic + zero).
template <class T>
__device__ inline void int4_differences(uint32_t word, uint32_t offset, uint32_t (&pairs)[4]) {
  FP_UNROLL
  for (int j = 0; j < 4; ++j) {
    pairs[j] = fma_pair<T>(and_or(word >> 4 * j, 0x000f000fu, Pair<T>::kMagic), Pair<T>::kOne, offset);
  }
}

// The 16 values of a table as 16-bit floats, their low bytes and their high bytes apart, for byte permutations.
struct ByteTable {
  uint32_t low[4], high[4];
};

template <class T>
__device__ inline ByteTable byte_table(const float* table) {
  ByteTable bytes = {};
  FP_UNROLL
  for (int c = 0; c < 16; ++c) {
    const uint32_t bits = from_float<T>(table[c]).bits;
    bytes.low[c / 4] |= (bits & 0xffu) << c % 4 * 8;
    bytes.high[c / 4] |= (bits >> 8) << c % 4 * 8;
  }
  return bytes;
}

// bytes[code] for the four codes in the low half of `codes`.
__device__ inline uint32_t look_up(const uint32_t (&bytes)[4], uint32_t codes) {
  const uint32_t below = codes & 0x7777u;  // a permutation picks among eight bytes, so twice, and then between the two
  const uint32_t first = pick_bytes(bytes[0], bytes[1], below), second = pick_bytes(bytes[2], bytes[3], below);
  return pick_bytes(first, second, 0x3210u | (codes & 0x8888u) >> 1);
}

// As int4_differences, but table[code].
__device__ inline void int4_values(uint32_t word, const ByteTable& table, uint32_t (&pairs)[4]) {
  uint32_t even[2], odd[2];  // 16-bit floats of columns h = 0 and 1, for j = 0, 1 and 2, 3
  const auto half = [&](uint32_t codes, uint32_t (&out)[2]) {
    const uint32_t low = look_up(table.low, codes), high = look_up(table.high, codes);
    out[0] = pick_bytes(low, high, 0x5140u);
    out[1] = pick_bytes(low, high, 0x7362u);
  };
  half(word, even);
  half(word >> 16, odd);
  FP_UNROLL
  for (int p = 0; p < 2; ++p) {
    pairs[2 * p] = pick_bytes(even[p], odd[p], 0x5410u);
    pairs[2 * p + 1] = pick_bytes(even[p], odd[p], 0x7632u);
  }
}

// cuda/ops/int4_gemm_sm80.cu: out [m, N] = x [m, K] · Wᵀ + bias? for m <= kRowsMost, x in bfloat16 or float16 with K and the
// stride of rows multiples of 8.
constexpr int kRowsMost = 64;
void multiply_rows(const Stream& stream, const Tensor& x, const Int4Matrix& w, const Tensor& bias, const Tensor& out);

// cuda/ops/int4_gemm_sm90.cu: the same for any m, without a table, scales in the dtype of x.
void multiply_tiles_sm90(const Stream& stream, const Tensor& x, const Int4Matrix& w, const Tensor& bias,
                         const Tensor& out);
// grad_x [m, K] = grad [m, N] · W on the same conditions.
void multiply_tiles_backward_sm90(const Stream& stream, const Tensor& grad, const Int4Matrix& w, const Tensor& grad_x);

}  // namespace fastpost::cuda
