// The CPU kernels' entry points. Knows pointers and strides, nothing of torch; each header holds one idea.
//
// Compiled once per machine by native.py, which mirrors the structs. Every result of a row depends on that row alone, in one
// fixed order of operations: neighbours, tiles and threads change no bit of it.
#include "layer.h"
#include "packing.h"

// ---- what native.py calls; `wide` says float32 (1) or bfloat16 (0)
extern "C" {

void loractl_linear(const Linear* layer, const Batch* batch, const void* x, int64_t x_stride, void* out, int64_t out_stride,
                    int64_t rows, int gated, int wide, int threads) {
  if (wide)
    linear<float>(*layer, batch, static_cast<const float*>(x), x_stride, static_cast<float*>(out), out_stride, rows, gated, threads);
  else
    linear<bf16>(*layer, batch, static_cast<const bf16*>(x), x_stride, static_cast<bf16*>(out), out_stride, rows, gated, threads);
}

void loractl_rms_norm(const void* x, int64_t x_stride, const void* weight, float eps, void* out, int64_t rows, int64_t d, int wide,
                      int threads) {
  if (wide)
    rms_norm<float>(static_cast<const float*>(x), x_stride, static_cast<const float*>(weight), eps, static_cast<float*>(out), rows, d, threads);
  else
    rms_norm<bf16>(static_cast<const bf16*>(x), x_stride, static_cast<const bf16*>(weight), eps, static_cast<bf16*>(out), rows, d, threads);
}

void loractl_write_kv(const Paged* paged, const Heads* heads, const void* k, const void* v, void* k_cache, void* v_cache, int wide) {
  if (wide)
    write_kv<float>(*paged, *heads, static_cast<const float*>(k), static_cast<const float*>(v), static_cast<float*>(k_cache), static_cast<float*>(v_cache));
  else
    write_kv<bf16>(*paged, *heads, static_cast<const bf16*>(k), static_cast<const bf16*>(v), static_cast<bf16*>(k_cache), static_cast<bf16*>(v_cache));
}

void loractl_attention(const Paged* paged, const Heads* heads, const void* q, const void* k_cache, const void* v_cache, void* out,
                       int wide, int threads) {
  if (wide)
    paged_attention<float>(*paged, *heads, static_cast<const float*>(q), static_cast<const float*>(k_cache), static_cast<const float*>(v_cache), static_cast<float*>(out), threads);
  else
    paged_attention<bf16>(*paged, *heads, static_cast<const bf16*>(q), static_cast<const bf16*>(k_cache), static_cast<const bf16*>(v_cache), static_cast<bf16*>(out), threads);
}

void loractl_layer(const Layer* layer, const Paged* paged, const Batch* batch, const void* cos, const void* sin, int64_t rotary,
                   const void* hidden, void* out, int wide, int threads) {
  if (wide)
    run_layer<float>(*layer, *paged, batch, static_cast<const float*>(cos), static_cast<const float*>(sin), rotary, static_cast<const float*>(hidden), static_cast<float*>(out), threads);
  else
    run_layer<bf16>(*layer, *paged, batch, static_cast<const bf16*>(cos), static_cast<const bf16*>(sin), rotary, static_cast<const bf16*>(hidden), static_cast<bf16*>(out), threads);
}

void loractl_scan_rows(const void* x, int64_t rows, int64_t count, void* best, void* finite, int wide, int threads) {
  if (wide)
    scan_rows<float>(static_cast<const float*>(x), rows, count, static_cast<int64_t*>(best), static_cast<uint8_t*>(finite), threads);
  else
    scan_rows<bf16>(static_cast<const bf16*>(x), rows, count, static_cast<int64_t*>(best), static_cast<uint8_t*>(finite), threads);
}

void loractl_pack_adapter(const void* file, int64_t size, const MatrixCopy* copies, int64_t count, void* slot, void* finite, int wide) {
  const char* from = static_cast<const char*>(file);
  *static_cast<uint8_t*>(finite) = wide ? pack_adapter<float>(from, size, copies, count, static_cast<float*>(slot))
                                        : pack_adapter<bf16>(from, size, copies, count, static_cast<bf16*>(slot));
}

void loractl_want_large_pages(void* data, int64_t size) { want_large_pages(data, size); }

// The calling thread's products run on it alone from now on: no second team of threads competes for the processors.
void loractl_run_alone() { omp_set_num_threads(1); }

// End the calling thread's team; the next parallel product makes a new one.
void loractl_end_team() { omp_pause_resource_all(omp_pause_soft); }

}  // extern "C"
