// What the kernels that score heads share: keys or values of one head in float32, products of
// tiles, softmax, and heads spread over threads.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "paged.h"

namespace {

// A micro tile is kRows x kColumns products: 4 x 32 float accumulators fill 8 of AVX-512's 32
// registers (16 of AVX2's 16), enough to hide the latency of a fused multiply-add.
constexpr int64_t kRows = 4;
constexpr int64_t kColumns = 32;
// All threads together: 16 of them at 128K tokens of 128 dimensions. More would wait for memory
// that the machine may have promised to others.
constexpr int64_t kMostScratchBytes = int64_t{1} << 30;

enum DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat8E4M3 = 3,
  kFloat8E5M2 = 4
};

// The judged keys of one request: n tokens from physical token `first` on.
struct Keys {
  RkvPaged paged;
  const int32_t* block_ids;  // [ceil((first + n) / block_size)]
  int32_t dtype;
  int64_t first, n;
};

RKV_INLINE float to_float(uint16_t bits, int32_t dtype) {
  if (dtype == kBFloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  _Float16 half;
  std::memcpy(&half, &bits, sizeof(half));
  return static_cast<float>(half);
}

// Without the factor that a quantised cache has for a head: callers fold it in.
RKV_INLINE float to_float(uint8_t bits, int32_t dtype) {
  // E5M2 is the upper half of a float16.
  if (dtype == kFloat8E5M2) return to_float(static_cast<uint16_t>(bits << 8), kFloat16);
  // E4M3 has a bias of 7 where float16 has 15, no infinity, and one NaN of either sign.
  const uint16_t magnitude = bits & 0x7f;
  const auto half = static_cast<uint16_t>((bits & 0x80) << 8 | magnitude << 7);
  return magnitude == 0x7f ? NAN : to_float(half, kFloat16) * 256.0f;
}

RKV_INLINE void load_row(const void* source, int64_t offset, int64_t count, int32_t dtype,
                         float* target) {
  if (dtype == kFloat32) {
    std::memcpy(target, static_cast<const float*>(source) + offset, count * sizeof(float));
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(source) + offset;
  const uint8_t* bytes = static_cast<const uint8_t*>(source) + offset;
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < count; ++i) target[i] = to_float(halves[i], kBFloat16);
  } else if (dtype == kFloat16) {
    for (int64_t i = 0; i < count; ++i) target[i] = to_float(halves[i], kFloat16);
  } else if (dtype == kFloat8E4M3) {
    for (int64_t i = 0; i < count; ++i) target[i] = to_float(bytes[i], kFloat8E4M3);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = to_float(bytes[i], kFloat8E5M2);
  }
}

// Keys [start, start + count) of one head into target[k * stride + i], count <= kColumns.
RKV_INLINE void load_columns(const Keys& keys, int64_t head, int64_t start, int64_t count,
                             float* target, int64_t stride) {
  int64_t places[kColumns];
  bool are_neighbours = true;
  for (int64_t i = 0; i < count; ++i) {
    places[i] = token_place(keys.paged, keys.block_ids, head, keys.first + start + i);
    are_neighbours &= places[i] == places[0] + i;
  }
  for (int64_t k = 0; k < keys.paged.head_size; ++k) {
    const int64_t dim = keys.paged.dim_offsets[k];
    float* row = target + k * stride;
    if (are_neighbours) {
      // Packings for vector units hold a dimension of all tokens of a block side by side.
      load_row(keys.paged.base, places[0] + dim, count, keys.dtype, row);
    } else if (keys.dtype == kFloat32) {
      const float* base = static_cast<const float*>(keys.paged.base) + dim;
      for (int64_t i = 0; i < count; ++i) row[i] = base[places[i]];
    } else if (keys.dtype == kFloat8E4M3 || keys.dtype == kFloat8E5M2) {
      const uint8_t* base = static_cast<const uint8_t*>(keys.paged.base) + dim;
      for (int64_t i = 0; i < count; ++i) row[i] = to_float(base[places[i]], keys.dtype);
    } else {
      const uint16_t* base = static_cast<const uint16_t*>(keys.paged.base) + dim;
      for (int64_t i = 0; i < count; ++i) row[i] = to_float(base[places[i]], keys.dtype);
    }
  }
}

// products[r][c] = rows[r] . columns[:, c] for kRows rows of head_size floats and kColumns columns
// of a transposed matrix with `stride` floats per dimension.
RKV_INLINE void micro_tile(const float* rows, const float* columns, int64_t stride,
                           int64_t head_size, float (&products)[kRows][kColumns]) {
  float sums[kRows][kColumns] = {};
  for (int64_t k = 0; k < head_size; ++k) {
    const float* column = columns + k * stride;
    for (int64_t r = 0; r < kRows; ++r) {
      const float factor = rows[r * head_size + k];
#pragma omp simd
      for (int64_t c = 0; c < kColumns; ++c) sums[r][c] += factor * column[c];
    }
  }
  std::memcpy(products, sums, sizeof(sums));
}

RKV_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// In place; returns false when a value is not finite (a softmax would hide an infinite one).
RKV_INLINE bool softmax(float* values, int64_t count) {
  float largest = values[0], bad = 0;
#pragma omp simd reduction(max : largest) reduction(+ : bad)
  for (int64_t i = 0; i < count; ++i) {
    // Zero times what is not finite is NaN.
    bad += 0.0f * values[i];
    largest = values[i] > largest ? values[i] : largest;
  }
  if (bad != 0) return false;
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - largest);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
  return true;
}

// Runs `work(head, scratch)` for all heads. Each thread makes its scratch itself when it has a
// head to work on; threads beyond what may be allocated are not started.
template <class Scratch, class Args, class Work>
int64_t for_all_heads(const RkvPaged& paged, const Args& args, Work work) {
  const int64_t num_heads = paged.num_layers * paged.num_heads;
  const int64_t bytes = Scratch::num_floats(args) * static_cast<int64_t>(sizeof(float));
  const int64_t affordable = std::max<int64_t>(kMostScratchBytes / bytes, 1);
  const int64_t num_threads =
      std::min({static_cast<int64_t>(omp_get_max_threads()), num_heads, affordable});
  if (num_threads == 0) return kDone;
  bool failed = false;
#pragma omp parallel num_threads(static_cast<int>(num_threads)) reduction(|| : failed)
  {
    // An exception may not leave the region.
    Scratch* scratch = nullptr;
    try {
      scratch = new Scratch(args);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < num_heads; ++head)
      if (scratch != nullptr) work(head, *scratch);
    delete scratch;
  }
  return failed ? kNoMemory : kDone;
}

}  // namespace
