// What turns kernels.cu into C++: CUDA's keywords, the thread's indices, and a launch that runs the
// grid one thread after another. Arguments come as cuLaunchKernel takes them, by address.
#include <cmath>
#include <cstddef>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

struct Index { unsigned x; };
static Index blockIdx, threadIdx;

template <class Function> struct Kernel;

template <class... Parameters>
struct Kernel<void (*)(Parameters...)> {
  template <std::size_t... I>
  static void call(void (*function)(Parameters...), void** arguments, std::index_sequence<I...>) {
    function(*static_cast<Parameters*>(arguments[I])...);
  }

  static void run(void (*function)(Parameters...), unsigned blocks, unsigned block,
                  void** arguments) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x)
        call(function, arguments, std::index_sequence_for<Parameters...>());
  }

  // The size of each parameter in bytes, then 0: the launcher's widths are checked against it.
  static const int* widths() {
    static const int sizes[] = {sizeof(Parameters)..., 0};
    return sizes;
  }
};

#define EXPORT(NAME, ...)                                                                  \
  extern "C" void NAME(unsigned blocks, unsigned block, void** arguments) {                \
    Kernel<decltype(&__VA_ARGS__)>::run(&__VA_ARGS__, blocks, block, arguments);           \
  }                                                                                        \
  extern "C" const int* NAME##_widths() { return Kernel<decltype(&__VA_ARGS__)>::widths(); }
