// A CUDA runtime without a GPU. It describes a node of cards and computes nothing.
//
// It is preloaded before libcudart and libcublas. It answers torch's questions (counts, properties,
// streams, events) and ignores the work that torch starts (kernels, matrix products, copies to and
// from devices), which it counts. That is enough for FakeTensors with device cuda (node.py), for
// real tensors whose numbers nobody reads (host.py), for autograd's device threads and torch.cuda.
// A small copy from a device gives zeros. Environment variables describe the card; __main__.py sets
// them from the table in model.py.
#include <cuda_runtime_api.h>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
static thread_local int current = 0;
static const char* text(const char* name) { const char* t = getenv(name); return t ? t : "0"; }
static size_t number(const char* name) { return strtoull(text(name), nullptr, 10); }
static long dummies = 0x1000;
static void* handle() { return (void*)(__sync_fetch_and_add(&dummies, 64)); }
static int ok_driver() { return 0; }
static int primary_state(int, unsigned* flags, int* active) { if (flags) *flags = 0; if (active) *active = 1; return 0; }
extern "C" {
// What was started: runtime kernels, driver kernels, matrix products, copies, fills.
long host_counts[8];
#define COUNT(i) __sync_fetch_and_add(&host_counts[i], 1)
#define OK { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { *n = number("FAKE_CUDA_DEVICES"); return cudaSuccess; }
cudaError_t cudaGetDevice(int* d) { *d = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int d) { current = d; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strncpy(p->name, text("FAKE_CUDA_NAME"), sizeof p->name - 1);
  p->totalGlobalMem = number("FAKE_CUDA_MEMORY"); p->sharedMemPerBlock = 49152; p->regsPerBlock = 65536; p->warpSize = 32;
  p->maxThreadsPerBlock = 1024; p->major = number("FAKE_CUDA_MAJOR"); p->minor = number("FAKE_CUDA_MINOR");
  p->multiProcessorCount = number("FAKE_CUDA_MULTIPROCESSORS"); p->l2CacheSize = 52428800;
  p->maxThreadsPerMultiProcessor = 2048; p->sharedMemPerMultiprocessor = number("FAKE_CUDA_SHARED") + 1024; p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlockOptin = number("FAKE_CUDA_SHARED"); p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64; p->pciBusID = d; p->unifiedAddressing = 1;
  p->memoryBusWidth = 5120; p->canMapHostMemory = 1; p->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrComputeCapabilityMajor: *v = number("FAKE_CUDA_MAJOR"); break;
    case cudaDevAttrComputeCapabilityMinor: *v = number("FAKE_CUDA_MINOR"); break;
    case cudaDevAttrMultiProcessorCount: *v = number("FAKE_CUDA_MULTIPROCESSORS"); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = number("FAKE_CUDA_SHARED"); break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = 233472; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *v = 65535; break;
    case cudaDevAttrL2CacheSize: *v = 52428800; break;
    default: *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) { strncpy(s, "0000:00:00.0", n); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) { *v = 1; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) OK
cudaError_t cudaDeviceSynchronize() OK
cudaError_t cudaGetLastError() OK
cudaError_t cudaPeekAtLastError() OK
cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) { if (a) *a = 0; if (b) *b = -5; return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t* s) { *s = (cudaStream_t)handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { *s = (cudaStream_t)handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { *s = (cudaStream_t)handle(); return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) OK
cudaError_t cudaStreamQuery(cudaStream_t) OK
cudaError_t cudaStreamSynchronize(cudaStream_t) OK
cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) OK
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) { *s = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id, cudaGraph_t* g,
    const cudaGraphNode_t** d, const cudaGraphEdgeData** e, size_t* n) {
  *s = cudaStreamCaptureStatusNone; if (id) *id = 0; if (n) *n = 0; return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) OK
cudaError_t cudaEventCreate(cudaEvent_t* e) { *e = (cudaEvent_t)handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { *e = (cudaEvent_t)handle(); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) OK
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) OK
cudaError_t cudaEventQuery(cudaEvent_t) OK
cudaError_t cudaEventSynchronize(cudaEvent_t) OK
cudaError_t cudaEventDestroy(cudaEvent_t) OK
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 1.0f; return cudaSuccess; }
cudaError_t cudaMalloc(void** p, size_t n) {
  *p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return *p == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void*) OK
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { *p = malloc(n); return cudaSuccess; }
cudaError_t cudaFreeHost(void* p) { free(p); return cudaSuccess; }
cudaError_t cudaHostRegister(void*, size_t, unsigned) OK
cudaError_t cudaHostUnregister(void*) OK
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) { *t = number("FAKE_CUDA_MEMORY"); *f = *t - (1ull << 30); return cudaSuccess; }
static void copy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  COUNT(3);
  if (k == cudaMemcpyHostToHost) memmove(d, s, n);
  else if (k == cudaMemcpyDeviceToHost && n <= 65536) memset(d, 0, n);
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) { copy(d, s, n, k); return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t) { copy(d, s, n, k); return cudaSuccess; }
cudaError_t cudaMemset(void* d, int v, size_t n) { COUNT(4); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) { COUNT(4); return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a); a->type = cudaMemoryTypeHost; a->hostPointer = (void*)p; return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { COUNT(0); return cudaSuccess; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { COUNT(0); return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) { memset(a, 0, sizeof *a); a->binaryVersion = 90; a->ptxVersion = 90; a->numRegs = 32; a->maxDynamicSharedSizeBytes = 200000; a->maxThreadsPerBlock = 1024; return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) OK
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* r) {
  *f = strstr(name, "PrimaryCtxGetState") ? (void*)primary_state : (void*)ok_driver;
  if (r) *r = cudaDriverEntryPointSuccess; return cudaSuccess; }
cudaError_t cudaProfilerStart() OK
cudaError_t cudaProfilerStop() OK
const char* cudaGetErrorString(cudaError_t) { return "fake"; }
const char* cudaGetErrorName(cudaError_t) { return "fake"; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; return cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t, cudaStreamCallback_t, void*, unsigned) { return cudaSuccess; }
int __cudaLaunchKernel() { COUNT(0); return 0; }
int __cudaGetKernel(void** k, const void*) { *k = (void*)0x1; return 0; }

// cuBLAS, as far as bfloat16 and float32 need it
int cublasCreate_v2(void** h) { *h = (void*)0x1000; return 0; }
int cublasGetMathMode(void*, int* m) { *m = 0; return 0; }
int cublasGetPointerMode_v2(void*, int* m) { *m = 0; return 0; }
size_t cublasLtGetVersion() { return 130101; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* n) {
  memset(result, 0, 80); *n = 1; return 0; }
int cublasLtMatmulDescCreate(void** p) { *p = (void*)0x2000; return 0; }
int cublasLtMatmulPreferenceCreate(void** p) { *p = (void*)0x4000; return 0; }
int cublasLtMatrixLayoutCreate(void** p) { *p = (void*)0x3000; return 0; }
#define PRODUCT(name) int name() { COUNT(2); return 0; }
PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasLtMatmul) PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasSgemv_v2)
#define F(name) int name() { return 0; }
F(cublasDestroy_v2) F(cublasSetMathMode) F(cublasSetPointerMode_v2) F(cublasSetSmCountTarget) F(cublasSetStream_v2)
F(cublasSetWorkspace_v2) F(cublasLtMatmulDescDestroy) F(cublasLtMatmulDescSetAttribute)
F(cublasLtMatmulPreferenceDestroy) F(cublasLtMatmulPreferenceSetAttribute) F(cublasLtMatrixLayoutDestroy)
F(cublasLtMatrixLayoutSetAttribute)
}
