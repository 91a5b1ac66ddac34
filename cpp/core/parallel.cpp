// SPDX-License-Identifier: Apache-2.0
// torch's CPU kernels run on an OpenMP runtime whose idle threads keep spinning for a while after each call. A second
// set of threads would fight them for the same cores between two GEMMs, so we run on theirs when we find them
// (GOMP_parallel is stable ABI of both GNU and LLVM OpenMP) and start our own only where there are none.
#include "core/parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace fastpost {
namespace {

thread_local int allowed_threads = 1;

struct Job {
  void (*body)(void*, int);
  void* context;
  int chunks;
  std::atomic<int> next{0};
  void work() {
    for (int c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) body(context, c);
  }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel openmp() {
  static std::atomic<GompParallel> found{nullptr};
  GompParallel f = found.load(std::memory_order_relaxed);
  if (!f) {  // look again as long as there is none: torch may be imported after us
    f = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(f, std::memory_order_relaxed);
  }
  return f;
}

// Workers sleep on a condition variable; one job runs at a time. Leaked on purpose: joining threads while the process
// unloads libraries is a classic source of hangs.
class Pool {
 public:
  void run(Job& job) {
    std::lock_guard one_job(entry_);
    {
      std::lock_guard lock(mutex_);
      while (static_cast<int>(workers_.size()) < job.chunks - 1) workers_.emplace_back([this] { loop(); });
      job_ = &job;
      wanted_ = job.chunks - 1;
      running_ = 0;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock lock(mutex_);
    wanted_ = 0;  // late wakers find nothing to do
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

 private:
  void loop() {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (wanted_ == 0) continue;
      --wanted_;
      ++running_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }
  std::mutex entry_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int wanted_ = 0, running_ = 0;
};

}  // namespace

void set_num_threads(int n) { allowed_threads = n < 1 ? 1 : n; }
int num_threads() { return allowed_threads; }
const char* thread_source() { return openmp() ? "openmp" : "own pool"; }

void detail::run_chunks(int chunks, void (*body)(void*, int), void* context) {
  Job job{body, context, chunks};
  if (GompParallel parallel = openmp()) {
    parallel([](void* p) { static_cast<Job*>(p)->work(); }, &job, static_cast<unsigned>(chunks), 0);
  } else {
    static Pool& pool = *new Pool;
    pool.run(job);
  }
}

}  // namespace fastpost
