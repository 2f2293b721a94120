// The library's own pool of threads: a piece of work is cut into items, and the calling thread shares them with whatever
// workers are free.
//
// The caller never waits for a worker that has not begun: it takes items itself until none is left, withdraws its offer
// from workers that did not come, and waits only for those that have an item in hand. On a busy machine a worker may not
// be scheduled for milliseconds; a call then takes as long as it takes on one thread, not as long as the worker sleeps.
//
// Several threads may call at once: each gets the workers that are free, possibly none. There are no threads before the
// first call with more than one. A forked child starts without workers and gets its own. Not to be included from files
// that are compiled for one instruction set (see floats.h).
#pragma once

#include <atomic>
#include <cstdint>

#include "waiting.h"

namespace transload {

class Job;

// What one participant sees of the work: its number, and the next item.
class Share {
 public:
  Share(Job &job, int worker) : worker(worker), job_(job) {}

  // False when no item is left.
  bool next(int64_t *item);

  const int worker;  // 0 for the caller, below the number of threads asked for; no two participants have the same

 private:
  Job &job_;
};

// Calls part(context, share) on this thread and on up to threads - 1 workers. A participant may come late or never, and
// takes items with share.next; what surrounds that loop brackets its part. An exception of a worker stops the handing
// out of items and becomes std::bad_alloc here (nothing else is thrown in this library).
void share_items(int threads, int64_t items, void (*part)(const void *context, Share &share), const void *context);

// body(share), as above.
template <class Body>
void share(int threads, int64_t items, const Body &body) {
  share_items(threads, items, [](const void *b, Share &s) { (*static_cast<const Body *>(b))(s); }, &body);
}

// body(item, worker) for every item of [0, items), in any order.
template <class Body>
void parallel(int threads, int64_t items, const Body &body) {
  share(threads, items, [&body](Share &s) {
    for (int64_t item; s.next(&item);) body(item, s.worker);
  });
}

// Steps that participants complete together before any of them goes on: each takes steps until none is left, then waits
// for those that others have in hand. Whoever comes first does most; no one waits for someone who never came. A step
// must not throw.
class Stage {
 public:
  // Before anyone takes part. A stage without steps is complete.
  void reset(uint32_t steps) {
    steps_ = steps;
    left_.value.store(steps, std::memory_order_relaxed);
  }

  template <class Body>
  void complete(const Body &body) {
    if (left_.value.load(std::memory_order_acquire) == 0) return;
    for (uint64_t step; (step = next_.fetch_add(1, std::memory_order_relaxed)) < steps_;) {
      body(static_cast<int64_t>(step));
      done();
    }
    wait();
  }

 private:
  void done();
  void wait();

  uint32_t steps_ = 0;
  std::atomic<uint64_t> next_{0};
  Word left_;
  std::atomic<uint32_t> waiting_{0};
};

}  // namespace transload
