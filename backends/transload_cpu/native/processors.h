// On which processors threads run, for parallel.cpp alone.
#pragma once

#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif

namespace transload {
namespace {

#if defined(__linux__)
int this_cpu() { return sched_getcpu(); }

int usable_cpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                     : static_cast<int>(std::thread::hardware_concurrency());
}

// Where a worker may run. On a busy machine the system tends to wake a worker on the very processor of the caller that
// woke it, where it can only take the caller's place.
class Place {
 public:
  // Leaves a processor for the others that the worker may use; false when there are none.
  bool leave(int cpu) {
    cpu_set_t now;
    if (sched_getaffinity(0, sizeof now, &now) != 0) return false;
    if (!CPU_EQUAL(&now, &chosen_)) allowed_ = now;  // the first time, and when somebody else has decided anew
    chosen_ = allowed_;
    CPU_CLR(cpu, &chosen_);
    return CPU_COUNT(&chosen_) > 0 && sched_setaffinity(0, sizeof chosen_, &chosen_) == 0;
  }

 private:
  cpu_set_t allowed_{}, chosen_{};
};
#else
int this_cpu() { return -1; }
int usable_cpus() { return static_cast<int>(std::thread::hardware_concurrency()); }

struct Place {
  bool leave(int) { return true; }
};
#endif

}  // namespace
}  // namespace transload
