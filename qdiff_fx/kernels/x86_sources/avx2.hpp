// Registers of AVX2, which adds products of bytes in 16 bits and saturates: sums that stay exact all the same.
//
// Codes are read as x - 128, between -128 and 127, weights lie between -127 and 127: then a pair of products |x - 128| *
// (weight with the sign of x - 128) is at most 2 * 128 * 127 = 32,512, which 16 bits hold. What that takes from each sum,
// 128 times the sum of the weights, is in the layer's offsets (pack_weight in x86_native.py).

#pragma once

#include "kernels.hpp"

#define KERNEL __attribute__((target("avx2")))
#define KERNEL_INLINE [[gnu::always_inline]] KERNEL inline

namespace qdiff {

using Floats = __m256;
using Kept = int64_t;       // lanes that are written
constexpr int kWidth = 8;   // lanes of a register
constexpr int kBlockVectors = 2; // registers of outputs that a layer sums together
constexpr int kBlockRows = 4;    // pixels of them: sums fill 8 of 16 registers
constexpr int kFewRows = 2; // of a layer that has no more pixels

KERNEL_INLINE __m128i round_to_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

// The first `left` of 8 lanes.
inline Kept first_lanes(int64_t left) { return left; }

// A dense result of floats in one of two types.
struct Target {
  char* data;
  int64_t row; // elements from one row of results to the next
  bool bfloat16;

  [[gnu::always_inline]] KERNEL void store(int64_t element, Kept kept, __m256 value) const {
    const int64_t size = bfloat16 ? 2 : 4;
    char* to = data + size * element;
    alignas(32) char bytes[32];
    char* whole = kept >= kWidth ? to : bytes;
    if (bfloat16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(whole), round_to_bfloat16(value));
    } else {
      _mm256_storeu_ps(reinterpret_cast<float*>(whole), value);
    }
    if (kept < kWidth) std::memcpy(to, bytes, static_cast<size_t>(size * kept));
  }
};

KERNEL_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }

// Rounded twice, as the reference does: results have its bits.
KERNEL_INLINE Floats scaled(__m256i sums, Floats scale, Floats bias) {
  return _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale), bias);
}

// Sums of some rows by some registers, in 32 bits.
template <int rows, int vectors>
using Sums = __m256i[rows][vectors];

// The same numbers for every row.
template <int rows, int vectors>
KERNEL_INLINE void start(Sums<rows, vectors>& sums, const int32_t* from) {
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + kWidth * v));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sums[r][v] = lanes;
  }
}

// Adds `groups` products of four: unsigned bytes `x` of each row, less 128, by signed `codes` [groups, 8 * vectors, 4].
// Returns the codes' end.
template <int rows, int vectors>
KERNEL_INLINE const int8_t* add(Sums<rows, vectors>& sums, const uint8_t* const* x, int64_t groups,
                                const int8_t* codes) {
  const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8(-128);
  for (int64_t g = 0; g < groups; ++g, codes += 32 * vectors) {
    __m256i lanes[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) lanes[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * v));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      std::memcpy(&four, x[r] + 4 * g, sizeof four);
      const __m256i signed_x = _mm256_xor_si256(_mm256_set1_epi32(four), middle), size = _mm256_abs_epi8(signed_x);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(lanes[v], signed_x));
        sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
  return codes;
}

} // namespace qdiff
