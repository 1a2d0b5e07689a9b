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
