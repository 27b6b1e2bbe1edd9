// Attention of packed rows over paged K and V. Knows blocks and heads, nothing of weights.
#pragma once
#include "vectors.h"

extern "C" {

struct Paged {  // where each sequence's rows and tokens lie; see PagedBatch
  const int32_t* tables;
  const int32_t* starts;
  const int32_t* lengths;
  const int64_t* places;
  int64_t table_width;
  int64_t num_sequences;
  int64_t block_size;
  int64_t num_rows;
};

struct Heads {  // strides in numbers; caches are [places, kv_heads, dim]
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;
  int64_t q_row;
  int64_t q_head;
  int64_t k_row;
  int64_t k_head;
  int64_t v_row;
  int64_t v_head;
  int64_t window;     // 0: none
  const float* sinks;  // [heads] or null
  float scale;
  float softcap;  // 0: none
};

}  // extern "C"

namespace {

constexpr int kQueries = 12;  // rows times query heads of one kv head that share each load of K

inline void transpose16(__m512i* r) {  // 16 x 16 dwords
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

inline __m512 dot_step(__m512 sum, __m512i keys, int32_t query, const float*) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(keys), _mm512_castsi512_ps(_mm512_set1_epi32(query)), sum);
}
inline __m512 dot_step(__m512 sum, __m512i keys, int32_t query, const bf16*) {  // two dimensions at once
  const __m512i both = _mm512_set1_epi32(query);
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)keys, (__m512bh)both);
#else
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(keys, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(keys, high)), _mm512_castsi512_ps(_mm512_and_si512(both, high)), sum);
#endif
}

// Scores of 16 tokens for NQ queries: keys [dwords, 16 tokens]; even and odd dwords in chains of their own.
template <int NQ, class T>
inline void score16(const __m512i* keys, const T* const* queries, int64_t dwords, __m512* scores) {
  __m512 even[NQ], odd[NQ];
  for (int i = 0; i < NQ; ++i) even[i] = odd[i] = _mm512_setzero_ps();
  const T* type = nullptr;
  int64_t d = 0;
  for (; d + 2 <= dwords; d += 2)
    for (int i = 0; i < NQ; ++i) {
      const int32_t* q = reinterpret_cast<const int32_t*>(queries[i]) + d;
      even[i] = dot_step(even[i], keys[d], q[0], type);
      odd[i] = dot_step(odd[i], keys[d + 1], q[1], type);
    }
  for (int i = 0; i < NQ; ++i) {
    if (d < dwords) even[i] = dot_step(even[i], keys[d], reinterpret_cast<const int32_t*>(queries[i])[d], type);
    scores[i] = _mm512_add_ps(even[i], odd[i]);
  }
}

// sums [NQ, NV * 16] += weights [NQ, tokens] times values, token by token.
template <int NQ, int NV, class T>
inline void mix(const float* const* weights, const T* values, const int64_t* places, int64_t stride, int64_t tokens,
                __mmask16 last, __m512 (*sums)[NV]) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* v = values + places[t] * stride;
    __m512 row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load16(v + j * 16, j + 1 == NV ? last : (__mmask16)0xffff);
#pragma GCC unroll 4
    for (int i = 0; i < NQ; ++i) {
      const __m512 w = _mm512_set1_ps(weights[i][t]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sums[i][j] = _mm512_fmadd_ps(w, row[j], sums[i][j]);
    }
  }
}

template <int NQ, int NV, class T>
void mix_store(const float* const* weights, const float* totals, const T* values, const int64_t* places, int64_t stride,
               int64_t tokens, __mmask16 last, T* const* out) {
  __m512 sums[NQ][NV];
  for (int i = 0; i < NQ; ++i)
    for (int j = 0; j < NV; ++j) sums[i][j] = _mm512_setzero_ps();
  mix<NQ, NV, T>(weights, values, places, stride, tokens, last, sums);
  for (int i = 0; i < NQ; ++i)
    for (int j = 0; j < NV; ++j)
      store16(out[i] + j * 16, _mm512_div_ps(sums[i][j], _mm512_set1_ps(totals[i])), j + 1 == NV ? last : (__mmask16)0xffff);
}

template <int NQ, class T>
void mix_any(int vectors, const float* const* weights, const float* totals, const T* values, const int64_t* places,
             int64_t stride, int64_t tokens, __mmask16 last, T* const* out) {
  switch (vectors) {
    case 1: return mix_store<NQ, 1, T>(weights, totals, values, places, stride, tokens, last, out);
    case 2: return mix_store<NQ, 2, T>(weights, totals, values, places, stride, tokens, last, out);
    case 3: return mix_store<NQ, 3, T>(weights, totals, values, places, stride, tokens, last, out);
    default: return mix_store<NQ, 4, T>(weights, totals, values, places, stride, tokens, last, out);
  }
}

// Turn raw scores of tokens [0, tokens) into exp(score - most) inside [low, high], 0 outside; returns their sum.
inline float soften(float* scores, int64_t tokens, int64_t low, int64_t high, const Heads& heads, int64_t head) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 scale = _mm512_set1_ps(heads.scale);
  __m512 most = lowest;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first = _mm512_set1_epi32((int)low), last = _mm512_set1_epi32((int)high);
  for (int64_t t = 0; t < tokens; t += 16) {
    __m512 v = _mm512_mul_ps(_mm512_loadu_ps(scores + t), scale);
    if (heads.softcap > 0) {
      const __m512 cap = _mm512_set1_ps(heads.softcap);
      v = _mm512_mul_ps(cap, tanh16(_mm512_div_ps(v, cap)));
    }
    const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)t));
    const __mmask16 seen = _mm512_cmpge_epi32_mask(at, first) & _mm512_cmple_epi32_mask(at, last);
    v = _mm512_mask_mov_ps(lowest, seen, v);
    _mm512_storeu_ps(scores + t, v);
    most = _mm512_max_ps(most, v);
  }
  float peak = _mm512_reduce_max_ps(most);
  if (heads.sinks) peak = std::max(peak, heads.sinks[head]);
  const __m512 top = _mm512_set1_ps(peak);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t t = 0; t < tokens; t += 16) {
    const __m512 v = exp16(_mm512_sub_ps(_mm512_loadu_ps(scores + t), top));
    _mm512_storeu_ps(scores + t, v);
    sums = _mm512_add_ps(sums, v);
  }
  const float total = _mm512_reduce_add_ps(sums);
  return heads.sinks ? total + _mm512_cvtss_f32(exp16(_mm512_set1_ps(heads.sinks[head] - peak))) : total;
}

// Rows [row, row + count) of one sequence, all query heads of one kv head.
template <class T>
void attend(const Paged& paged, const Heads& heads, const T* q, const T* k_cache, const T* v_cache, T* out, int64_t sequence,
            int64_t row, int64_t count, int64_t kv_head, Scratch& scratch) {
  const int64_t group = heads.heads / heads.kv_heads, num_queries = count * group;
  const int64_t position = paged.lengths[sequence] - (paged.starts[sequence + 1] - row);  // of the first row
  const int64_t seen = heads.window > 0 ? std::max<int64_t>(0, position - heads.window + 1) : 0;
  const int64_t origin = seen & ~(int64_t)15, tokens = position + count - origin, padded = (tokens + 15) / 16 * 16;
  const int64_t dwords = heads.dim * sizeof(T) / 4, chunks = (dwords + 15) / 16;
  const int64_t stride = heads.kv_heads * heads.dim;

  const size_t places_size = padded * 8, keys_size = chunks * 16 * 64;
  char* base = scratch.get(places_size + keys_size + num_queries * padded * 4 + 128);
  int64_t* places = reinterpret_cast<int64_t*>(base);
  __m512i* keys = reinterpret_cast<__m512i*>(base + (places_size + 63) / 64 * 64);
  float* scores = reinterpret_cast<float*>(reinterpret_cast<char*>(keys) + keys_size);

  const int32_t* table = paged.tables + sequence * paged.table_width;
  for (int64_t t = 0; t < padded; ++t) {
    const int64_t token = std::min(origin + t, origin + tokens - 1);
    places[t] = (int64_t)table[token / paged.block_size] * paged.block_size + token % paged.block_size;
  }
  const T* queries[kQueries];
  T* outputs[kQueries];
  for (int64_t i = 0; i < num_queries; ++i) {
    const int64_t r = row + i / group, h = kv_head * group + i % group;
    queries[i] = q + r * heads.q_row + h * heads.q_head;
    outputs[i] = out + (r * heads.heads + h) * heads.dim;
  }
  const T* k_base = k_cache + kv_head * heads.dim;
  const T* v_base = v_cache + kv_head * heads.dim;
  for (int64_t t = 0; t < padded; t += 16) {
    for (int64_t c = 0; c < chunks; ++c) {
      const __mmask16 mask = tail_mask(dwords - c * 16);
      for (int i = 0; i < 16; ++i)
        keys[c * 16 + i] = _mm512_maskz_loadu_epi32(mask, reinterpret_cast<const int32_t*>(k_base + places[t + i] * stride) + c * 16);
      transpose16(keys + c * 16);
      for (int i = 0; i < 16; ++i) {  // what comes next: K of the next tokens, V of these
        if (t + 16 < padded) _mm_prefetch(reinterpret_cast<const char*>(k_base + places[t + 16 + i] * stride) + c * 64, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(v_base + places[t + i] * stride) + c * 64, _MM_HINT_T0);
      }
    }
    __m512 sixteen[4];
    for (int64_t i = 0; i < num_queries;) {
      const int64_t left = num_queries - i;
      const int step = (int)std::min<int64_t>(left, 4);
      if (step == 4) score16<4, T>(keys, queries + i, dwords, sixteen);
      else if (step == 3) score16<3, T>(keys, queries + i, dwords, sixteen);
      else if (step == 2) score16<2, T>(keys, queries + i, dwords, sixteen);
      else score16<1, T>(keys, queries + i, dwords, sixteen);
      for (int j = 0; j < step; ++j) _mm512_storeu_ps(scores + (i + j) * padded + t, sixteen[j]);
      i += step;
    }
  }
  float totals[kQueries];
  const float* weights[kQueries];
  for (int64_t i = 0; i < num_queries; ++i) {
    const int64_t last = position + i / group;
    const int64_t first = heads.window > 0 ? std::max<int64_t>(0, last - heads.window + 1) : 0;
    totals[i] = soften(scores + i * padded, padded, first - origin, last - origin, heads, kv_head * group + i % group);
    weights[i] = scores + i * padded;
  }
  for (int64_t d = 0; d < heads.dim; d += 64) {
    const int vectors = (int)std::min<int64_t>(4, (heads.dim - d + 15) / 16);
    const __mmask16 last = tail_mask(heads.dim - d - (vectors - 1) * 16);
    for (int64_t i = 0; i < num_queries;) {
      const int step = (int)std::min<int64_t>(num_queries - i, 4);
      T* to[4];
      for (int j = 0; j < step; ++j) to[j] = outputs[i + j] + d;
      if (step == 4) mix_any<4, T>(vectors, weights + i, totals + i, v_base + d, places, stride, tokens, last, to);
      else if (step == 3) mix_any<3, T>(vectors, weights + i, totals + i, v_base + d, places, stride, tokens, last, to);
      else if (step == 2) mix_any<2, T>(vectors, weights + i, totals + i, v_base + d, places, stride, tokens, last, to);
      else mix_any<1, T>(vectors, weights + i, totals + i, v_base + d, places, stride, tokens, last, to);
      i += step;
    }
  }
}

// (sequence, first row) of every tile of rows: 2 numbers a tile, at most one tile a row.
inline int64_t plan_tiles(const Paged& paged, const Heads& heads, int64_t* tiles) {
  const int64_t rows_at_once = std::max<int64_t>(1, kQueries / (heads.heads / heads.kv_heads));
  int64_t num_tiles = 0;
  for (int64_t s = 0; s < paged.num_sequences; ++s)
    for (int64_t row = paged.starts[s]; row < paged.starts[s + 1]; row += rows_at_once) {
      tiles[2 * num_tiles] = s;
      tiles[2 * num_tiles++ + 1] = row;
    }
  return num_tiles;
}

// Called by every thread of a team; a unit is a tile and a kv head.
template <class T>
void attend_tiles(const Paged& paged, const Heads& heads, const T* q, const T* k_cache, const T* v_cache, T* out,
                  const int64_t* tiles, int64_t num_tiles, std::atomic<int64_t>& next, int threads) {
  static thread_local Scratch scratch;
  const int64_t rows_at_once = std::max<int64_t>(1, kQueries / (heads.heads / heads.kv_heads));
  const int64_t num_units = num_tiles * heads.kv_heads;
  const int64_t step = num_tiles >= 8 * threads ? heads.kv_heads : 1;  // a sequence's heads lie side by side in memory
  for (int64_t first; (first = next.fetch_add(step)) < num_units;)
    for (int64_t unit = first; unit < std::min(first + step, num_units); ++unit) {
      const int64_t sequence = tiles[unit / heads.kv_heads * 2], row = tiles[unit / heads.kv_heads * 2 + 1];
      const int64_t count = std::min<int64_t>(rows_at_once, paged.starts[sequence + 1] - row);
      attend<T>(paged, heads, q, k_cache, v_cache, out, sequence, row, count, unit % heads.kv_heads, scratch);
    }
}

template <class T>
void paged_attention(const Paged& paged, const Heads& heads, const T* q, const T* k_cache, const T* v_cache, T* out, int threads) {
  static thread_local Scratch plan;
  int64_t* tiles = reinterpret_cast<int64_t*>(plan.get((paged.num_rows + 1) * 16));
  const int64_t num_tiles = plan_tiles(paged, heads, tiles);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  attend_tiles<T>(paged, heads, q, k_cache, v_cache, out, tiles, num_tiles, next, threads);
}

template <class T>
void write_kv(const Paged& paged, const Heads& heads, const T* k, const T* v, T* k_cache, T* v_cache) {
  const int64_t stride = heads.kv_heads * heads.dim;
  for (int64_t row = 0; row < paged.num_rows; ++row)
    for (int64_t h = 0; h < heads.kv_heads; ++h) {
      const int64_t to = paged.places[row] * stride + h * heads.dim;
      std::memcpy(k_cache + to, k + row * heads.k_row + h * heads.k_head, heads.dim * sizeof(T));
      std::memcpy(v_cache + to, v + row * heads.v_row + h * heads.v_head, heads.dim * sizeof(T));
    }
}

}  // namespace
