// Loading queries, keys and values in the three dtypes into the words that products read.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "product.h"

namespace hsa {

template <class T>
struct Matrix {  // rows of a tensor; the last dimension is contiguous
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

// Starts loading `count` rows of `width` elements from row `first` on: of one query's work half is waiting for keys.
template <class T>
inline void prefetch_rows(Matrix<T> x, int64_t first, int count, int width) {
  for (int i = 0; i < count; ++i)
    for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x.row(first + i)) + byte);
}

template <class T>
struct Heads {  // [B, heads, N, D]
  const T* data;
  int64_t batch_stride, head_stride, row_stride;
  // rows of a head from row `first` on
  Matrix<T> rows(int64_t b, int64_t head, int64_t first = 0) const {
    return {data + b * batch_stride + head * head_stride + first * row_stride, row_stride};
  }
};

// Whether tensors of T are words of the format as they stand.
template <class T, class Format>
constexpr bool NATIVE = std::is_same_v<T, float> && std::is_same_v<Format, Floats>;
#if defined(__AVX512BF16__)
template <>
constexpr bool NATIVE<c10::BFloat16, Pairs> = true;
#endif

// Keys as left operand of scores: `count` rows of `width` elements from row `first` on, zero up to `rows`.
// Returns where they stand and sets the words between rows; copies to `room` [rows][width] only where it must.
template <class Format, class T>
inline const Word* key_rows(Matrix<T> x, int64_t first, int count, int rows, int width, float* room, int64_t* stride) {
  const T* from = x.row(first);
  if constexpr (NATIVE<T, Format>) {
    if (count == rows && x.stride % Format::PACK == 0) {
      *stride = x.stride / Format::PACK;
      return reinterpret_cast<const Word*>(from);
    }
    T* to = reinterpret_cast<T*>(room);
    for (int i = 0; i < count; ++i) std::memcpy(to + i * width, from + i * x.stride, width * sizeof(T));
    std::memset(to + count * width, 0, (rows - count) * width * sizeof(T));
  } else {
    for (int i = 0; i < count; ++i)
      for (int d = 0; d < width; ++d) room[i * width + d] = static_cast<float>(from[i * x.stride + d]);
    std::memset(room + count * width, 0, (rows - count) * width * sizeof(float));
  }
  *stride = width / Format::PACK;
  return room;
}

// Values as left operand of outputs: as `key_rows`, but PACK neighbouring rows share a word: [rows / PACK][width].
template <class Format, class T>
inline const Word* value_rows(Matrix<T> x, int64_t first, int count, int rows, int width, float* room,
                              int64_t* stride) {
  if constexpr (Format::PACK == 1) {
    return key_rows<Format>(x, first, count, rows, width, room, stride);
#if defined(__AVX512BF16__)
  } else {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                         39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int i = 0; i < rows; i += 2) {
      const T *a = x.row(first + i), *b = a + x.stride;
      float* to = room + i / 2 * width;
      for (int d = 0; d < width; d += 32) {
        const int left = width - d;
        const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
        const __m512i upper = i < count ? _mm512_maskz_loadu_epi16(mask, a + d) : _mm512_setzero_si512();
        const __m512i lower = i + 1 < count ? _mm512_maskz_loadu_epi16(mask, b + d) : _mm512_setzero_si512();
        _mm512_mask_storeu_epi32(to + d, mask & 0xffff, _mm512_permutex2var_epi16(upper, low, lower));
        if (left > 16) _mm512_mask_storeu_epi32(to + d + 16, mask >> 16, _mm512_permutex2var_epi16(upper, high, lower));
      }
    }
    *stride = width;
    return room;
#endif
  }
}

// One row of `width` elements into lane `lane` of [width / PACK][lanes] words; null is a row of zeros.
template <class Format, class T>
inline void to_lane(const T* from, int width, int lanes, int lane, float* to) {
  if constexpr (Format::PACK == 1) {
    for (int d = 0; d < width; ++d) to[d * lanes + lane] = from ? static_cast<float>(from[d]) : 0.0f;
  } else {
    for (int d = 0; d < width; d += 2) {
      float word = 0;
      if (from) std::memcpy(&word, from + d, 4);
      to[d / 2 * lanes + lane] = word;
    }
  }
}

}  // namespace hsa
