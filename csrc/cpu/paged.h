// A paged cache as the C++ kernels see it, and what all of them share.
//
// Element (token t, dimension k) of a block of a head lies at token_offsets[t] + dim_offsets[k]:
// that covers dense rows as well as the packed blocks of vLLM's CPU_ATTN
// (rkv_vllm/worker/cache_views.py).
//
// Plain C interfaces, called through ctypes (kernels/native.py), so that building needs a compiler
// and no torch. OpenMP is the runtime that torch has loaded already, which keeps vLLM's number of
// threads and their binding.

#pragma once

#include <cstdint>

#if defined(__x86_64__)
// One binary for all: the loader picks AVX-512, AVX2 or the baseline.
#define RKV_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RKV_CLONES
#endif
// Helpers are inlined into each clone, otherwise they would stay at the baseline.
#define RKV_INLINE static inline __attribute__((always_inline))

// Raised with every change of a signature or structure; kernels/native.py refuses another one.
constexpr int32_t kInterface = 4;

// What the functions return.
enum RkvResult : int64_t { kDone = 0, kNoMemory = -2 };

extern "C" {

// Where the keys or values of a request lie; strides and offsets in elements. Mirrored field by
// field by a ctypes structure in kernels/native.py.
struct RkvPaged {
  void* base;
  int64_t layer_stride, block_stride, head_stride;
  int64_t num_layers, num_heads, block_size, head_size;
  const int64_t* token_offsets;  // [block_size]
  const int64_t* dim_offsets;    // [head_size]
};

}  // extern "C"

// Offset of a token of one (flattened) head, its dimension offsets not included.
RKV_INLINE int64_t token_place(const RkvPaged& p, const int32_t* block_ids, int64_t head,
                               int64_t token) {
  return head / p.num_heads * p.layer_stride + head % p.num_heads * p.head_stride +
         block_ids[token / p.block_size] * p.block_stride + p.token_offsets[token % p.block_size];
}
