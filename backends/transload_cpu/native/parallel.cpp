// The pool. A worker's state is one number: a tag, and above it the number of the offer that it is about. Callers and
// workers change it by compare-and-exchange only, so an offer is either withdrawn by its caller or taken by the worker.
#include "parallel.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "processors.h"

namespace transload {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMostWorkers = 1023;
constexpr std::chrono::microseconds kBeforeWaking(10);  // about what waking costs both sides; shorter work is done alone

enum Tag : uint32_t {
  kAwake,    // free and looking for work
  kAsleep,   // free and sleeping, or about to
  kClaimed,  // a caller is writing its offer
  kOffered,
  kTaken,
  kAwaited,  // taken, and the caller sleeps until the worker is done
  kClosed    // the thread ends
};

constexpr uint32_t kTagMask = 7, kOneOffer = 8;

uint32_t tag_of(uint32_t state) { return state & kTagMask; }
uint32_t with(uint32_t state, Tag tag) { return (state & ~kTagMask) | tag; }

struct alignas(128) Worker {
  Word state;
  Job *job = nullptr;
  int number = 0;                     // in the job
  std::chrono::microseconds spin{0};  // how long to look for the next job before sleeping
  Place place;
  std::thread thread;

  bool change(uint32_t from, uint32_t to) {
    return state.value.compare_exchange_strong(from, to, std::memory_order_acq_rel, std::memory_order_relaxed);
  }
};

// A worker that was offered a job.
struct Seat {
  Worker *worker;
  uint32_t offer;  // the state while offered
  bool asleep;     // when it was offered
};

}  // namespace

class Job {
 public:
  Job(int64_t items, void (*part)(const void *, Share &), const void *context)
      : items_(items), part_(part), context_(context) {}

  ~Job() { dismiss(); }

  bool next(int64_t *item) {
    *item = next_.fetch_add(1, std::memory_order_relaxed);
    if (*item >= items_) return false;
    wake_one();
    return true;
  }

  // A worker's part. On the caller's own processor it can only be in the way, and moves or does nothing.
  void help(Worker &w) noexcept {
    if (cpu_ >= 0 && this_cpu() == cpu_ && !w.place.leave(cpu_)) return;
    take_part(w.number);
  }

  // Takes part as participant `number`; a worker's exception is kept for the caller.
  void take_part(int number) noexcept {
    Share share(*this, number);
    try {
      part_(context_, share);
    } catch (...) {
      next_.store(items_, std::memory_order_relaxed);
      failed_.store(true, std::memory_order_relaxed);
    }
  }

  // Keeps a worker from other callers, if it is free.
  void claim(Worker &w) {
    const uint32_t state = w.state.value.load(std::memory_order_relaxed);
    const bool asleep = tag_of(state) == kAsleep;
    if ((!asleep && tag_of(state) != kAwake) || !w.change(state, with(state + kOneOffer, kClaimed))) return;
    w.job = this;
    w.number = seats_ + 1;
    seat_[seats_++] = {&w, with(state + kOneOffer, kOffered), asleep};
    if (asleep) sleeper_[asleep_++] = &w;
  }

  int seats() const { return seats_; }

  // From here on the claimed workers may take part.
  void offer() {
    cpu_ = this_cpu();
    waking_from_ = Clock::now() + kBeforeWaking;
    for (int i = 0; i < seats_; i++) seat_[i].worker->state.value.store(seat_[i].offer, std::memory_order_release);
  }

  // Afterwards no worker knows of this job.
  void dismiss() {
    for (int i = 0; i < seats_; i++) {
      const Seat &s = seat_[i];
      if (!s.worker->change(s.offer, with(s.offer, s.asleep ? kAsleep : kAwake))) await(s);
    }
    seats_ = 0;
  }

  bool failed() const { return failed_.load(std::memory_order_relaxed); }

 private:
  // Every participant that has found work wakes another sleeper, so that waking many is nobody's burden.
  void wake_one() {
    if (asleep_ == 0 || woken_.load(std::memory_order_relaxed) >= asleep_ || Clock::now() < waking_from_) return;
    const int i = woken_.fetch_add(1, std::memory_order_relaxed);
    if (i < asleep_) sleeper_[i]->state.wake_all();
  }

  // A worker is busy with this job as long as its state has the number of our offer.
  void await(const Seat &s) {
    const uint32_t taken = with(s.offer, kTaken), awaited = with(s.offer, kAwaited);
    Spin spin(kSpin);
    do {
      if (s.worker->state.value.load(std::memory_order_acquire) != taken) return;
    } while (spin.more());
    if (!s.worker->change(taken, awaited)) return (void)s.worker->state.value.load(std::memory_order_acquire);
    while (s.worker->state.value.load(std::memory_order_acquire) == awaited) s.worker->state.sleep_while(awaited);
  }

  const int64_t items_;
  void (*const part_)(const void *, Share &);
  const void *const context_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> woken_{0};
  std::atomic<bool> failed_{false};
  int cpu_ = -1;  // where the caller was when it offered
  Clock::time_point waking_from_;
  int seats_ = 0, asleep_ = 0;
  Seat seat_[kMostWorkers];
  Worker *sleeper_[kMostWorkers];
};

namespace {

// Until there is an offer or the pool closes. Returns the state.
uint32_t await_offer(Worker &w) {
  Spin spin(w.spin);
  for (bool looking = true;;) {
    const uint32_t state = w.state.value.load(std::memory_order_acquire);
    switch (tag_of(state)) {
      case kOffered:
      case kClosed: return state;
      case kAsleep: w.state.sleep_while(state); break;
      case kAwake:
        looking = looking && spin.more();
        if (!looking) w.change(state, with(state, kAsleep));
        break;
      default: std::this_thread::yield();  // a caller is between claiming and offering
    }
  }
}

void work(Worker &w) {
  for (;;) {
    const uint32_t offer = await_offer(w);
    if (tag_of(offer) == kClosed) return;
    if (!w.change(offer, with(offer, kTaken))) continue;
    w.job->help(w);
    const uint32_t before = w.state.value.exchange(with(offer, kAwake), std::memory_order_acq_rel);
    if (tag_of(before) == kAwaited) w.state.wake_all();
  }
}

class Pool {
 public:
  void recruit(Job &job, int wanted) {
    wanted = std::min(wanted, kMostWorkers);
    int count = count_.load(std::memory_order_acquire);
    if (count < wanted) count = grow(wanted);
    for (int i = 0; i < count && job.seats() < wanted; i++) job.claim(*workers_[i]);
    job.offer();
  }

  // Ends all threads. Calls that come later find no worker.
  void close() {
    const std::lock_guard<std::mutex> lock(growing_);
    closed_ = true;
    for (int i = 0; i < count_.load(std::memory_order_relaxed); i++) {
      Worker &w = *workers_[i];
      for (;;) {
        const uint32_t state = w.state.value.load(std::memory_order_relaxed);
        if (tag_of(state) <= kAsleep && w.change(state, with(state, kClosed))) break;
        std::this_thread::yield();
      }
      w.state.wake_all();
      w.thread.join();
    }
  }

 private:
  int grow(int wanted) {
    const std::lock_guard<std::mutex> lock(growing_);
    int count = count_.load(std::memory_order_relaxed);
    const int cpus = usable_cpus();
    while (!closed_ && count < wanted) {
      auto *w = new (std::nothrow) Worker;
      if (w == nullptr) break;
      if (count + 1 < cpus) w->spin = kSpin;  // with fewer processors than threads, looking only disturbs
      if (!start(*w)) {
        delete w;
        break;
      }
      workers_[count++] = w;
      count_.store(count, std::memory_order_release);
    }
    return count;
  }

  // Workers take no signals: those belong to the program's own threads.
  static bool start(Worker &w) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      w.thread = std::thread(work, std::ref(w));
    } catch (const std::exception &) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return w.thread.joinable();
  }

  std::mutex growing_;
  bool closed_ = false;
  std::atomic<int> count_{0};
  Worker *workers_[kMostWorkers];
};

// Pools are never deleted: while a process exits, threads of its own may still be inside a call.
std::atomic<Pool *> current{nullptr};

Pool *pool() {
  Pool *found = current.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  auto *fresh = new (std::nothrow) Pool;
  if (fresh == nullptr) return nullptr;
  if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;
  return found;
}

// A forked child has none of its parent's threads: it forgets their pool, whatever state that was in.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_relaxed); });

// When the library is unloaded or the process exits, no thread is left in its code.
struct AtUnload {
  ~AtUnload() {
    if (Pool *p = current.load(std::memory_order_acquire)) p->close();
  }
} at_unload;

}  // namespace

bool Share::next(int64_t *item) { return job_.next(item); }

void share_items(int threads, int64_t items, void (*part)(const void *, Share &), const void *context) {
  Job job(items, part, context);
  Pool *workers = threads > 1 && items > 1 ? pool() : nullptr;
  if (workers != nullptr) workers->recruit(job, static_cast<int>(std::min<int64_t>(threads, items)) - 1);
  job.take_part(0);
  job.dismiss();
  if (job.failed()) throw std::bad_alloc();
}

void Stage::done() {
  if (left_.value.fetch_sub(1, std::memory_order_seq_cst) == 1 && waiting_.load(std::memory_order_seq_cst) > 0)
    left_.wake_all();
}

void Stage::wait() {
  Spin spin(kSpin);
  do {
    if (left_.value.load(std::memory_order_acquire) == 0) return;
  } while (spin.more());
  waiting_.fetch_add(1, std::memory_order_seq_cst);
  for (uint32_t left; (left = left_.value.load(std::memory_order_seq_cst)) != 0;) left_.sleep_while(left);
}

}  // namespace transload
