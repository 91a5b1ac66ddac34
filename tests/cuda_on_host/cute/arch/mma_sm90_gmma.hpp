// SPDX-License-Identifier: Apache-2.0
// WGMMA with both factors in shared memory: each thread works out its own sums from what the matrix descriptors say (PTX ISA,
// "Matrix descriptor format", "Register fragments for wgmma.mma_async.m64nNk16"). A product is done when it is waited for, not
// when it is started, so that what overwrites its factors too early shows.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda/core/vec.cuh"
#include "cuda_runtime.h"

#define CUTE_UNROLL

namespace cute {

namespace SM90::GMMA {
enum class Major { K = 0, MN = 1 };
enum class ScaleOut { Zero = 0, One = 1 };
enum class ScaleIn { Neg = -1, One = 1 };
}  // namespace SM90::GMMA

class Products {  // of a thread
 public:
  static Products& mine() {
    static Products all[1024];
    return all[threadIdx.x];
  }
  void start(std::function<void()> product) { open_.push_back(std::move(product)); }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t newest) {
    if (!open_.empty()) cuda_on_host::fail("a product that belongs to no group is waited for");
    while (groups_.size() > newest) {
      for (const auto& product : groups_.front()) product();
      groups_.erase(groups_.begin());
    }
  }

 private:
  std::vector<std::function<void()>> open_;
  std::vector<std::vector<std::function<void()>>> groups_;
};

template <class T, SM90::GMMA::Major kMajor>
float factor(uint64_t descriptor, int row, int k) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) cuda_on_host::fail("only swizzles of 128 bytes are known");
  const uint32_t plain = kMajor == SM90::GMMA::Major::K
                             ? start + row / 8 * stride + row % 8 * 128 + k * 2
                             : start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2;
  T value;
  memcpy(&value, cuda_on_host::shared_pointer(plain ^ (plain >> 7 & 7) << 4), 2);
  return fastpost::cuda::to_float(value);
}

template <class T, SM90::GMMA::Major kA, SM90::GMMA::Major kB>
struct Wide {
  template <class... Sums>
  static void fma(uint64_t a, uint64_t b, Sums&... sums_and_scale) {
    start(a, b, std::make_index_sequence<sizeof...(Sums) - 1>{}, sums_and_scale...);
  }

 private:
  template <size_t... I, class... Sums>
  static void start(uint64_t a, uint64_t b, std::index_sequence<I...>, Sums&... sums_and_scale) {
    static_assert(sizeof...(I) == 128);
    const auto all = std::tie(sums_and_scale...);
    float* const sums[] = {&std::get<I>(all)...};
    run(a, b, std::vector<float*>(sums, sums + 128), std::get<128>(all) == SM90::GMMA::ScaleOut::Zero);
  }
  static void run(uint64_t a, uint64_t b, std::vector<float*> sums, bool zero) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    Products::mine().start([=] {
      const int first = thread / 32 * 16 + thread % 32 / 4;
      float from_a[2][16];
      for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 16; ++k) from_a[half][k] = factor<T, kA>(a, first + 8 * half, k);
      }
      for (int j = 0; j < 64; ++j) {
        const int column = j / 2 * 8 + thread % 4 * 2 + j % 2;
        float from_b[16];
        for (int k = 0; k < 16; ++k) from_b[k] = factor<T, kB>(b, column, k);
        for (int half = 0; half < 2; ++half) {
          float& sum = *sums[j / 2 * 4 + half * 2 + j % 2];
          if (zero) sum = 0.0f;
          for (int k = 0; k < 16; ++k) sum += from_a[half][k] * from_b[k];
        }
      }
    });
  }
};

namespace SM90::GMMA {
template <Major kA, Major kB, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x256x16_F32BF16BF16_SS : Wide<fastpost::bfloat16, kA, kB> {};
template <Major kA, Major kB, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x256x16_F32F16F16_SS : Wide<fastpost::float16, kA, kB> {};
}  // namespace SM90::GMMA

inline void warpgroup_fence_operand(float&) {}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { Products::mine().commit(); }
template <int kNewest>
void warpgroup_wait() {
  Products::mine().wait(kNewest);
}

}  // namespace cute
