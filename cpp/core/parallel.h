// SPDX-License-Identifier: Apache-2.0
// parallel_for over rows, on as many threads as the caller allows.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastpost {

// Threads that parallel_for may use in this thread's calls; the binding sets it from torch.get_num_threads().
void set_num_threads(int n);
int num_threads();
// Where the threads come from: "openmp" (borrowed from the runtime that the process already has) or "own pool".
const char* thread_source();

namespace detail {
void run_chunks(int chunks, void (*body)(void* context, int chunk), void* context);
}

// Calls f(begin, end) on disjoint ranges that cover [0, n), each at least `grain` long except the last.
// Ranges depend only on n, grain and the number of threads, never on timing. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  const int64_t most = (n + grain - 1) / grain;
  const int chunks = static_cast<int>(most < num_threads() ? most : num_threads());
  if (chunks <= 1) {
    f(int64_t{0}, n);
    return;
  }
  struct Context {
    std::remove_reference_t<F>* f;
    int64_t n;
    int chunks;
  } context{&f, n, chunks};
  detail::run_chunks(
      chunks,
      [](void* p, int chunk) {
        auto& c = *static_cast<Context*>(p);
        (*c.f)(chunk* c.n / c.chunks, (chunk + 1) * c.n / c.chunks);
      },
      &context);
}

}  // namespace fastpost
