#include <cstdio>
#include <cstring>
#define X extern "C" __attribute__((visibility("default")))
X int nvmlInit_v2() { return 0; }
X int nvmlInitWithFlags(unsigned) { return 0; }
X int nvmlInit() { return 0; }
X int nvmlShutdown() { return 0; }
X int nvmlDeviceGetCount_v2(unsigned* n) {
  *n = 1;
  return 0;
}
X int nvmlDeviceGetHandleByIndex_v2(unsigned, void** h) {
  *h = (void*)1;
  return 0;
}
X int nvmlDeviceGetHandleByUUID(const char*, void** h) {
  *h = (void*)1;
  return 0;
}
X int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** h) {
  *h = (void*)1;
  return 0;
}
X int nvmlDeviceGetName(void*, char* s, unsigned n) {
  snprintf(s, n, "NVIDIA H100 80GB HBM3");
  return 0;
}
X int nvmlDeviceGetUUID(void*, char* s, unsigned n) {
  snprintf(s, n, "GPU-01020304-0506-0708-090a-0b0c0d0e0f10");
  return 0;
}
X int nvmlDeviceGetCudaComputeCapability(void*, int* a, int* b) {
  *a = 9;
  *b = 0;
  return 0;
}
X int nvmlDeviceGetMemoryInfo(void*, unsigned long long* m) {
  m[0] = 85520809984ull;
  m[1] = 84920809984ull;
  m[2] = 600000000;
  return 0;
}
X int nvmlDeviceGetMemoryInfo_v2(void*, unsigned long long* m) {
  m[1] = 85520809984ull;
  m[2] = 0;
  m[3] = 84920809984ull;
  m[4] = 600000000;
  return 0;
}
X int nvmlSystemGetDriverVersion(char* s, unsigned n) {
  snprintf(s, n, "580.159.04");
  return 0;
}
X int nvmlSystemGetCudaDriverVersion_v2(int* v) {
  *v = 13000;
  return 0;
}
X int nvmlSystemGetCudaDriverVersion(int* v) {
  *v = 13000;
  return 0;
}
X int nvmlDeviceGetP2PStatus(void*, void*, int, int* s) {
  *s = 1;
  return 0;
}
X int nvmlDeviceGetTopologyCommonAncestor(void*, void*, int* s) {
  *s = 0;
  return 0;
}
X const char* nvmlErrorString(int) { return "fake"; }
X int nvmlDeviceGetNumaNodeId(void*, unsigned* n) {
  *n = 0;
  return 0;
}
X int nvmlDeviceGetMigMode(void*, unsigned* a, unsigned* b) {
  *a = *b = 0;
  return 0;
}
X int nvmlDeviceGetNvLinkState(...) { return 3; }
X int nvmlDeviceGetCpuAffinity(void*, unsigned, unsigned long*) { return 3; }
X int nvmlDeviceGetMemoryAffinity(void*, unsigned, unsigned long*, unsigned) { return 3; }
