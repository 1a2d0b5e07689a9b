// What turns kernels.cu into C++: CUDA's keywords, the thread's indices, and a launch that runs the
// grid one thread after another.
#include <math.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define PUBLIC extern "C" __attribute__((visibility("default")))

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

// The end of the last word in memory that was read since a test asked.
static thread_local const void* read_to;
#define LOAD(WORD)                                      \
  inline void load_word(const WORD* from, WORD& word) { \
    word = *from++;                                     \
    if (from > read_to) read_to = from;                 \
  }
LOAD(unsigned short) LOAD(unsigned) LOAD(uint2) LOAD(uint4)
PUBLIC const void* take_end() {
  const void* end = read_to;
  read_to = nullptr;
  return end;
}

#ifndef STEP
#define ONE_AFTER_ANOTHER
#define __shared__ static thread_local

template <class Run> void run_block(unsigned block, Run run) {
  for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) run();
}
#else  // each to the next barrier in turn, as on a GPU, from the first (STEP 1) or the last (-1) on
#include <ucontext.h>
#define __shared__ static

static ucontext_t scheduler, threads[1024];
static char stacks[1024][1 << 15];

static void __syncthreads() { swapcontext(&threads[threadIdx.x], &scheduler); }

template <class Run> void run_block(unsigned block, Run run) {
  static Run* body;
  static bool ended[1024];
  body = &run;
  for (unsigned i = 0; i < block; ++i) {
    ended[i] = false;
    getcontext(&threads[i]);
    threads[i].uc_stack.ss_sp = stacks[i];
    threads[i].uc_stack.ss_size = sizeof stacks[i];
    threads[i].uc_link = &scheduler;
    makecontext(&threads[i], [] { (*body)(), ended[threadIdx.x] = true; }, 0);
  }
  for (unsigned left = block; left > 0;)
    for (unsigned i = 0; i < block; ++i) {
      threadIdx.x = STEP > 0 ? i : block - 1 - i;
      if (ended[threadIdx.x]) continue;
      swapcontext(&scheduler, &threads[threadIdx.x]);
      left -= ended[threadIdx.x];
    }
}
#endif

// Every kernel takes one struct, by its address as cuLaunchKernel does.
template <class Struct>
void launch(void (*kernel)(Struct), unsigned blocks, unsigned block, const void* argument) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    run_block(block, [&] { kernel(*static_cast<const Struct*>(argument)); });
}

// The size of the struct: the launcher's is checked against it.
template <class Struct> constexpr int size_of_argument(void (*)(Struct)) { return sizeof(Struct); }

#define EXPORT(NAME, ...)                                                            \
  PUBLIC void NAME(unsigned blocks, unsigned block, const void* argument) {          \
    launch(&__VA_ARGS__, blocks, block, argument);                                   \
  }                                                                                  \
  PUBLIC int NAME##_size() { return size_of_argument(&__VA_ARGS__); }
