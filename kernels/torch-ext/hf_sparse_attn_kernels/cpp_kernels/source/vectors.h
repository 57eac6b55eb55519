// Vectors of LANES floats, and the few operations on them that the kernels are made of.
//
// With AVX-512 LANES is 16 and pairs of bfloat16 multiply natively where the processor can; elsewhere LANES is 8 and
// bfloat16 and float16 are widened to float first. GCC's and Clang's vector extensions do the rest on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hsa {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int REGISTERS = 4;  // vectors side by side in one product
#else
constexpr int LANES = 8;
constexpr int REGISTERS = 2;
#endif

using Vec = float __attribute__((vector_size(4 * LANES)));
using IVec = int32_t __attribute__((vector_size(4 * LANES)));
using UVec = uint32_t __attribute__((vector_size(4 * LANES)));
// A word of a tensor as it stands: pairs of bfloat16 may begin at any element.
using Word = float __attribute__((may_alias, aligned(1)));

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }

inline Vec splat(float x) { return x - Vec{}; }

inline Vec blend(IVec mask, Vec yes, Vec no) { return mask ? yes : no; }

// the larger; b where either is NaN
inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return blend(a > b, a, b);
#endif
}

inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}

// 2^x for x <= 0: relative error below 2e-7, exactly 0 below -150, NaN for NaN.
inline Vec exp2_negative(Vec x) {
  // x is rounded here: where it is a product, the compiler would else fuse it into each of the sums below
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#else
  __asm__("" : "+x"(x));
#endif
  constexpr float magic =
      12583039.0f;  // 1.5 * 2^23 + 127: adding it rounds to an integer, whose low bits are those of 2^x
  const Vec shifted = x + magic;
  const Vec whole = shifted - magic;
  const Vec f = x - whole;
  // minimax polynomial of 2^f on [-0.5, 0.5]
  Vec p = f * 1.32647273e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return blend(x < -126.0f, Vec{}, p * (Vec)((UVec)shifted << 23));
#endif
}

// Natural logarithm of x >= 1.
inline Vec log_of(Vec x) {
  constexpr int32_t half_up = 0x3f3504f3;  // sqrt(1/2): the mantissa is taken from [sqrt(1/2), sqrt(2))
  const IVec exponent = ((IVec)x - half_up) >> 23;
  const Vec mantissa = (Vec)((UVec)x - ((UVec)exponent << 23));
  const Vec t = (mantissa - 1.0f) / (mantissa + 1.0f), t2 = t * t;
  const Vec series = t * (2.0f + t2 * (2 / 3.0f + t2 * (2 / 5.0f + t2 * (2 / 7.0f + t2 * (2 / 9.0f)))));
  return __builtin_convertvector(exponent, Vec) * 0.6931471805599453f + series;
}

// A format is how operands of a product lie in 4-byte words: one float, or two neighbours of the contraction in
// bfloat16.
struct Floats {
  static constexpr int PACK = 1;
  static Vec madd(Vec acc, float a, Vec b) { return acc + a * b; }
  static Vec pack(const Vec* rows) { return rows[0]; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int PACK = 2;
  static Vec madd(Vec acc, float a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
  // (rows[0][i], rows[1][i]) in word i
  static Vec pack(const Vec* rows) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Vec)_mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]));
  }
};
#endif

#if defined(__AVX512BF16__)
using BFloat16Format = Pairs;
#else
using BFloat16Format = Floats;
#endif

}  // namespace hsa
