// observe for CPUs: copies the queries of watched tokens into the query ring.
//
// Called once per attention layer and step through ctypes (kernels/observe/cpu.py); most calls find
// few watched tokens among many, so there is nothing to gain from threads. Strides count elements.

#include <cstdint>
#include <cstring>

extern "C" void rkv_observe(char* ring, int64_t seat_stride, int64_t ring_stride,
                            int64_t layer_offset, int64_t ring_len, const char* query,
                            int64_t token_stride, int64_t head_stride, const int32_t* token_rows,
                            int64_t num_tokens, int64_t num_heads, int64_t head_size,
                            int32_t element_size) {
  const int64_t head_bytes = head_size * element_size;
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int32_t row = token_rows[token];
    if (row < 0) continue;
    const int64_t target = (row / ring_len) * seat_stride + (row % ring_len) * ring_stride;
    char* to = ring + (target + layer_offset) * element_size;
    const char* from = query + token * token_stride * element_size;
    for (int64_t head = 0; head < num_heads; ++head) {
      std::memcpy(to + head * head_bytes, from + head * head_stride * element_size, head_bytes);
    }
  }
}
