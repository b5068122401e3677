#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "attributes.h"
#define X extern "C" __attribute__((visibility("default")))
static FILE* lg() {
  static FILE* f = getenv("FAKE_CUDA_LOG") ? fopen(getenv("FAKE_CUDA_LOG"), "a") : nullptr;
  return f;
}
X int fake_generic(...) { return 0; }
X int cuInit(unsigned) { return 0; }
X int cuDriverGetVersion(int* v) {
  *v = 13000;
  return 0;
}
X int cuDeviceGet(int* d, int i) {
  *d = i;
  return 0;
}
X int cuDeviceGetCount(int* n) {
  *n = 1;
  return 0;
}
X int cuDeviceGetAttribute(int* v, int a, int) {
  *v = attribute(a);
  return 0;
}
X int cuDeviceGetName(char* s, int n, int) {
  snprintf(s, n, "NVIDIA H100 80GB HBM3");
  return 0;
}
X int cuCtxGetCurrent(void** c) {
  *c = (void*)0x1;
  return 0;
}
X int cuCtxSetCurrent(void*) { return 0; }
X int cuCtxGetDevice(int* d) {
  *d = 0;
  return 0;
}
X int cuDevicePrimaryCtxRetain(void** c, int) {
  *c = (void*)0x1;
  return 0;
}
X int cuDevicePrimaryCtxGetState(int, unsigned* f, int* a) {
  if (f) *f = 0;
  *a = 1;
  return 0;
}
X int cuModuleLoadData(void** m, const void* d) {
  *m = malloc(8);
  return 0;
}
X int cuModuleLoadDataEx(void** m, const void*, unsigned, void*, void*) {
  *m = malloc(8);
  return 0;
}
X int cuModuleLoad(void** m, const char*) {
  *m = malloc(8);
  return 0;
}
X int cuModuleUnload(void*) { return 0; }
X int cuModuleGetFunction(void** f, void*, const char* n) {
  *f = strdup(n);
  if (lg()) {
    fprintf(lg(), "LOADED %s\n", n);
    fflush(lg());
  }
  return 0;
}
X int cuFuncGetAttribute(int* v, int a, void*) {
  *v = a == 0 ? 1024 : a == 4 ? 64 : 0;
  return 0;
}
X int cuFuncSetAttribute(void*, int, int) { return 0; }
X int cuFuncSetCacheConfig(void*, int) { return 0; }
X int cuLaunchKernel(...) { return 0; }
X int cuLaunchKernelEx(const void*, void* f, void**, void**) {
  if (lg() && getenv("FAKE_CUDA_LAUNCHES")) {
    fprintf(lg(), "LAUNCH %s\n", (char*)f);
  }
  return 0;
}
X int cuLaunchCooperativeKernel(...) { return 0; }
X int cuGetErrorString(int, const char** s) {
  *s = "fake";
  return 0;
}
X int cuGetErrorName(int, const char** s) {
  *s = "fake";
  return 0;
}
X int cuPointerGetAttribute(void* p, int, unsigned long long v) {
  *(unsigned long long*)p = v;
  return 0;
}
X int cuTensorMapEncodeTiled(...) { return 0; }
X int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int, size_t) {
  *n = 2;
  return 0;
}
X int cuOccupancyMaxActiveClusters(int* n, void*, const void*) {
  *n = 8;
  return 0;
}
X int cuCtxGetLimit(size_t* v, int) {
  *v = 1 << 20;
  return 0;
}
X int cuCtxSetLimit(int, size_t) { return 0; }
X int cuMemAddressFree(...) { return 0; }
X int cuMemAddressReserve(...) { return 0; }
X int cuMemCreate(...) { return 0; }
X int cuMemGetAllocationGranularity(size_t* g, ...) {
  *g = 2097152;
  return 0;
}
X int cuMemMap(...) { return 0; }
X int cuMemRelease(...) { return 0; }
X int cuMemSetAccess(...) { return 0; }
X int cuMemUnmap(...) { return 0; }
X int cuLinkAddData_v2(...) { return 0; }
X int cuLinkComplete(...) { return 0; }
X int cuLinkCreate_v2(...) { return 0; }
X int cuGetProcAddress_v2(const char* s, void** f, int, unsigned long long, int* r) {
  void* h = dlopen("libcuda.so.1", RTLD_NOW);
  *f = dlsym(h, s);
  if (!*f) *f = (void*)fake_generic;
  if (r) *r = 0;
  return 0;
}
X int cuGetProcAddress(const char* s, void** f, int a, unsigned long long b) {
  return cuGetProcAddress_v2(s, f, a, b, nullptr);
}
X int cuMemGetInfo_v2(size_t* f, size_t* t) {
  *t = 85520809984ull;
  *f = *t - 600000000;
  return 0;
}
X int cuStreamWaitValue32_v2(...) { return 0; }
X int cuStreamWriteValue32_v2(...) { return 0; }
X int cuMemcpyBatchAsync_v2(...) { return 0; }
X int cuMemcpyBatchAsync(...) { return 0; }
