// What adapters add to rows: shrink to the rank before the base's product, expand after it. Knows slots and pairs, no layer.
//
// An adapter's weights are read once a step and from memory, which is most of what it costs. So a product fetches what the next
// shrink and expand read while it computes (`fetch_ahead`).
#pragma once
#include "products.h"

namespace {

constexpr int kGroup = 4;  // most rows of one adapter that share each load of its weights

// What shrink hands to expand: as the layer below hands on its output, in T, where the processor multiplies such pairs.
#ifdef __AVX512BF16__
template <class T>
using Hidden = T;
#else
template <class T>
using Hidden = float;
#endif

// The step's adapters as a layer's products meet them.
template <class T>
struct Adapters {
  const Batch* batch = nullptr;
  Hidden<T>* hidden = nullptr;  // [parts, pairs, width]
  int64_t num_pairs = 0;
  int64_t width = 0;  // ranks, padded
  Hidden<T>* of(int part, int64_t pair) const { return hidden + (part * num_pairs + pair) * width; }
};

inline bool reaches(const Linear& layer, int slot) { return layer.num_sites > 0 && layer.sites[0].ranks[slot] > 0; }

template <class T>
const T* shrink_weights(const Linear& layer, int slot) {
  return static_cast<const T*>(layer.sites[0].a) + slot * layer.sites[0].slot_stride;
}
template <class T>
const T* expand_weights(const Linear& layer, int slot) {
  return static_cast<const T*>(layer.sites[0].b) + slot * layer.sites[0].slot_stride;
}

// Lane i: the sum of v[i], always added in the same order.
inline __m512 sum_lanes(const __m512* v) {
  __m512 by2[8], by4[4], by8[2];
  for (int i = 0; i < 8; ++i)
    by2[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(by2[2 * i]), b = _mm512_castps_pd(by2[2 * i + 1]);
    by4[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    by8[i] = _mm512_add_ps(_mm512_shuffle_f32x4(by4[2 * i], by4[2 * i + 1], 0x88), _mm512_shuffle_f32x4(by4[2 * i], by4[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(by8[0], by8[1], 0x88), _mm512_shuffle_f32x4(by8[0], by8[1], 0xdd));
}

inline __m512 dot_rows(const float* a, const float* x, int64_t left, __m512 sum) {
  const __mmask16 mask = tail_mask(left);
  return _mm512_fmadd_ps(load16(x, mask), load16(a, mask), sum);
}

// hidden[n][first + r] = weights[n] * rows[n] . a[r], for R ranks of N rows; ranks past `ranks` repeat the last one.
template <int R, int N, class T>
inline void shrink(const T* a, int ranks, const T* const* x, int64_t count, const float* weights, Hidden<T>* const* hidden, int first) {
  static_assert(R * N <= 16);
  __m512 sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
  const T* from[R];
  for (int r = 0; r < R; ++r) from[r] = a + std::min(r, ranks - 1) * count;
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    for (int64_t i = 0; i < count; i += 32) {
      const __mmask32 mask = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
      __m512bh v[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) v[n] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[n] + i);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(mask, from[r] + i);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[n * R + r] = _mm512_dpbf16_ps(sums[n * R + r], v[n], weight);
      }
    }
  } else
#endif
  {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = tail_mask(count - i);
      __m512 v[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) v[n] = load16(x[n] + i, mask);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512 weight = load16(from[r] + i, mask);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[n * R + r] = _mm512_fmadd_ps(v[n], weight, sums[n * R + r]);
      }
    }
  }
  alignas(64) float factors[16] = {};
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) factors[n * R + r] = r < ranks ? weights[n] : 0.0f;
  const __m512 wide = _mm512_mul_ps(sum_lanes(sums), _mm512_load_ps(factors));
  alignas(64) Hidden<T> out[16];
  store16(out, wide);
  for (int n = 0; n < N; ++n) std::memcpy(hidden[n] + first, out + n * R, R * sizeof(Hidden<T>));
}

// N rows of one slot; a row's result does not depend on N.
template <int N, class T>
void shrink_rows(const T* a, int ranks, const T* const* x, int64_t count, const float* weights, Hidden<T>* const* hidden) {
  constexpr int kMost = N == 1 ? 16 : N == 2 ? 8 : 4;
  for (int r = 0; r < ranks;) {
    const int left = ranks - r;
    if (kMost == 16 && left > 8) shrink<kMost, N, T>(a + r * count, left, x, count, weights, hidden, r), r += kMost;
    else if (kMost >= 8 && left > 4) shrink<std::min(kMost, 8), N, T>(a + r * count, left, x, count, weights, hidden, r), r += std::min(kMost, 8);
    else shrink<4, N, T>(a + r * count, left, x, count, weights, hidden, r), r += 4;
  }
}

// The rows of a visit: up to kGroup that run with one slot each, the same one, or a single row with any pairs, or rows without.
struct Group {
  int64_t rows[kGroup];
  int count = 0;
  int first = 0, num_pairs = 0;  // the first row's pairs
};

// Visit all rows in groups, rows of one adapter together. Called by every thread of a team.
template <class Visit>
void for_groups(const Batch* batch, int64_t num_rows, Shares shares, int me, const Visit& visit) {
  const int64_t step = num_rows >= 64 * shares.threads ? 16 : num_rows >= 16 * shares.threads ? 4 : num_rows >= 4 * shares.threads ? 2 : 1;
  int64_t end;
  for (int64_t first; (first = shares.take(num_rows, step, me, end)) >= 0;)
    for (int64_t i = first; i < end;) {
      Group group;
      for (; i < end && group.count < kGroup; ++i) {
        const int64_t row = batch ? batch->order[i] : i;
        const int pair = batch ? batch->firsts[row] : 0, pairs = batch ? batch->firsts[row + 1] - pair : 0;
        if (group.count && (pairs > 1 || pairs != group.num_pairs || (pairs == 1 && batch->slots[pair] != batch->slots[group.first]))) break;
        if (!group.count) group.first = pair, group.num_pairs = pairs;
        group.rows[group.count++] = row;
        if (pairs > 1) {
          ++i;
          break;
        }
      }
      visit(group);
    }
}

// Shrink a group's rows for each part, and flag those whose part of the product waits for their adapters'.
template <class T>
void shrink_group(const Part<T>* parts, int num_parts, const Adapters<T>& adapters, const Group& group, const T* const* x) {
  const Batch& batch = *adapters.batch;
  for (int p = 0; p < num_parts; ++p) {
    const Linear& layer = *parts[p].layer;
    bool is_reached = false;
    for (int pair = group.first; pair < group.first + group.num_pairs; ++pair) {
      const int slot = batch.slots[pair];
      if (!reaches(layer, slot)) continue;
      is_reached = true;
      float weights[kGroup];
      Hidden<T>* hidden[kGroup];
      for (int n = 0; n < group.count; ++n) {
        const int64_t own = group.num_pairs > 1 ? pair : batch.firsts[group.rows[n]];
        weights[n] = batch.weights[own];
        hidden[n] = adapters.of(p, own);
      }
      const T* a = shrink_weights<T>(layer, slot);
      const int ranks = layer.sites[0].ranks[slot];
      if (group.count == 4) shrink_rows<4, T>(a, ranks, x, layer.d_in, weights, hidden);
      else if (group.count == 3) shrink_rows<3, T>(a, ranks, x, layer.d_in, weights, hidden);
      else if (group.count == 2) shrink_rows<2, T>(a, ranks, x, layer.d_in, weights, hidden);
      else shrink_rows<1, T>(a, ranks, x, layer.d_in, weights, hidden);
    }
    for (int n = 0; n < group.count; ++n) parts[p].flags[group.rows[n]] = is_reached;
  }
}

// sums[n] += hidden[n] . b over 64 outputs from `i`; in bfloat16 two ranks at once, and outputs in the order that pairing leaves.
template <int N, class T>
inline void expand(const T* b, int ranks, const Hidden<T>* const* hidden, int64_t count, int64_t i, __m512 (*sums)[4]) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    __mmask32 masks[2];
    for (int j = 0; j < 2; ++j) {
      const int64_t left = count - i - j * 32;
      masks[j] = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
    }
    for (int r = 0; r < ranks; r += 2) {
      const T* even = b + r * count + i;
      const T* odd = r + 1 < ranks ? even + count : even;  // the last of an odd number meets a 0
      _mm_prefetch(reinterpret_cast<const char*>(even + 256), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(even + 288), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(odd + 256), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(odd + 288), _MM_HINT_T0);
      __m512bh pairs[4];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m512i x = _mm512_maskz_loadu_epi16(masks[j], even + j * 32), y = _mm512_maskz_loadu_epi16(masks[j], odd + j * 32);
        pairs[2 * j] = (__m512bh)_mm512_unpacklo_epi16(x, y);
        pairs[2 * j + 1] = (__m512bh)_mm512_unpackhi_epi16(x, y);
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        int32_t both;
        std::memcpy(&both, hidden[n] + r, 4);
        const __m512bh h = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[n][j] = _mm512_dpbf16_ps(sums[n][j], h, pairs[j]);
      }
    }
    return;
  }
#endif
  __mmask16 masks[4];
  for (int j = 0; j < 4; ++j) masks[j] = count - i > j * 16 ? tail_mask(count - i - j * 16) : (__mmask16)0;
  for (int r = 0; r < ranks; ++r) {
    const T* from = b + r * count + i;
    _mm_prefetch(reinterpret_cast<const char*>(from + 256), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(from + 288), _MM_HINT_T0);
    __m512 weights[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) weights[j] = load16(from + j * 16, masks[j]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const __m512 h = _mm512_set1_ps(((const float*)hidden[n])[r]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[n][j] = _mm512_fmadd_ps(h, weights[j], sums[n][j]);
    }
  }
}

// Outputs j * 16 .. j * 16 + 15 of what `expand` has summed.
template <class T>
inline __m512 in_order(const __m512* sums, int j) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i from = j & 1 ? _mm512_add_epi32(low, _mm512_set1_epi32(8)) : low;
    return _mm512_permutex2var_ps(sums[j & 2], from, sums[(j & 2) + 1]);
  }
#endif
  return sums[j];
}

// Add to N rows' sums of one part what their adapters add, and hand them on.
template <int N, class T>
void expand_rows(const Part<T>& part, int p, const Adapters<T>& adapters, const Group& group) {
  const Batch& batch = *adapters.batch;
  const Linear& layer = *part.layer;
  for (int64_t i = 0; i < layer.d_out; i += 64) {
    __m512 sums[N][4];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[n][j] = _mm512_setzero_ps();
    for (int pair = group.first; pair < group.first + group.num_pairs; ++pair) {
      const int slot = batch.slots[pair];
      if (!reaches(layer, slot)) continue;
      const Hidden<T>* hidden[N];
      for (int n = 0; n < N; ++n) hidden[n] = adapters.of(p, group.num_pairs > 1 ? pair : batch.firsts[group.rows[n]]);
      expand<N, T>(expand_weights<T>(layer, slot), layer.sites[0].ranks[slot], hidden, layer.d_out, i, sums);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + j * 16;
        if (at >= layer.d_out) break;
        const __mmask16 mask = tail_mask(layer.d_out - at);
        const int64_t row = group.rows[n];
        const __m512 base = part.sums ? load16(part.sums + row * part.sums_stride + at, mask) : load16(part.out + row * part.out_stride + at, mask);
        part.put(row, at, _mm512_add_ps(base, in_order<T>(sums[n], j)), mask);
      }
  }
}

template <class T>
void expand_group(const Part<T>* parts, int num_parts, const Adapters<T>& adapters, const Group& group) {
  for (int p = 0; p < num_parts && group.num_pairs; ++p) {
    if (!parts[p].flags[group.rows[0]]) continue;
    if (group.count == 4) expand_rows<4, T>(parts[p], p, adapters, group);
    else if (group.count == 3) expand_rows<3, T>(parts[p], p, adapters, group);
    else if (group.count == 2) expand_rows<2, T>(parts[p], p, adapters, group);
    else expand_rows<1, T>(parts[p], p, adapters, group);
  }
}

// Quantize a group's rows, which `produce(row, wide)` writes in float32, and shrink them. `narrow` [kGroup, stride] is the thread's.
template <class T, class Produce>
void prepare_group(const Part<T>* parts, int num_parts, const Adapters<T>& adapters, const Tiling& tiling, const Group& group,
                   const Produce& produce, uint32_t* codes, float* scales, float* wide, T* narrow, int64_t stride) {
  const int64_t d_in = parts[0].layer->d_in, groups = (d_in + 3) / 4;
  const T* x[kGroup];
  for (int n = 0; n < group.count; ++n) {
    const int64_t row = group.rows[n];
    produce(row, wide);
    scales[row] = quantize_row(wide, d_in, codes + (row / tiling.height * groups) * kTile + row % tiling.height);
    if (!adapters.batch || !group.num_pairs) continue;
    T* to = narrow + n * stride;
    for (int64_t k = 0; k < stride; k += 16) store16(to + k, _mm512_loadu_ps(wide + k));
    x[n] = to;
  }
  if (adapters.batch) shrink_group<T>(parts, num_parts, adapters, group, x);
}

// What a thread's rows read next: B of the parts whose product runs now, A of the parts whose rows come after it.
template <class T>
void fetch_ahead(Stream& stream, const Batch* batch, int64_t num_rows, const Part<T>* now, int num_now, const Linear* const* then,
                 int num_then, int me, int threads) {
  if (!batch) return;
  const auto for_slots = [&](const auto& add) {
    int last = -1;
    for (int64_t i = Shares::start(num_rows, me, threads); i < Shares::start(num_rows, me + 1, threads); ++i) {
      const int64_t row = batch->order[i];
      for (int pair = batch->firsts[row]; pair < batch->firsts[row + 1]; ++pair) {
        if (batch->slots[pair] != last) add(batch->slots[pair]);
        last = batch->slots[pair];
      }
    }
  };
  for_slots([&](int slot) {
    for (int p = 0; p < num_now; ++p) {
      const Linear& layer = *now[p].layer;
      if (now[p].flags && reaches(layer, slot))
        stream.add(expand_weights<T>(layer, slot), layer.sites[0].ranks[slot] * layer.d_out * sizeof(T));
    }
  });
  for_slots([&](int slot) {
    for (int p = 0; p < num_then; ++p)
      if (reaches(*then[p], slot))
        stream.add(shrink_weights<T>(*then[p], slot), then[p]->sites[0].ranks[slot] * then[p]->d_in * sizeof(T));
  });
}

}  // namespace
