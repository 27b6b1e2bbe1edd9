// One linear layer, row norms, and a whole decoder layer of Llama's shape in one go. Knows no model and no step's plan.
#pragma once
#include "adapters.h"
#include "attention.h"

extern "C" {

struct Layer {  // norm, q k v, rotary positions, attention, o, residual, norm, gate and up, down, residual
  const Linear *q, *k, *v, *o, *gate, *up, *down;
  const void *norm, *mlp_norm;
  const void *q_norm, *k_norm;  // of each head, or null
  void *k_cache, *v_cache;
  Heads heads;
  float norm_eps, mlp_norm_eps, head_norm_eps;
  const Layer* next;  // whose adapters are fetched ahead, or null
};

}  // extern "C"

namespace {

inline int64_t wide_size(int64_t count) { return (count + 63) / 64 * 64; }

template <class T>
inline void norm_row(const T* from, const T* weight, float eps, int64_t d, float* wide) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    const __m512 v = load16(from + i, tail_mask(d - i));
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)d + eps));
  for (int64_t i = 0; i < wide_size(d); i += 16) {
    const __mmask16 mask = i < d ? tail_mask(d - i) : (__mmask16)0;
    const __m512 unit = as_stored(_mm512_mul_ps(load16(from + i, mask), factor), from);
    _mm512_storeu_ps(wide + i, as_stored(_mm512_mul_ps(load16(weight + i, mask), unit), from));
  }
}

template <class T>
void rms_norm(const T* x, int64_t x_stride, const T* weight, float eps, T* out, int64_t rows, int64_t d, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * d > 16384)
  {
    static thread_local Scratch scratch;
    float* wide = reinterpret_cast<float*>(scratch.get(wide_size(d) * 4));
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      norm_row(x + row * x_stride, weight, eps, d, wide);
      for (int64_t i = 0; i < d; i += 16) store16(out + row * d + i, _mm512_loadu_ps(wide + i), tail_mask(d - i));
    }
  }
}

// The buffers of a product, cut from one piece of scratch.
struct Cutter {
  size_t at = 0;
  size_t cut(size_t bytes) {
    const size_t here = at;
    at += (bytes + 63) / 64 * 64;
    return here;
  }
};

// Most ranks of a pair at any of these layers, padded for shrink.
inline int64_t rank_width(const Batch& batch, int64_t num_pairs, std::initializer_list<const Linear*> layers) {
  int most = 0;
  for (const Linear* layer : layers)
    for (int64_t pair = 0; layer->num_sites > 0 && pair < num_pairs; ++pair) most = std::max(most, layer->sites[0].ranks[batch.slots[pair]]);
  return (most + 15) / 16 * 16 + 16;
}

template <class T>
void linear(const Linear& layer, const Batch* batch, const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t rows,
            int gated, int threads) {
  static thread_local Scratch scratch;
  const Tiling tiling(rows);
  const int64_t stride = wide_size(layer.d_in), groups = (layer.d_in + 3) / 4;
  Adapters<T> adapters;
  if (batch && layer.num_sites > 0) {
    adapters.batch = batch;
    adapters.num_pairs = batch->firsts[rows];
    adapters.width = rank_width(*batch, adapters.num_pairs, {&layer});
  }
  Cutter cutter;
  const size_t at_codes = cutter.cut(tiling.tiles * groups * kTile * 4), at_scales = cutter.cut(rows * 4);
  const size_t at_wide = cutter.cut(threads * stride * 4), at_narrow = cutter.cut(threads * kGroup * stride * sizeof(T));
  const size_t at_flags = cutter.cut(rows);
  const size_t at_hidden = cutter.cut(adapters.num_pairs * adapters.width * sizeof(Hidden<T>));
  const size_t at_shares = cutter.cut(2 * Shares::bytes(threads)), run_bytes = adapters.num_pairs * sizeof(Stream::Run);
  const size_t at_runs = cutter.cut(threads * run_bytes);
  char* base = scratch.get(cutter.at);
  uint32_t* codes = reinterpret_cast<uint32_t*>(base + at_codes);
  float* scales = reinterpret_cast<float*>(base + at_scales);
  Part<T> part{&layer, out, out_stride};
  if (adapters.batch) {
    part.flags = reinterpret_cast<uint8_t*>(base + at_flags);
    adapters.hidden = reinterpret_cast<Hidden<T>*>(base + at_hidden);
  }
  const Shares shares(base + at_shares, threads), shares_after(base + at_shares + Shares::bytes(threads), threads);
  std::atomic<int64_t> next_unit{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    const auto produce = [&](int64_t row, float* wide) { widen_row(x + row * x_stride, layer.d_in, gated, wide); };
    for_groups(adapters.batch, rows, shares, me, [&](const Group& group) {
      prepare_group<T>(&part, 1, adapters, tiling, group, produce, codes, scales, reinterpret_cast<float*>(base + at_wide) + me * stride,
                       reinterpret_cast<T*>(base + at_narrow) + me * kGroup * stride, stride);
    });
#pragma omp barrier
    Stream stream{reinterpret_cast<Stream::Run*>(base + at_runs + me * run_bytes)};
    fetch_ahead<T>(stream, adapters.batch, rows, &part, 1, nullptr, 0, me, threads);
    multiply<T>(&part, 1, codes, scales, tiling, next_unit, stream, threads);
    if (adapters.batch) {
#pragma omp barrier
      for_groups(adapters.batch, rows, shares_after, me, [&](const Group& group) { expand_group<T>(&part, 1, adapters, group); });
    }
  }
}

template <class T>
inline void rotate_head(T* head, const T* cos, const T* sin, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = tail_mask(half - i);
    const __m512 a = load16(head + i, mask), b = load16(head + half + i, mask);
    const __m512 minus_b = _mm512_sub_ps(_mm512_setzero_ps(), b);
    const auto turned = [&](__m512 v, __m512 other, int64_t at) {
      return _mm512_add_ps(as_stored(_mm512_mul_ps(v, load16(cos + at, mask)), cos),
                           as_stored(_mm512_mul_ps(other, load16(sin + at, mask)), cos));
    };
    store16(head + i, turned(a, minus_b, i), mask);
    store16(head + half + i, turned(b, a, half + i), mask);
  }
}

// Turn a row's q and k in place, and write k and v to their places.
template <class T>
void place_row(const Layer& layer, const Paged& paged, T* of_row, int64_t row, const T* cos, const T* sin, int64_t rotary, float* wide) {
  const Heads& heads = layer.heads;
  const int64_t dim = heads.dim, kv = heads.kv_heads * dim;
  T *k_cache = static_cast<T*>(layer.k_cache), *v_cache = static_cast<T*>(layer.v_cache);
  for (int64_t h = 0; h < heads.heads + heads.kv_heads; ++h) {
    const T* norm = static_cast<const T*>(h < heads.heads ? layer.q_norm : layer.k_norm);
    T* head = of_row + h * dim;
    if (norm) {
      norm_row(head, norm, layer.head_norm_eps, dim, wide);
      for (int64_t i = 0; i < dim; i += 16) store16(head + i, _mm512_loadu_ps(wide + i), tail_mask(dim - i));
    }
    rotate_head(head, cos + row * rotary, sin + row * rotary, rotary);
  }
  std::memcpy(k_cache + paged.places[row] * kv, of_row + heads.heads * dim, kv * sizeof(T));
  std::memcpy(v_cache + paged.places[row] * kv, of_row + heads.heads * dim + kv, kv * sizeof(T));
}

template <class T>
void run_layer(const Layer& layer, const Paged& paged, const Batch* batch, const T* cos, const T* sin, int64_t rotary,
               const T* hidden, T* out, int threads) {
  static thread_local Scratch scratch;
  constexpr int kPhases = 6, kProducts = 4;
  const int64_t rows = paged.num_rows, d = layer.q->d_in, inner = layer.down->d_in;
  const int64_t q_width = layer.q->d_out, width = q_width + layer.k->d_out + layer.v->d_out;
  const int64_t most_in = std::max({d, inner, q_width}), stride = wide_size(most_in), groups = (most_in + 3) / 4;
  const Tiling tiling(rows);
  Adapters<T> adapters{batch};
  if (batch) {
    adapters.num_pairs = batch->firsts[rows];
    adapters.width = rank_width(*batch, adapters.num_pairs, {layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down});
  }
  Cutter cutter;
  const size_t at_codes = cutter.cut(tiling.tiles * groups * kTile * 4), at_scales = cutter.cut(rows * 4);
  const size_t at_wide = cutter.cut(threads * stride * 4), at_narrow = cutter.cut(threads * kGroup * stride * sizeof(T));
  const size_t at_flags = cutter.cut(rows * 7), at_sums = cutter.cut(batch ? rows * d * 4 : 0);
  const size_t at_qkv = cutter.cut(rows * width * sizeof(T)), at_mixed = cutter.cut(rows * q_width * sizeof(T));
  const size_t at_inner = cutter.cut(rows * 2 * inner * sizeof(T)), at_tiles = cutter.cut((rows + 1) * 16);
  const size_t at_hidden = cutter.cut(3 * adapters.num_pairs * adapters.width * sizeof(Hidden<T>));
  const size_t at_shares = cutter.cut(kPhases * Shares::bytes(threads)), run_bytes = 5 * adapters.num_pairs * sizeof(Stream::Run);
  const size_t at_runs = cutter.cut(threads * run_bytes);
  char* base = scratch.get(cutter.at);
  uint32_t* codes = reinterpret_cast<uint32_t*>(base + at_codes);
  float *scales = reinterpret_cast<float*>(base + at_scales), *sums = reinterpret_cast<float*>(base + at_sums);
  uint8_t* flags = reinterpret_cast<uint8_t*>(base + at_flags);
  T *qkv = reinterpret_cast<T*>(base + at_qkv), *mixed = reinterpret_cast<T*>(base + at_mixed);
  T* gate_up = reinterpret_cast<T*>(base + at_inner);
  int64_t* tiles = reinterpret_cast<int64_t*>(base + at_tiles);
  adapters.hidden = reinterpret_cast<Hidden<T>*>(base + at_hidden);
  const int64_t num_tiles = plan_tiles(paged, layer.heads, tiles);

  // The parts of a product wait for their adapters side by side, when some adapter of the step reaches one of them.
  const auto wire = [&](Part<T>* parts, int count) {
    Adapters<T> reaching = adapters;
    reaching.batch = nullptr;
    for (int p = 0; p < count; ++p)
      if (batch && parts[p].layer->num_sites > 0) reaching.batch = batch;
    for (int p = 0; reaching.batch && p < count; ++p) {
      if (parts[p].residual) parts[p].sums = sums, parts[p].sums_stride = d;
      parts[p].flags = flags;
      flags += rows;
    }
    return reaching;
  };
  Part<T> in[3] = {{layer.q, qkv, width}, {layer.k, qkv + q_width, width}, {layer.v, qkv + q_width + layer.k->d_out, width}};
  Part<T> back[1] = {{layer.o, out, d, hidden, d}};
  Part<T> wide_in[2] = {{layer.gate, gate_up, 2 * inner}, {layer.up, gate_up + inner, 2 * inner}};
  Part<T> down[1] = {{layer.down, out, d, out, d}};
  const Adapters<T> of_in = wire(in, 3), of_back = wire(back, 1), of_wide = wire(wide_in, 2), of_down = wire(down, 1);
  Heads heads = layer.heads;
  heads.q_row = width;
  heads.q_head = heads.dim;
  std::atomic<int64_t> next[kProducts + 1] = {};
  for (int phase = 0; phase < kPhases; ++phase) Shares(base + at_shares + phase * Shares::bytes(threads), threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    float* wide = reinterpret_cast<float*>(base + at_wide) + me * stride;
    T* narrow = reinterpret_cast<T*>(base + at_narrow) + me * kGroup * stride;
    const auto phase = [&](int number, const auto& visit) {
      Shares shares = Shares::over(base + at_shares + number * Shares::bytes(threads), threads);
      for_groups(batch, rows, shares, me, visit);
#pragma omp barrier
    };
    const auto prepare = [&](const Part<T>* parts, int count, const Adapters<T>& of, const Group& group, const auto& produce) {
      prepare_group<T>(parts, count, of, tiling, group, produce, codes, scales, wide, narrow, wide_size(parts[0].layer->d_in));
    };
    const auto product = [&](const Part<T>* parts, int count, int counter, std::initializer_list<const Linear*> then) {
      Stream stream{reinterpret_cast<Stream::Run*>(base + at_runs + me * run_bytes)};
      fetch_ahead<T>(stream, batch, rows, parts, count, then.begin(), (int)then.size(), me, threads);
      multiply<T>(parts, count, codes, scales, tiling, next[counter], stream, threads);
#pragma omp barrier
    };
    phase(0, [&](const Group& group) {
      prepare(in, 3, of_in, group, [&](int64_t row, float* to) {
        norm_row(hidden + row * d, static_cast<const T*>(layer.norm), layer.norm_eps, d, to);
      });
    });
    product(in, 3, 0, {layer.o});
    phase(1, [&](const Group& group) {
      if (of_in.batch) expand_group<T>(in, 3, of_in, group);
      for (int n = 0; n < group.count; ++n)
        place_row<T>(layer, paged, qkv + group.rows[n] * width, group.rows[n], cos, sin, rotary, wide);
    });
    attend_tiles<T>(paged, heads, qkv, static_cast<const T*>(layer.k_cache), static_cast<const T*>(layer.v_cache), mixed, tiles,
                    num_tiles, next[kProducts], threads);
#pragma omp barrier
    phase(2, [&](const Group& group) {
      prepare(back, 1, of_back, group, [&](int64_t row, float* to) { widen_row(mixed + row * q_width, q_width, 0, to); });
    });
    product(back, 1, 1, {layer.gate, layer.up});
    phase(3, [&](const Group& group) {
      if (of_back.batch) expand_group<T>(back, 1, of_back, group);
      prepare(wide_in, 2, of_wide, group, [&](int64_t row, float* to) {
        norm_row(out + row * d, static_cast<const T*>(layer.mlp_norm), layer.mlp_norm_eps, d, to);
      });
    });
    product(wide_in, 2, 2, {layer.down});
    phase(4, [&](const Group& group) {
      if (of_wide.batch) expand_group<T>(wide_in, 2, of_wide, group);
      prepare(down, 1, of_down, group, [&](int64_t row, float* to) { widen_row(gate_up + row * 2 * inner, inner, 1, to); });
    });
    if (layer.next) product(down, 1, 3, {layer.next->q, layer.next->k, layer.next->v});
    else product(down, 1, 3, {});
    if (of_down.batch) {
      phase(5, [&](const Group& group) { expand_group<T>(down, 1, of_down, group); });
    }
  }
}

// The place of each row's largest number (the first of equals), and whether all are finite.
template <class T>
void scan_rows(const T* x, int64_t rows, int64_t count, int64_t* best, uint8_t* finite, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * count;
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 most = lowest, poison = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = tail_mask(count - i);
      const __m512 v = _mm512_mask_mov_ps(lowest, mask, load16(from + i, mask));
      poison = _mm512_mask3_fmadd_ps(v, _mm512_setzero_ps(), poison, mask);  // 0 * inf and 0 * nan are nan
      most = _mm512_max_ps(most, v);
    }
    const float top = _mm512_reduce_max_ps(most);
    finite[row] = _mm512_cmp_ps_mask(poison, poison, _CMP_UNORD_Q) == 0;
    best[row] = 0;
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = tail_mask(count - i);
      const __mmask16 hit = _mm512_mask_cmp_ps_mask(mask, load16(from + i, mask), _mm512_set1_ps(top), _CMP_EQ_OQ);
      if (hit) {
        best[row] = i + __builtin_ctz(hit);
        break;
      }
    }
  }
}

}  // namespace
