// An adapter's matrices from its file into a slot's numbers: widened, scaled, turned, rounded, looked at for NaN. Knows no names.
#pragma once
#include "vectors.h"

#include <sys/mman.h>
#include <unistd.h>

extern "C" {

struct MatrixCopy {  // [rows, columns] of a file to a slot, as it lies or turned
  int64_t from;      // bytes from the file's beginning
  int64_t to;        // numbers from the slot's beginning
  int64_t rows, columns;
  float scale;
  int32_t format;  // 0 float32, 1 bfloat16, 2 float16
  int32_t is_turned;
};

}  // extern "C"

namespace {

struct Half {
  uint16_t bits;
};

inline __m512 load16(const Half* p, __mmask16 mask = 0xffff) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }

// Rows of 16 to columns of 16, in place.
inline void turn16(__m512i* v) {
  __m512i by2[16], by4[16], by8[16];
  for (int i = 0; i < 8; ++i) {
    by2[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    by2[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      by4[4 * i + 2 * j] = _mm512_unpacklo_epi64(by2[4 * i + j], by2[4 * i + 2 + j]);
      by4[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(by2[4 * i + j], by2[4 * i + 2 + j]);
    }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j) {
      by8[8 * i + j] = _mm512_shuffle_i32x4(by4[8 * i + j], by4[8 * i + 4 + j], 0x88);
      by8[8 * i + 4 + j] = _mm512_shuffle_i32x4(by4[8 * i + j], by4[8 * i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    v[j] = _mm512_shuffle_i32x4(by8[j], by8[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(by8[j], by8[8 + j], 0xdd);
  }
}

template <class From, class To>
void copy_matrix(const From* from, const MatrixCopy& copy, To* to, __m512& poison) {
  const __m512 scale = _mm512_set1_ps(copy.scale);
  const auto put = [&](To* at, __m512 v, __mmask16 mask) {
    const __m512 kept = as_stored(_mm512_mul_ps(v, scale), at);
    poison = _mm512_mask3_fmadd_ps(kept, _mm512_setzero_ps(), poison, mask);  // 0 * inf and 0 * nan are nan
    store16(at, kept, mask);
  };
  if (!copy.is_turned) {
    const int64_t count = copy.rows * copy.columns;
    for (int64_t i = 0; i < count; i += 16) put(to + i, load16(from + i, tail_mask(count - i)), tail_mask(count - i));
    return;
  }
  for (int64_t row = 0; row < copy.rows; row += 16)
    for (int64_t column = 0; column < copy.columns; column += 16) {
      const int64_t down = std::min<int64_t>(16, copy.rows - row), across = std::min<int64_t>(16, copy.columns - column);
      __m512i v[16];
      for (int64_t i = 0; i < 16; ++i)
        v[i] = i < down ? _mm512_castps_si512(load16(from + (row + i) * copy.columns + column, tail_mask(across))) : _mm512_setzero_si512();
      turn16(v);
      for (int64_t j = 0; j < across; ++j) put(to + (column + j) * copy.rows + row, _mm512_castsi512_ps(v[j]), tail_mask(down));
    }
}

// Whether all that was stored is finite. `file` begins on a page.
template <class To>
bool pack_adapter(const char* file, int64_t size, const MatrixCopy* copies, int64_t count, To* slot) {
#ifdef MADV_POPULATE_READ
  madvise(const_cast<char*>(file), size, MADV_POPULATE_READ);  // all pages at once: a fault for each costs more than copying it
#endif
  __m512 poison = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; ++i) {
    const MatrixCopy& copy = copies[i];
    const char* from = file + copy.from;
    if (copy.format == 0) copy_matrix(reinterpret_cast<const float*>(from), copy, slot + copy.to, poison);
    else if (copy.format == 1) copy_matrix(reinterpret_cast<const bf16*>(from), copy, slot + copy.to, poison);
    else copy_matrix(reinterpret_cast<const Half*>(from), copy, slot + copy.to, poison);
  }
  return _mm512_cmp_ps_mask(poison, poison, _CMP_UNORD_Q) == 0;
}

}  // namespace
