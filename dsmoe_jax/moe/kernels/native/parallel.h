// Work in items on XLA's threads.

#ifndef DSMOE_JAX_MOE_NATIVE_PARALLEL_H_
#define DSMOE_JAX_MOE_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace dsmoe {

// Runs body(0) ... body(n - 1) on XLA's threads and this one; returns when all are done.
template <typename Body>
void ForEach(xla::ffi::ThreadPool& pool, int64_t n, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto shared = std::make_shared<Shared>();  // a helper may start when all is over
  auto work = [shared, n, &body] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < n;) {
      body(i);
      if (shared->done.fetch_add(1) + 1 == n) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_done.notify_all();
      }
    }
  };
  for (int64_t i = 1; i < std::min(pool.num_threads(), n); ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done.load() == n; });
}

// The same for items of `step` indices: body(first, end) for parts of 0 ... n - 1.
template <typename Body>
void ForEachPart(xla::ffi::ThreadPool& pool, int64_t n, int64_t step, const Body& body) {
  ForEach(pool, (n + step - 1) / step,
          [&](int64_t i) { body(i * step, std::min(n, (i + 1) * step)); });
}

}  // namespace dsmoe

#endif  // DSMOE_JAX_MOE_NATIVE_PARALLEL_H_
