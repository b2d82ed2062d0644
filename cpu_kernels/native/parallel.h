// Work in phases on a borrowed thread pool, and memory that threads keep.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace jsparse {

// A pool of threads that belongs to somebody else: it may be busy, and its threads may start late or never.
struct Pool {
  int64_t num_threads = 1;
  std::function<void(std::function<void()>)> schedule;
};

// Phases of independent chunks; a phase begins when all chunks of the one before are done. The calling thread claims
// chunks itself and can finish everything alone, so that a busy pool delays nothing and cannot deadlock. Which thread
// computes a chunk must not matter to its result.
class Phases {
 public:
  using Body = std::function<void(int64_t chunk)>;

  Phases();
  void Add(int64_t chunks, Body body);
  // Returns when every chunk is done. Called once. `bytes` is about what the phases read together: a thread is not
  // woken for less than it could read meanwhile.
  void Run(const Pool& pool, int64_t bytes);

 private:
  struct State;
  class Lounge;
  std::shared_ptr<State> state_;  // outlives the call where a helper starts late
};

// Memory that a thread keeps between calls, so that a decode step asks for none of that size again. Pointers are good until `Begin`.
class Arena {
 public:
  static Arena& OfCall();   // for what a whole operation shares, on the thread that called it
  static Arena& OfChunk();  // for one chunk, on the thread that computes it

  void Begin();
  template <class T>
  T* Take(int64_t count) {
    return static_cast<T*>(Bytes(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  struct Block {
    std::unique_ptr<uint8_t[]> memory;
    int64_t size;
  };
  void* Bytes(int64_t size);

  std::vector<Block> blocks_;
  int64_t used_ = 0;   // of the last block
  int64_t total_ = 0;  // since Begin
};

}  // namespace jsparse
