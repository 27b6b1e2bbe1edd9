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

template <class T>
void linear(const Linear& layer, const Batch* batch, const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t rows,
            int gated, int threads) {
  static thread_local Scratch scratch;
  const Tiling tiling(rows);
  const int64_t stride = wide_size(layer.d_in), groups = (layer.d_in + 3) / 4;
  if (layer.num_sites == 0) batch = nullptr;
  Cutter cutter;
  const size_t at_codes = cutter.cut(tiling.tiles * groups * kTile * 4), at_scales = cutter.cut(rows * 4);
  const size_t at_wide = cutter.cut(threads * stride * 4), at_narrow = cutter.cut(threads * kGroup * stride * sizeof(T));
  const size_t at_flags = cutter.cut(rows), at_delta = cutter.cut(batch ? rows * layer.d_out * 4 : 0);
  char* base = scratch.get(cutter.at);
  uint32_t* codes = reinterpret_cast<uint32_t*>(base + at_codes);
  float* scales = reinterpret_cast<float*>(base + at_scales);
  Part<T> part{&layer, out, out_stride};
  if (batch) {
    part.delta = reinterpret_cast<float*>(base + at_delta);
    part.delta_stride = layer.d_out;
    part.flags = reinterpret_cast<uint8_t*>(base + at_flags);
  }
  std::atomic<int64_t> next_row{0}, next_unit{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    const auto produce = [&](int64_t row, float* wide) { widen_row(x + row * x_stride, layer.d_in, gated, wide); };
    prepare_rows<T>(&part, 1, batch, tiling, produce, codes, scales, reinterpret_cast<float*>(base + at_wide) + me * stride,
                    reinterpret_cast<T*>(base + at_narrow) + me * kGroup * stride, stride, next_row, threads);
#pragma omp barrier
    multiply<T>(&part, 1, codes, scales, tiling, next_unit, threads);
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

// Turn q and k of each row in place, and write k and v to their places.
template <class T>
void place_rows(const Layer& layer, const Paged& paged, T* qkv, int64_t width, const T* cos, const T* sin, int64_t rotary,
                std::atomic<int64_t>& next, float* wide) {
  const Heads& heads = layer.heads;
  const int64_t dim = heads.dim, kv = heads.kv_heads * dim;
  T *k_cache = static_cast<T*>(layer.k_cache), *v_cache = static_cast<T*>(layer.v_cache);
  for (int64_t first; (first = next.fetch_add(8)) < paged.num_rows;)
    for (int64_t row = first; row < std::min<int64_t>(first + 8, paged.num_rows); ++row) {
      T* of_row = qkv + row * width;
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
}

template <class T>
void run_layer(const Layer& layer, const Paged& paged, const Batch* batch, const T* cos, const T* sin, int64_t rotary,
               const T* hidden, T* out, int threads) {
  static thread_local Scratch scratch;
  const int64_t rows = paged.num_rows, d = layer.q->d_in, inner = layer.down->d_in;
  const int64_t q_width = layer.q->d_out, width = q_width + layer.k->d_out + layer.v->d_out;
  const int64_t most_in = std::max({d, inner, q_width}), stride = wide_size(most_in), groups = (most_in + 3) / 4;
  const int64_t most_out = std::max({width, 2 * inner, d});
  const Tiling tiling(rows);
  Cutter cutter;
  const size_t at_codes = cutter.cut(tiling.tiles * groups * kTile * 4), at_scales = cutter.cut(rows * 4);
  const size_t at_wide = cutter.cut(threads * stride * 4), at_narrow = cutter.cut(threads * kGroup * stride * sizeof(T));
  const size_t at_flags = cutter.cut(rows * 3), at_delta = cutter.cut(batch ? rows * most_out * 4 : 0);
  const size_t at_qkv = cutter.cut(rows * width * sizeof(T)), at_mixed = cutter.cut(rows * q_width * sizeof(T));
  const size_t at_inner = cutter.cut(rows * 2 * inner * sizeof(T)), at_tiles = cutter.cut((rows + 1) * 16);
  char* base = scratch.get(cutter.at);
  uint32_t* codes = reinterpret_cast<uint32_t*>(base + at_codes);
  float *scales = reinterpret_cast<float*>(base + at_scales), *delta = reinterpret_cast<float*>(base + at_delta);
  uint8_t* flags = reinterpret_cast<uint8_t*>(base + at_flags);
  T *qkv = reinterpret_cast<T*>(base + at_qkv), *mixed = reinterpret_cast<T*>(base + at_mixed);
  T* gate_up = reinterpret_cast<T*>(base + at_inner);
  int64_t* tiles = reinterpret_cast<int64_t*>(base + at_tiles);
  const int64_t num_tiles = plan_tiles(paged, layer.heads, tiles);

  // `batch` for the parts that some adapter of the step reaches
  const auto wire = [&](Part<T>* parts, int count) {
    bool reached = false;
    int64_t column = 0, sum = 0;
    for (int p = 0; p < count; ++p) {
      reached |= batch && parts[p].layer->num_sites > 0;
      sum += parts[p].layer->d_out;
    }
    for (int p = 0; reached && p < count; ++p) {
      parts[p].delta = delta + column;
      parts[p].delta_stride = sum;
      parts[p].flags = flags + p * rows;
      column += parts[p].layer->d_out;
    }
    return reached ? batch : nullptr;
  };
  Part<T> in[3] = {{layer.q, qkv, width}, {layer.k, qkv + q_width, width}, {layer.v, qkv + q_width + layer.k->d_out, width}};
  Part<T> back[1] = {{layer.o, out, d, hidden, d}};
  Part<T> wide_in[2] = {{layer.gate, gate_up, 2 * inner}, {layer.up, gate_up + inner, 2 * inner}};
  Part<T> down[1] = {{layer.down, out, d, out, d}};
  const Batch *in_batch = wire(in, 3), *back_batch = wire(back, 1), *wide_batch = wire(wide_in, 2), *down_batch = wire(down, 1);
  Heads heads = layer.heads;
  heads.q_row = width;
  heads.q_head = heads.dim;
  std::atomic<int64_t> next[10] = {};

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    float* wide = reinterpret_cast<float*>(base + at_wide) + me * stride;
    T* narrow = reinterpret_cast<T*>(base + at_narrow) + me * kGroup * stride;
    const auto stage = [&](const Part<T>* parts, int count, const Batch* adapters, const auto& produce, int counter) {
      prepare_rows<T>(parts, count, adapters, tiling, produce, codes, scales, wide, narrow, wide_size(parts[0].layer->d_in),
                      next[counter], threads);
#pragma omp barrier
      multiply<T>(parts, count, codes, scales, tiling, next[counter + 1], threads);
#pragma omp barrier
    };
    stage(in, 3, in_batch, [&](int64_t row, float* to) {
      norm_row(hidden + row * d, static_cast<const T*>(layer.norm), layer.norm_eps, d, to);
    }, 0);
    place_rows<T>(layer, paged, qkv, width, cos, sin, rotary, next[2], wide);
#pragma omp barrier
    attend_tiles<T>(paged, heads, qkv, static_cast<const T*>(layer.k_cache), static_cast<const T*>(layer.v_cache), mixed, tiles,
                    num_tiles, next[3], threads);
#pragma omp barrier
    stage(back, 1, back_batch, [&](int64_t row, float* to) { widen_row(mixed + row * q_width, q_width, 0, to); }, 4);
    stage(wide_in, 2, wide_batch, [&](int64_t row, float* to) {
      norm_row(out + row * d, static_cast<const T*>(layer.mlp_norm), layer.mlp_norm_eps, d, to);
    }, 6);
    stage(down, 1, down_batch, [&](int64_t row, float* to) { widen_row(gate_up + row * 2 * inner, inner, 1, to); }, 8);
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
