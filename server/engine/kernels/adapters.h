// What adapters add to rows: shrink to the rank, expand into float32. Knows slots and pairs, nothing of the base's product.
#pragma once
#include "products.h"

namespace {

constexpr int kGroup = 4;   // most rows of one adapter that share each load of its weights
constexpr int kRanks = 64;  // ranks between shrink and expand

// hidden[row][r] = rows . a[r], for R ranks of N rows.
template <int R, int N, class T>
inline void shrink(const T* a, const T* const* x, int64_t count, float (*hidden)[kRanks]) {
  __m512 sums[N][R];
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) sums[n][r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    __m512 weights[R];
    for (int r = 0; r < R; ++r) weights[r] = load16(a + r * count + i, mask);
    for (int n = 0; n < N; ++n) {
      const __m512 v = load16(x[n] + i, mask);
      for (int r = 0; r < R; ++r) sums[n][r] = _mm512_fmadd_ps(v, weights[r], sums[n][r]);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) hidden[n][r] = _mm512_reduce_add_ps(sums[n][r]);
}

#ifdef __AVX512BF16__
template <int R, int N>
inline void shrink(const bf16* a, const bf16* const* x, int64_t count, float (*hidden)[kRanks]) {
  __m512 sums[N][R];
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) sums[n][r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 mask = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
    __m512bh weights[R];
    for (int r = 0; r < R; ++r) weights[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + r * count + i);
    for (int n = 0; n < N; ++n) {
      const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[n] + i);
      for (int r = 0; r < R; ++r) sums[n][r] = _mm512_dpbf16_ps(sums[n][r], v, weights[r]);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) hidden[n][r] = _mm512_reduce_add_ps(sums[n][r]);
}
#endif

template <int N, class T>
void shrink_ranks(const T* a, int ranks, const T* const* x, int64_t count, float (*hidden)[kRanks]) {
  int r = 0;
  for (; r + 4 <= ranks; r += 4) shrink<4, N>(a + r * count, x, count, reinterpret_cast<float(*)[kRanks]>(hidden[0] + r));
  for (; r < ranks; ++r) shrink<1, N>(a + r * count, x, count, reinterpret_cast<float(*)[kRanks]>(hidden[0] + r));
}

// delta[row] (+)= hidden[row] . b, 64 outputs at a time and rank by rank.
template <int N, class T>
void expand_ranks(const T* b, int ranks, const float (*hidden)[kRanks], int64_t count, float* const* delta, bool is_first) {
  for (int64_t i = 0; i < count; i += 64) {
    __mmask16 masks[4];
    for (int j = 0; j < 4; ++j) masks[j] = count - i > j * 16 ? tail_mask(count - i - j * 16) : (__mmask16)0;
    __m512 sums[N][4];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[n][j] = is_first ? _mm512_setzero_ps() : load16(delta[n] + i + j * 16, masks[j]);
    for (int r = 0; r < ranks; ++r) {
      const T* from = b + r * count + i;
      _mm_prefetch(reinterpret_cast<const char*>(from + 256), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(from + 288), _MM_HINT_T0);
      __m512 weights[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) weights[j] = load16(from + j * 16, masks[j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const __m512 h = _mm512_set1_ps(hidden[n][r]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[n][j] = _mm512_fmadd_ps(h, weights[j], sums[n][j]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store16(delta[n] + i + j * 16, sums[n][j], masks[j]);
  }
}

// N rows that all run with `slot`; a row's result does not depend on N.
template <int N, class T>
void add_slot(const Site& site, int slot, const float* weights, const T* const* x, int64_t d_in, float* const* delta, bool is_first) {
  const int rank = site.ranks[slot];
  const T* a = static_cast<const T*>(site.a) + slot * site.slot_stride;
  const T* b = static_cast<const T*>(site.b) + slot * site.slot_stride;
  alignas(64) float hidden[N][kRanks];
  for (int first = 0; first < rank; first += kRanks) {
    const int ranks = std::min(kRanks, rank - first);
    shrink_ranks<N, T>(a + first * d_in, ranks, x, d_in, hidden);
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < ranks; ++r) hidden[n][r] *= weights[n];
    expand_ranks<N, T>(b + first * site.num_outputs, ranks, hidden, site.num_outputs, delta, is_first && first == 0);
  }
}

inline bool reaches(const Linear& layer, int slot) { return layer.num_sites > 0 && layer.sites[0].ranks[slot] > 0; }

// The adapters' part of `count` rows, which run with one slot each, the same one, or are a single row with any pairs.
template <class T>
void run_adapters(const Part<T>* parts, int num_parts, const Batch& batch, const int64_t* rows, int count, const T* const* x) {
  const int first = batch.firsts[rows[0]], num_pairs = batch.firsts[rows[0] + 1] - first;
  for (int p = 0; p < num_parts; ++p) {
    const Part<T>& part = parts[p];
    const Linear& layer = *part.layer;
    float* delta[kGroup];
    float weights[kGroup];
    for (int n = 0; n < count; ++n) {
      delta[n] = part.delta + rows[n] * part.delta_stride;
      weights[n] = batch.weights[batch.firsts[rows[n]]];
      part.flags[rows[n]] = 0;
    }
    if (num_pairs > 1) {
      for (int pair = first; pair < first + num_pairs; ++pair)
        if (reaches(layer, batch.slots[pair])) {
          add_slot<1, T>(layer.sites[0], batch.slots[pair], batch.weights + pair, x, layer.d_in, delta, !part.flags[rows[0]]);
          part.flags[rows[0]] = 1;
        }
      continue;
    }
    const int slot = batch.slots[first];
    if (!reaches(layer, slot)) continue;
    for (int n = 0; n < count; ++n) part.flags[rows[n]] = 1;
    if (count == 4) add_slot<4, T>(layer.sites[0], slot, weights, x, layer.d_in, delta, true);
    else if (count == 3) add_slot<3, T>(layer.sites[0], slot, weights, x, layer.d_in, delta, true);
    else if (count == 2) add_slot<2, T>(layer.sites[0], slot, weights, x, layer.d_in, delta, true);
    else add_slot<1, T>(layer.sites[0], slot, weights, x, layer.d_in, delta, true);
  }
}

// Quantize the rows that `produce(row, wide)` writes in float32, and run them through their adapters. Called by every thread
// of a team. `narrow` [kGroup, stride] is the thread's own; batch may be null.
template <class T, class Produce>
void prepare_rows(const Part<T>* parts, int num_parts, const Batch* batch, const Tiling& tiling, const Produce& produce, uint32_t* codes,
                  float* scales, float* wide, T* narrow, int64_t stride, std::atomic<int64_t>& next, int threads) {
  const int64_t d_in = parts[0].layer->d_in, groups = (d_in + 3) / 4;
  const int64_t step = tiling.rows >= 64 * threads ? 16 : tiling.rows >= 16 * threads ? 4 : tiling.rows >= 4 * threads ? 2 : 1;
  const auto one_slot = [&](int64_t row) {
    return batch->firsts[row + 1] - batch->firsts[row] == 1 ? batch->slots[batch->firsts[row]] : -1;
  };
  for (int64_t first; (first = next.fetch_add(step)) < tiling.rows;) {
    int64_t rows[kGroup];
    const T* x[kGroup];
    int count = 0;
    const auto flush = [&] {
      if (count) run_adapters<T>(parts, num_parts, *batch, rows, count, x);
      count = 0;
    };
    for (int64_t i = first; i < std::min(first + step, tiling.rows); ++i) {
      const int64_t row = batch ? batch->order[i] : i;
      const bool has_pairs = batch && batch->firsts[row] < batch->firsts[row + 1];
      if (count && (count == kGroup || !has_pairs || one_slot(row) < 0 || one_slot(row) != one_slot(rows[0]))) flush();
      produce(row, wide);
      scales[row] = quantize_row(wide, d_in, codes + (row / tiling.height * groups) * kTile + row % tiling.height);
      if (has_pairs) {
        T* to = narrow + count * stride;
        for (int64_t k = 0; k < stride; k += 16) store16(to + k, _mm512_loadu_ps(wide + k));
        rows[count] = row;
        x[count++] = to;
      } else if (batch) {
        for (int p = 0; p < num_parts; ++p) parts[p].flags[row] = 0;
      }
    }
    flush();
  }
}

}  // namespace
