// Memory of a calling thread, kept between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace transload {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { std::free(memory_); }

  // Memory that starts at a multiple of 64. What was in it is gone. Throws std::bad_alloc.
  uint8_t *reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = static_cast<uint8_t *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }

  // Gives memory back that is more than calls usually need.
  void release_large() {
    if (size_ <= kKept) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t kKept = size_t(64) << 20;

  uint8_t *memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace transload
