// The one product that every kernel is made of: rows of words, broadcast, times vectors of lanes.
#pragma once

#include "vectors.h"

namespace hsa {

// Left operand a(i, s): runs of steps. Rows are `row` words apart, the steps of a run as many as the run says.
struct Run {
  const Word* base;
  int64_t step;
};
struct Left {
  const Run* runs;
  int count;
  int64_t row;
};

// What is summed here is added to what out held in the end: sums of sums of short runs round less than one long sum.
// R rows of out[i][lane] = keep[lane] * out[i][lane] + sum over runs and steps of a(i, s) * b[s][lane].
template <class Format, int NV, int R>
inline void product_rows(const Left& a, int64_t first, int steps, const float* b, const Vec* keep, float* out) {
  Vec acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec{};
  }
  for (int j = 0; j < a.count; ++j) {
    const int64_t step = a.runs[j].step;
    const Word* left = a.runs[j].base + first * a.row;
    for (int s = 0; s < steps; ++s, b += NV * LANES, left += step) {
      Vec right[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) right[v] = load(b + v * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const float word = left[i * a.row];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = Format::madd(acc[i][v], word, right[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* at = out + (i * NV + v) * LANES;
      store(at, keep ? load(at) * keep[v] + acc[i][v] : acc[i][v]);
    }
  }
}

// All `rows` rows; b is [count * steps][NV * LANES], out [rows][NV * LANES]. Without `keep` what out held is forgotten.
template <class Format, int NV>
inline void product(const Left& a, int rows, int steps, const float* b, const Vec* keep, float* out) {
  constexpr int R = NV == 4 ? 4 : NV == 1 ? 16 : 8;
  int64_t i = 0;
  for (; i + R <= rows; i += R) product_rows<Format, NV, R>(a, i, steps, b, keep, out + i * NV * LANES);
  for (; i < rows; ++i) product_rows<Format, NV, 1>(a, i, steps, b, keep, out + i * NV * LANES);
}

// The same for one run of neighbouring words: a(i, s) = base[i * row + s].
template <class Format, int NV>
inline void product(const Word* base, int64_t row, int rows, int steps, const float* b, float* out) {
  const Run run{base, 1};
  product<Format, NV>({&run, 1, row}, rows, steps, b, nullptr, out);
}

}  // namespace hsa
