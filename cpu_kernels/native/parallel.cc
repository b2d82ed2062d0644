#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <thread>

namespace jsparse {

namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kSmallestBlock = 1 << 16;
constexpr int64_t kWorthAThread = 1 << 17;
constexpr auto kLinger = std::chrono::microseconds(100);
constexpr int kSpins = 20000;  // then give the core away

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

struct Phases::State {
  struct Phase {
    Phase(int64_t chunks, Body body) : chunks(chunks), body(std::move(body)) {}
    const int64_t chunks;
    const Body body;
    std::atomic<int64_t> claimed{0};
    std::atomic<int64_t> done{0};
  };
  std::vector<std::unique_ptr<Phase>> phases;

  void Work() noexcept {
    for (const auto& phase : phases) {
      for (int64_t chunk; (chunk = phase->claimed.fetch_add(1, std::memory_order_relaxed)) < phase->chunks;) {
        phase->body(chunk);
        phase->done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; phase->done.load(std::memory_order_acquire) < phase->chunks;) {
        Pause();
        if (++spins == kSpins) {
          std::this_thread::yield();
          spins = 0;
        }
      }
    }
  }
};

// Helpers that have finished wait here a moment for the next operation: to wake a thread takes as long as a small one.
// Those here are `waiting` or have a job in `jobs` that is kept for one of them.
class Phases::Lounge {
 public:
  static Lounge& Get() {
    static Lounge* const lounge = new Lounge;  // threads may outlive static objects
    return *lounge;
  }

  // Hands the job to at most that many helpers who wait; returns to how many.
  int64_t Offer(const std::shared_ptr<State>& job, int64_t helpers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t taken = std::min(helpers, waiting_);
    waiting_ -= taken;
    jobs_.insert(jobs_.end(), taken, job);
    offered_.fetch_add(taken, std::memory_order_release);
    return taken;
  }

  // The next job, or null if none came in time.
  std::shared_ptr<State> Wait() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++waiting_;
    }
    const auto end = std::chrono::steady_clock::now() + kLinger;
    for (;;) {
      const bool over = std::chrono::steady_clock::now() >= end;
      if (over || offered_.load(std::memory_order_acquire) > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!jobs_.empty()) {
          const std::shared_ptr<State> job = std::move(jobs_.front());
          jobs_.pop_front();
          offered_.fetch_sub(1, std::memory_order_relaxed);
          return job;
        }
        if (over) {
          --waiting_;
          return nullptr;
        }
      }
      for (int i = 0; i < 16; ++i) Pause();
    }
  }

 private:
  std::mutex mutex_;
  int64_t waiting_ = 0;
  std::deque<std::shared_ptr<State>> jobs_;
  std::atomic<int64_t> offered_{0};
};

Phases::Phases() : state_(std::make_shared<State>()) {}

void Phases::Add(int64_t chunks, Body body) {
  state_->phases.push_back(std::make_unique<State::Phase>(chunks, std::move(body)));
}

void Phases::Run(const Pool& pool, int64_t bytes) {
  int64_t most = 0;
  for (const auto& phase : state_->phases) most = std::max(most, phase->chunks);
  const int64_t helpers = std::min({pool.num_threads, most, bytes / kWorthAThread}) - 1;
  const auto help = [](std::shared_ptr<State> job) {
    for (; job; job = Lounge::Get().Wait()) job->Work();
  };
  const int64_t here = helpers > 0 ? Lounge::Get().Offer(state_, helpers) : 0;
  for (int64_t i = here; i < helpers; ++i) pool.schedule([help, state = state_] { help(state); });
  state_->Work();
}

Arena& Arena::OfCall() {
  static thread_local Arena arena;
  return arena;
}

Arena& Arena::OfChunk() {
  static thread_local Arena arena;
  return arena;
}

void Arena::Begin() {
  if (blocks_.size() > 1) {
    blocks_.clear();
    blocks_.push_back({std::make_unique<uint8_t[]>(total_ + kAlignment), total_ + kAlignment});
  }
  used_ = total_ = 0;
}

void* Arena::Bytes(int64_t size) {
  size = (size + kAlignment - 1) / kAlignment * kAlignment;
  total_ += size;
  const auto aligned = [this](int64_t at) {
    const auto address = reinterpret_cast<uintptr_t>(blocks_.back().memory.get()) + at;
    return at + static_cast<int64_t>(-address % kAlignment);
  };
  if (blocks_.empty() || aligned(used_) + size > blocks_.back().size) {
    const int64_t block = std::max(size + kAlignment, kSmallestBlock);
    blocks_.push_back({std::unique_ptr<uint8_t[]>(new uint8_t[block]), block});
    used_ = 0;
  }
  const int64_t at = aligned(used_);
  used_ = at + size;
  return blocks_.back().memory.get() + at;
}

}  // namespace jsparse
