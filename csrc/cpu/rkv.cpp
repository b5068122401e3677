// R-KV's score, select and compact for CPUs, one head at a time, heads spread over threads.
//
// score:  importance and redundancy of every candidate (docs/method.md), float32, memory
//         O(n * head_size) per thread. The search for the newest similar key runs in tiles from the newest key backwards
//         and ends for a group of rows as soon as each has found one.
// select: the indices of the largest scores, ascending; of equal scores the lower index stays.
// compact: moves the survivors of every head together, in place or to other blocks.
//
// score and compact address the paged cache itself. Element (token t, dimension k) of a block of a
// head lies at token_offsets[t] + dim_offsets[k]: that covers dense rows as well as the packed
// blocks of vLLM's CPU_ATTN (rkv_vllm/worker/cache_views.py).
//
// Plain C interface, called through ctypes (kernels/native.py), so that building needs a compiler
// and no torch. OpenMP is the runtime that torch has loaded already, which keeps vLLM's number of
// threads and their binding.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#if defined(__x86_64__)
// One binary for all: the loader picks AVX-512, AVX2 or the baseline.
#define RKV_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RKV_CLONES
#endif
// Helpers are inlined into each clone, otherwise they would stay at the baseline.
#define RKV_INLINE static inline __attribute__((always_inline))

namespace {

// A micro tile is kRows x kColumns products: 4 x 32 float accumulators fill 8 of AVX-512's 32
// registers (16 of AVX2's 16), enough to hide the latency of a fused multiply-add.
constexpr int64_t kRows = 4;
constexpr int64_t kColumns = 32;
constexpr float kNormEpsilon = 1e-8f;

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace

extern "C" {

// Where the keys or values of a request lie; strides and offsets in elements. Mirrored field by field
// by a ctypes structure in kernels/native.py.
struct RkvPaged {
  void* base;
  int64_t layer_stride, block_stride, head_stride;
  int64_t num_layers, num_heads, block_size, head_size;
  const int64_t* token_offsets;  // [block_size]
  const int64_t* dim_offsets;    // [head_size]
};

}  // extern "C"

namespace {

struct ScoreArgs {
  RkvPaged keys;
  const int32_t* block_ids;  // [ceil(n / block_size)]
  const void* queries;       // [num_layers * num_heads * group][window][head_size], contiguous
  int32_t dtype;             // of keys and queries
  int64_t n, head_size, group, window, pool;
  float lam, threshold;
};

// Offset of a token of one (flattened) head, its dimension offsets not included.
RKV_INLINE int64_t token_place(const RkvPaged& p, const int32_t* block_ids, int64_t head,
                               int64_t token) {
  return head / p.num_heads * p.layer_stride + head % p.num_heads * p.head_stride +
         block_ids[token / p.block_size] * p.block_stride + p.token_offsets[token % p.block_size];
}

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

RKV_INLINE void load(const void* source, int64_t offset, int64_t count, int32_t dtype,
                     float* target) {
  if (dtype == kFloat32) {
    std::memcpy(target, static_cast<const float*>(source) + offset, count * sizeof(float));
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(source) + offset;
  for (int64_t i = 0; i < count; ++i) target[i] = to_float(halves[i], dtype);
}

RKV_INLINE void load_keys(const ScoreArgs& a, int64_t head, float* target) {
  const int64_t* dims = a.keys.dim_offsets;
  for (int64_t i = 0; i < a.n; ++i, target += a.head_size) {
    const int64_t place = token_place(a.keys, a.block_ids, head, i);
    if (a.dtype == kFloat32) {
      const float* key = static_cast<const float*>(a.keys.base) + place;
      for (int64_t k = 0; k < a.head_size; ++k) target[k] = key[dims[k]];
    } else {
      const uint16_t* key = static_cast<const uint16_t*>(a.keys.base) + place;
      for (int64_t k = 0; k < a.head_size; ++k) target[k] = to_float(key[dims[k]], a.dtype);
    }
  }
}

RKV_INLINE float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) sum += a[k] * b[k];
  return sum;
}

// products[r][c] = rows[r] . columns[:, c] for kRows rows of `stride` floats and kColumns columns of
// a transposed matrix with `columns_stride` floats per dimension.
RKV_INLINE void micro_tile(const float* rows, int64_t stride, const float* columns,
                           int64_t columns_stride, int64_t head_size,
                           float (&products)[kRows][kColumns]) {
  float sums[kRows][kColumns] = {};
  for (int64_t k = 0; k < head_size; ++k) {
    const float* column = columns + k * columns_stride;
    for (int64_t r = 0; r < kRows; ++r) {
      const float factor = rows[r * stride + k];
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
  float largest = values[0];
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) return false;
    largest = std::max(largest, values[i]);
  }
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - largest);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
  return true;
}

// The memory of one thread, reused for all its heads. Matrices are padded with zeros to whole tiles.
struct Scratch {
  int64_t rows, columns;         // n padded to kRows; n plus one tile of slack, padded to kColumns
  std::vector<float> keys;       // [rows][head_size]; unit keys after the importance is done
  std::vector<float> transposed; // [head_size][columns]
  std::vector<float> norms;      // [n]
  std::vector<float> queries;    // [group * window padded to kRows][head_size]
  std::vector<float> logits;     // [window][columns]
  std::vector<float> mean;       // [n], later the keys' inverse norms
  std::vector<float> sums;       // [n]
  std::vector<double> total;     // [head_size], sum of the unit keys
  std::vector<float> sum;        // [head_size], the same rounded once

  explicit Scratch(const ScoreArgs& a)
      : rows(round_up(a.n, kRows)),
        columns(round_up(a.n, kColumns) + kColumns),
        keys(rows * a.head_size),
        transposed(a.head_size * columns),
        norms(a.n),
        queries(round_up(a.group * a.window, kRows) * a.head_size),
        logits(a.window * columns),
        mean(a.n),
        sums(a.n),
        total(a.head_size),
        sum(a.head_size) {}
};

RKV_INLINE void transpose(const ScoreArgs& a, Scratch& s) {
  for (int64_t i = 0; i < a.n; ++i)
    for (int64_t k = 0; k < a.head_size; ++k)
      s.transposed[k * s.columns + i] = s.keys[i * a.head_size + k];
}

// Attention of the window's queries to the candidates: max over the group on raw logits, softmax
// over the candidates, mean over the window, max-pool. Result in `scores` [n - window].
RKV_INLINE bool importance(const ScoreArgs& a, int64_t head, Scratch& s, float* scores) {
  const int64_t m = a.n - a.window, num_queries = a.group * a.window;
  load(a.queries, head * num_queries * a.head_size, num_queries * a.head_size, a.dtype,
       s.queries.data());
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.head_size));
  for (int64_t i = 0; i < num_queries * a.head_size; ++i) s.queries[i] *= scale;
  std::fill(s.logits.begin(), s.logits.end(), -INFINITY);
  float products[kRows][kColumns];
  bool finite = true;
  for (int64_t first = 0; first < m; first += kColumns) {
    const int64_t valid = std::min(kColumns, m - first);
    for (int64_t row = 0; row < num_queries; row += kRows) {
      micro_tile(&s.queries[row * a.head_size], a.head_size, &s.transposed[first], s.columns,
                 a.head_size, products);
      for (int64_t r = 0; r < std::min(kRows, num_queries - row); ++r) {
        float* logits = &s.logits[(row + r) % a.window * s.columns + first];
        for (int64_t c = 0; c < valid; ++c) {
          finite &= std::isfinite(products[r][c]);
          logits[c] = std::max(logits[c], products[r][c]);
        }
      }
    }
  }
  if (!finite) return false;
  std::fill(s.mean.begin(), s.mean.end(), 0.0f);
  for (int64_t q = 0; q < a.window; ++q) {
    float* row = &s.logits[q * s.columns];
    if (!softmax(row, m)) return false;
    for (int64_t i = 0; i < m; ++i) s.mean[i] += row[i] / static_cast<float>(a.window);
  }
  const int64_t half = a.pool / 2;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t stop = std::min(i + half + 1, m);
    scores[i] = *std::max_element(&s.mean[std::max<int64_t>(i - half, 0)], s.mean.data() + stop);
  }
  return true;
}

// The newest other key similar to each of kRows rows, 0 without any, and the cosine with it.
RKV_INLINE void newest_similar(const ScoreArgs& a, const Scratch& s, int64_t row,
                               int64_t (&newest)[kRows], float (&cosine)[kRows]) {
  const int64_t num_rows = std::min(kRows, a.n - row);
  int64_t open = num_rows;
  std::fill(newest, newest + kRows, -1);
  float products[kRows][kColumns];
  for (int64_t stop = a.n; stop > 0 && open > 0; stop -= kColumns) {
    // The last tile may reach below the first key; its columns start at 0 and overlap.
    const int64_t first = std::max<int64_t>(stop - kColumns, 0);
    micro_tile(&s.keys[row * a.head_size], a.head_size, &s.transposed[first], s.columns,
               a.head_size, products);
    for (int64_t r = 0; r < num_rows; ++r) {
      if (newest[r] >= 0) continue;
      for (int64_t c = std::min(kColumns, stop - first) - 1; c >= 0; --c) {
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
    cosine[r] = dot(&s.keys[(row + r) * a.head_size], s.keys.data(), a.head_size);
  }
}

// How much each key repeats the others, as a distribution over all n, in s.sums.
RKV_INLINE bool redundancy(const ScoreArgs& a, Scratch& s) {
  std::fill(s.total.begin(), s.total.end(), 0.0);
  for (int64_t i = 0; i < a.n; ++i) {
    float* key = &s.keys[i * a.head_size];
    s.norms[i] = std::sqrt(dot(key, key, a.head_size));
    s.mean[i] = 1.0f / (s.norms[i] + kNormEpsilon);
    for (int64_t k = 0; k < a.head_size; ++k) {
      key[k] *= s.mean[i];
      s.total[k] += key[k];
    }
  }
  for (int64_t k = 0; k < a.head_size; ++k) {
    float* column = &s.transposed[k * s.columns];
#pragma omp simd
    for (int64_t i = 0; i < a.n; ++i) column[i] *= s.mean[i];
  }
  std::copy(s.total.begin(), s.total.end(), s.sum.begin());
  for (int64_t i = 0; i < a.n; ++i) {
    const float own = s.norms[i] / (s.norms[i] + kNormEpsilon);
    s.sums[i] = dot(&s.keys[i * a.head_size], s.sum.data(), a.head_size) - own * own;
  }
  int64_t newest[kRows];
  float cosine[kRows];
  for (int64_t row = 0; row < a.n; row += kRows) {
    newest_similar(a, s, row, newest, cosine);
    for (int64_t r = 0; r < std::min(kRows, a.n - row); ++r)
      // Row 0 points to itself when nothing is similar; its own cosine was never in the sum.
      if (newest[r] != row + r) s.sums[newest[r]] -= cosine[r];
  }
  for (int64_t i = 0; i < a.n; ++i) s.sums[i] /= static_cast<float>(a.n);
  return softmax(s.sums.data(), a.n);
}

// Scores of one head; false when one is not finite.
RKV_CLONES bool score_head(const ScoreArgs& a, int64_t head, Scratch& s, float* scores) {
  load_keys(a, head, s.keys.data());
  transpose(a, s);
  if (!importance(a, head, s, scores) || !redundancy(a, s)) return false;
  bool finite = true;
  for (int64_t i = 0; i < a.n - a.window; ++i) {
    scores[i] = a.lam * scores[i] - (1.0f - a.lam) * s.sums[i];
    finite &= std::isfinite(scores[i]);
  }
  return finite;
}

void select_row(const float* scores, int64_t m, int64_t count, std::vector<float>& sorted,
                int32_t* kept) {
  if (count == 0) return;
  sorted.assign(scores, scores + m);
  std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<>());
  const float cut = sorted[count - 1];
  int64_t ties = count - std::count_if(scores, scores + m, [cut](float x) { return x > cut; });
  for (int64_t i = 0; i < m; ++i)
    if (scores[i] > cut || (scores[i] == cut && ties-- > 0)) *kept++ = static_cast<int32_t>(i);
}

// Moves one head's survivors. Ascending order: a destination is never behind its source within the
// blocks that stay, and other blocks hold nothing that is still to be read.
template <class T>
void compact_head(const RkvPaged& p, const int32_t* old_ids, const int32_t* new_ids, int64_t head,
                  const int32_t* keep, int64_t budget, int64_t settled_len, int64_t total_len) {
  T* base = static_cast<T*>(p.base);
  const int64_t new_len = budget + total_len - settled_len;
  for (int64_t token = 0; token < new_len; ++token) {
    const int64_t source = token < budget ? keep[token] : settled_len + token - budget;
    const T* from = base + token_place(p, old_ids, head, source);
    T* to = base + token_place(p, new_ids, head, token);
    if (from == to) continue;
    for (int64_t k = 0; k < p.head_size; ++k) to[p.dim_offsets[k]] = from[p.dim_offsets[k]];
  }
}

}  // namespace

extern "C" {

// scores: float [num_layers * num_heads][scores_stride], of which n - window are written. Returns the
// first flattened head with a score that is not finite, -1 without one, -2 when memory ran out.
int64_t rkv_score(const RkvPaged* keys, const int32_t* block_ids, const void* queries,
                  int32_t dtype, int64_t n, int64_t group, int64_t window, float lam, int64_t pool,
                  float threshold, float* scores, int64_t scores_stride) {
  const ScoreArgs args{*keys, block_ids, queries, dtype,  n,  keys->head_size,
                       group, window,    pool,    lam,    threshold};
  const int64_t num_heads = keys->num_layers * keys->num_heads;
  // Threads without a head would allocate for nothing. An exception may not leave the region.
  const int num_threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), num_heads));
  if (num_threads == 0) return -1;
  std::vector<std::unique_ptr<Scratch>> scratches(num_threads);
  try {
    for (auto& scratch : scratches) scratch = std::make_unique<Scratch>(args);
  } catch (const std::bad_alloc&) {
    return -2;
  }
  int64_t bad_head = num_heads;
#pragma omp parallel for schedule(static) num_threads(num_threads) reduction(min : bad_head)
  for (int64_t head = 0; head < num_heads; ++head)
    if (!score_head(args, head, *scratches[omp_get_thread_num()], scores + head * scores_stride))
      bad_head = std::min(bad_head, head);
  return bad_head == num_heads ? -1 : bad_head;
}

// scores: float [num_rows][scores_stride], m of each row count; kept: int32 [num_rows][kept_stride], of
// which the `count` best, ascending, and then the window [m, m + window) are written. count <= m.
void rkv_select(const float* scores, int64_t scores_stride, int64_t num_rows, int64_t m,
                int64_t count, int64_t window, int32_t* kept, int64_t kept_stride) {
#pragma omp parallel
  {
    std::vector<float> sorted;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) {
      int32_t* target = kept + row * kept_stride;
      select_row(scores + row * scores_stride, m, count, sorted, target);
      std::iota(target + count, target + count + window, static_cast<int32_t>(m));
    }
  }
}

// keep: int32 [num_layers * num_heads][keep_stride], the first `budget` ascending and < settled_len.
// element_size: 2 or 4.
void rkv_compact(const RkvPaged* states, int64_t element_size, const int32_t* old_ids,
                 const int32_t* new_ids, const int32_t* keep, int64_t keep_stride, int64_t budget,
                 int64_t settled_len, int64_t total_len) {
  const int64_t num_heads = states->num_layers * states->num_heads;
#pragma omp parallel for schedule(static)
  for (int64_t head = 0; head < num_heads; ++head) {
    const int32_t* kept = keep + head * keep_stride;
    if (element_size == 2)
      compact_head<uint16_t>(*states, old_ids, new_ids, head, kept, budget, settled_len, total_len);
    else
      compact_head<uint32_t>(*states, old_ids, new_ids, head, kept, budget, settled_len, total_len);
  }
}

}  // extern "C"
