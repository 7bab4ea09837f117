// SPDX-License-Identifier: BSD-3-Clause
//
// A stand-in for CUDA's runtime that runs kernels on the host, block after block. Each thread of a block is a fiber
// with its own stack. A barrier or a shuffle switches to the next fiber. Code that hangs a GPU or corrupts memory ends
// the process with a message. A launch that a GPU refuses returns its error. Only the parts of CUDA that the kernels
// use exist.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __grid_constant__

struct Index3 {
  unsigned x = 0;
};
inline Index3 blockIdx, threadIdx;

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

namespace cuda_stand_in {

constexpr int kWarpLanes = 32;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostBlocks = 0x7fffffff;
constexpr size_t kMostParameterBytes = 4096;
constexpr size_t kStackBytes = size_t{1} << 18;
constexpr int kPoison = 0xa5;

inline cudaError_t last_error = cudaSuccess;
inline uint64_t order_seed = 0;  // 0: threads run in ascending order, else shuffled

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  State state = State::kDone;
  bool entered = false;
  unsigned char value[8];  // the value that a shuffle sends, then the received value
  int other = 0;           // XOR mask that gives the lane of the partner
  jmp_buf here;
  ucontext_t first;
};

class Block {
 public:
  static Block& get() {
    static Block block;
    return block;
  }

  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    while (fibers_.size() < threads) add_fiber();
    threads_ = threads;
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0u);
    if (order_seed != 0) std::shuffle(order_.begin(), order_.end(), std::mt19937_64(order_seed + blockIdx.x));
    for (unsigned t = 0; t < threads; ++t) fibers_[t]->state = State::kReady;
    for (const auto& [memory, bytes] : shared_) std::memset(memory, kPoison, bytes);
    do {
      for (const unsigned t : order_) {
        if (fibers_[t]->state == State::kReady) enter(t);
      }
    } while (release());
  }

  // A thread calls this to wait in `state` until all threads that it waits for have arrived.
  void wait(State state) {
    const unsigned me = threadIdx.x;
    fibers_[me]->state = state;
    leave(*fibers_[me]);
    threadIdx.x = me;
  }

  Fiber& current() { return *fibers_[threadIdx.x]; }

  // Poisons this memory now and at the start of every block.
  void add_shared(void* memory, size_t bytes) {
    shared_.emplace_back(memory, bytes);
    std::memset(memory, kPoison, bytes);
  }

 private:
  void add_fiber() {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    mprotect(stack, 4096, PROT_NONE);  // the stack grows down
    getcontext(&fiber->first);
    fiber->first.uc_stack.ss_sp = stack;
    fiber->first.uc_stack.ss_size = kStackBytes;
    fiber->first.uc_link = nullptr;
    makecontext(&fiber->first, &Block::loop, 0);
    fibers_.push_back(std::move(fiber));
  }

  // A fiber runs one thread after another.
  static void loop() {
    Block& block = get();
    for (;;) {
      const unsigned me = threadIdx.x;
      (*block.body_)();
      block.fibers_[me]->state = State::kDone;
      block.leave(*block.fibers_[me]);
    }
  }

  void enter(unsigned thread) {
    Fiber& fiber = *fibers_[thread];
    threadIdx.x = thread;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.entered) _longjmp(fiber.here, 1);
    fiber.entered = true;
    setcontext(&fiber.first);
  }

  void leave(Fiber& fiber) {
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler_, 1);
  }

  // Releases threads that wait for the same event. Returns false if all threads are done.
  bool release() {
    unsigned done = 0, at_barrier = 0;
    for (unsigned t = 0; t < threads_; ++t) {
      done += fibers_[t]->state == State::kDone;
      at_barrier += fibers_[t]->state == State::kAtBarrier;
    }
    if (done == threads_) return false;
    if (at_barrier > 0) {
      if (at_barrier != threads_) fail("a barrier that not all threads of the block reach");
      for (unsigned t = 0; t < threads_; ++t) fibers_[t]->state = State::kReady;
      return true;
    }
    for (unsigned first = 0; first < threads_; first += kWarpLanes) shuffle(first);
    return true;
  }

  // Exchanges the values of a warp. Either all lanes shuffle or none does.
  void shuffle(unsigned first) {
    int shuffling = 0;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      shuffling += first + lane < threads_ && fibers_[first + lane]->state == State::kAtShuffle;
    }
    if (shuffling == 0) return;
    if (shuffling != kWarpLanes) fail("a shuffle that not all lanes of the warp reach");
    unsigned char given[kWarpLanes][8];
    for (int lane = 0; lane < kWarpLanes; ++lane) std::memcpy(given[lane], fibers_[first + lane]->value, 8);
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      Fiber& fiber = *fibers_[first + lane];
      if (fiber.other != fibers_[first]->other) fail("a shuffle whose lanes name different partners");
      std::memcpy(fiber.value, given[lane ^ fiber.other], 8);
      fiber.state = State::kReady;
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> order_;
  std::vector<std::pair<void*, size_t>> shared_;
  const std::function<void()>* body_ = nullptr;
  unsigned threads_ = 0;
  jmp_buf scheduler_;
};

// An array that the threads of a block share. Each declaration has its own `Declaration` type.
template <class T, size_t kCount, class Declaration>
T* shared() {
  static T values[kCount];
  static const bool known = (Block::get().add_shared(values, sizeof values), true);
  static_cast<void>(known);
  return values;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, const Arguments&... arguments) {
  static_assert((sizeof(Arguments) + ... + 0) <= kMostParameterBytes);
  if (blocks == 0 || blocks > kMostBlocks || threads == 0 || threads > kMostThreads) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    Block::get().run(threads, body);
  }
}

}  // namespace cuda_stand_in

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_stand_in::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline void __syncthreads() { cuda_stand_in::Block::get().wait(cuda_stand_in::State::kAtBarrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) cuda_stand_in::fail("a shuffle of a part of a warp");
  cuda_stand_in::Fiber& fiber = cuda_stand_in::Block::get().current();
  std::memcpy(fiber.value, &value, sizeof value);
  fiber.other = other;
  cuda_stand_in::Block::get().wait(cuda_stand_in::State::kAtShuffle);
  std::memcpy(&value, fiber.value, sizeof value);
  return value;
}
