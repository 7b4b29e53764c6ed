// The pool of threads alone, hammered: prints what went wrong, and ends with 1 if anything did.

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

#include "native_workers.h"

namespace {

std::atomic<int64_t> wrong{0};

// Every task once, and all of them done when Run returns; the results are in plain memory, so that TSan sees who may touch it.
void Check(int64_t tasks, int64_t threads) {
  std::vector<int64_t> done(tasks, 0);
  kvcascade::Shared().Run(tasks, threads, [&](int64_t i) {
    for (volatile int k = 0; k < 200; k = k + 1) {
    }
    done[i] += i + 1;
  });
  for (int64_t i = 0; i < tasks; ++i) wrong += done[i] != i + 1;
}

// Many short calls from two callers, of changing widths, with pauses in which the workers fall asleep.
void Callers(int64_t calls) {
  auto caller = [calls](int64_t seed) {
    for (int64_t r = 0; r < calls; ++r) {
      Check(1 + (r * 7 + seed) % 40, 1 + r % 5);
      if (r % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(400));
    }
  };
  std::thread first(caller, 1), second(caller, 3);
  first.join(), second.join();
}

// A task that throws: the caller hears of it when no task runs any more, and the pool works on.
void Throws(int64_t calls) {
  for (int64_t r = 0; r < calls; ++r) {
    bool thrown = false;
    std::vector<int64_t> done(8, 0);
    try {
      kvcascade::Shared().Run(8, 3, [&](int64_t i) {
        done[i] = 1;
        if (i == r % 8) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    wrong += !thrown;
    Check(8, 3);
  }
}

// Children forked while another thread calls: each works, with threads of its own. One that hangs, or works alone for ever, is killed.
void Forks(int64_t children, unsigned seconds) {
  std::atomic<bool> over{false};
  std::thread caller([&] {
    while (!over) Check(3, 3);
  });
  for (int64_t child = 0; child < children; ++child) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(seconds);
      const auto self = std::this_thread::get_id();
      std::atomic<bool> helped{false};
      while (!helped) kvcascade::Shared().Run(8, 3, [&](int64_t) { helped = helped || std::this_thread::get_id() != self; });
      for (int64_t r = 0; r < 20; ++r) Check(8, 3);
      _exit(wrong != 0);
    }
    int status = 1;
    waitpid(pid, &status, 0);
    wrong += status != 0;
    if (status) break;
  }
  over = true;
  caller.join();
}

// However many threads are asked for, no more work than are allowed.
void Few() {
  kvcascade::Workers::most = 2;
  std::mutex lock;
  std::set<std::thread::id> seen;
  for (int64_t r = 0; r < 50; ++r) {
    kvcascade::Shared().Run(40, 5, [&](int64_t) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));  // time enough for every thread to come
      const std::lock_guard<std::mutex> alone(lock);
      seen.insert(std::this_thread::get_id());
    });
  }
  wrong += seen.size() != 2;
}

}  // namespace

#if defined(REFUSE_THREADS)
// In place of the system's, also for the C++ library: only the first thread is started.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*run)(void*), void* with) noexcept {
  static int asked = 0;
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return asked++ ? EAGAIN : real(thread, how, run, with);
}
#endif

int main(int count, char** words) {
  const char* what = count > 1 ? words[1] : "";
  if (!std::strcmp(what, "callers")) Callers(3000);
  if (!std::strcmp(what, "throws")) Throws(2000);
  if (!std::strcmp(what, "forks")) Forks(50, count > 2 ? std::atoi(words[2]) : 60);
  if (!std::strcmp(what, "few")) Few();
  if (!std::strcmp(what, "alone")) {
    for (int64_t r = 0; r < 1000; ++r) Check(8, 5);
  }
  std::printf("%s: %lld wrong\n", what, static_cast<long long>(wrong));
  return wrong != 0;
}
