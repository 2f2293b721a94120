#include "waiting.h"

#if defined(__linux__)
#include <climits>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace transload {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

#if defined(__linux__)
void futex(std::atomic<uint32_t> &word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}
#endif

}  // namespace

bool Spin::more() {
  if (length_.count() == 0) return false;
  pause();
  if (++pauses_ % 32 != 0) return true;
  const auto now = std::chrono::steady_clock::now();
  if (pauses_ == 32) end_ = now + length_;
  return now < end_;
}

#if defined(__linux__)
void Word::sleep_while(uint32_t same) { futex(value, FUTEX_WAIT, same); }
void Word::wake_all() { futex(value, FUTEX_WAKE, INT_MAX); }
#else
void Word::sleep_while(uint32_t same) {
  std::unique_lock<std::mutex> lock(lock_);
  if (value.load(std::memory_order_acquire) == same) changed_.wait(lock);
}

void Word::wake_all() {
  const std::lock_guard<std::mutex> lock(lock_);
  changed_.notify_all();
}
#endif

}  // namespace transload
