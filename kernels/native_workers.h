// The threads that all kernels share.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <thread>

#include <pthread.h>

namespace kvcascade {

// Threads that share the tasks of a kernel. A decode step asks for them every few tens of microseconds, less than it takes the system
// to wake one, so each waits in a loop for kPatience before it sleeps.
class Workers {
 public:
  // At most so many threads work for a caller, itself among them.
  static inline std::atomic<int64_t> most{std::numeric_limits<int64_t>::max()};

  // Tasks are claimed one by one, by this thread too, so none is waited for that nobody has begun. Another caller meanwhile works alone.
  // Throws std::bad_alloc where a task throws, once no task runs any more.
  template <typename F>
  void Run(int64_t tasks, int64_t threads, const F& task) {
    threads = std::min(threads, most.load(std::memory_order_relaxed));
    const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (threads < 2 || tasks < 2 || !alone) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    Start(threads - 1);
    task_ = [](const void* task, int64_t i) { (*static_cast<const F*>(task))(i); };
    context_ = &task, tasks_ = tasks, wanted_ = threads - 1;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    calls_.fetch_add(1);
    if (asleep_.load()) {
      { const std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    Work();
    open_.store(false);  // who has not come in by now stays out
    for (int spins = 0; inside_.load(); ++spins) spins < 1000 ? Pause() : std::this_thread::yield();
    if (failed_.exchange(false)) throw std::bad_alloc();
  }

 private:
  static constexpr std::chrono::microseconds kPatience{200};

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // What the system refuses to start is done without, for good: asking again in every call would cost more than the work.
  void Start(int64_t count) {
    try {
      for (; started_ < count && !refused_; ++started_) std::thread(&Workers::Wait, this, started_).detach();
    } catch (const std::exception&) {
      refused_ = true;
    }
  }

  void Work() {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) task_(context_, i);
    } catch (const std::exception&) {  // tasks throw nothing but want of memory
      failed_.store(true);
      next_.store(tasks_, std::memory_order_relaxed);
    }
  }

  void Wait(int64_t index) {
    for (uint64_t seen = 0;;) {
      const auto since = std::chrono::steady_clock::now();
      for (int spins = 1; calls_.load() == seen; ++spins) {
        Pause();
        if (spins % 64 || std::chrono::steady_clock::now() - since < kPatience) continue;
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return calls_.load() != seen; });
        asleep_.fetch_sub(1);
      }
      seen = calls_.load();
      inside_.fetch_add(1);
      if (open_.load() && index < wanted_) Work();
      inside_.fetch_sub(1);
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  void (*task_)(const void*, int64_t);
  const void* context_;
  int64_t tasks_, wanted_, started_ = 0;
  bool refused_ = false;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> open_{false}, failed_{false};
  std::atomic<int> inside_{0}, asleep_{0};
  std::atomic<uint64_t> calls_{0};
};

// Never destroyed: its threads may be in it until the process ends. They do not live on in a child of a fork, which begins anew.
inline Workers*& Pool() {
  static Workers* pool = (pthread_atfork(nullptr, nullptr, [] { Pool() = new Workers; }), new Workers);
  return pool;
}
inline Workers& Shared() { return *Pool(); }

}  // namespace kvcascade
