// The threads that all kernels share.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace kvcascade {

// Threads that share the tasks of a kernel. A decode step asks for them every few tens of microseconds, less than it takes the system
// to wake one, so each waits in a loop for kPatience before it sleeps.
class Workers {
 public:
  // Tasks are claimed one by one, by this thread too, so none is waited for that nobody has begun. Another caller meanwhile works alone.
  template <typename F>
  void Run(int64_t tasks, int64_t threads, const F& task) {
    const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (threads < 2 || tasks < 2 || !alone) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    while (static_cast<int64_t>(started_) + 1 < threads) std::thread(&Workers::Wait, this, started_++).detach();
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
  }

 private:
  static constexpr std::chrono::microseconds kPatience{200};

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void Work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) task_(context_, i);
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
  std::atomic<int64_t> next_{0};
  std::atomic<bool> open_{false};
  std::atomic<int> inside_{0}, asleep_{0};
  std::atomic<uint64_t> calls_{0};
};

// Never destroyed: its threads may be in it until the process ends.
inline Workers& Shared() {
  static Workers* const workers = new Workers;
  return *workers;
}

}  // namespace kvcascade
