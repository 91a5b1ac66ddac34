// SPDX-License-Identifier: Apache-2.0
// Found before the real cuda_runtime.h when cuda/**/*.cu is compiled as plain C++ (g++ -x c++ -I tests/cuda_on_host).
// Supplies the few words of CUDA C++ and of the runtime API that fastpost uses. Blocks run one after the other; the
// threads of a block are fibres (fibres.cpp), so a run is the same every time and barriers cost no system call.
//
// What this cannot show: memory that a GPU may not touch, races between blocks, alignment faults, speed, PTX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __shared__ static  // one block at a time, so one copy is enough
#define FP_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(cuda_on_host::dynamic_shared())

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Set for the fibre that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int lane_mask);
uint32_t __ballot_sync(unsigned mask, int predicate);

inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline int atomicMax(int* at, int value) {
  int old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

// ---- runtime API ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute,
                                 int bytes) {  // what a block of compute capability 9.0 can have
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidConfiguration;
}
// Memory of the host that a GPU can read, as pinned memory is; or pageable, while set_pageable says so.
struct cudaPointerAttributes {
  void* devicePointer;
};
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t) { return "refused by cuda_on_host"; }

namespace cuda_on_host {

void* dynamic_shared();
// Dynamic shared memory as the hardware counts its bytes, and back.
uint32_t shared_address(const void* pointer);
const void* shared_pointer(uint32_t address);
// Calls copy(shared, global) when the group of copies is waited for, and not before.
void copy_later(void (*copy)(void*, const void*), void* shared, const void* global);
void close_copies();
void wait_for_copies(int newest);
// Lets other threads run, or until ready(context).
void yield();
void wait_until(bool (*ready)(void*), void* context);
// The launch ends with this message; for what a GPU would answer with a hang or with nonsense.
[[noreturn]] void fail(const char* what);
// Calls body(context) once per thread of every block. Throws std::runtime_error when threads wait for each other
// forever.
cudaError_t run(const cudaLaunchConfig_t& config, void (*body)(void*), void* context);
// For tests of the tests: every thread walks past its n-th __syncthreads of a kernel (counted from 0; -1: none).
void skip_barrier(int n);
// The most __syncthreads that a thread has met in one kernel; reset to 0 by forget_barriers.
int most_barriers();
void forget_barriers();
// What cudaDevAttrComputeCapabilityMajor says from now on; 8 at first.
void set_capability(int major);
// Whether the host's memory counts as pageable from now on, which it does not at first.
void set_pageable(bool pageable);

}  // namespace cuda_on_host

inline size_t __cvta_generic_to_shared(const void* pointer) { return cuda_on_host::shared_address(pointer); }

template <class... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               std::type_identity_t<Params>... args) {
  auto call = [&] { kernel(args...); };
  return cuda_on_host::run(*config, [](void* p) { (*static_cast<decltype(call)*>(p))(); }, &call);
}
