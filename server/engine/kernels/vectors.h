// Vectors of 16 numbers, their exp, silu and tanh, and scratch memory. Knows no layer.
#pragma once
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "needs AVX-512 with VNNI"
#endif

using bf16 = uint16_t;

namespace {

constexpr int kPanel = 32;  // outputs in a panel: two vectors of int32
constexpr int kTile = 12;   // most rows of a tile: 24 accumulators, and registers left for weights and rows
constexpr int kMaxParts = 4;

// ---- vectors of 16 numbers, float32 inside, float32 or bfloat16 in memory

inline __mmask16 tail_mask(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

inline __m512 load16(const float* p, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load16(const bf16* p, __mmask16 mask = 0xffff) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

inline __m256i round_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

inline void store16(float* p, __m512 v, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(p, mask, v); }
inline void store16(bf16* p, __m512 v, __mmask16 mask = 0xffff) { _mm256_mask_storeu_epi16(p, mask, round_bf16(v)); }

// What a value becomes when a module hands it on in T.
inline __m512 as_stored(__m512 v, const float*) { return v; }
inline __m512 as_stored(__m512 v, const bf16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_bf16(v)), 16));
}

// exp by 2^n * p(f), |f| <= 0.5: relative error below 2e-7, 0 far below.
inline __m512 exp16(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-126.0f)), _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 clipped = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  __m512 f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), clipped);
  f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(f, f), _mm512_add_ps(f, _mm512_set1_ps(1.0f)));
  const __m512 result = _mm512_scalef_ps(p, whole);
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(result, tiny, _mm512_setzero_ps());
}

inline __m512 silu16(__m512 x) {
  const __m512 e = exp16(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

inline __m512 tanh16(__m512 x) {  // 1 - 2 / (exp(2x) + 1)
  const __m512 twice = _mm512_min_ps(_mm512_add_ps(x, x), _mm512_set1_ps(80.0f));
  const __m512 e = exp16(twice);
  const __m512 two = _mm512_set1_ps(2.0f), one = _mm512_set1_ps(1.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one)));
}

// Ask for large pages: streaming through small ones stalls at every border. Before the memory is first touched.
inline void want_large_pages(void* data, size_t size) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) & ~(page - 1);
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Scratch that lives as long as the calling thread; contents do not survive a call.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  char* get(size_t need) {
    if (need > size) {
      std::free(data);
      constexpr size_t page = 2 << 20;
      const size_t unit = need > page / 2 ? page : 4096;
      size = (need + need / 4 + unit - 1) / unit * unit;
      data = std::aligned_alloc(unit, size);
      want_large_pages(data, size);
    }
    return static_cast<char*>(data);
  }
};

}  // namespace
