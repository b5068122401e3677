// compact for CPUs: moves the survivors of every head together, in place or to other blocks.

#include "paged.h"

namespace {

struct CompactArgs {
  RkvPaged states;
  const int32_t *old_ids, *new_ids;
  int64_t prefix_len, budget, settled_len, total_len;
};

// Ascending order: a destination is never behind its source within the blocks that stay, and other
// blocks hold nothing that is still to be read. Blocks full of prefix are skipped; what the next
// one holds of the prefix goes along where that block is another one now. What follows the last
// token in its block becomes zero: a fresh block may hold anything there (a state of a Mamba layer
// read as a number is often NaN), and attention multiplies what it masks by zero.
template <class T>
void compact_head(const CompactArgs& a, int64_t head, const int32_t* keep) {
  const RkvPaged& p = a.states;
  T* base = static_cast<T*>(p.base);
  const int64_t kept_len = a.prefix_len + a.budget;
  const int64_t new_len = kept_len + a.total_len - a.settled_len;
  for (int64_t token = a.prefix_len / p.block_size * p.block_size; token < new_len; ++token) {
    const int64_t source = token < a.prefix_len ? token
                           : token < kept_len   ? keep[token - a.prefix_len]
                                                : a.settled_len + token - kept_len;
    const T* from = base + token_place(p, a.old_ids, head, source);
    T* to = base + token_place(p, a.new_ids, head, token);
    if (from == to) continue;
    for (int64_t k = 0; k < p.head_size; ++k) to[p.dim_offsets[k]] = from[p.dim_offsets[k]];
  }
  for (int64_t token = new_len; token % p.block_size != 0; ++token) {
    T* to = base + token_place(p, a.new_ids, head, token);
    for (int64_t k = 0; k < p.head_size; ++k) to[p.dim_offsets[k]] = 0;
  }
}

}  // namespace

extern "C" {

// keep: int32 [num_layers * num_heads][keep_stride], the first `budget` ascending and in
// [prefix_len, settled_len). element_size: 1, 2 or 4.
void rkv_compact(const RkvPaged* states, int64_t element_size, const int32_t* old_ids,
                 const int32_t* new_ids, const int32_t* keep, int64_t keep_stride,
                 int64_t prefix_len, int64_t budget, int64_t settled_len, int64_t total_len) {
  const CompactArgs args{*states, old_ids, new_ids, prefix_len, budget, settled_len, total_len};
  const int64_t num_heads = states->num_layers * states->num_heads;
#pragma omp parallel for schedule(static)
  for (int64_t head = 0; head < num_heads; ++head) {
    const int32_t* kept = keep + head * keep_stride;
    if (element_size == 1)
      compact_head<uint8_t>(args, head, kept);
    else if (element_size == 2)
      compact_head<uint16_t>(args, head, kept);
    else
      compact_head<uint32_t>(args, head, kept);
  }
}

}  // extern "C"
