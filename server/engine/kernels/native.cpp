// The CPU kernels: int8 products with adapters, paged attention, row norms. Knows pointers and strides, nothing of torch.
//
// Compiled once per machine by native.py, which mirrors the structs. Every result of a row depends on that row alone, in one
// fixed order of operations: neighbours, tiles and threads change no bit of it.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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

// Scratch that lives as long as the calling thread; contents do not survive a call.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  char* get(size_t need) {
    if (need > size) {
      std::free(data);
      size = (need + need / 4 + 4095) / 4096 * 4096;
      data = std::aligned_alloc(4096, size);
    }
    return static_cast<char*>(data);
  }
};

}  // namespace

extern "C" {

struct Site {  // one layer's part of the slots; strides in numbers
  const void* a;       // [slots, rank_max, d_in]
  const void* b;       // [slots, rank_max, d_out]
  const int32_t* ranks;
  int64_t slot_stride;
  int64_t first_output;
  int64_t num_outputs;
};

struct Batch {  // the pairs of each row: slots[firsts[row] .. firsts[row + 1])
  const int32_t* order;  // rows sorted by slot
  const int32_t* firsts;
  const int32_t* slots;
  const float* weights;
};

struct Linear {
  const int8_t* panels;     // [outputs / 32, d_in / 4, 32, 4]
  const float* scales;      // [outputs], padded
  const int32_t* offsets;   // [outputs], padded: -128 * sum of the weights
  const float* bias;        // [outputs], padded, or null
  int64_t d_in;
  int64_t d_out;
  int64_t num_sites;
  Site sites[kMaxParts];
};

}  // extern "C"

namespace {

// ---- one row: quantize it, and run it through its adapters

template <class T>
const float* widen_row(const T* x, int64_t count, int gated, float* wide) {
  const int64_t padded = (count + 63) / 64 * 64;
  for (int64_t i = 0; i < padded; i += 16) {
    const __mmask16 mask = i < count ? tail_mask(count - i) : 0;
    __m512 v = mask ? load16(x + i, mask) : _mm512_setzero_ps();
    if (gated && mask) {
      const __m512 activated = as_stored(silu16(v), x);
      v = as_stored(_mm512_mul_ps(activated, load16(x + count + i, mask)), x);
    }
    _mm512_storeu_ps(wide + i, v);
  }
  return wide;
}

// codes: the row's dwords lie kTile apart, so that a tile's rows stand side by side for every group of 4 inputs.
inline float quantize_row(const float* wide, int64_t count, uint32_t* codes) {
  const int64_t padded = (count + 63) / 64 * 64;
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < padded; i += 16)  // as integers, so that a NaN wins
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(wide + i)), magnitude));
  const uint32_t bits = _mm512_reduce_max_epu32(most);
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  const __m512 factor = _mm512_set1_ps(absmax == 0.0f ? 0.0f : 127.0f / absmax);
  const __m128i sign = _mm_set1_epi8((char)0x80);
  const int64_t groups = (count + 3) / 4;
  for (int64_t g = 0; g < groups; g += 4) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(wide + g * 4), factor));
    const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(whole), sign);
    uint32_t* to = codes + g * kTile;
    to[0] = (uint32_t)_mm_extract_epi32(bytes, 0);
    if (g + 1 < groups) to[kTile] = (uint32_t)_mm_extract_epi32(bytes, 1);
    if (g + 2 < groups) to[2 * kTile] = (uint32_t)_mm_extract_epi32(bytes, 2);
    if (g + 3 < groups) to[3 * kTile] = (uint32_t)_mm_extract_epi32(bytes, 3);
  }
  return absmax / 127.0f;
}

template <int R>
inline void shrink(const float* a, int64_t stride, const float* x, int64_t count, float* hidden) {
  __m512 sums[R];
  for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    const __m512 v = load16(x + i, mask);
    for (int r = 0; r < R; ++r) sums[r] = _mm512_fmadd_ps(v, load16(a + r * stride + i, mask), sums[r]);
  }
  for (int r = 0; r < R; ++r) hidden[r] = _mm512_reduce_add_ps(sums[r]);
}

template <int R>
inline void shrink(const bf16* a, int64_t stride, const bf16* x, int64_t count, float* hidden) {
  __m512 sums[R];
  for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
#ifdef __AVX512BF16__
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 mask = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
    const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i);
    for (int r = 0; r < R; ++r)
      sums[r] = _mm512_dpbf16_ps(sums[r], v, (__m512bh)_mm512_maskz_loadu_epi16(mask, a + r * stride + i));
  }
#else
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    const __m512 v = load16(x + i, mask);
    for (int r = 0; r < R; ++r) sums[r] = _mm512_fmadd_ps(v, load16(a + r * stride + i, mask), sums[r]);
  }
#endif
  for (int r = 0; r < R; ++r) hidden[r] = _mm512_reduce_add_ps(sums[r]);
}

template <int R, class T>
inline void expand(const T* b, int64_t stride, const float* hidden, int64_t count, float* delta) {
  __m512 h[R];
  for (int r = 0; r < R; ++r) h[r] = _mm512_set1_ps(hidden[r]);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    __m512 sum = load16(delta + i, mask);
    for (int r = 0; r < R; ++r) sum = _mm512_fmadd_ps(h[r], load16(b + r * stride + i, mask), sum);
    store16(delta + i, sum, mask);
  }
}

template <class T>
void add_pair(const Site& site, const T* x, int64_t d_in, int slot, float weight, float* delta) {
  const int rank = site.ranks[slot];
  const T* a = static_cast<const T*>(site.a) + slot * site.slot_stride;
  const T* b = static_cast<const T*>(site.b) + slot * site.slot_stride;
  const int64_t n = site.num_outputs;
  for (int r = 0; r < rank;) {
    float hidden[8];
    const int left = rank - r;
    const int step = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const T* rows = a + r * d_in;
    if (step == 8) {
      shrink<4>(rows, d_in, x, d_in, hidden);
      shrink<4>(rows + 4 * d_in, d_in, x, d_in, hidden + 4);
    } else if (step == 4) {
      shrink<4>(rows, d_in, x, d_in, hidden);
    } else if (step == 2) {
      shrink<2>(rows, d_in, x, d_in, hidden);
    } else {
      shrink<1>(rows, d_in, x, d_in, hidden);
    }
    for (int i = 0; i < step; ++i) hidden[i] *= weight;
    const T* columns = b + r * n;
    if (step == 8) expand<8>(columns, n, hidden, n, delta);
    else if (step == 4) expand<4>(columns, n, hidden, n, delta);
    else if (step == 2) expand<2>(columns, n, hidden, n, delta);
    else expand<1>(columns, n, hidden, n, delta);
    r += step;
  }
}

// Fill delta [d_out] with the row's adapters' part; false when no adapter of the row reaches this layer.
template <class T>
bool run_adapters(const Linear& layer, const Batch& batch, int64_t row, const T* x, float* delta) {
  bool any = false;
  for (int64_t s = 0; s < layer.num_sites; ++s)
    for (int p = batch.firsts[row]; p < batch.firsts[row + 1]; ++p)
      any |= layer.sites[s].ranks != nullptr && layer.sites[s].ranks[batch.slots[p]] > 0;
  if (!any) return false;
  std::memset(delta, 0, layer.d_out * sizeof(float));
  for (int64_t s = 0; s < layer.num_sites; ++s) {
    const Site& site = layer.sites[s];
    if (site.ranks == nullptr) continue;
    for (int p = batch.firsts[row]; p < batch.firsts[row + 1]; ++p)
      add_pair<T>(site, x, layer.d_in, batch.slots[p], batch.weights[p], delta + site.first_output);
  }
  return true;
}

// ---- the int8 product of one tile of rows with one panel of outputs

template <class T>
struct Output {
  T* out;
  int64_t stride;
  const float* row_scales;
  const float* delta;  // [rows, d_out]
  const uint8_t* has_delta;
  int64_t d_out;
};

template <int MR, class T>
void tile(const uint32_t* x, const int8_t* w, int64_t groups, const Linear& layer, const Output<T>& to, int64_t row,
          int64_t first, const char* ahead) {
  __m512i c[MR][2];
  const __m512i zero0 = _mm512_loadu_si512(layer.offsets + first), zero1 = _mm512_loadu_si512(layer.offsets + first + 16);
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) c[m][0] = zero0, c[m][1] = zero1;
  for (int64_t g = 0; g < groups; ++g) {
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
    w += 128;
    _mm_prefetch(ahead, _MM_HINT_T0);
    ahead += 64;
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      const __m512i v = _mm512_set1_epi32((int)x[m]);
      c[m][0] = _mm512_dpbusd_epi32(c[m][0], v, w0);
      c[m][1] = _mm512_dpbusd_epi32(c[m][1], v, w1);
    }
    x += kTile;
  }
  const int64_t left = layer.d_out - first;
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) {
    const __m512 row_scale = _mm512_set1_ps(to.row_scales[row + m]);
    for (int half = 0; half < 2; ++half) {
      if (left <= half * 16) break;
      const int64_t n = first + half * 16;
      const __mmask16 mask = tail_mask(left - half * 16);
      __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(c[m][half]), _mm512_mul_ps(row_scale, _mm512_loadu_ps(layer.scales + n)));
      if (layer.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(layer.bias + n));
      if (to.has_delta && to.has_delta[row + m]) v = _mm512_add_ps(v, load16(to.delta + (row + m) * to.d_out + n, mask));
      store16(to.out + (row + m) * to.stride + n, v, mask);
    }
  }
}

template <class T>
void any_tile(int rows, const uint32_t* x, const int8_t* w, int64_t groups, const Linear& layer, const Output<T>& to,
              int64_t row, int64_t first, const char* ahead) {
  switch (rows) {
    case 1: return tile<1, T>(x, w, groups, layer, to, row, first, ahead);
    case 2: return tile<2, T>(x, w, groups, layer, to, row, first, ahead);
    case 3: return tile<3, T>(x, w, groups, layer, to, row, first, ahead);
    case 4: return tile<4, T>(x, w, groups, layer, to, row, first, ahead);
    case 5: return tile<5, T>(x, w, groups, layer, to, row, first, ahead);
    case 6: return tile<6, T>(x, w, groups, layer, to, row, first, ahead);
    case 7: return tile<7, T>(x, w, groups, layer, to, row, first, ahead);
    case 8: return tile<8, T>(x, w, groups, layer, to, row, first, ahead);
    case 9: return tile<9, T>(x, w, groups, layer, to, row, first, ahead);
    case 10: return tile<10, T>(x, w, groups, layer, to, row, first, ahead);
    case 11: return tile<11, T>(x, w, groups, layer, to, row, first, ahead);
    default: return tile<12, T>(x, w, groups, layer, to, row, first, ahead);
  }
}

template <class T>
void linear(const Linear& layer, const Batch* batch, const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t rows,
            int gated, int threads) {
  static thread_local Scratch scratch;
  const int64_t groups = (layer.d_in + 3) / 4;
  const int64_t num_tiles = (rows + kTile - 1) / kTile;
  const int64_t height = (rows + num_tiles - 1) / num_tiles;
  const int64_t wide_size = (layer.d_in + 63) / 64 * 64;
  const int64_t panels = (layer.d_out + kPanel - 1) / kPanel;
  const bool adapted = batch != nullptr && layer.num_sites > 0;

  size_t at = 0;
  const auto place = [&at](size_t bytes) { const size_t here = at; at += (bytes + 63) / 64 * 64; return here; };
  const size_t at_codes = place(num_tiles * groups * kTile * 4), at_scales = place(rows * 4);
  const size_t at_wide = place(threads * wide_size * 4), at_narrow = place(threads * wide_size * sizeof(T));
  const size_t at_flags = place(rows), at_delta = place(adapted ? rows * layer.d_out * 4 : 0);
  char* base = scratch.get(at);
  uint32_t* codes = reinterpret_cast<uint32_t*>(base + at_codes);
  float* scales = reinterpret_cast<float*>(base + at_scales);
  float* delta = reinterpret_cast<float*>(base + at_delta);
  uint8_t* flags = reinterpret_cast<uint8_t*>(base + at_flags);

  // Tiles are taken in chunks whose codes stay in the second-level cache while all panels pass over them.
  const int64_t chunk_tiles = std::max<int64_t>(8, (384 << 10) / (groups * kTile * 4));
  const int64_t num_chunks = (num_tiles + chunk_tiles - 1) / chunk_tiles;
  const int64_t num_units = panels * num_chunks;
  std::atomic<int64_t> next_row{0}, next_unit{0};
  const int64_t row_step = rows > 32 * threads ? 8 : 1;
  const int64_t unit_step = std::max<int64_t>(1, panels / (8 * threads));

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    float* wide = reinterpret_cast<float*>(base + at_wide) + me * wide_size;
    T* narrow = reinterpret_cast<T*>(base + at_narrow) + me * wide_size;
    for (int64_t first; (first = next_row.fetch_add(row_step)) < rows;) {
      for (int64_t i = first; i < std::min(first + row_step, rows); ++i) {
        const int64_t row = adapted ? batch->order[i] : i;
        const T* from = x + row * x_stride;
        widen_row(from, layer.d_in, gated, wide);
        scales[row] = quantize_row(wide, layer.d_in, codes + (row / height * groups) * kTile + row % height);
        if (!adapted) continue;
        flags[row] = 0;
        if (batch->firsts[row] == batch->firsts[row + 1]) continue;
        if (gated) {
          for (int64_t k = 0; k < wide_size; k += 16) store16(narrow + k, _mm512_loadu_ps(wide + k));
          from = narrow;
        }
        flags[row] = run_adapters<T>(layer, *batch, row, from, delta + row * layer.d_out);
      }
    }
#pragma omp barrier
    const Output<T> to{out, out_stride, scales, delta, adapted ? flags : nullptr, layer.d_out};
    const int64_t panel_size = groups * kPanel * 4;
    int64_t first = next_unit.fetch_add(unit_step);
    while (first < num_units) {
      const int64_t following = next_unit.fetch_add(unit_step);
      const int64_t end = std::min(first + unit_step, num_units);
      for (int64_t unit = first; unit < end; ++unit) {
        const int64_t chunk = unit / panels, panel = unit % panels;
        const int64_t after = unit + 1 < end ? unit + 1 : following;
        const int8_t* w = layer.panels + panel * panel_size;
        const char* ahead = reinterpret_cast<const char*>(layer.panels + (after < num_units ? after % panels : panel) * panel_size);
        const int64_t last_tile = std::min((chunk + 1) * chunk_tiles, num_tiles);
        for (int64_t t = chunk * chunk_tiles; t < last_tile; ++t) {
          const int count = (int)std::min(height, rows - t * height);
          if (count <= 0) break;
          const int64_t part = t - chunk * chunk_tiles;  // two tiles fetch the next panel between them
          any_tile<T>(count, codes + t * groups * kTile, w, groups, layer, to, t * height, panel * kPanel,
                      ahead + (part & 1) * groups * 64);
        }
      }
      first = following;
    }
  }
}

// ---- norms and element-wise parts

template <class T>
void rms_norm(const T* x, int64_t x_stride, const T* weight, float eps, T* out, int64_t rows, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * d > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * x_stride;
    T* to = out + row * d;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < d; i += 16) {
      const __m512 v = load16(from + i, tail_mask(d - i));
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)d + eps));
    for (int64_t i = 0; i < d; i += 16) {
      const __mmask16 mask = tail_mask(d - i);
      const __m512 unit = as_stored(_mm512_mul_ps(load16(from + i, mask), factor), from);
      store16(to + i, _mm512_mul_ps(load16(weight + i, mask), unit), mask);
    }
  }
}

}  // namespace

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

template <class T>
void paged_attention(const Paged& paged, const Heads& heads, const T* q, const T* k_cache, const T* v_cache, T* out, int threads) {
  const int64_t group = heads.heads / heads.kv_heads;
  const int64_t rows_at_once = std::max<int64_t>(1, kQueries / group);
  static thread_local Scratch plan_scratch;
  // (sequence, first row) of every tile of rows; a unit is a tile and a kv head
  int64_t* tiles = reinterpret_cast<int64_t*>(plan_scratch.get((paged.num_rows + 1) * 16));
  int64_t num_tiles = 0;
  for (int64_t s = 0; s < paged.num_sequences; ++s)
    for (int64_t row = paged.starts[s]; row < paged.starts[s + 1]; row += rows_at_once) {
      tiles[2 * num_tiles] = s;
      tiles[2 * num_tiles++ + 1] = row;
    }
  const int64_t num_units = num_tiles * heads.kv_heads;
  const int64_t step = num_tiles >= 8 * threads ? heads.kv_heads : 1;  // a sequence's heads lie side by side in memory
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch scratch;
    for (int64_t first; (first = next.fetch_add(step)) < num_units;)
      for (int64_t unit = first; unit < std::min(first + step, num_units); ++unit) {
        const int64_t sequence = tiles[unit / heads.kv_heads * 2], row = tiles[unit / heads.kv_heads * 2 + 1];
        const int64_t count = std::min<int64_t>(rows_at_once, paged.starts[sequence + 1] - row);
        attend<T>(paged, heads, q, k_cache, v_cache, out, sequence, row, count, unit % heads.kv_heads, scratch);
      }
  }
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

// ---- what native.py calls; `wide` says float32 (1) or bfloat16 (0)
extern "C" {

void loractl_linear(const Linear* layer, const Batch* batch, const void* x, int64_t x_stride, void* out, int64_t out_stride,
                    int64_t rows, int gated, int wide, int threads) {
  if (wide)
    linear<float>(*layer, batch, static_cast<const float*>(x), x_stride, static_cast<float*>(out), out_stride, rows, gated, threads);
  else
    linear<bf16>(*layer, batch, static_cast<const bf16*>(x), x_stride, static_cast<bf16*>(out), out_stride, rows, gated, threads);
}

void loractl_rms_norm(const void* x, int64_t x_stride, const void* weight, float eps, void* out, int64_t rows, int64_t d, int wide,
                      int threads) {
  if (wide)
    rms_norm<float>(static_cast<const float*>(x), x_stride, static_cast<const float*>(weight), eps, static_cast<float*>(out), rows, d, threads);
  else
    rms_norm<bf16>(static_cast<const bf16*>(x), x_stride, static_cast<const bf16*>(weight), eps, static_cast<bf16*>(out), rows, d, threads);
}

void loractl_write_kv(const Paged* paged, const Heads* heads, const void* k, const void* v, void* k_cache, void* v_cache, int wide) {
  if (wide)
    write_kv<float>(*paged, *heads, static_cast<const float*>(k), static_cast<const float*>(v), static_cast<float*>(k_cache), static_cast<float*>(v_cache));
  else
    write_kv<bf16>(*paged, *heads, static_cast<const bf16*>(k), static_cast<const bf16*>(v), static_cast<bf16*>(k_cache), static_cast<bf16*>(v_cache));
}

void loractl_attention(const Paged* paged, const Heads* heads, const void* q, const void* k_cache, const void* v_cache, void* out,
                       int wide, int threads) {
  if (wide)
    paged_attention<float>(*paged, *heads, static_cast<const float*>(q), static_cast<const float*>(k_cache), static_cast<const float*>(v_cache), static_cast<float*>(out), threads);
  else
    paged_attention<bf16>(*paged, *heads, static_cast<const bf16*>(q), static_cast<const bf16*>(k_cache), static_cast<const bf16*>(v_cache), static_cast<bf16*>(out), threads);
}

}  // extern "C"
