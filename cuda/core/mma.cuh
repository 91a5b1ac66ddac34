// SPDX-License-Identifier: Apache-2.0
// Matrix instructions of compute capability 8.0 and what feeds them: asynchronous copies to shared memory and ldmatrix.
// Where this is compiled as plain C++ (tests/cuda_on_host), each does the same by exchanges and copies.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/core/vec.cuh"

namespace fastpost::cuda {

#ifndef __CUDACC__
// What each lane of the warp passes, for all of them.
template <class V>
inline void exchange(const V& mine, V (&all)[32]) {
  static V shown[1024 / 32][32];
  const unsigned warp = threadIdx.x / 32;
  shown[warp][threadIdx.x % 32] = mine;
  __syncwarp();
  memcpy(all, shown[warp], sizeof all);
  __syncwarp();  // before anyone shows the next
}
#endif

// d += a · b with a [16, 16], b [16, 8], d [16, 8] over a warp. Lane 4g + t holds (PTX ISA, mma.m16n8k16)
//   a: rows g, g + 8, g, g + 8, columns 2t and 2t + 1, the last two registers 8 columns on;
//   b: rows 2t and 2t + 1, then 8 rows on, of column g;    d: rows g, g, g + 8, g + 8, columns 2t, 2t + 1, 2t, 2t + 1.
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  const int lane = static_cast<int>(threadIdx.x % 32);
  struct Registers {
    uint32_t r[6];
  } all[32];
  exchange(Registers{{a[0], a[1], a[2], a[3], b0, b1}}, all);
  const auto half = [](uint32_t pair, int h) { return to_float(T{static_cast<uint16_t>(pair >> 16 * h)}); };
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + 8 * (r / 2), column = lane % 4 * 2 + r % 2;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, h = k % 2;
      d[r] += half(all[row % 8 * 4 + t].r[row / 8 + k / 8 * 2], h) * half(all[column * 4 + t].r[4 + k / 8], h);
    }
  }
#endif
}

// Four matrices of 8 rows and 16 bytes from shared memory: lane l passes the address of row l % 8 of matrix l / 8, and gets
// 4 bytes at 4·(l % 4) of row l / 4 of each.
__device__ inline void load_matrices(const void* row, uint32_t (&out)[4]) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  const int lane = static_cast<int>(threadIdx.x % 32);
  const char* rows[32];
  exchange(static_cast<const char*>(row), rows);
  for (int m = 0; m < 4; ++m) memcpy(&out[m], rows[8 * m + lane / 4] + 4 * (lane % 4), 4);
#endif
}

// The same, but each matrix is transposed on the way: lane l gets elements l / 4 of rows 2·(l % 4) and 2·(l % 4) + 1.
__device__ inline void load_matrices_transposed(const void* row, uint32_t (&out)[4]) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  const int lane = static_cast<int>(threadIdx.x % 32);
  const char* rows[32];
  exchange(static_cast<const char*>(row), rows);
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int h = 0; h < 2; ++h) memcpy(&pair[h], rows[8 * m + lane % 4 * 2 + h] + 2 * (lane / 4), 2);
    memcpy(&out[m], pair, 4);
  }
#endif
}

// Where 16 bytes of a row lie in shared memory, so that eight neighbouring rows' lie in different banks.
template <int kChunks>  // of a row
__host__ __device__ constexpr int swizzled(int row, int chunk) {
  static_assert(kChunks == 4 || kChunks % 8 == 0);
  return (row * kChunks + (kChunks == 4 ? chunk ^ row / 2 % 4 : chunk ^ row % 8)) * 16;
}

// Two numbers, rounded, in a register: `low` in its lower half.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// 16 bytes from global to shared memory, zeros if !exists. A thread's own copies are there once copies_wait says so; those
// of others after a barrier, too. Unlike loads to registers, any number can be under way, and each group of them (closed by
// copies_commit) can be waited for by itself.
__device__ inline void copy_async(void* shared, const void* global, bool exists) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(exists ? 16 : 0)
      : "memory");
#else
  cuda_on_host::copy_later(
      [](void* to, const void* from) { from ? void(memcpy(to, from, 16)) : void(memset(to, 0, 16)); }, shared,
      exists ? global : nullptr);
#endif
}
__device__ inline void copies_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_on_host::close_copies();
#endif
}
template <int kNewest>  // all but the newest groups are there
__device__ inline void copies_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#else
  cuda_on_host::wait_for_copies(kNewest);
#endif
}

// a & b | c in one instruction; nvcc makes two of it when b and c are constants.
__device__ inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return (a & b) | c;
#endif
}

// Two 16-bit floats in a register.
template <class T>
__device__ inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
#else
  const auto half = [&](int h) {
    const auto value = [h](uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair >> 16 * h)}); };
    return uint32_t{from_float<T>(value(a) * value(b) + value(c)).bits} << 16 * h;
  };
  d = half(0) | half(1);
#endif
  return d;
}

// Byte i of the result is byte (selector's nibble i) of the eight bytes of low and high.
__device__ inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDACC__
  return __byte_perm(low, high, selector);
#else
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
#endif
}

}  // namespace fastpost::cuda
