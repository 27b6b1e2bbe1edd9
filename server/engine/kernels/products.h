// The int8 product of rows quantized once with the weights that read them. Knows panels and tiles, no adapters' arithmetic.
#pragma once
#include "streams.h"

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

// One weight's share of a product: where its results go and what is added to them.
template <class T>
struct Part {
  const Linear* layer;
  T* out;
  int64_t out_stride;
  const T* residual = nullptr;  // added to what the layer hands on, or null
  int64_t residual_stride = 0;
  uint8_t* flags = nullptr;  // of rows whose adapters' part is still to come
  float* sums = nullptr;     // [rows, sums_stride]: where those wait when there is a residual; others wait in `out`
  int64_t sums_stride = 0;

  // Hand on 16 outputs of a row.
  inline void put(int64_t row, int64_t n, __m512 v, __mmask16 mask) const {
    if (residual) v = _mm512_add_ps(as_stored(v, out), load16(residual + row * residual_stride + n, mask));
    store16(out + row * out_stride + n, v, mask);
  }
};

// Rows cut into tiles of one height, so that no tile is nearly empty.
struct Tiling {
  int64_t rows, tiles, height;
  explicit Tiling(int64_t count)
      : rows(count), tiles((count + kTile - 1) / kTile), height((count + tiles - 1) / std::max<int64_t>(1, tiles)) {}
};

template <int MR, class T>
void tile(const uint32_t* x, const int8_t* w, int64_t groups, const Part<T>& to, const float* row_scales, int64_t row,
          int64_t first, const char* ahead, Stream& stream) {
  const Linear& layer = *to.layer;
  __m512i c[MR][2];
  const __m512i zero0 = _mm512_loadu_si512(layer.offsets + first), zero1 = _mm512_loadu_si512(layer.offsets + first + 16);
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) c[m][0] = zero0, c[m][1] = zero1;
  stream.refill();
  const auto advance = [&] {
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
  };
  int64_t g = 0;
  for (int64_t end = stream.steps(groups); g < end; ++g) {
    stream.fetch();
    advance();
  }
  for (; g < groups; ++g) advance();
  const int64_t left = layer.d_out - first;
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) {
    const __m512 row_scale = _mm512_set1_ps(row_scales[row + m]);
    for (int half = 0; half < 2; ++half) {
      if (left <= half * 16) break;
      const int64_t n = first + half * 16;
      const __mmask16 mask = tail_mask(left - half * 16);
      __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(c[m][half]), _mm512_mul_ps(row_scale, _mm512_loadu_ps(layer.scales + n)));
      if (layer.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(layer.bias + n));
      if (to.sums && to.flags[row + m]) store16(to.sums + (row + m) * to.sums_stride + n, v, mask);
      else to.put(row + m, n, v, mask);
    }
  }
}

template <class T>
void any_tile(int rows, const uint32_t* x, const int8_t* w, int64_t groups, const Part<T>& to, const float* row_scales,
              int64_t row, int64_t first, const char* ahead, Stream& stream) {
  switch (rows) {
    case 1: return tile<1, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 2: return tile<2, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 3: return tile<3, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 4: return tile<4, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 5: return tile<5, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 6: return tile<6, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 7: return tile<7, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 8: return tile<8, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 9: return tile<9, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 10: return tile<10, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    case 11: return tile<11, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
    default: return tile<12, T>(x, w, groups, to, row_scales, row, first, ahead, stream);
  }
}

// All parts read the same codes. Called by every thread of a team; `next` starts at 0 and ends the phase.
template <class T>
void multiply(const Part<T>* parts, int num_parts, const uint32_t* codes, const float* scales, const Tiling& tiling,
              std::atomic<int64_t>& next, Stream& stream, int threads) {
  const int64_t groups = (parts[0].layer->d_in + 3) / 4, panel_size = groups * kPanel * 4;
  int64_t ends[kMaxParts], total = 0;
  for (int p = 0; p < num_parts; ++p) ends[p] = total += (parts[p].layer->d_out + kPanel - 1) / kPanel;
  const auto part_of = [&](int64_t panel) { int p = 0; while (panel >= ends[p]) ++p; return p; };
  const auto weights = [&](int64_t panel) {
    const int p = part_of(panel);
    return parts[p].layer->panels + (panel - (p ? ends[p - 1] : 0)) * panel_size;
  };
  // Tiles are taken in chunks whose codes stay in the second-level cache while all panels pass over them.
  const int64_t chunk_tiles = std::max<int64_t>(8, (384 << 10) / (groups * kTile * 4));
  const int64_t num_units = total * ((tiling.tiles + chunk_tiles - 1) / chunk_tiles);
  const int64_t step = std::max<int64_t>(1, total / (8 * threads));
  stream.begin(total * tiling.tiles * groups / threads);
  int64_t first = next.fetch_add(step);
  while (first < num_units) {
    const int64_t following = next.fetch_add(step), end = std::min(first + step, num_units);
    for (int64_t unit = first; unit < end; ++unit) {
      const int64_t chunk = unit / total, panel = unit % total, after = unit + 1 < end ? unit + 1 : following;
      const int p = part_of(panel);
      const int64_t output = (panel - (p ? ends[p - 1] : 0)) * kPanel;
      const int8_t* w = weights(panel);
      const char* ahead = reinterpret_cast<const char*>(weights(after < num_units ? after % total : panel));
      const int64_t last_tile = std::min((chunk + 1) * chunk_tiles, tiling.tiles);
      for (int64_t t = chunk * chunk_tiles; t < last_tile; ++t) {
        const int count = (int)std::min(tiling.height, tiling.rows - t * tiling.height);
        if (count <= 0) break;
        const int64_t half = (t - chunk * chunk_tiles) & 1;  // two tiles fetch the next panel between them
        any_tile<T>(count, codes + t * groups * kTile, w, groups, parts[p], scales, t * tiling.height, output,
                    ahead + half * groups * 64, stream);
      }
    }
    first = following;
  }
}

}  // namespace
