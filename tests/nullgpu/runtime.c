/* A CUDA runtime and cuBLAS without a device, to be preloaded: work is counted, not done. See README.md.
 *
 * PyTorch's host code runs unchanged. Device memory is address space without access: host code that touches it crashes.
 * This file defines the functions that write to their arguments. build.py adds one that only returns 0 for every other
 * that PyTorch needs, and so for the products of cuBLAS one that counts.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Read by runs.py */
atomic_long nullgpu_launches, nullgpu_pageable_copies, nullgpu_synchronizations;

typedef size_t Size;
enum { PAGE = 1 << 12, PINNED_MEMORY = 4ull << 30, MEMORY = 80ull << 30 };

int nullgpu_launch(void) {
    nullgpu_launches++;
    return 0;
}

void *__cudaRegisterFatBinary() { static void *module; return &module; }

/* kernel<<<grid, block, shared, stream>>>() pushes its configuration and pops it in the kernel's host function. */
typedef struct { unsigned x, y, z; } Dim;
static _Thread_local struct { Dim grid, block; Size shared; void *stream; } configuration;

int __cudaPushCallConfiguration(Dim grid, Dim block, Size shared, void *stream) {
    configuration.grid = grid, configuration.block = block;
    configuration.shared = shared, configuration.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(Dim *grid, Dim *block, Size *shared, void **stream) {
    *grid = configuration.grid, *block = configuration.block;
    *shared = configuration.shared, *stream = configuration.stream;
    return 0;
}
int __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return 0; }
int __cudaLaunchKernel() { return nullgpu_launch(); }
int cudaLaunchKernel() { return nullgpu_launch(); }
int cudaLaunchCooperativeKernel() { return nullgpu_launch(); }
int cudaLaunchKernelExC() { return nullgpu_launch(); }

int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { *blocks = 2; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 2; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, void *results, int *found) { *found = 1; return 0; }

/* The device: an H100 */
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = NULLGPU_VERSION; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = NULLGPU_VERSION; return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *device) {
    memset(device, 0, sizeof *device);
    strcpy(device->name, "no GPU");
    device->major = 9, device->totalGlobalMem = MEMORY, device->multiProcessorCount = 132, device->warpSize = 32;
    device->maxThreadsPerBlock = 1024, device->maxThreadsPerMultiProcessor = 2048, device->l2CacheSize = 50 << 20;
    device->sharedMemPerBlock = 48 << 10, device->sharedMemPerBlockOptin = 227 << 10;
    device->sharedMemPerMultiprocessor = 228 << 10, device->regsPerBlock = device->regsPerMultiprocessor = 65536;
    device->maxGridSize[0] = 0x7fffffff, device->maxGridSize[1] = device->maxGridSize[2] = 65535;
    device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024, device->maxThreadsDim[2] = 64;
    device->textureAlignment = 512;
    return 0;
}
int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
        case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        default: *value = 1;
    }
    return 0;
}
int cudaDeviceCanAccessPeer(int *can) { *can = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return 0; }

/* Memory, device and pinned, is handed out in order and never taken back: PyTorch has caches for both. */
typedef struct { char *start, *next, *end; } Region;
static Region device, pinned;

static Region reserve(Size size, int access) {
    char *start = mmap(0, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) perror("nullgpu: cannot reserve address space"), exit(1);
    return (Region){start, start, start + size};
}
__attribute__((constructor)) static void reserve_all() {
    device = reserve(MEMORY, PROT_NONE), pinned = reserve(PINNED_MEMORY, PROT_READ | PROT_WRITE);
}
static int is_in(const Region *region, const void *p) { return region->start <= (char *)p && (char *)p < region->end; }
static int allocate(Region *region, void **p, Size size) {
    size = (size + PAGE - 1) / PAGE * PAGE;
    if (size > (Size)(region->end - region->next)) return cudaErrorMemoryAllocation;
    *p = __atomic_fetch_add(&region->next, size, __ATOMIC_RELAXED);
    return 0;
}
int cudaMalloc(void **p, Size size) { return allocate(&device, p, size); }
int cudaHostAlloc(void **p, Size size) { return allocate(&pinned, p, size); }
int cudaMemGetInfo(Size *available, Size *total) { *total = MEMORY, *available = device.end - device.next; return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *p) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = is_in(&device, p)   ? cudaMemoryTypeDevice
                       : is_in(&pinned, p) ? cudaMemoryTypeHost
                                           : cudaMemoryTypeUnregistered;
    attributes->devicePointer = attributes->hostPointer = (void *)p;
    return 0;
}
int cudaMemcpyAsync(void *to, const void *from, Size size) {
    if (is_in(&device, to) && is_in(&device, from)) return nullgpu_launch();
    if (is_in(&device, to))
        nullgpu_pageable_copies += !is_in(&pinned, from);
    else if (is_in(&device, from))
        memset(to, 0, size);
    else
        memcpy(to, from, size);
    return 0;
}
int cudaMemcpy(void *to, const void *from, Size size) {
    nullgpu_synchronizations++;
    return cudaMemcpyAsync(to, from, size);
}
int cudaMemset() { return nullgpu_launch(); }
int cudaMemsetAsync() { return nullgpu_launch(); }

const char *cudaGetErrorName() { return "error"; }
const char *cudaGetErrorString() { return "not possible without a GPU"; }

/* Streams, events and graphs. One capture at a time; a synchronization is an error in it, and makes it invalid. */
static enum cudaStreamCaptureStatus capture;
static unsigned long long captures;

static int synchronize(void) {
    nullgpu_synchronizations++;
    if (capture == cudaStreamCaptureStatusNone) return 0;
    capture = cudaStreamCaptureStatusInvalidated;
    return cudaErrorStreamCaptureUnsupported;
}
int cudaDeviceSynchronize() { return synchronize(); }
int cudaStreamSynchronize() { return synchronize(); }
int cudaEventSynchronize() { return synchronize(); }
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 0; return 0; }
int cudaStreamBeginCapture() { capture = cudaStreamCaptureStatusActive, captures++; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) {
    int is_valid = capture == cudaStreamCaptureStatusActive;
    capture = cudaStreamCaptureStatusNone, *graph = is_valid ? &captures : 0;
    return is_valid ? 0 : cudaErrorStreamCaptureInvalidated;
}
int cudaStreamIsCapturing(void *stream, int *status) { *status = capture; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id) {
    *status = capture;
    if (id) *id = captures;
    return 0;
}
int cudaGraphGetNodes(void *graph, void *nodes, Size *count) { *count = 1; return 0; }
int cudaGraphInstantiateWithFlags(void **executable) { *executable = &captures; return 0; }
int cudaGraphLaunch() { return nullgpu_launch(); }

/* The driver */
int cuCtxGetCurrent(void **context) { *context = &device; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
static int nothing() { return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *result) {
    void *own = dlsym(RTLD_DEFAULT, name);
    *function = own ? own : (void *)nothing;
    if (result) *result = cudaDriverEntryPointSuccess;
    return 0;
}
