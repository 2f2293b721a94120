// Waiting for another thread: a bounded look at a number, then sleep until somebody changes it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#if !defined(__linux__)
#include <condition_variable>
#include <mutex>
#endif

namespace transload {

// A number that a thread can sleep on until another changes it and says so.
class Word {
 public:
  std::atomic<uint32_t> value{0};

  void sleep_while(uint32_t same);  // may also return without a change
  void wake_all();

#if !defined(__linux__)
 private:
  std::mutex lock_;
  std::condition_variable changed_;
#endif
};

// Time to look before sleep. Longer than a thread needs to come when it is awake, far shorter than a time slice.
constexpr std::chrono::microseconds kSpin(50);

// Looking that is bounded by time. The clock is read once in a while, since that may be a system call.
class Spin {
 public:
  explicit Spin(std::chrono::microseconds length) : length_(length) {}

  // Pauses for a moment; false when the time is up.
  bool more();

 private:
  const std::chrono::microseconds length_;
  std::chrono::steady_clock::time_point end_;
  uint32_t pauses_ = 0;
};

}  // namespace transload
