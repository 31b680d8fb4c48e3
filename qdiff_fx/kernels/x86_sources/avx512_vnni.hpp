// Registers of AVX512-VNNI: sums of unsigned by signed bytes in 32 bits, how they are scaled and written.

#pragma once

#include "kernels.hpp"

// Per function, not by the compiler's options: with those gcc 12 keeps the sums in memory (200 instead of 440 GOPS).
#define KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define KERNEL_INLINE [[gnu::always_inline]] KERNEL inline

namespace qdiff {

using Floats = __m512;
using Kept = __mmask16;          // lanes that are written
constexpr int kWidth = 16;       // lanes of a register
constexpr int kBlockVectors = 2; // registers of outputs that a layer sums together
constexpr int kBlockRows = 12;   // pixels of them: sums fill 24 of 32 registers
constexpr int kFewRows = 4;      // of a layer that has no more pixels

// Whether results are rounded by the CPU's instruction.
inline bool has_bfloat16 = __builtin_cpu_supports("avx512bf16");

// The tests try the other way as well.
extern "C" [[gnu::used, gnu::visibility("default")]] inline void qdiff_use_bfloat16_instruction(bool used) {
  has_bfloat16 = used && __builtin_cpu_supports("avx512bf16");
}

KERNEL_INLINE __m256i round_to_bfloat16(__m512 value) {
  if (has_bfloat16) {
    __m256i result;
    asm("vcvtneps2bf16 %1, %0" : "=v"(result) : "v"(value));
    return result;
  }
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// The first `left` of 16 lanes.
inline Kept first_lanes(int64_t left) { return left >= 16 ? 0xffff : static_cast<Kept>((1u << left) - 1); }

KERNEL_INLINE void store(const Target& target, int64_t element, Kept kept, Floats value) {
  if (target.bfloat16) {
    _mm256_mask_storeu_epi16(target.data + 2 * element, kept, round_to_bfloat16(value));
  } else {
    _mm512_mask_storeu_ps(target.data + 4 * element, kept, value);
  }
}

KERNEL_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }

// Rounded twice, as the reference does: results have its bits.
KERNEL_INLINE Floats scaled(__m512i sums, Floats scale, Floats bias) {
  return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale), bias);
}

// Sums of some rows by some registers, in 32 bits. They fill 24 of the 32 registers at most.
template <int rows, int vectors>
using Sums = __m512i[rows][vectors];

// The same numbers for every row, zeros for none.
template <int rows, int vectors>
KERNEL_INLINE void start(Sums<rows, vectors>& sums, const int32_t* from) {
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const __m512i lanes = from == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(from + 16 * v);
#pragma GCC unroll 24
    for (int r = 0; r < rows; ++r) sums[r][v] = lanes;
  }
}

// Bytes that a layer has behind its bias: none, 32 bits hold every sum.
inline int64_t span_bytes(int64_t) { return 0; }

// Adds `groups` products of four: unsigned bytes `x` of each row by signed `codes` [groups, 16 * vectors, 4]. Returns
// the codes' end.
template <int rows, int vectors>
KERNEL_INLINE const int8_t* add(Sums<rows, vectors>& sums, const uint8_t* const* x, int64_t groups,
                                const int8_t* codes, const uint8_t* = nullptr) {
  for (int64_t g = 0; g < groups; ++g, codes += 64 * vectors) {
    __m512i lanes[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) lanes[v] = _mm512_loadu_si512(codes + 64 * v);
#pragma GCC unroll 24
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      std::memcpy(&four, x[r] + 4 * g, sizeof four);
      const __m512i copies = _mm512_set1_epi32(four);
      // Not the intrinsic: with it gcc 12 keeps the sums in memory (240 instead of 440 GOPS).
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][v]) : "v"(copies), "v"(lanes[v]));
    }
  }
  return codes;
}

} // namespace qdiff
