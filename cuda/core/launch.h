// SPDX-License-Identifier: Apache-2.0
// Starting a kernel. Nothing here allocates or waits for the GPU.
//
// Only plain C++ and the CUDA runtime API are used (no <<<>>>), so that tests/cuda_on_host can compile the same files
// with an API of its own and run every kernel on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/tensor.h"

// Shared memory whose size is given at launch. One per kernel.
#ifndef FP_DYNAMIC_SHARED
#define FP_DYNAMIC_SHARED(T, name) extern __shared__ __align__(16) T name[]
#endif

// Before a loop whose index picks registers: an array indexed at run time would be memory.
#ifdef __CUDACC__
#define FP_UNROLL _Pragma("unroll")
#else
#define FP_UNROLL
#endif

namespace fastpost::cuda {

// Whether the files *_sm90.cu are part of this build.
#ifdef FASTPOST_SM90
constexpr bool kBuiltForSm90 = true;
#else
constexpr bool kBuiltForSm90 = false;
#endif

// Where an op runs: the stream of its first tensor, with that tensor's device made current for the scope.
class Stream {
 public:
  Stream(const char* op, const Tensor& tensor) : op_(op), stream_(static_cast<cudaStream_t>(tensor.stream)) {
    check(cudaGetDevice(&previous_));
    if (previous_ != tensor.device_index) {
      check(cudaSetDevice(tensor.device_index));
      moved_ = true;
    }
  }
  ~Stream() {
    if (moved_) static_cast<void>(cudaSetDevice(previous_));
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }

  void check(cudaError_t status) const {
    if (status == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());  // or the next, innocent call would report it again
    throw std::runtime_error("[" + std::string(op_) + "] CUDA: " + cudaGetErrorName(status) + ", " +
                             cudaGetErrorString(status) +
                             ". Run `fastpost env` to compare the GPU with what was built.");
  }

 private:
  const char* op_;
  cudaStream_t stream_;
  int previous_ = 0;
  bool moved_ = false;
};

struct Cluster {
  int blocks;
};

// Starts kernel(args...) on `grid` blocks of `block` threads with `smem` bytes of dynamic shared memory, `cluster`
// neighbouring blocks at a time on multiprocessors that reach each other's shared memory (compute capability 9.0).
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t grid, int block, size_t smem, const Stream& stream, Cluster cluster,
            Args... args) {
  static_assert(sizeof...(Params) == sizeof...(Args));
  if (grid == 0) return;
  if (grid > INT32_MAX) stream.check(cudaErrorInvalidConfiguration);  // the hardware's limit
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = smem;
  config.stream = stream.get();
#ifdef __CUDACC__
  cudaLaunchAttribute attribute = {};
  if (cluster.blocks > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster.blocks), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
#else
  static_cast<void>(cluster);
#endif
  stream.check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t grid, int block, size_t smem, const Stream& stream, Args... args) {
  launch(kernel, grid, block, smem, stream, Cluster{1}, args...);
}

// Above 48 KB of dynamic shared memory a kernel has to ask.
template <class Kernel>
void allow_shared(const Stream& stream, Kernel* kernel, int bytes) {
  stream.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

__host__ __device__ constexpr int64_t blocks_for(int64_t items, int per_block) {
  return (items + per_block - 1) / per_block;
}

// A run-time option as a template argument: with_flag(x, [&](auto flag) { kernel<decltype(flag)::value> ... }).
template <class F>
void with_flag(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace fastpost::cuda
