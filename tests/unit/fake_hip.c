// Stands in for libamdhip64.so in tests without a GPU: the functions that mlcgen/runtime/hip.py and driver_device.py
// use, by AMD's documentation. Most are like the CUDA driver's, so the fake of that does the work, and its log has its
// names; what is different is here. HIP has no contexts: every thread may call as soon as hipInit was called.

#define __thread  // one context for all threads
#define cuDeviceGetName hipDeviceGetName
#define cuMemGetInfo_v2 hipMemGetInfo
#define cuMemAlloc_v2 hipMalloc
#define cuMemFree_v2 hipFree
#define cuMemHostAlloc hipHostMalloc
#define cuMemFreeHost hipHostFree
#define cuMemcpyHtoDAsync_v2 hipMemcpyHtoDAsync
#define cuMemcpyDtoDAsync_v2 hipMemcpyDtoDAsync
#define cuMemcpyDtoHAsync_v2 hipMemcpyDtoHAsync
#define cuMemsetD8Async hipMemsetD8Async
#define cuStreamCreate hipStreamCreateWithFlags
#define cuStreamDestroy_v2 hipStreamDestroy
#define cuStreamSynchronize hipStreamSynchronize
#define cuStreamBeginCapture_v2 hipStreamBeginCapture
#define cuStreamEndCapture hipStreamEndCapture
#define cuGraphLaunch hipGraphLaunch
#define cuGraphDestroy hipGraphDestroy
#define cuGraphExecDestroy hipGraphExecDestroy
#define cuEventCreate hipEventCreateWithFlags
#define cuEventRecord hipEventRecord
#define cuEventSynchronize hipEventSynchronize
#define cuStreamWaitEvent hipStreamWaitEvent
#define cuEventDestroy_v2 hipEventDestroy
#define cuModuleUnload hipModuleUnload
#define cuModuleGetFunction hipModuleGetFunction
#include "fake_cuda.c"

enum { NO_BINARY = 209 };

static const struct {
  int code;
  const char *name;
} names[] = {
    {INVALID_VALUE, "hipErrorInvalidValue"},     {OUT_OF_MEMORY, "hipErrorOutOfMemory"},
    {NO_DEVICE, "hipErrorNoDevice"},             {INVALID_IMAGE, "hipErrorInvalidImage"},
    {NOT_FOUND, "hipErrorNotFound"},             {ILLEGAL_ADDRESS, "hipErrorIllegalAddress"},
    {INVALID_HANDLE, "hipErrorInvalidHandle"},   {CAPTURE_UNSUPPORTED, "hipErrorStreamCaptureUnsupported"},
    {NO_BINARY, "hipErrorNoBinaryForGpu"},       {CAPTURE_INVALIDATED, "hipErrorStreamCaptureInvalidated"},
    {NOT_INITIALIZED, "hipErrorNotInitialized"},
};

const char *hipGetErrorName(int code) {
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].code == code) return names[i].name;
  return "hipErrorUnknown";
}

int hipInit(unsigned flags) {
  int code = injected(__func__);
  if (code) return code;
  code = cuInit(flags);
  if (code || retained) return code;
  cuDevicePrimaryCtxRetain(&(void *){NULL}, 0);
  return cuCtxSetCurrent(context);
}

int hipGetDeviceCount(int *found) {
  ENTER(0, "hipGetDeviceCount");
  *found = count();
  return SUCCESS;
}

// In the old layout and in that of ROCm 6 the architecture is elsewhere, among other things.
static int properties(char *to, int device, size_t bytes, size_t at) {
  REQUIRE(device >= 0 && device < count(), INVALID_DEVICE);
  memset(to, 0xFF, bytes);
  strcpy(to, "AMD Fake");
  snprintf(to + at, 256, "gfx%s:sramecc+:xnack-", getenv("FAKE_HIP_ARCH") ? getenv("FAKE_HIP_ARCH") : "90a");
  return SUCCESS;
}

int hipGetDeviceProperties(char *to, int device) {
  ENTER(0, "hipGetDeviceProperties");
  return properties(to, device, 792, 396);
}

#ifndef OLD
int hipGetDevicePropertiesR0600(char *to, int device) {
  ENTER(0, "hipGetDevicePropertiesR0600");
  return properties(to, device, 1472, 1160);
}
#endif

int hipModuleLoadData(Object **module, const char *image) {
  ENTER(1, "hipModuleLoadData");
  return cuModuleLoadData(module, image);
}

int hipGraphInstantiate(Object **executable, Object *graph, void **node, char *log, size_t bytes) {
  ENTER(1, "hipGraphInstantiate");
  REQUIRE(!node && !log && !bytes, INVALID_VALUE);
  return cuGraphInstantiateWithFlags(executable, graph, 0);
}

int hipModuleLaunchKernel(Object *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, Object *stream, void **params,
                          void **extra) {
  ENTER(1, "hipModuleLaunchKernel");
  REQUIRE((uint64_t)grid_x * block_x <= UINT32_MAX, INVALID_VALUE);  // what hardware counts are threads
  Config config = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, params, extra);
}
