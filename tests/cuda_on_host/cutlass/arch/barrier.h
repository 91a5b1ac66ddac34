// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory (mbarrier), for kernels that name them through CUTLASS: 64 bits with the arrivals and the bytes that
// a phase still waits for. A thread that waits lets others run; when all wait, the launch fails.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace cutlass::arch {

class ClusterBarrier {
 public:
  using ValueType = uint64_t;

  static void init(ValueType* barrier, uint32_t arrivals) {
    const auto count = static_cast<uint16_t>(arrivals);
    store(barrier, {count, count, 0, 0});
  }
  // Until the phase of this parity is over.
  static void wait(ValueType* barrier, uint32_t parity) {
    struct Condition {
      ValueType* barrier;
      uint32_t parity;
    } condition = {barrier, parity};
    cuda_on_host::wait_until(
        [](void* p) {
          const auto* c = static_cast<Condition*>(p);
          return (load(c->barrier).phase & 1u) != c->parity;
        },
        &condition);
  }
  static void arrive(ValueType* barrier) {
    change(barrier, 1, 0);
    cuda_on_host::yield();  // who waited goes on before anything else happens
  }

 protected:
  struct State {
    uint16_t arrivals, missing, phase;
    int16_t units;  // of 16 bytes that are announced and not there
  };
  static State load(const ValueType* barrier) {
    State state;
    memcpy(&state, barrier, sizeof state);
    return state;
  }
  static void store(ValueType* barrier, const State& state) { memcpy(barrier, &state, sizeof state); }
  static void change(ValueType* barrier, int arrivals, int bytes) {
    State state = load(barrier);
    if (state.missing < arrivals) cuda_on_host::fail("more arrivals at a barrier than it was made for");
    state.missing = static_cast<uint16_t>(state.missing - arrivals);
    state.units = static_cast<int16_t>(state.units + bytes / 16);
    if (state.missing == 0 && state.units == 0) {
      state.missing = state.arrivals;
      ++state.phase;
    }
    store(barrier, state);
  }
};

class ClusterTransactionBarrier : public ClusterBarrier {
 public:
  static void arrive_and_expect_tx(ValueType* barrier, uint32_t bytes) { change(barrier, 1, static_cast<int>(bytes)); }
  static void complete(ValueType* barrier, int bytes) { change(barrier, 0, -bytes); }  // the copy engine's
};

inline void fence_barrier_init() {}
inline void fence_view_async_shared() {}

}  // namespace cutlass::arch
