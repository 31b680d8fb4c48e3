// What convolutions, linears and attention of unsigned by signed bytes share on every instruction set.

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

// A dense result of floats in one of two types.
struct Target {
  char* data;
  int64_t row; // elements from one row of results to the next
  bool bfloat16;
};

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
