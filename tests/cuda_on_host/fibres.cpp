// SPDX-License-Identifier: Apache-2.0
// One block of CUDA threads as fibres of one OS thread, scheduled round robin between barriers.
//
// Under ThreadSanitizer each fibre counts as a thread of its own, and switching between fibres orders nothing. Only
// __syncthreads and __syncwarp order memory, as on a GPU: a shuffle does not. So a missing barrier is reported as a
// data race however the fibres happen to be scheduled. This file itself is compiled without the sanitizer.
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef CUDA_ON_HOST_TSAN
#include <sanitizer/tsan_interface.h>
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {
namespace {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;

enum class State { Ready, AtBlockBarrier, AtWarpBarrier, AtCondition, Failed, Done };

struct Copy {
  void (*copy)(void*, const void*);
  void* shared;
  const void* global;
  int group;
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* tsan = nullptr;
  State state = State::Done;
  int barriers = 0, warp_barriers = 0, shuffles = 0;
  bool (*ready)(void*) = nullptr;
  void* ready_context = nullptr;
  std::vector<Copy> copies;      // of groups, the oldest first
  int group = 0;                 // that is open
  uint32_t shared_with_warp[2];  // two, so that a fast lane's next shuffle cannot overwrite what a slow one still reads
};

struct Machine {
  std::vector<Fibre> fibres;  // made once, used by all launches
  ucontext_t scheduler;
  void* scheduler_tsan = nullptr;
  int threads = 0, current = 0, skipped_barrier = -1, most_barriers = 0, capability = 8;
  bool pageable = false;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  const char* failure = nullptr;
  std::vector<std::max_align_t> dynamic;
  char start, end;  // sanitizer's sync objects: only their addresses count
  // More than one, or a fast thread's next arrival would order too much; three, for one in between can be skipped.
  char block_sync[3], warp_sync[kMaxThreads / kWarp][2];

  Fibre& self() { return fibres[current]; }

  void wait(State state) {
    Fibre& me = self();
    me.state = state;
    __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
    swapcontext(&me.context, &scheduler);
  }
};

Machine machine;

void fibre_main() {
  for (;;) {
    __tsan_acquire(&machine.start);
    machine.body(machine.context);
    __tsan_release(&machine.end);
    machine.wait(State::Done);  // resumed for the next block
  }
}

void make_fibres(int count) {
  if (machine.fibres.empty()) machine.fibres.reserve(kMaxThreads);  // contexts must not move
  while (static_cast<int>(machine.fibres.size()) < count) {
    Fibre& f = machine.fibres.emplace_back();
    f.stack.reset(new char[kStackBytes]);
    f.tsan = __tsan_create_fiber(0);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fibre_main, 0);
  }
}

void resume(int i) {
  Fibre& f = machine.fibres[i];
  machine.current = i;
  threadIdx = dim3(static_cast<unsigned>(i), 0, 0);
  __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
  swapcontext(&machine.scheduler, &f.context);
}

// Opens the barrier of threads [begin, end) if all that still run stand at it. True if it did.
bool open_barrier(int begin, int end, State barrier) {
  bool any = false;
  for (int i = begin; i < end; ++i) {
    const State s = machine.fibres[i].state;
    if (s != barrier && s != State::Done) return false;
    any |= s == barrier;
  }
  for (int i = begin; i < end; ++i) {
    if (machine.fibres[i].state == barrier) machine.fibres[i].state = State::Ready;
  }
  return any;
}

void run_block(bool reversed) {
  const int n = machine.threads;
  for (int i = 0; i < n; ++i) {
    Fibre& f = machine.fibres[i];
    f.state = State::Ready;
    f.barriers = f.warp_barriers = f.shuffles = f.group = 0;
    f.copies.clear();
  }
  __tsan_release(&machine.start);
  for (bool progress = true; progress;) {
    progress = false;
    for (int k = 0; k < n; ++k) {
      const int i = reversed ? n - 1 - k : k;
      Fibre& f = machine.fibres[i];
      if (f.state == State::AtCondition && f.ready(f.ready_context)) f.state = State::Ready;
      if (f.state != State::Ready) continue;
      resume(i);
      progress = true;
    }
    for (int w = 0; w < n; w += kWarp) progress |= open_barrier(w, w + kWarp < n ? w + kWarp : n, State::AtWarpBarrier);
    progress |= open_barrier(0, n, State::AtBlockBarrier);
  }
  __tsan_acquire(&machine.end);
  for (int i = 0; i < n; ++i) {
    const Fibre& f = machine.fibres[i];
    if (f.state == State::Done && f.barriers == machine.fibres[0].barriers) continue;
    const bool stuck = f.state != State::Done;
    const char* failure = machine.failure;
    machine.failure = nullptr;
    machine.fibres.clear();
    throw std::runtime_error(failure ? std::string("cuda_on_host: ") + failure
                             : stuck ? "cuda_on_host: threads of a block wait for each other forever"
                                     : "cuda_on_host: not all threads of a block met the same number of __syncthreads");
  }
}

}  // namespace

void* dynamic_shared() { return machine.dynamic.data(); }

constexpr uint32_t kFirstShared = 1 << 10;  // what a block has of its own comes first
uint32_t shared_address(const void* pointer) {
  return kFirstShared + static_cast<uint32_t>(static_cast<const char*>(pointer) -
                                              reinterpret_cast<const char*>(machine.dynamic.data()));
}
const void* shared_pointer(uint32_t address) {
  if (address < kFirstShared || address - kFirstShared >= machine.dynamic.size() * sizeof(std::max_align_t)) {
    fail("an address outside of dynamic shared memory");
  }
  return reinterpret_cast<const char*>(machine.dynamic.data()) + (address - kFirstShared);
}

void copy_later(void (*copy)(void*, const void*), void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("a copy of 16 bytes that is not aligned");
  }
  Fibre& me = machine.self();
  me.copies.push_back({copy, shared, global, me.group});
}
void close_copies() { ++machine.self().group; }
void wait_for_copies(int newest) {
  Fibre& me = machine.self();
  size_t done = 0;
  for (; done < me.copies.size() && me.copies[done].group < me.group - newest; ++done) {
    const Copy& c = me.copies[done];
    c.copy(c.shared, c.global);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void yield() { machine.wait(State::Ready); }

void wait_until(bool (*ready)(void*), void* context) {
  if (ready(context)) return;
  Fibre& me = machine.self();
  me.ready = ready;
  me.ready_context = context;
  machine.wait(State::AtCondition);
}

void fail(const char* what) {
  machine.failure = what;
  for (;;) machine.wait(State::Failed);
}
void skip_barrier(int n) { machine.skipped_barrier = n; }
int most_barriers() { return machine.most_barriers; }
void forget_barriers() { machine.most_barriers = 0; }
void set_capability(int major) { machine.capability = major; }
void set_pageable(bool pageable) { machine.pageable = pageable; }

cudaError_t run(const cudaLaunchConfig_t& config, void (*body)(void*), void* context) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (block.x == 0 || block.x > kMaxThreads || block.y * block.z * grid.y * grid.z != 1 || grid.x == 0) {
    return cudaErrorInvalidConfiguration;
  }
  machine.scheduler_tsan = __tsan_get_current_fiber();
  machine.threads = static_cast<int>(block.x);
  machine.body = body;
  machine.context = context;
  machine.dynamic.assign(config.dynamicSmemBytes / sizeof(std::max_align_t) + 1, {});
  make_fibres(machine.threads);
  blockDim = block;
  gridDim = grid;
  // Every other block runs its threads backwards, so that a result that leans on their order shows.
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b, 0, 0);
    run_block(b % 2 == 1);
  }
  return cudaSuccess;
}

}  // namespace cuda_on_host

using cuda_on_host::machine;
using cuda_on_host::State;

void __syncthreads() {
  const int n = machine.self().barriers++;
  if (n >= machine.most_barriers) machine.most_barriers = n + 1;
  if (n == machine.skipped_barrier) return;
  char* sync = &machine.block_sync[n % 3];
  __tsan_release(sync);
  machine.wait(State::AtBlockBarrier);
  __tsan_acquire(sync);
}

void __syncwarp(unsigned) {
  char* sync = &machine.warp_sync[machine.current / cuda_on_host::kWarp][machine.self().warp_barriers++ % 2];
  __tsan_release(sync);
  machine.wait(State::AtWarpBarrier);
  __tsan_acquire(sync);
}

// Shows `value` to the warp and waits until all have; returns which of the two places it is in.
static int show_warp(uint32_t value) {
  const int slot = machine.self().shuffles++ % 2;
  machine.self().shared_with_warp[slot] = value;
  machine.wait(State::AtWarpBarrier);
  return slot;
}

uint32_t __shfl_xor_sync(unsigned, uint32_t value, int lane_mask) {
  const int me = machine.current, slot = show_warp(value);
  return machine.fibres[me ^ lane_mask].shared_with_warp[slot];
}

uint32_t __ballot_sync(unsigned, int predicate) {
  const int first = machine.current / cuda_on_host::kWarp * cuda_on_host::kWarp, slot = show_warp(predicate != 0);
  uint32_t votes = 0;
  for (int lane = 0; lane < cuda_on_host::kWarp && first + lane < machine.threads; ++lane) {
    votes |= machine.fibres[first + lane].shared_with_warp[slot] << lane;
  }
  return votes;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  attributes->devicePointer = machine.pageable ? nullptr : const_cast<void*>(pointer);
  return cudaSuccess;
}

constexpr int kProcessors = 4;  // few, so that small matrices make blocks with many rows

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? kProcessors : machine.capability;
  return cudaSuccess;
}
