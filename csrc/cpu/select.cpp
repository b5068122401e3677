// select for CPUs: the largest scores of every head, ascending; of equal scores the lower index
// stays. A head with a score that is not finite keeps its newest tokens.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <new>
#include <numeric>
#include <vector>

#include "paged.h"

namespace {

bool all_finite(const float* scores, int64_t m) {
  return std::all_of(scores, scores + m, [](float x) { return std::isfinite(x); });
}

// Writes `first` plus the index of each of the `count` largest of m scores.
void select_row(const float* scores, int64_t m, int64_t count, int64_t first,
                std::vector<float>& sorted, int32_t* kept) {
  if (count == 0) return;
  std::copy(scores, scores + m, sorted.begin());
  std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.begin() + m,
                   std::greater<>());
  const float cut = sorted[count - 1];
  int64_t ties = count - std::count_if(scores, scores + m, [cut](float x) { return x > cut; });
  for (int64_t i = 0; i < m; ++i)
    if (scores[i] > cut || (scores[i] == cut && ties-- > 0))
      *kept++ = static_cast<int32_t>(first + i);
}

}  // namespace

extern "C" {

// scores: float [num_rows][scores_stride], the m candidates of each row are tokens
// [first, first + m); kept: int32 [num_rows][kept_stride], of which the `count` best, ascending,
// and then the window [first + m, first + m + window) are written. count <= m. bad_row becomes the
// first row with a score that is not finite, if it is before the one that it names.
int64_t rkv_select(const float* scores, int64_t scores_stride, int64_t num_rows, int64_t first,
                   int64_t m, int64_t count, int64_t window, int32_t* kept, int64_t kept_stride,
                   int32_t* bad_row) {
  bool failed = false;
  int32_t first_bad = *bad_row;
#pragma omp parallel reduction(|| : failed) reduction(min : first_bad)
  {
    // An exception may not leave the region.
    std::vector<float> sorted;
    try {
      sorted.resize(m);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    const bool has_memory = !failed;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) {
      if (!has_memory) continue;
      const float* candidates = scores + row * scores_stride;
      int32_t* target = kept + row * kept_stride;
      if (all_finite(candidates, m)) {
        select_row(candidates, m, count, first, sorted, target);
      } else {
        std::iota(target, target + count, static_cast<int32_t>(first + m - count));
        first_bad = std::min(first_bad, static_cast<int32_t>(row));
      }
      std::iota(target + count, target + count + window, static_cast<int32_t>(first + m));
    }
  }
  *bad_row = first_bad;
  return failed ? kNoMemory : kDone;
}

}  // extern "C"
