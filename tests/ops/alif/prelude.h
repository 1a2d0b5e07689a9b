// What turns kernels.cu into C++: CUDA's keywords, the thread's indices, and a launch that runs the
// grid one thread after another.
#include <math.h>

#define __global__
#define __device__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

struct Index { unsigned x; };
static thread_local Index blockIdx, threadIdx;

// What kernels.cu has in PTX.
inline float half_to_float(unsigned short bits) {
  _Float16 h;
  __builtin_memcpy(&h, &bits, sizeof h);
  return h;
}
inline unsigned short float_to_half(float x) {
  const _Float16 h = (_Float16)x;
  unsigned short bits;
  __builtin_memcpy(&bits, &h, sizeof h);
  return bits;
}
inline float reciprocal(float x) { return 1.0f / x; }
inline float power_of_2(float x) { return exp2f(x); }

// Every kernel takes one struct, by its address as cuLaunchKernel does.
template <class Struct>
void launch(void (*kernel)(Struct), unsigned blocks, unsigned block, const void* argument) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x)
      kernel(*static_cast<const Struct*>(argument));
}

// The size of the struct: the launcher's is checked against it.
template <class Struct> constexpr int size_of_argument(void (*)(Struct)) { return sizeof(Struct); }

#define EXPORT(NAME, ...)                                                            \
  extern "C" void NAME(unsigned blocks, unsigned block, const void* argument) {      \
    launch(&__VA_ARGS__, blocks, block, argument);                                   \
  }                                                                                  \
  extern "C" int NAME##_size() { return size_of_argument(&__VA_ARGS__); }
