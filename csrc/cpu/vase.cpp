// What VaSE scores with, for CPUs: mean attention of a window, and how wide values are. One head at
// a time, heads spread over threads, all arithmetic float32; memory O(tokens) per thread. Attention
// of a head that holds NaN or Inf is NaN throughout.

#include <algorithm>
#include <cmath>
#include <vector>

#include "heads.h"

namespace {

struct AttentionArgs {
  Keys keys;
  const float* queries;   // [num_layers * num_heads * group][window][head_size], contiguous
  const float* scale;     // [num_layers * num_heads]
  const float* soft_cap;  // [num_layers], 0 = none
  int64_t group, window, pool;
};

// The memory of one thread, reused for all its heads. Matrices are padded with zeros to whole
// tiles.
struct AttentionScratch {
  int64_t columns;               // m padded to kColumns
  std::vector<float> keys;       // [head_size][columns], transposed
  std::vector<float> queries;    // [group * window padded to kRows][head_size]
  std::vector<float> logits;     // [kRows][columns]
  std::vector<float> attention;  // [m]

  static int64_t num_floats(const AttentionArgs& a) {
    return (a.keys.paged.head_size + kRows + 1) * round_up(a.keys.n, kColumns) +
           (a.group * a.window + kRows) * a.keys.paged.head_size;
  }

  explicit AttentionScratch(const AttentionArgs& a)
      : columns(round_up(a.keys.n - a.window, kColumns)),
        keys(a.keys.paged.head_size * columns),
        queries(round_up(a.group * a.window, kRows) * a.keys.paged.head_size),
        logits(kRows * columns),
        attention(a.keys.n - a.window) {}
};

// The mean of what all query heads of the group and all rows of the window pay to the candidates,
// then the mean over neighbours. Returns false when a logit is not finite.
RKV_CLONES bool attention(const AttentionArgs& a, int64_t head, AttentionScratch& s,
                          float* result) {
  const int64_t m = a.keys.n - a.window, num_queries = a.group * a.window;
  const int64_t head_size = a.keys.paged.head_size, layer = head / a.keys.paged.num_heads;
  const float* queries = a.queries + head * num_queries * head_size;
  for (int64_t i = 0; i < num_queries * head_size; ++i) s.queries[i] = queries[i] * a.scale[head];
  for (int64_t first = 0; first < m; first += kColumns)
    load_columns(a.keys, head, first, std::min(kColumns, m - first), &s.keys[first], s.columns);
  std::fill(s.attention.begin(), s.attention.end(), 0.0f);
  const float cap = a.soft_cap[layer];
  float products[kRows][kColumns];
  for (int64_t first_row = 0; first_row < num_queries; first_row += kRows) {
    for (int64_t first = 0; first < s.columns; first += kColumns) {
      micro_tile(&s.queries[first_row * head_size], &s.keys[first], s.columns, head_size, products);
      for (int64_t r = 0; r < kRows; ++r)
        std::copy(products[r], products[r] + kColumns, &s.logits[r * s.columns + first]);
    }
    for (int64_t r = 0; r < std::min(kRows, num_queries - first_row); ++r) {
      float* row = &s.logits[r * s.columns];
      if (cap > 0) {
        for (int64_t i = 0; i < m; ++i) {
          // The cap would hide an infinite one.
          if (!std::isfinite(row[i])) return false;
          row[i] = cap * std::tanh(row[i] / cap);
        }
      }
      if (!softmax(row, m)) return false;
      for (int64_t i = 0; i < m; ++i) s.attention[i] += row[i] / static_cast<float>(num_queries);
    }
  }
  const int64_t half = a.pool / 2;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t start = std::max<int64_t>(i - half, 0), stop = std::min(i + half + 1, m);
    float sum = 0;
    for (int64_t j = start; j < stop; ++j) sum += s.attention[j];
    result[i] = sum / static_cast<float>(stop - start);
  }
  return true;
}

struct RangeScratch {
  std::vector<float> tile;  // [head_size][kColumns]

  static int64_t num_floats(const Keys& a) { return a.paged.head_size * kColumns; }

  explicit RangeScratch(const Keys& a) : tile(num_floats(a)) {}
};

// Largest minus smallest element of each of n values; NaN or infinite where one of them is.
RKV_CLONES void channel_range(const Keys& a, int64_t head, RangeScratch& s, float* result) {
  for (int64_t first = 0; first < a.n; first += kColumns) {
    const int64_t valid = std::min(kColumns, a.n - first);
    load_columns(a, head, first, valid, s.tile.data(), kColumns);
    float smallest[kColumns], largest[kColumns], nothing[kColumns] = {};
    std::copy(s.tile.data(), s.tile.data() + kColumns, smallest);
    std::copy(s.tile.data(), s.tile.data() + kColumns, largest);
    for (int64_t k = 0; k < a.paged.head_size; ++k) {
      const float* row = &s.tile[k * kColumns];
#pragma omp simd
      for (int64_t c = 0; c < kColumns; ++c) {
        smallest[c] = std::min(smallest[c], row[c]);
        largest[c] = std::max(largest[c], row[c]);
        // A comparison would hide NaN.
        nothing[c] += row[c] * 0.0f;
      }
    }
    for (int64_t c = 0; c < valid; ++c) result[first + c] = largest[c] - smallest[c] + nothing[c];
  }
}

}  // namespace

extern "C" {

// result: float [num_layers * num_heads][result_stride], of which n - window > 0 are written.
int64_t rkv_attention(const RkvPaged* keys, const int32_t* block_ids, int32_t dtype, int64_t first,
                      int64_t n, const float* queries, const float* scale, const float* soft_cap,
                      int64_t group, int64_t window, int64_t pool, float* result,
                      int64_t result_stride) {
  const AttentionArgs args{
      {*keys, block_ids, dtype, first, n}, queries, scale, soft_cap, group, window, pool};
  return for_all_heads<AttentionScratch>(*keys, args, [&](int64_t head, AttentionScratch& scratch) {
    float* row = result + head * result_stride;
    if (!attention(args, head, scratch, row)) std::fill(row, row + n - window, NAN);
  });
}

// result: float [num_layers * num_heads][result_stride], of which n are written.
int64_t rkv_channel_range(const RkvPaged* values, const int32_t* block_ids, int32_t dtype,
                          int64_t first, int64_t n, float* result, int64_t result_stride) {
  const Keys args{*values, block_ids, dtype, first, n};
  return for_all_heads<RangeScratch>(*values, args, [&](int64_t head, RangeScratch& scratch) {
    channel_range(args, head, scratch, result + head * result_stride);
  });
}

}  // extern "C"
