// Convolutions and linears of unsigned by signed bytes: sums in 32 bits, written in a floating type.
//
//   y[p, o] = float(offset[o] + sum over taps t and channels c of x[p + t, c] * w[o, t, c]) * scale[o] + bias[o]
//
// offset[o] = -zero_point * sum of w[o], and what the registers' sums are short of, so that they are exact before they
// are scaled. Compiled once for each instruction set: QDIFF_REGISTERS is the header of its registers, QDIFF_NAME what
// its operators' names begin with. A block of some pixels by kLanes outputs stays in registers over all taps and
// channels; inputs are pixels of contiguous channels (NHWC), read where they lie. Inputs with a border, of other
// strides, or of channels that four does not divide are copied once, with the zero point around them, into memory that
// each calling thread keeps. Linears are 1x1 convolutions of one row of pixels. All that a layer keeps is one tensor of
// bytes, since small layers take no longer than their call: for each group codes [blocks, taps, channels / 4, kLanes,
// 4], outputs and channels filled up with zeros, and behind them offset (int32), scale and bias (float32), filled up
// likewise, then what the registers' sums want to know of channels.

#include <array>
#include <vector>

#include <torch/csrc/stable/library.h>

#include QDIFF_REGISTERS

namespace qdiff {
namespace {

constexpr int64_t kLanes = kWidth * kBlockVectors;
constexpr int64_t kChunk = 96; // pixels that one block of weights is kept for
static_assert(kChunk % kBlockRows == 0 && kChunk % kFewRows == 0);

// Codes [batch, channels, height, width]; distances in bytes.
struct Input {
  const uint8_t* data;
  int64_t batch, channels, height, width;
  int64_t by_image, by_channel, by_row, by_pixel;
};

struct Window {
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
};

// What the sums are made from: `taps` rows of `channels` bytes a pixel, at these distances from its first.
struct Source {
  const uint8_t* data;
  int64_t by_image, by_row, by_pixel; // from one pixel of the result to the next
  int64_t out_height, out_width;
  std::vector<int64_t> taps;
  int64_t channels;
  int64_t pixels;
};

struct Weight {
  const int8_t* codes;
  const int32_t* offset;
  const float* scale;
  const float* bias;
  const uint8_t* spans; // as span_bytes says
  int64_t outputs;
};

// kLanes outputs, from `first` on, of kBlock pixels. `rows` may name a pixel twice.
template <int kBlock>
KERNEL void block(const Source& source, const Weight& weight, const Target& target, int64_t first,
                  const uint8_t* const* rows, const int64_t* pixels) {
  Sums<kBlock, kBlockVectors> sums;
  start<kBlock, kBlockVectors>(sums, weight.offset + first);
  const int64_t groups = source.channels / 4;
  const int8_t* codes = weight.codes + first * 4 * groups * static_cast<int64_t>(source.taps.size());
  for (const int64_t tap : source.taps) {
    const uint8_t* row[kBlock];
#pragma GCC unroll 12
    for (int r = 0; r < kBlock; ++r) row[r] = rows[r] + tap;
    codes = add<kBlock, kBlockVectors>(sums, row, groups, codes, weight.spans);
  }
#pragma GCC unroll 2
  for (int v = 0; v < kBlockVectors; ++v) {
    const int64_t at = first + kWidth * v;
    if (at >= weight.outputs) break;
    const Kept kept = first_lanes(weight.outputs - at);
    const Floats scale = load(weight.scale + at), bias = load(weight.bias + at);
#pragma GCC unroll 12
    for (int r = 0; r < kBlock; ++r)
      store(target, pixels[r] * target.row + at, kept, scaled(sums[r][v], scale, bias));
  }
}

// All outputs of blocks [begin, end) of the chunk of pixels that starts at `start`.
template <int kBlock>
void chunk(const Source& source, const Weight& weight, const Target& target, int64_t start, int64_t begin,
           int64_t end) {
  std::array<const uint8_t*, kChunk> rows;
  std::array<int64_t, kChunk> pixels;
  const int64_t last = source.pixels - 1;
  const int64_t count = filled_up(std::min(kChunk, source.pixels - start), kBlock);
  int64_t x = start % source.out_width, y = start / source.out_width;
  int64_t image = y / source.out_height;
  y %= source.out_height;
  for (int64_t i = 0; i < count; ++i) {
    pixels[i] = std::min(start + i, last);
    rows[i] = source.data + image * source.by_image + y * source.by_row + x * source.by_pixel;
    if (start + i < last && ++x == source.out_width) {
      x = 0;
      if (++y == source.out_height) y = 0, ++image;
    }
  }
  for (int64_t b = begin; b < end; ++b)
    for (int64_t i = 0; i < count; i += kBlock)
      block<kBlock>(source, weight, target, b * kLanes, rows.data() + i, pixels.data() + i);
}

void run(const Source& source, const Weight& weight, const Target& target) {
  if (source.pixels == 0) return;
  const int64_t blocks = filled_up(weight.outputs, kLanes) / kLanes, chunks = filled_up(source.pixels, kChunk) / kChunk;
  const int64_t pixels = std::min(source.pixels, kChunk);
  const int64_t work = pixels * kLanes * source.channels * static_cast<int64_t>(source.taps.size());
  const auto part = source.pixels <= kFewRows ? chunk<kFewRows> : chunk<kBlockRows>;
  torch::stable::parallel_for(0, chunks * blocks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
                                while (begin < end) {
                                  const int64_t index = begin / blocks, first = begin % blocks;
                                  const int64_t stop = std::min(blocks, first + end - begin);
                                  part(source, weight, target, index * kChunk, first, stop);
                                  begin += stop - first;
                                }
                              });
}

// The input as [B, H + 2 * padding, W + 2 * padding, channels filled up to fours], the border filled with `fill`.
Input padded(const Input& input, int64_t pad_y, int64_t pad_x, uint8_t fill, std::vector<uint8_t>& to) {
  const int64_t channels = filled_up(input.channels, 4);
  const int64_t height = input.height + 2 * pad_y, width = input.width + 2 * pad_x, by_row = width * channels;
  const auto border = static_cast<size_t>(pad_x * channels);
  uint8_t* start = room_for(to, input.batch * height * by_row);
  const bool whole = input.by_channel == 1 && input.by_pixel == channels && input.channels == channels;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, by_row));
  torch::stable::parallel_for(
      0, input.batch * height, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          uint8_t* out = start + i * by_row;
          const int64_t y = i % height - pad_y;
          if (y < 0 || y >= input.height) {
            std::memset(out, fill, static_cast<size_t>(by_row));
            continue;
          }
          const uint8_t* in = input.data + i / height * input.by_image + y * input.by_row;
          std::memset(out, fill, border);
          out += border;
          if (whole) {
            std::memcpy(out, in, static_cast<size_t>(input.width * channels));
            out += input.width * channels;
          } else {
            for (int64_t p = 0; p < input.width; ++p, out += channels, in += input.by_pixel)
              for (int64_t c = 0; c < channels; ++c) out[c] = c < input.channels ? in[c * input.by_channel] : 0;
          }
          std::memset(out, fill, border);
        }
      });
  return {start, input.batch, channels, height, width, height * by_row, 1, by_row, channels};
}

// Of one group.
Weight weight_of(const int8_t* bytes, int64_t depth, int64_t outputs) {
  const int64_t filled = filled_up(outputs, kLanes);
  const auto* offset = reinterpret_cast<const int32_t*>(bytes + filled * depth);
  const auto* scale = reinterpret_cast<const float*>(offset + filled);
  const float* bias = scale + filled;
  return {bytes, offset, scale, bias, reinterpret_cast<const uint8_t*>(bias + filled), outputs};
}

// `y` is dense, channels last. Groups follow each other in it and in `packed`, and run one by one.
void convolve(const Input& x, const Window& window, uint8_t zero_point, int64_t groups, int64_t out_height,
              int64_t out_width, const Tensor& packed, int64_t outputs, const Tensor& y) {
  thread_local std::vector<uint8_t> copy;
  const int64_t own = outputs / groups, channels = filled_up(x.channels / groups, 4);
  const int64_t depth = window.kernel_y * window.kernel_x * channels;
  const int64_t bytes = filled_up(own, kLanes) * (depth + 12) + span_bytes(channels / 4);
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Char && packed.numel() == groups * bytes && packed.is_contiguous(),
      "weight: want ", groups * bytes, " packed bytes");
  Target target{static_cast<char*>(y.mutable_data_ptr()), outputs, y.scalar_type() == ScalarType::BFloat16};
  for (int64_t group = 0; group < groups; ++group, target.data += own * (target.bfloat16 ? 2 : 4)) {
    Input input = x;
    input.channels /= groups;
    input.data += group * input.channels * input.by_channel;
    if (window.pad_y || window.pad_x || input.by_channel != 1 || input.channels % 4)
      input = padded(input, window.pad_y, window.pad_x, zero_point, copy);
    Source source{input.data, input.by_image, input.by_row * window.stride_y, input.by_pixel * window.stride_x,
                  out_height, out_width, {}, input.channels, input.batch * out_height * out_width};
    for (int64_t i = 0; i < window.kernel_y; ++i)
      for (int64_t j = 0; j < window.kernel_x; ++j)
        source.taps.push_back(i * window.dilation_y * input.by_row + j * window.dilation_x * input.by_pixel);
    run(source, weight_of(static_cast<const int8_t*>(packed.const_data_ptr()) + group * bytes, depth, own), target);
  }
}

// geometry: outputs, then height and width of kernel, stride, padding and dilation, then groups.
Tensor conv2d(Tensor x, Tensor weight, int64_t zero_point, std::vector<int64_t> geometry, ScalarType dtype) {
  const uint8_t* codes = codes_of(x);
  STD_TORCH_CHECK(geometry.size() == 10, "geometry: want 10 integers");
  const int64_t* numbers = geometry.data();
  const int64_t outputs = numbers[0], groups = numbers[9];
  const Window window{numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7], numbers[8]};
  STD_TORCH_CHECK(*std::min_element(numbers, numbers + 5) > 0 && window.pad_y >= 0 && window.pad_x >= 0 &&
                      window.dilation_y > 0 && window.dilation_x > 0,
                  "geometry: want positive sizes");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0 && outputs % groups == 0, "geometry: want groups that divide");
  const int64_t span_y = window.dilation_y * (window.kernel_y - 1), span_x = window.dilation_x * (window.kernel_x - 1);
  const int64_t room_y = x.size(2) + 2 * window.pad_y - span_y - 1, room_x = x.size(3) + 2 * window.pad_x - span_x - 1;
  STD_TORCH_CHECK(room_y >= 0 && room_x >= 0, "x: the kernel is larger than the padded input");
  const int64_t out_height = room_y / window.stride_y + 1, out_width = room_x / window.stride_x + 1;
  const int64_t sizes[] = {x.size(0), outputs, out_height, out_width};
  const int64_t strides[] = {outputs * out_height * out_width, 1, outputs * out_width, outputs};
  Tensor y = empty(sizes, strides, 4, dtype);
  const Input input{codes, x.size(0), x.size(1), x.size(2), x.size(3),
                    x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  convolve(input, window, static_cast<uint8_t>(zero_point), groups, out_height, out_width, weight, outputs, y);
  return y;
}

Tensor linear(Tensor x, Tensor weight, int64_t outputs, ScalarType dtype) {
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const uint8_t* codes = codes_of(x);
  const int64_t dimensions = x.dim(), channels = x.size(dimensions - 1);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size(), 1);
  sizes.back() = outputs;
  for (int64_t i = dimensions - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes[i + 1]);
  Tensor y = empty(sizes.data(), strides.data(), dimensions, dtype);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dimensions; ++i) rows *= sizes[i];
  const Input input{codes, 1, channels, 1, rows, 0, 1, 0, channels};
  convolve(input, {1, 1, 1, 1, 0, 0, 1, 1}, 0, 1, 1, rows, weight, outputs, y);
  return y;
}

} // namespace
} // namespace qdiff

STABLE_TORCH_LIBRARY_FRAGMENT(qdiff, library) {
  library.def(QDIFF_NAME "_conv2d(Tensor x, Tensor weight, int x_zero_point, int[] geometry, ScalarType output_dtype) "
                         "-> Tensor");
  library.def(QDIFF_NAME "_linear(Tensor x, Tensor weight, int outputs, ScalarType output_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qdiff, CPU, library) {
  library.impl(QDIFF_NAME "_conv2d", TORCH_BOX(&qdiff::conv2d));
  library.impl(QDIFF_NAME "_linear", TORCH_BOX(&qdiff::linear));
}
