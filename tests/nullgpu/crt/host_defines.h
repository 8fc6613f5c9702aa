/* NVIDIA's driver_types.h includes a header of this name, which PyTorch's dependencies lack. Only its macros are needed:
 * they matter to compilers for devices, except for the alignment. */
#define __device_builtin__
#define __builtin_align__(bytes) __attribute__((aligned(bytes)))
#define __align__(bytes) __attribute__((aligned(bytes)))
