// R-KV's importance and redundancy for CPUs, one head at a time, heads spread over threads.
//
// The formulas are in docs/method.md; all arithmetic is float32. Importance needs O(window * n)
// memory per thread. Redundancy needs the unit keys once, transposed; its search for the newest
// similar key runs in tiles from the newest key backwards and ends for a group of rows as soon as
// each has found one. The result of a head that holds NaN or Inf is NaN throughout.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "heads.h"

namespace {

constexpr float kNormEpsilon = 1e-8f;
// A centred key this much shorter than the mean key consists of rounding: it has no direction.
constexpr float kLeastCentred = 1e-5f;

struct ImportanceArgs {
  Keys keys;
  const float* queries;   // [num_layers * num_heads * group][window][head_size], contiguous
  const float* scale;     // [num_layers * num_heads]
  const float* soft_cap;  // [num_layers], 0 = none
  int64_t group, window, pool;
  bool defensive;
};

// The memory of one thread, reused for all its heads. Matrices are padded with zeros to whole
// tiles; so is the one below.
struct ImportanceScratch {
  int64_t columns;               // m padded to kColumns
  std::vector<float> tile;       // [head_size][kColumns]
  std::vector<float> queries;    // [group * window padded to kRows][head_size]
  std::vector<float> logits;     // [window][columns]
  std::vector<float> attention;  // [m]

  static int64_t num_floats(const ImportanceArgs& a) {
    return (a.window + 1) * round_up(a.keys.n, kColumns) +
           (kColumns + a.group * a.window + kRows) * a.keys.paged.head_size;
  }

  explicit ImportanceScratch(const ImportanceArgs& a)
      : columns(round_up(a.keys.n - a.window, kColumns)),
        tile(a.keys.paged.head_size * kColumns),
        queries(round_up(a.group * a.window, kRows) * a.keys.paged.head_size),
        logits(a.window * columns),
        attention(a.keys.n - a.window) {}
};

// Attention of the window's queries to the candidates: max over the group on capped logits, softmax
// over the candidates, mean over the window (defensive: maximum, at least the mean of the maxima),
// max-pool. Returns false when a logit is not finite.
RKV_CLONES bool importance(const ImportanceArgs& a, int64_t head, ImportanceScratch& s,
                           float* result) {
  const int64_t m = a.keys.n - a.window, num_queries = a.group * a.window;
  const int64_t head_size = a.keys.paged.head_size, layer = head / a.keys.paged.num_heads;
  const float* queries = a.queries + head * num_queries * head_size;
  for (int64_t i = 0; i < num_queries * head_size; ++i) s.queries[i] = queries[i] * a.scale[head];
  std::fill(s.logits.begin(), s.logits.end(), -INFINITY);
  float products[kRows][kColumns];
  // Zero times what is not finite is NaN, and stays it: a test that vector units make.
  float bad[kColumns] = {};
  for (int64_t first = 0; first < m; first += kColumns) {
    const int64_t valid = std::min(kColumns, m - first);
    // Columns behind the last candidate count as well; what an earlier head left there is gone.
    if (valid < kColumns) std::fill(s.tile.begin(), s.tile.end(), 0.0f);
    load_columns(a.keys, head, first, valid, s.tile.data(), kColumns);
    for (int64_t row = 0; row < num_queries; row += kRows) {
      micro_tile(&s.queries[row * head_size], s.tile.data(), kColumns, head_size, products);
      for (int64_t r = 0; r < std::min(kRows, num_queries - row); ++r) {
        float* logits = &s.logits[(row + r) % a.window * s.columns + first];
#pragma omp simd
        for (int64_t c = 0; c < kColumns; ++c) {
          const float product = products[r][c];
          bad[c] += 0.0f * product;
          logits[c] = logits[c] > product ? logits[c] : product;
        }
      }
    }
  }
  if (std::any_of(bad, bad + kColumns, [](float value) { return value != 0.0f; })) return false;
  std::fill(s.attention.begin(), s.attention.end(), 0.0f);
  const float cap = a.soft_cap[layer];
  for (int64_t q = 0; q < a.window; ++q) {
    float* row = &s.logits[q * s.columns];
    // A cap keeps the order, so the largest of the group is still the largest.
    if (cap > 0)
      for (int64_t i = 0; i < m; ++i) row[i] = cap * std::tanh(row[i] / cap);
    if (!softmax(row, m)) return false;
    if (a.defensive) {
      for (int64_t i = 0; i < m; ++i) s.attention[i] = std::max(s.attention[i], row[i]);
    } else {
      for (int64_t i = 0; i < m; ++i) s.attention[i] += row[i] / static_cast<float>(a.window);
    }
  }
  float least = 0;
  if (a.defensive) {
    double sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += s.attention[i];
    least = static_cast<float>(sum / static_cast<double>(m));
  }
  // The largest of floored shares is the floored largest.
  for (int64_t i = 0; i < m; ++i) result[i] = std::max(s.attention[i], least);
  for (int64_t shift = 1; shift <= std::min(a.pool / 2, m - 1); ++shift) {
    const float* attention = s.attention.data();
#pragma omp simd
    for (int64_t i = 0; i < m - shift; ++i)
      result[i] = result[i] > attention[i + shift] ? result[i] : attention[i + shift];
#pragma omp simd
    for (int64_t i = shift; i < m; ++i)
      result[i] = result[i] > attention[i - shift] ? result[i] : attention[i - shift];
  }
  return true;
}

struct RedundancyArgs {
  Keys keys;
  int64_t num_candidates;
  float threshold;
  bool center;
};

// Unit keys lie in tiles of kColumns of them, transposed: what goes through a tile stays in the
// first-level cache. Columns behind the last key are zeros.
struct RedundancyScratch {
  int64_t tile_size;           // head_size * kColumns
  std::vector<float> unit;     // [tiles][head_size][kColumns]
  std::vector<float> sums;     // [tiles * kColumns]
  std::vector<double> totals;  // [head_size]
  std::vector<float> rows;     // [kRows][head_size]
  int64_t num_tiles = 0;       // micro tiles that the searches of this thread looked at

  static int64_t num_floats(const RedundancyArgs& a) {
    return (a.keys.paged.head_size + 1) * round_up(a.keys.n, kColumns);
  }

  explicit RedundancyScratch(const RedundancyArgs& a)
      : tile_size(a.keys.paged.head_size * kColumns),
        unit(a.keys.paged.head_size * round_up(a.keys.n, kColumns)),
        sums(round_up(a.keys.n, kColumns)),
        totals(a.keys.paged.head_size),
        rows(kRows * a.keys.paged.head_size) {}

  float* tile(int64_t first) { return &unit[first / kColumns * tile_size]; }
};

// The newest other key similar to each of kRows rows from `row` on, 0 without any, and the cosine
// with it. The rows are in s.rows.
RKV_INLINE void newest_similar(const RedundancyArgs& a, RedundancyScratch& s, int64_t row,
                               int64_t (&newest)[kRows], float (&cosine)[kRows]) {
  const int64_t n = a.keys.n, head_size = a.keys.paged.head_size;
  const int64_t num_rows = std::min(kRows, n - row);
  int64_t open = num_rows;
  std::fill(newest, newest + kRows, -1);
  float products[kRows][kColumns];
  for (int64_t first = (n - 1) / kColumns * kColumns; first >= 0 && open > 0; first -= kColumns) {
    micro_tile(s.rows.data(), s.tile(first), kColumns, head_size, products);
    ++s.num_tiles;
    for (int64_t r = 0; r < num_rows; ++r) {
      if (newest[r] >= 0) continue;
      for (int64_t c = std::min(kColumns, n - first) - 1; c >= 0; --c) {
        if (products[r][c] > a.threshold && first + c != row + r) {
          newest[r] = first + c;
          cosine[r] = products[r][c];
          --open;
          break;
        }
      }
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    if (newest[r] >= 0) continue;
    newest[r] = 0;
    cosine[r] = 0;
    for (int64_t k = 0; k < head_size; ++k)
      cosine[r] += s.rows[r * head_size + k] * s.unit[k * kColumns];
  }
}

RKV_INLINE float row_sum(const float* values) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < kColumns; ++c) sum += values[c];
  return sum;
}

// Takes the mean key off all keys in s.unit; returns its norm.
RKV_INLINE float center(const RedundancyArgs& a, RedundancyScratch& s) {
  const int64_t n = a.keys.n, head_size = a.keys.paged.head_size;
  std::fill(s.totals.begin(), s.totals.end(), 0.0);
  for (int64_t first = 0; first < n; first += kColumns)
    for (int64_t k = 0; k < head_size; ++k) s.totals[k] += row_sum(s.tile(first) + k * kColumns);
  double square = 0;
  for (double& total : s.totals) {
    total /= static_cast<double>(n);
    square += total * total;
  }
  for (int64_t first = 0; first < n; first += kColumns) {
    for (int64_t k = 0; k < head_size; ++k) {
      float* key = s.tile(first) + k * kColumns;
      const float mean = static_cast<float>(s.totals[k]);
      for (int64_t c = 0; c < std::min(kColumns, n - first); ++c) key[c] -= mean;
    }
  }
  return static_cast<float>(std::sqrt(square));
}

// Makes unit keys of a tile and adds them to the totals; minus the square of each one's norm, 1 or
// 0, goes to s.sums.
RKV_INLINE void normalise(int64_t head_size, float least, float* tile, float* sums,
                          std::vector<double>& totals) {
  float norms[kColumns] = {}, inverse[kColumns];
  for (int64_t k = 0; k < head_size; ++k) {
    const float* key = tile + k * kColumns;
#pragma omp simd
    for (int64_t c = 0; c < kColumns; ++c) norms[c] += key[c] * key[c];
  }
  for (int64_t c = 0; c < kColumns; ++c) {
    const float norm = std::sqrt(norms[c]);
    inverse[c] = norm <= least ? 0.0f : 1.0f / (norm + kNormEpsilon);
    const float own = norm * inverse[c];
    sums[c] = -own * own;
  }
  for (int64_t k = 0; k < head_size; ++k) {
    float* key = tile + k * kColumns;
#pragma omp simd
    for (int64_t c = 0; c < kColumns; ++c) key[c] *= inverse[c];
    totals[k] += row_sum(key);
  }
}

// How much each key repeats the others, as a distribution over all n, in s.sums.
RKV_CLONES bool redundancy(const RedundancyArgs& a, int64_t head, RedundancyScratch& s) {
  const int64_t n = a.keys.n, head_size = a.keys.paged.head_size;
  float least = -1.0f;
  if (a.center) {
    for (int64_t first = 0; first < n; first += kColumns)
      load_columns(a.keys, head, first, std::min(kColumns, n - first), s.tile(first), kColumns);
    least = kLeastCentred * center(a, s);
  }
  std::fill(s.totals.begin(), s.totals.end(), 0.0);
  for (int64_t first = 0; first < n; first += kColumns) {
    const int64_t count = std::min(kColumns, n - first);
    if (!a.center) load_columns(a.keys, head, first, count, s.tile(first), kColumns);
    normalise(head_size, least, s.tile(first), &s.sums[first], s.totals);
  }
  for (int64_t first = 0; first < n; first += kColumns) {
    float sums[kColumns] = {};
    for (int64_t k = 0; k < head_size; ++k) {
      const float* key = s.tile(first) + k * kColumns;
      const float total = static_cast<float>(s.totals[k]);
#pragma omp simd
      for (int64_t c = 0; c < kColumns; ++c) sums[c] += key[c] * total;
    }
    for (int64_t c = 0; c < kColumns; ++c) s.sums[first + c] += sums[c];
  }
  int64_t newest[kRows];
  float cosine[kRows];
  static_assert(kColumns % kRows == 0, "rows of one micro tile lie in one tile of columns");
  for (int64_t row = 0; row < n; row += kRows) {
    // Rows behind the last one are the zeros of the padding.
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t k = 0; k < head_size; ++k)
        s.rows[r * head_size + k] = s.tile(row)[k * kColumns + row % kColumns + r];
    newest_similar(a, s, row, newest, cosine);
    for (int64_t r = 0; r < std::min(kRows, n - row); ++r)
      // Row 0 points to itself when nothing is similar; its own cosine was never in the sum.
      if (newest[r] != row + r) s.sums[newest[r]] -= cosine[r];
  }
  for (int64_t i = 0; i < n; ++i) s.sums[i] /= static_cast<float>(n);
  return softmax(s.sums.data(), n);
}

}  // namespace

extern "C" {

int32_t rkv_interface() { return kInterface; }

// result: float [num_layers * num_heads][result_stride], of which n - window > 0 are written.
int64_t rkv_importance(const RkvPaged* keys, const int32_t* block_ids, int32_t dtype, int64_t first,
                       int64_t n, const float* queries, const float* scale, const float* soft_cap,
                       int64_t group, int64_t window, int64_t pool, float* result,
                       int64_t result_stride, bool defensive) {
  const ImportanceArgs args{{*keys, block_ids, dtype, first, n},
                            queries,
                            scale,
                            soft_cap,
                            group,
                            window,
                            pool,
                            defensive};
  return for_all_heads<ImportanceScratch>(*keys, args,
                                          [&](int64_t head, ImportanceScratch& scratch) {
                                            float* row = result + head * result_stride;
                                            if (!importance(args, head, scratch, row))
                                              std::fill(row, row + n - window, NAN);
                                          });
}

// result: float [num_layers * num_heads][result_stride], of which num_candidates <= n are written.
// num_tiles, if not null, is raised by the micro tiles that the search looked at.
int64_t rkv_redundancy(const RkvPaged* keys, const int32_t* block_ids, int32_t dtype, int64_t first,
                       int64_t n, int64_t num_candidates, float threshold, float* result,
                       int64_t result_stride, int64_t* num_tiles, bool center) {
  const RedundancyArgs args{{*keys, block_ids, dtype, first, n}, num_candidates, threshold, center};
  return for_all_heads<RedundancyScratch>(
      *keys, args, [&](int64_t head, RedundancyScratch& scratch) {
        float* row = result + head * result_stride;
        scratch.num_tiles = 0;
        if (redundancy(args, head, scratch)) {
          std::copy(scratch.sums.begin(), scratch.sums.begin() + num_candidates, row);
        } else {
          std::fill(row, row + num_candidates, NAN);
        }
        if (num_tiles != nullptr) {
#pragma omp atomic
          *num_tiles += scratch.num_tiles;
        }
      });
}

}  // extern "C"
