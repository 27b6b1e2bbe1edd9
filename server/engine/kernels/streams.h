// Which thread takes which rows, and what a thread fetches from memory while it computes something else. Knows no arithmetic.
#pragma once
#include "vectors.h"

namespace {

// `count` things cut into one range a thread, so that what a thread fetched ahead is what it meets; who is done helps the others.
struct Shares {
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };
  Counter* counters;
  int threads;
  Shares(Counter* made, int number) : counters(made), threads(number) {}
  static size_t bytes(int threads) { return threads * sizeof(Counter); }
  Shares(char* memory, int number) : counters(reinterpret_cast<Counter*>(memory)), threads(number) {
    for (int t = 0; t < threads; ++t) new (counters + t) Counter();
  }
  static Shares over(char* made, int number) { return {reinterpret_cast<Counter*>(made), number}; }
  static int64_t start(int64_t count, int thread, int threads) { return count * thread / threads; }

  // The first of up to `step` things of one range, `end` behind the last; -1 when all are taken.
  int64_t take(int64_t count, int64_t step, int me, int64_t& end) {
    for (int k = 0; k < threads; ++k) {
      const int of = (me + k) % threads;
      const int64_t base = start(count, of, threads), stop = start(count, of + 1, threads);
      if (base + counters[of].next.load(std::memory_order_relaxed) >= stop) continue;
      const int64_t first = base + counters[of].next.fetch_add(step);
      if (first >= stop) continue;
      end = std::min(first + step, stop);
      return first;
    }
    return -1;
  }
};

// Stretches of memory that a thread will need soon, fetched line by line from within products that leave the memory idle.
struct Stream {
  static constexpr int64_t kLine = 64;
  struct Run {
    const char* data;
    int64_t size;
  };
  Run* runs;
  int64_t num_runs = 0, current = 0, lines = 0;
  int per_step = 0;
  const char *at = nullptr, *end = nullptr;

  void add(const void* data, int64_t size) {
    runs[num_runs++] = {static_cast<const char*>(data), size};
    lines += (size + kLine - 1) / kLine;
  }
  // Spread the lines over about `steps` steps.
  void begin(int64_t steps) { per_step = (int)std::min<int64_t>(3, (lines * 9 / 8 + steps - 1) / std::max<int64_t>(1, steps)); }
  void refill() {
    if (at < end || current == num_runs) return;
    at = runs[current].data;
    end = at + runs[current++].size;
  }
  // How many of the next `most` steps have something to fetch.
  int64_t steps(int64_t most) const { return at < end ? std::min<int64_t>(most, (end - at + per_step * kLine - 1) / (per_step * kLine)) : 0; }
  inline void fetch() {
    for (int i = 0; i < per_step; ++i, at += kLine) _mm_prefetch(at, _MM_HINT_T1);
  }
};

}  // namespace
