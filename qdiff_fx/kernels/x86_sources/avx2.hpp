// Registers of AVX2, which adds products of bytes in 16 bits and saturates: sums that stay exact all the same.
//
// Where the weights of a span of channels are small, as those of 4 bits are, 16 bits hold the sum of its products: the
// sizes of the eight weights that meet in one of them add up to at most 128, and 255 * 128 = 32,640. Elsewhere codes
// are read as x - 128, between -128 and 127, weights lie between -127 and 127, and a pair of products |x - 128| *
// (weight with the sign of x - 128) is at most 2 * 128 * 127 = 32,512. What that takes from a sum, 128 times the sum of
// these weights, is in the layer's offsets. Which spans are narrow stands behind the bias (NativeKernels.pack in
// x86_native.py).

#pragma once

#include "kernels.hpp"

#define KERNEL __attribute__((target("avx2")))
#define KERNEL_INLINE [[gnu::always_inline]] KERNEL inline

namespace qdiff {

using Floats = __m256;
using Kept = int64_t;            // lanes that are written
constexpr int kWidth = 8;        // lanes of a register
constexpr int kBlockVectors = 2; // registers of outputs that a layer sums together
constexpr int kBlockRows = 4;    // pixels of them: sums fill 8 of 16 registers
constexpr int kFewRows = 2;      // of a layer that has no more pixels

KERNEL_INLINE __m128i round_to_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

// The first `left` of 8 lanes.
inline Kept first_lanes(int64_t left) { return left; }

KERNEL_INLINE void store(const Target& target, int64_t element, Kept kept, Floats value) {
  const int64_t size = target.bfloat16 ? 2 : 4;
  char* to = target.data + size * element;
  alignas(32) char bytes[32];
  char* whole = kept >= kWidth ? to : bytes;
  if (target.bfloat16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(whole), round_to_bfloat16(value));
  } else {
    _mm256_storeu_ps(reinterpret_cast<float*>(whole), value);
  }
  if (kept < kWidth) std::memcpy(to, bytes, static_cast<size_t>(size * kept));
}

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

constexpr int64_t kSpan = 4; // groups of four channels

// Bytes that a layer of `groups` groups of channels has behind its bias: for each span, whether it is narrow.
inline int64_t span_bytes(int64_t groups) { return filled_up(filled_up(groups, kSpan) / kSpan, 4); }

KERNEL_INLINE __m256i load_codes(const int8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

using Four [[gnu::may_alias, gnu::aligned(1)]] = int32_t;

// A span of small weights.
template <int rows, int vectors>
KERNEL_INLINE void add_narrow(Sums<rows, vectors>& sums, const uint8_t* const* x, int64_t first, const int8_t* codes) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    __m256i pairs[rows];
#pragma GCC unroll 4
    for (int64_t g = 0; g < kSpan; ++g) {
      const __m256i lanes = load_codes(codes + 32 * (vectors * g + v));
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        // Loaded anew for each vector and added at once: gcc 12 would keep codes and products of a span, in memory.
        __m256i copies;
        const auto* four = reinterpret_cast<const Four*>(x[r] + 4 * (first + g));
        asm volatile("vpbroadcastd %1, %0" : "=x"(copies) : "m"(*four));
        const __m256i products = _mm256_maddubs_epi16(copies, lanes);
        pairs[r] = g == 0 ? products : _mm256_add_epi16(pairs[r], products);
        asm volatile("" : "+x"(pairs[r]));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(pairs[r], ones));
  }
}

// One group of any weights, of codes less 128.
template <int rows, int vectors>
KERNEL_INLINE void add_wide(Sums<rows, vectors>& sums, const uint8_t* const* x, int64_t group, const int8_t* codes) {
  const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8(-128);
  __m256i lanes[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) lanes[v] = load_codes(codes + 32 * v);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const __m256i copies = _mm256_set1_epi32(*reinterpret_cast<const Four*>(x[r] + 4 * group));
    const __m256i signed_x = _mm256_xor_si256(copies, middle), size = _mm256_abs_epi8(signed_x);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(lanes[v], signed_x));
      sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(pairs, ones));
    }
  }
}

// Adds `groups` products of four: bytes `x` of each row, less 128 where a span is not `narrow`, by signed `codes`
// [groups, 8 * vectors, 4]. Returns the codes' end.
template <int rows, int vectors>
KERNEL_INLINE const int8_t* add(Sums<rows, vectors>& sums, const uint8_t* const* x, int64_t groups, const int8_t* codes,
                                const uint8_t* narrow) {
  for (int64_t first = 0; first < groups; first += kSpan) {
    const int64_t end = std::min(first + kSpan, groups);
    if (narrow[first / kSpan]) {
      add_narrow<rows, vectors>(sums, x, first, codes);
      codes += 32 * vectors * kSpan;
    } else {
      for (int64_t g = first; g < end; ++g, codes += 32 * vectors) add_wide<rows, vectors>(sums, x, g, codes);
    }
  }
  return codes;
}

} // namespace qdiff
