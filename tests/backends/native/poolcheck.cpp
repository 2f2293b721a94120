// The pool of threads checked from C++, where sanitizers can watch (see ci/sanitizers): every item once and only once,
// stages complete before anyone passes, many callers at once, errors, forks, and unloading of a library that has threads.
//
//   poolcheck [LIBRARY]    LIBRARY: a built native library, loaded, used with two threads and unloaded
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "parallel.h"
#include "transload_native.h"

namespace {

using transload::parallel;
using transload::Share;
using transload::share;
using transload::Stage;

std::atomic<int> failures{0};

void expect(bool good, const char *what) {
  if (good) return;
  failures++;
  std::printf("FAILED %s\n", what);
}

// Plain memory, so that a missing order between threads is a race that ThreadSanitizer sees.
void check_items(int threads, int64_t items) {
  std::vector<int> done(static_cast<size_t>(items), 0);
  std::vector<int> by(static_cast<size_t>(threads), 0);
  parallel(threads, items, [&](int64_t item, int worker) {
    done[static_cast<size_t>(item)]++;
    by[static_cast<size_t>(worker)]++;
  });
  int64_t sum = 0;
  for (const int count : by) sum += count;
  bool once = true;
  for (const int count : done) once = once && count == 1;
  expect(once && sum == items, "every item once");
}

void check_stages(int threads) {
  constexpr int64_t kStages = 5, kSteps = 40, kItems = 20;
  std::vector<int> made(kStages * kSteps, 0);
  std::vector<Stage> stages(kStages);
  for (Stage &s : stages) s.reset(kSteps);
  std::atomic<int> incomplete{0};
  share(threads, kStages * kItems, [&](Share &mine) {
    for (int64_t item; mine.next(&item);) {
      const int64_t stage = item / kItems;
      stages[static_cast<size_t>(stage)].complete([&](int64_t i) { made[static_cast<size_t>(stage * kSteps + i)]++; });
      for (int64_t i = 0; i < kSteps; i++) incomplete += made[static_cast<size_t>(stage * kSteps + i)] != 1;
    }
  });
  expect(incomplete == 0, "stages complete before anyone passes");
}

void check_errors(int threads) {
  for (const int64_t bad : {0, 7, 99}) {
    bool caught = false;
    try {
      parallel(threads, 100, [&](int64_t item, int) {
        if (item == bad) throw std::runtime_error("item");
      });
    } catch (const std::bad_alloc &) {
      caught = true;
    }
    expect(caught, "an exception arrives as bad_alloc");
  }
}

void check_nested() {
  std::atomic<int> inner{0};
  parallel(3, 10, [&](int64_t, int) { parallel(3, 10, [&](int64_t, int) { inner++; }); });
  expect(inner == 100, "calls inside calls");
}

void check_callers(int callers, int rounds) {
  std::vector<std::thread> threads;
  for (int c = 0; c < callers; c++)
    threads.emplace_back([=] {
      for (int i = 0; i < rounds; i++) {
        check_items(1 + (c + i) % 5, 1 + (i * 37) % 200);
        if (i % 8 == 0) check_stages(2 + c % 3);
        if (i % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));  // workers fall asleep
      }
    });
  for (std::thread &t : threads) t.join();
}

// A child has none of its parent's workers and must not look for them; it is forked while others are at work.
// ThreadSanitizer does not follow threads that a forked child starts.
void check_fork() {
#if defined(__SANITIZE_THREAD__)
  return;
#endif
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) check_items(3, 50);
  });
  for (int i = 0; i < 5; i++) {
    const pid_t child = fork();
    if (child == 0) {
      failures = 0;
      for (int r = 0; r < 20; r++) check_items(3, 50);
      _exit(failures != 0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    expect(status == 0, "a forked child");
  }
  stop = true;
  other.join();
}

// Unloads a library whose workers are awake, and again after they have gone to sleep.
void check_unload(const char *path) {
  for (int i = 0; i < 6; i++) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return expect(false, dlerror());
    const auto size = reinterpret_cast<decltype(&tl_packed_bytes)>(dlsym(library, "tl_packed_bytes"));
    const auto pack = reinterpret_cast<decltype(&tl_pack)>(dlsym(library, "tl_pack"));
    const tl_geometry g{256, 128, 32, 1, 4, TL_ZERO_MIDPOINT, 8, TL_FLOAT32, 0, 0};
    int64_t bytes = 0;
    expect(size(&g, &bytes) == TL_OK, "packed_bytes");
    std::vector<uint8_t> codes(256 * 128, 3), packed(static_cast<size_t>(bytes));
    std::vector<float> scales(256 * 4, 1.f);
    expect(pack(&g, codes.data(), scales.data(), nullptr, nullptr, packed.data(), bytes, 4) == TL_OK, "pack");
    if (i % 2) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    expect(dlclose(library) == 0, "dlclose");
  }
}

}  // namespace

int main(int argc, char **argv) {
  for (const int threads : {1, 2, 3, 8})
    for (const int64_t items : {0, 1, 2, 100, 5000}) check_items(threads, items);
  for (const int threads : {1, 2, 4}) check_stages(threads), check_errors(threads);
  check_nested();
  check_callers(6, 150);
  // An emulator of another processor cannot fork a process that has threads.
  if (std::getenv("POOLCHECK_NO_FORK") == nullptr) check_fork();
  if (argc > 1) check_unload(argv[1]);
  std::printf("pool: %d failed\n", failures.load());
  return failures != 0;
}
