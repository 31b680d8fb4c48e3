// What convolutions, linears and attention of unsigned by signed bytes share: sums in registers, how they are written.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// Per function, not by the compiler's options: with those gcc 12 keeps the sums in memory (200 instead of 440 GOPS).
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define VNNI_INLINE [[gnu::always_inline]] VNNI inline

namespace qdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = int64_t{1} << 20; // multiplications that are worth a thread

// The first `count` elements of memory that is kept, and grown where it is too small. Their values are old ones.
template <typename Element>
Element* room_for(std::vector<Element>& memory, int64_t count) {
  if (memory.size() < static_cast<size_t>(count)) memory.resize(static_cast<size_t>(count));
  return memory.data();
}

inline int64_t filled_up(int64_t count, int64_t whole) { return (count + whole - 1) / whole * whole; }

// Whether results are rounded by the CPU's instruction.
inline bool has_bfloat16 = __builtin_cpu_supports("avx512bf16");

VNNI_INLINE __m256i round_to_bfloat16(__m512 value) {
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
inline __mmask16 first_lanes(int64_t left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

// A dense result of floats in one of two types.
struct Target {
  char* data;
  int64_t row; // elements from one row of results to the next
  bool bfloat16;

  [[gnu::always_inline]] VNNI void store(int64_t element, __mmask16 kept, __m512 value) const {
    if (bfloat16) {
      _mm256_mask_storeu_epi16(data + 2 * element, kept, round_to_bfloat16(value));
    } else {
      _mm512_mask_storeu_ps(data + 4 * element, kept, value);
    }
  }
};

// Sums of kRows rows by 16 * kVectors lanes, in 32 bits. They fill 24 of the 32 registers at most.
template <int kRows, int kVectors>
using Sums = __m512i[kRows][kVectors];

// The same numbers for every row, zeros for none.
template <int kRows, int kVectors>
VNNI_INLINE void start(Sums<kRows, kVectors>& sums, const int32_t* from) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const __m512i lanes = from == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(from + 16 * v);
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) sums[r][v] = lanes;
  }
}

// Adds `groups` products of four: rows of unsigned bytes by signed `codes` [groups, 16 * kVectors, 4]. Returns the end.
template <int kRows, int kVectors>
VNNI_INLINE const int8_t* add(Sums<kRows, kVectors>& sums, const uint8_t* const* rows, int64_t groups,
                              const int8_t* codes) {
  for (int64_t g = 0; g < groups; ++g, codes += 64 * kVectors) {
    __m512i lanes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) lanes[v] = _mm512_loadu_si512(codes + 64 * v);
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      std::memcpy(&four, rows[r] + 4 * g, sizeof four);
      const __m512i x = _mm512_set1_epi32(four);
      // Not the intrinsic: with it gcc 12 keeps the sums in memory (240 instead of 440 GOPS).
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][v]) : "v"(x), "v"(lanes[v]));
    }
  }
  return codes;
}

inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dimensions, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "output: want bfloat16 or float32");
  AtenTensorHandle handle;
  const int32_t code = dtype == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline const uint8_t* codes_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte, "want uint8 codes");
  return static_cast<const uint8_t*>(x.const_data_ptr());
}

} // namespace qdiff
