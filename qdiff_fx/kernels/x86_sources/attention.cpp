// Attention on bytes with AVX512-VNNI: softmax(scale * (q - z_q) (k - z_k)^T) (v - z_v) * s_v, in a floating type.
//
// Keys stand where a linear's outputs stand (layers.cpp) and are packed likewise, then values, keys as their
// channels. Terms that are one number for all keys of a row fall out of the softmax: z_k is not needed. Of kQueries
// rows the scores of all keys are summed first; then their powers e[s] = qmax * 2^(c * (score[s] - max)), c = scale *
// log2(e), become bytes p[s] = round(e[s]). That is a grid of the row's own: many keys alike keep what a grid of
// 1 / qmax would round to zero. What rounding takes from a row's sum goes to the mean of all values, m, so that a long
// flat tail behind one large probability is not lost either:
//
//   y = ((sum of p[s] v[s] + (sum of e[s] - sum of p[s]) * m) / sum of e[s] - z_v) * s_v
//
// Probabilities of more than 8 bits are two planes of bytes, the high ones and the low ones.

#include <array>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "avx512_vnni.hpp"

namespace qdiff {
namespace {

constexpr int kKeyVectors = 2;
constexpr int kKeyLanes = 16 * kKeyVectors;
constexpr int kScoreRows = 12;
constexpr int kQueries = 24; // of a tile; rows of every shape of sums divide it
constexpr int kMostVectors = 3;
constexpr int64_t kLine = 64; // bytes of a cache line
constexpr double kMostScale = 1e20; // with which exponents of any scores are finite
constexpr int64_t kMostKeys = 65536, kMostSize = 32768; // for which sums of any codes stay within 32 bits

// Codes [batch, heads, length, size]; distances in bytes, elements of a row being neighbours.
struct Operand {
  const uint8_t* data;
  int64_t length, size;
  int64_t by_batch, by_head, by_row;

  const uint8_t* head(int64_t batch, int64_t head) const { return data + batch * by_batch + head * by_head; }
};

// Vectors of outputs that are summed together, and the rows that leave room for them.
constexpr int rows_of(int vectors) { return kQueries / vectors; }

int vectors_of(int64_t left) {
  const int64_t vectors = (left + 15) / 16;
  return static_cast<int>(vectors == 4 ? 2 : std::min<int64_t>(vectors, kMostVectors));
}

// A head's keys and values as the sums read them.
struct Packed {
  int8_t* keys;    // [blocks, size / 4, kKeyLanes, 4]
  int32_t* offset; // of a score: -z_q * sum of the key's codes
  float* mean;     // of the values over all keys
  int8_t* values;  // for each part of the values' size [length / 4, its lanes, 4]
};

// Where a head's keys and values lie, each part and each head at a whole cache line.
struct Layout {
  int64_t keys, values, offset_at, mean_at, values_at, bytes;

  Layout(int64_t length, int64_t size, int64_t value_size)
      : keys(filled_up(length, kKeyLanes)), values(filled_up(value_size, 16)),
        offset_at(filled_up(keys * filled_up(size, 4), kLine)), mean_at(offset_at + filled_up(4 * keys, kLine)),
        values_at(mean_at + 4 * values), bytes(filled_up(values_at + filled_up(length, 4) * values, kLine)) {}

  Packed at(int8_t* start) const {
    return {start, reinterpret_cast<int32_t*>(start + offset_at), reinterpret_cast<float*>(start + mean_at),
            start + values_at};
  }
};

// Bytes in all of `size` unsigned ones.
int32_t sum_of(const uint8_t* bytes, int64_t size) {
  __m128i sums = _mm_setzero_si128();
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    sums = _mm_add_epi64(sums, _mm_sad_epu8(sixteen, _mm_setzero_si128()));
  }
  auto sum = static_cast<int32_t>(_mm_cvtsi128_si64(sums) + _mm_cvtsi128_si64(_mm_unpackhi_epi64(sums, sums)));
  for (; i < size; ++i) sum += bytes[i];
  return sum;
}

// Keys [rows, size] as signed bytes, and what the queries' zero point adds to each key's scores.
void pack_keys(const uint8_t* keys, const Operand& key, int32_t query_zero_point, const Packed& to) {
  const int64_t whole = key.size / 4, groups = filled_up(key.size, 4) / 4, filled = filled_up(key.length, kKeyLanes);
  std::memset(to.keys, 0, static_cast<size_t>(filled * groups * 4));
  std::memset(to.offset, 0, static_cast<size_t>(4 * filled));
  for (int64_t i = 0; i < key.length; ++i) {
    const uint8_t* row = keys + i * key.by_row;
    int8_t* out = to.keys + (i / kKeyLanes * groups * kKeyLanes + i % kKeyLanes) * 4;
    to.offset[i] = -query_zero_point * (sum_of(row, key.size) - 128 * static_cast<int32_t>(key.size));
    for (int64_t g = 0; g < whole; ++g) {
      uint32_t four;
      std::memcpy(&four, row + 4 * g, 4);
      four ^= 0x80808080; // from codes to codes - 128
      std::memcpy(out + 4 * kKeyLanes * g, &four, 4);
    }
    for (int64_t c = 4 * whole; c < key.size; ++c)
      out[4 * kKeyLanes * whole + c % 4] = static_cast<int8_t>(row[c] ^ 0x80);
  }
}

// Values [rows, size] as signed bytes, four rows side by side, and their mean over the rows.
KERNEL void pack_values(const uint8_t* values, const Operand& value, const Packed& packed) {
  const __m128i sign = _mm_set1_epi8(-128);
  const int64_t groups = filled_up(value.length, 4) / 4;
  int8_t* to = packed.values;
  for (int64_t first = 0; first < value.size;) {
    const int vectors = vectors_of(value.size - first);
    __m512i sums[kMostVectors] = {};
    for (int64_t g = 0; g < groups; ++g) {
      for (int v = 0; v < vectors; ++v, to += 64) {
        const int64_t at = first + 16 * v;
        const __mmask16 kept = first_lanes(value.size - at);
        __m128i rows[4];
        for (int64_t r = 0; r < 4; ++r) {
          const int64_t key = 4 * g + r;
          const uint8_t* row = values + key * value.by_row + at;
          rows[r] = _mm_xor_si128(sign, key < value.length ? _mm_mask_loadu_epi8(sign, kept, row) : sign);
          sums[v] = _mm512_add_epi32(sums[v], _mm512_cvtepi8_epi32(rows[r]));
        }
        const __m128i low01 = _mm_unpacklo_epi8(rows[0], rows[1]), low23 = _mm_unpacklo_epi8(rows[2], rows[3]);
        const __m128i high01 = _mm_unpackhi_epi8(rows[0], rows[1]), high23 = _mm_unpackhi_epi8(rows[2], rows[3]);
        auto* out = reinterpret_cast<__m128i*>(to);
        _mm_storeu_si128(out, _mm_unpacklo_epi16(low01, low23));
        _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low01, low23));
        _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high01, high23));
        _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high01, high23));
      }
    }
    const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(value.length));
    for (int v = 0; v < vectors; ++v)
      _mm512_storeu_ps(packed.mean + first + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), share));
    first += 16 * vectors;
  }
}

// What a thread works in: a tile's queries, scores and probabilities.
struct Scratch {
  std::vector<uint8_t> queries, probabilities;
  std::vector<int32_t> scores;
};

// scores [rows, keys] of the queries [rows, groups * 4], both filled up to whole blocks of rows.
KERNEL void score(const uint8_t* queries, int64_t count, int64_t groups, const Packed& packed, int64_t keys,
                  int32_t* scores) {
  for (int64_t first = 0; first < keys; first += kKeyLanes) {
    for (int row = 0; row < count; row += kScoreRows) {
      const uint8_t* rows[kScoreRows];
#pragma GCC unroll 12
      for (int r = 0; r < kScoreRows; ++r) rows[r] = queries + (row + r) * 4 * groups;
      Sums<kScoreRows, kKeyVectors> sums;
      start<kScoreRows, kKeyVectors>(sums, packed.offset + first);
      add<kScoreRows, kKeyVectors>(sums, rows, groups, packed.keys + first * 4 * groups);
#pragma GCC unroll 12
      for (int r = 0; r < kScoreRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kKeyVectors; ++v)
          _mm512_storeu_si512(scores + (row + r) * keys + first + 16 * v, sums[r][v]);
    }
  }
}

struct Totals {
  float powers, rounded;
};

// probabilities[s] = round(qmax * 2^(factor * (scores[s] - max))) of one row, zeros behind the last; their sums. Of two
// planes the high bytes come first, the low ones `by_plane` behind them.
template <int kPlanes>
KERNEL Totals exponentiate(const int32_t* scores, int64_t length, float factor, float qmax, uint8_t* probabilities,
                           int64_t by_plane) {
  const int64_t whole = length / 16 * 16;
  const __mmask16 rest = first_lanes(length - whole);
  __m512i largest = _mm512_set1_epi32(std::numeric_limits<int32_t>::min());
  for (int64_t i = 0; i < whole; i += 16) largest = _mm512_max_epi32(largest, _mm512_loadu_si512(scores + i));
  largest = _mm512_mask_max_epi32(largest, rest, largest, _mm512_maskz_loadu_epi32(rest, scores + whole));
  largest = _mm512_set1_epi32(_mm512_reduce_max_epi32(largest));
  const __m512 scale = _mm512_set1_ps(factor);
  // qmax * 2^r for |r| <= 1/2, to 2.6e-6 of itself: the quartic of least greatest relative error.
  const __m512 c0 = _mm512_set1_ps(qmax * 0.99999926f), c1 = _mm512_set1_ps(qmax * 0.69312181f);
  const __m512 c2 = _mm512_set1_ps(qmax * 0.24024745f), c3 = _mm512_set1_ps(qmax * 0.05591786f);
  const __m512 c4 = _mm512_set1_ps(qmax * 0.00957010f);
  __m512i rounded = _mm512_setzero_si512();
  __m512 powers = _mm512_setzero_ps();
  for (int64_t i = 0; i < length; i += 16) {
    const __m512i below = _mm512_sub_epi32(_mm512_loadu_si512(scores + i), largest);
    const __m512 exponent = _mm512_mul_ps(_mm512_cvtepi32_ps(below), scale);
    const __m512 integer = _mm512_roundscale_ps(exponent, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(exponent, integer);
    const __m512 cubic = _mm512_fmadd_ps(_mm512_fmadd_ps(_mm512_fmadd_ps(c4, r, c3), r, c2), r, c1);
    __m512 power = _mm512_scalef_ps(_mm512_fmadd_ps(cubic, r, c0), integer);
    if (i == whole) power = _mm512_maskz_mov_ps(rest, power);
    const __m512i code = _mm512_cvtps_epi32(power);
    powers = _mm512_add_ps(powers, power);
    rounded = _mm512_add_epi32(rounded, code);
    auto* out = reinterpret_cast<__m128i*>(probabilities + i);
    if constexpr (kPlanes == 2) {
      _mm_storeu_si128(out, _mm512_cvtepi32_epi8(_mm512_srli_epi32(code, 8)));
      out = reinterpret_cast<__m128i*>(probabilities + by_plane + i);
    }
    _mm_storeu_si128(out, _mm512_cvtepi32_epi8(code));
  }
  return {_mm512_reduce_add_ps(powers), _mm512_reduce_add_ps(_mm512_cvtepi32_ps(rounded))};
}

struct Output {
  Target target;
  int64_t queries; // rows that there are
  float value_scale, value_zero_point;
};

// 16 * kVectors outputs of a tile; the first of its first row is `element` of the result, `left` are there.
template <int kVectors, int kPlanes>
KERNEL void average(const uint8_t* probabilities, int64_t by_row, const Totals* totals, int64_t groups,
                    const int8_t* values, const float* mean, const Output& output, int64_t element, int64_t left) {
  constexpr int kRows = rows_of(kVectors);
  for (int row = 0; row < output.queries; row += kRows) {
    Sums<kRows, kVectors> planes[kPlanes];
#pragma GCC unroll 2
    for (int plane = 0; plane < kPlanes; ++plane) {
      const uint8_t* rows[kRows];
#pragma GCC unroll 24
      for (int r = 0; r < kRows; ++r) rows[r] = probabilities + (plane * kQueries + row + r) * by_row;
      start<kRows, kVectors>(planes[plane], nullptr);
      add<kRows, kVectors>(planes[plane], rows, groups, values);
    }
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= output.queries) break;
      const Totals total = totals[row + r];
      const float scale = output.value_scale / total.powers;
      const __m512 share = _mm512_set1_ps(scale), lost = _mm512_set1_ps(scale * (total.powers - total.rounded));
      const __m512 zero = _mm512_set1_ps(-output.value_scale * output.value_zero_point);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        if (left <= 16 * v) break;
        __m512 sum = _mm512_cvtepi32_ps(planes[0][r][v]);
        if constexpr (kPlanes == 2)
          sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(planes[1][r][v]));
        const __m512 rest = _mm512_fmadd_ps(_mm512_loadu_ps(mean + 16 * v), lost, zero);
        const __m512 value = _mm512_fmadd_ps(sum, share, rest);
        store(output.target, element + (row + r) * output.target.row + 16 * v, first_lanes(left - 16 * v), value);
      }
    }
  }
}

struct Numbers {
  float factor, qmax, value_scale, value_zero_point;
};

// Up to kQueries rows of a head's output, the first of them at `element` of the result.
template <int kPlanes>
void attend(const uint8_t* queries, int64_t count, const Operand& query, const Operand& value, const Packed& packed,
            const Numbers& numbers, const Target& target, int64_t element, Scratch& scratch) {
  const int64_t groups = filled_up(query.size, 4) / 4, length = value.length, keys = filled_up(length, kKeyLanes);
  uint8_t* rows = room_for(scratch.queries, kQueries * groups * 4);
  int32_t* scores = room_for(scratch.scores, kQueries * keys);
  uint8_t* probabilities = room_for(scratch.probabilities, kPlanes * kQueries * keys);
  for (int64_t i = 0; i < kQueries; ++i)
    std::memcpy(rows + i * groups * 4, queries + std::min(i, count - 1) * query.by_row,
                static_cast<size_t>(query.size));
  score(rows, count, groups, packed, keys, scores);
  std::array<Totals, kQueries> totals;
  for (int64_t i = 0; i < count; ++i)
    totals[i] = exponentiate<kPlanes>(scores + i * keys, length, numbers.factor, numbers.qmax, probabilities + i * keys,
                                      kQueries * keys);
  const Output output{target, count, numbers.value_scale, numbers.value_zero_point};
  const int8_t* values = packed.values;
  for (int64_t first = 0; first < value.size;) {
    const int vectors = vectors_of(value.size - first);
    const auto part = vectors == 3 ? average<3, kPlanes> : vectors == 2 ? average<2, kPlanes> : average<1, kPlanes>;
    part(probabilities, keys, totals.data(), filled_up(length, 4) / 4, values, packed.mean + first, output,
         element + first, value.size - first);
    values += 16 * vectors * filled_up(length, 4);
    first += 16 * vectors;
  }
}

// x as [batch, heads, length, size]; `kept` is what the operand's data lives in.
Operand operand(const Tensor& x, Tensor& kept) {
  const int64_t rank = x.dim();
  STD_TORCH_CHECK(rank == 3 || rank == 4, "want [heads, length, size] or [batch, heads, length, size]");
  kept = x.size(rank - 1) > 1 && x.stride(rank - 1) != 1 ? torch::stable::contiguous(x) : x;
  return {codes_of(kept), kept.size(rank - 2), kept.size(rank - 1), rank == 4 ? kept.stride(0) : 0,
          kept.stride(rank - 3), kept.stride(rank - 2)};
}

// The result of a batch lies as [batch, length, heads, size] in memory: the layer behind it reads rows of all heads.
Tensor attention(Tensor q, Tensor k, Tensor v, double score_scale, double value_scale, std::vector<int64_t> zero_points,
                 int64_t qmax, ScalarType dtype) {
  Tensor kept[3];
  const Operand query = operand(q, kept[0]), key = operand(k, kept[1]), value = operand(v, kept[2]);
  const int64_t rank = q.dim(), batch = rank == 4 ? q.size(0) : 1, heads = q.size(rank - 3);
  STD_TORCH_CHECK(k.dim() == rank && v.dim() == rank && query.size == key.size && key.length == value.length,
                  "want q [..., L, E], k [..., S, E] and v [..., S, D]");
  for (int64_t i = 0; i + 2 < rank; ++i)
    STD_TORCH_CHECK(k.size(i) == q.size(i) && v.size(i) == q.size(i), "want q, k and v of the same batch and heads");
  STD_TORCH_CHECK(0 < key.length && key.length <= kMostKeys, "want 1 to ", kMostKeys, " keys");
  STD_TORCH_CHECK(key.size <= kMostSize, "want a head size of at most ", kMostSize);
  STD_TORCH_CHECK(0 <= score_scale && score_scale <= kMostScale, "score scale: want 0 to ", kMostScale);
  STD_TORCH_CHECK(zero_points.size() == 2, "zero points: want those of q and v");
  for (const int64_t zero_point : zero_points)
    STD_TORCH_CHECK(0 <= zero_point && zero_point < 256, "zero points: want 0 to 255");
  STD_TORCH_CHECK(0 < qmax && qmax < 65536, "qmax: want 1 to 65535");
  const int64_t length = query.length, row = rank == 4 ? heads * value.size : value.size;
  const int64_t by_head = rank == 4 ? value.size : length * row, by_batch = length * row;
  const int64_t sizes[] = {batch, heads, length, value.size}, strides[] = {by_batch, by_head, row, 1};
  Tensor y = empty(sizes + 4 - rank, strides + 4 - rank, rank, dtype);
  if (length == 0 || batch * heads == 0 || value.size == 0) return y;

  const Layout layout(key.length, key.size, value.size);
  thread_local std::vector<int8_t> memory;
  int8_t* start = room_for(memory, batch * heads * layout.bytes + kLine);
  start += -reinterpret_cast<intptr_t>(start) & (kLine - 1);
  const int64_t grain = std::max<int64_t>(1, kGrain / 16 / layout.bytes);
  torch::stable::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Packed packed = layout.at(start + i * layout.bytes);
      pack_keys(key.head(i / heads, i % heads), key, static_cast<int32_t>(zero_points[0]), packed);
      pack_values(value.head(i / heads, i % heads), value, packed);
    }
  });
  const Numbers numbers{static_cast<float>(score_scale * 1.4426950408889634), static_cast<float>(qmax),
                        static_cast<float>(value_scale), static_cast<float>(zero_points[1] - 128)};
  const Target target{static_cast<char*>(y.mutable_data_ptr()), row, dtype == ScalarType::BFloat16};
  const int64_t tiles = filled_up(length, kQueries) / kQueries;
  const int64_t work = kQueries * layout.keys * (query.size + layout.values + 64);
  const auto attend_tile = qmax < 256 ? attend<1> : attend<2>;
  torch::stable::parallel_for(
      0, batch * heads * tiles, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
        thread_local Scratch scratch;
        for (int64_t index = begin; index < end; ++index) {
          const int64_t i = index / tiles, first = index % tiles * kQueries;
          attend_tile(query.head(i / heads, i % heads) + first * query.by_row,
                      std::min<int64_t>(kQueries, length - first), query, value, layout.at(start + i * layout.bytes),
                      numbers, target, i / heads * by_batch + i % heads * by_head + first * row, scratch);
        }
      });
  return y;
}

} // namespace
} // namespace qdiff

STABLE_TORCH_LIBRARY_FRAGMENT(qdiff, library) {
  library.def(
      "vnni_attention(Tensor query, Tensor key, Tensor value, float score_scale, float value_scale, int[] zero_points, "
      "int qmax, ScalarType output_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qdiff, CPU, library) { library.impl("vnni_attention", TORCH_BOX(&qdiff::attention)); }
