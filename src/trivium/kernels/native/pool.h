// A team of threads that walks a step together: between steps the helpers sleep, within one they meet at barriers.
//
// Waiting spins for some tens of microseconds, then sleeps, so that a shared machine is not burnt.
#pragma once
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace trv {

TRV_INLINE void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A number that only rises; `wait` returns once it differs from `seen`.
class Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void raise() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> hold(mutex_);
      condition_.notify_all();
    }
  }
  void wait(uint32_t seen, int spins) {
    for (int i = 0; i < spins; i++) {
      if (value() != seen) return;
      relax();
    }
    std::unique_lock<std::mutex> hold(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    condition_.wait(hold, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
};

class Team {
 public:
  // Throws std::system_error where a thread cannot be started; those that were have ended then.
  explicit Team(int size) : size_(size), process_(getpid()) {
    threads_.reserve(size);
    try {
      for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { serve(i); });
    } catch (...) {
      end();
      throw;
    }
  }
  ~Team() { end(); }
  int size() const { return size_; }
  // After a fork the helpers do not exist in the child.
  bool alive() const { return process_ == getpid(); }

  // work(member) on every member; returns when all are done.
  void run(const std::function<void(int)>& work) {
    if (size_ == 1) return work(0);
    work_ = &work;
    begin_.raise();
    work(0);
    barrier();
  }

  void barrier() {
    if (size_ == 1) return;
    uint32_t seen = passed_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      passed_.raise();
    } else {
      passed_.wait(seen, 3000);
    }
  }

 private:
  void end() {
    stop_ = true;
    begin_.raise();
    for (auto& thread : threads_) thread.join();
  }
  void serve(int member) {
    uint32_t seen = 0;
    for (;;) {
      begin_.wait(seen, 2000);
      seen++;
      if (stop_) return;
      (*work_)(member);
      barrier();
    }
  }
  const int size_;
  const int process_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> stop_{false};
  Signal begin_, passed_;
  std::atomic<int> arrived_{0};
};

// Memory that grows and is kept, aligned to cache lines; its contents do not survive growing.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      release();
      size_t wanted = (bytes + 4095) / 4096 * 4096;
      void* fresh = nullptr;
      if (posix_memalign(&fresh, 4096, wanted)) throw std::bad_alloc();
      memset(fresh, 0, wanted);
      data_ = fresh;
      size_ = wanted;
    }
    return data_;
  }
  template <typename T>
  T* get(size_t count) {
    return static_cast<T*>(reserve(count * sizeof(T)));
  }

 private:
  void release() {
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace trv
