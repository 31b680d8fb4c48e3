// Convolutions and linears of unsigned by signed bytes with AVX512-VNNI: sums in 32 bits, written in a floating type.
//
//   y[p, o] = float(offset[o] + sum over taps t and channels c of x[p + t, c] * w[o, t, c]) * scale[o] + bias[o]
//
// offset[o] = -zero_point * sum of w[o], so that the sums are exact before they are scaled. A block of kRows pixels by
// kLanes outputs stays in registers over all taps and channels; inputs are pixels of contiguous channels (NHWC), read
// where they lie. Padded inputs are copied once, with the zero point around them. Linears are 1x1 convolutions of one
// row of pixels. All that a layer keeps is one tensor of bytes, since small layers take no longer than their call: codes
// [blocks, taps, channels / 4, kLanes, 4], blocks of kLanes outputs, the last one filled up with zeros, and behind them
// offset (int32), scale and bias (float32), filled up likewise.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRows = 12;
constexpr int64_t kVectors = 2;
constexpr int64_t kLanes = 16 * kVectors;
constexpr int64_t kChunk = 8 * kRows;        // pixels that one block of weights is kept for
constexpr int64_t kGrain = int64_t{1} << 20; // multiplications that are worth a thread

// What the sums are made from: `taps` rows of `channels` bytes a pixel, at these distances from its first.
struct Source {
  const uint8_t* data;
  int64_t image, row, pixel; // bytes from one to the next
  int64_t out_height, out_width, stride_y, stride_x;
  std::vector<int64_t> taps;
  int64_t channels;
  int64_t pixels;
};

struct Weight {
  const int8_t* codes;
  const int32_t* offset;
  const float* scale;
  const float* bias;
  int64_t outputs;
};

struct Target {
  char* data;
  bool bfloat16;
};

const bool kBfloat16 = __builtin_cpu_supports("avx512bf16");

VNNI inline __m256i round_to_bfloat16(__m512 value) {
  if (kBfloat16) {
    __m256i result;
    asm("vcvtneps2bf16 %1, %0" : "=v"(result) : "v"(value));
    return result;
  }
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// kLanes outputs, from `first` on, of kRows pixels. `rows` may name a pixel twice.
VNNI void block(const Source& source, const Weight& weight, const Target& target, int64_t first,
                const uint8_t* const* rows, const int64_t* pixels) {
  __m512i sums[kRows][kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const __m512i start = _mm512_loadu_si512(weight.offset + first + 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sums[r][v] = start;
  }
  const int64_t groups = source.channels / 4;
  const int8_t* codes = weight.codes + first * 4 * groups * static_cast<int64_t>(source.taps.size());
  for (const int64_t tap : source.taps) {
    const uint8_t* row[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) row[r] = rows[r] + tap;
    for (int64_t g = 0; g < groups; ++g, codes += 4 * kLanes) {
      __m512i lanes[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) lanes[v] = _mm512_loadu_si512(codes + 64 * v);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, row[r] + 4 * g, sizeof four);
        const __m512i x = _mm512_set1_epi32(four);
        // Not the intrinsic: with it gcc 12 keeps the sums in memory (240 instead of 440 GOPS).
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][v]) : "v"(x), "v"(lanes[v]));
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + 16 * v, left = weight.outputs - at;
    if (left <= 0) break;
    const __mmask16 kept = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 scale = _mm512_loadu_ps(weight.scale + at), bias = _mm512_loadu_ps(weight.bias + at);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), scale, bias);
      const int64_t element = pixels[r] * weight.outputs + at;
      if (target.bfloat16) {
        _mm256_mask_storeu_epi16(target.data + 2 * element, kept, round_to_bfloat16(value));
      } else {
        _mm512_mask_storeu_ps(target.data + 4 * element, kept, value);
      }
    }
  }
}

// All outputs of blocks [begin, end) of the chunk of pixels that starts at `start`.
void chunk(const Source& source, const Weight& weight, const Target& target, int64_t start, int64_t begin,
           int64_t end) {
  std::array<const uint8_t*, kChunk> rows;
  std::array<int64_t, kChunk> pixels;
  const int64_t last = source.pixels - 1;
  const int64_t count = (std::min(kChunk, source.pixels - start) + kRows - 1) / kRows * kRows;
  int64_t x = start % source.out_width, y = start / source.out_width;
  int64_t image = y / source.out_height;
  y %= source.out_height;
  for (int64_t i = 0; i < count; ++i) {
    pixels[i] = std::min(start + i, last);
    rows[i] = source.data + image * source.image + y * source.stride_y * source.row + x * source.stride_x * source.pixel;
    if (start + i < last && ++x == source.out_width) {
      x = 0;
      if (++y == source.out_height) y = 0, ++image;
    }
  }
  for (int64_t b = begin; b < end; ++b)
    for (int64_t i = 0; i < count; i += kRows)
      block(source, weight, target, b * kLanes, rows.data() + i, pixels.data() + i);
}

void run(const Source& source, const Weight& weight, const Target& target) {
  if (source.pixels == 0) return;
  const int64_t blocks = (weight.outputs + kLanes - 1) / kLanes;
  const int64_t chunks = (source.pixels + kChunk - 1) / kChunk;
  const int64_t work = kChunk * kLanes * source.channels * static_cast<int64_t>(source.taps.size());
  torch::stable::parallel_for(0, chunks * blocks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
                                while (begin < end) {
                                  const int64_t index = begin / blocks, first = begin % blocks;
                                  const int64_t stop = std::min(blocks, first + end - begin);
                                  chunk(source, weight, target, index * kChunk, first, stop);
                                  begin += stop - first;
                                }
                              });
}

// `x` [B, C, H, W] of any strides as bytes [B, H + 2 * padding, W + 2 * padding, C], the border filled with `fill`.
void pad(const Tensor& x, int64_t pad_y, int64_t pad_x, uint8_t fill, std::vector<uint8_t>& to) {
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t rows = height + 2 * pad_y, row_bytes = (width + 2 * pad_x) * channels;
  to.resize(static_cast<size_t>(batch * rows * row_bytes));
  const auto* from = static_cast<const uint8_t*>(x.const_data_ptr());
  const int64_t by_image = x.stride(0), by_channel = x.stride(1), by_row = x.stride(2), by_pixel = x.stride(3);
  torch::stable::parallel_for(0, batch * rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_bytes)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* out = to.data() + i * row_bytes;
      const int64_t y = i % rows - pad_y;
      if (y < 0 || y >= height) {
        std::memset(out, fill, static_cast<size_t>(row_bytes));
        continue;
      }
      const uint8_t* in = from + i / rows * by_image + y * by_row;
      std::memset(out, fill, static_cast<size_t>(pad_x * channels));
      out += pad_x * channels;
      if (by_channel == 1 && by_pixel == channels) {
        std::memcpy(out, in, static_cast<size_t>(width * channels));
      } else {
        for (int64_t p = 0; p < width; ++p)
          for (int64_t c = 0; c < channels; ++c) out[p * channels + c] = in[p * by_pixel + c * by_channel];
      }
      std::memset(out + width * channels, fill, static_cast<size_t>(pad_x * channels));
    }
  });
}

Weight weight_of(const Tensor& packed, int64_t taps, int64_t channels, int64_t outputs) {
  const int64_t filled = (outputs + kLanes - 1) / kLanes * kLanes, codes = filled * taps * channels;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Char && packed.numel() == codes + 12 * filled,
                  "weight: want ", codes + 12 * filled, " packed bytes");
  const auto* bytes = static_cast<const int8_t*>(packed.const_data_ptr());
  const auto* offset = reinterpret_cast<const int32_t*>(bytes + codes);
  const auto* scale = reinterpret_cast<const float*>(offset + filled);
  return {bytes, offset, scale, scale + filled, outputs};
}

Target target_of(const Tensor& y) {
  return {static_cast<char*>(y.mutable_data_ptr()), y.scalar_type() == ScalarType::BFloat16};
}

void check_input(const Tensor& x, int64_t channels, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte, "x: want uint8 codes");
  STD_TORCH_CHECK(channels % 4 == 0, "x: want a multiple of 4 channels, got ", channels);
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "output: want bfloat16 or float32");
}

Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dimensions, ScalarType dtype) {
  AtenTensorHandle handle;
  const int32_t code = dtype == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// geometry: outputs, then height and width of kernel, stride, padding and dilation.
Tensor conv2d(Tensor x, Tensor weight, int64_t zero_point, std::vector<int64_t> geometry, ScalarType dtype) {
  const int64_t channels = x.size(1);
  check_input(x, channels, dtype);
  STD_TORCH_CHECK(geometry.size() == 9, "geometry: want 9 integers");
  const auto [outputs, kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x] =
      *reinterpret_cast<const std::array<int64_t, 9>*>(geometry.data());
  const int64_t height = x.size(2) + 2 * pad_y, width = x.size(3) + 2 * pad_x;
  const int64_t out_height = (height - dilation_y * (kernel_y - 1) - 1) / stride_y + 1;
  const int64_t out_width = (width - dilation_x * (kernel_x - 1) - 1) / stride_x + 1;
  const int64_t sizes[] = {x.size(0), outputs, out_height, out_width};
  const int64_t strides[] = {outputs * out_height * out_width, 1, outputs * out_width, outputs};
  Tensor y = empty(sizes, strides, 4, dtype);
  Source source{static_cast<const uint8_t*>(x.const_data_ptr()), x.stride(0), x.stride(2), x.stride(3),
                out_height, out_width, stride_y, stride_x, {}, channels, x.size(0) * out_height * out_width};
  thread_local std::vector<uint8_t> padded;
  if (pad_y || pad_x || x.stride(1) != 1) {
    pad(x, pad_y, pad_x, static_cast<uint8_t>(zero_point), padded);
    source.data = padded.data();
    source.pixel = channels;
    source.row = width * channels;
    source.image = height * source.row;
  }
  for (int64_t i = 0; i < kernel_y; ++i)
    for (int64_t j = 0; j < kernel_x; ++j)
      source.taps.push_back(i * dilation_y * source.row + j * dilation_x * source.pixel);
  run(source, weight_of(weight, kernel_y * kernel_x, channels, outputs), target_of(y));
  return y;
}

Tensor linear(Tensor x, Tensor weight, int64_t outputs, ScalarType dtype) {
  const int64_t dimensions = x.dim(), channels = x.size(dimensions - 1);
  check_input(x, channels, dtype);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size(), 1);
  sizes.back() = outputs;
  for (int64_t i = dimensions - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes[i + 1]);
  Tensor y = empty(sizes.data(), strides.data(), dimensions, dtype);
  const int64_t rows = channels == 0 ? 0 : x.numel() / channels;
  const Source source{static_cast<const uint8_t*>(x.const_data_ptr()), 0, 0, channels, 1, std::max<int64_t>(1, rows), 1, 1,
                      {0}, channels, rows};
  run(source, weight_of(weight, 1, channels, outputs), target_of(y));
  return y;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qdiff, library) {
  library.def(
      "vnni_conv2d(Tensor x, Tensor weight, int x_zero_point, int[] geometry, ScalarType output_dtype) -> Tensor");
  library.def("vnni_linear(Tensor x, Tensor weight, int outputs, ScalarType output_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qdiff, CPU, library) {
  library.impl("vnni_conv2d", TORCH_BOX(&conv2d));
  library.impl("vnni_linear", TORCH_BOX(&linear));
}
