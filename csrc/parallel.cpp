// SPDX-License-Identifier: Apache-2.0
#include "parallel.hpp"

#include <pthread.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace fastloss {
namespace {

std::atomic<int> requested_threads{0};
std::atomic<TorchParallelFor> torch_parallel{nullptr};
std::atomic<TorchGetNumThreads> torch_threads{nullptr};

// One loop in progress. Workers take the next index until none is left, or a task throws: memory may run out in any of them.
struct Loop {
  const std::function<void(int64_t)>& task;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;  // of the first that threw

  void work() noexcept {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  // Only one loop at a time has the workers; a second caller gets `false` and runs its loop alone. Where the system gives no
  // more threads, those that there are do the work.
  bool run(Loop& loop, int workers) {
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; started_ < workers; ++started_) std::thread([this, id = started_] { serve(id); }).detach();
      } catch (const std::system_error&) {
        workers = started_;
      }
      loop_ = &loop;
      wanted_ = workers;
      active_ = workers;
      ++generation_;
    }
    wake_.notify_all();
    loop.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return active_ == 0; });
    loop_ = nullptr;
    return true;
  }

 private:
  void serve(int id) {
    uint64_t seen = 0;
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= wanted_ || loop_ == nullptr) continue;
      Loop* loop = loop_;
      lock.unlock();
      loop->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  int started_ = 0, wanted_ = 0, active_ = 0;
  uint64_t generation_ = 0;
};

std::atomic<Pool*> current_pool{nullptr};

// Threads do not survive fork(): the child leaves its copy of the pool alone and starts a new one when it needs it. PyTorch's
// OpenMP pool cannot be used again in a child either.
void forget_pools_in_child() {
  current_pool = nullptr;
  torch_parallel = nullptr;
  torch_threads = nullptr;
}

// Never destroyed: its threads wait in it until the process ends.
Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pools_in_child);
  (void)registered;
  Pool* existing = current_pool.load();
  if (existing != nullptr) return *existing;
  Pool* fresh = new Pool;
  if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
  delete fresh;
  return *existing;
}

int available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// 0 where the variable is not set.
int environment_threads() {
  const char* variable = getenv("FASTLOSS_NUM_THREADS");
  const std::string text = variable ? variable : "";
  if (text.empty()) return 0;
  const bool digits = text.find_first_not_of("0123456789") == std::string::npos;  // strtol takes blanks and signs, too
  const long threads = digits ? strtol(text.c_str(), nullptr, 10) : 0;
  if (threads < 1 || threads > kMostThreads) {
    throw std::invalid_argument("FASTLOSS_NUM_THREADS = '" + text + "' is not a number of threads: expected 1 to " +
                                std::to_string(kMostThreads));
  }
  return static_cast<int>(threads);
}

}  // namespace

int get_num_threads() {
  if (const int requested = requested_threads) return requested;
  static const int environment = environment_threads();
  if (environment > 0) return environment;
  uint32_t torch_count = 0;
  const TorchGetNumThreads count = torch_threads;
  if (count && count(&torch_count) == 0 && torch_count > 0) return static_cast<int>(torch_count);
  static const int cpus = available_cpus();
  return cpus;
}

void set_num_threads(int threads) { requested_threads = threads; }

void use_torch_pool(TorchParallelFor parallel, TorchGetNumThreads count) {
  pool();  // registers the fork handler
  torch_threads = count;
  torch_parallel = parallel;
}

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  Loop loop{task, count, {0}, {}, nullptr};
  const int workers = static_cast<int>(std::min<int64_t>(threads, count));
  bool done = false;
  if (workers > 1) {
    const auto body = [](int64_t, int64_t, void* context) { static_cast<Loop*>(context)->work(); };
    const TorchParallelFor torch = torch_parallel;
    done = torch ? torch(0, workers, 1, body, &loop) == 0 : pool().run(loop, workers - 1);
  }
  if (!done) loop.work();
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace fastloss
