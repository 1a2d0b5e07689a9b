// A neuron over a whole sequence, and the batch norm before it: a kernel for forward and one for
// backward, sums over threads, spikes as bits. What one step of the neuron computes is not written here:
// Python puts it in the place of "step.h", read of the neuron's own step (../step/README.md).
//
// A step of the sequence is `size` neurons in storage order, so any dense layout will do. A thread
// owns VEC neighbouring neurons, carries their states through time in registers, and continues with those
// VEC * threads further. `threads` is a multiple of the distance, in packs of VEC, after which the
// channels repeat, so that a thread stays in one channel (or in the same VEC channels, LANES = VEC):
// it reads its operands once and sums their gradients in registers. Each writes its sums; a block per
// channel adds them up, in a fixed order.
//
// A kernel takes one struct by value. Its members are of 8 bytes, or pairs of floats, in the order in
// which cuda.py packs them: first what is the same for all calls of a plan.
//
// Up to LONGEST_SWEEP steps fit in registers. For longer sequences T stands for every length with the
// same remainder modulo SEGMENT: forward saves the states every SEGMENT steps (`checkpoint`), backward
// goes through the segments from the last to the first.
//
// Compiled without contraction (--fmad=false): a step must round as in PyTorch, and in backward as in
// forward, or a recomputed spike could differ from the one emitted. Fused multiply-adds are written as
// fmaf.
//
// No standard headers: NVRTC compiles this text for a GPU and, under a prelude that defines the CUDA
// keywords, a C++ compiler for the tests. BLOCK, ADDERS, SEGMENT, LONGEST_SWEEP, MOST_TOTALS and the
// bits of NEEDS come from kernels.py; STATES, OPERANDS, TOTALS, CONSTANTS and LIVE are those of the step.

typedef long long index_t;

// How neurons or values are distributed over threads: kernels.Grid.
struct Grid { index_t size, threads, inner, channels; };

// Where a channel's sums by threads lie: `run` neighbours in each of `rows`.
struct Partials { index_t rows, run, channels; };

__device__ constexpr int steps_in_registers(int T) { return T <= LONGEST_SWEEP ? T : SEGMENT; }
__device__ constexpr int steps_left(int T) { return T <= LONGEST_SWEEP ? 0 : T % SEGMENT; }

// Blackwell's compiler takes more registers for the same lines.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
__device__ constexpr bool IS_BLACKWELL = true;
#else
__device__ constexpr bool IS_BLACKWELL = false;
#endif

// Blocks per multiprocessor promised to the compiler for backward, which bounds a thread's registers:
// 96 for 5 blocks, 128 for 4, 168 for 3. Fewer could not hide the latency of memory; with v_seq's
// gradients a thread requests more bytes at a time, and needs more registers. LIVE is how many values
// of a step backward holds at a time.
__device__ constexpr int resident_blocks(bool norm, int needs, bool grad_v_seq, int T) {
  const bool makes_several = needs != NEED_X && needs != NEED_NORM;
  const bool makes_all = needs & NEED_X && needs & NEED_NORM && TOTALS > 2;
  const int less = norm * (makes_several + makes_all) + (steps_left(T) > 0 || LIVE > 6) +
                   (IS_BLACKWELL && steps_in_registers(T) >= SEGMENT);
  return grad_v_seq || STATES > 1 || less > 2 ? 3 : 5 - less;
}

// Arrays of C++ are not empty.
__device__ constexpr int room(int n) { return n > 0 ? n : 1; }
__device__ constexpr int even(int n) { return (n + 1) / 2 * 2; }

// ---- PTX ------------------------------------------------------------------------------------------
// The host build has these in C++.

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// 1 / x to one unit in the last place; the IEEE division costs a call. Used in backward only.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// The compiler would split most plain assignments into 4 bytes each, and delay a plain load until the
// word is used, so that the latencies of a sequence's loads add up.
__device__ __forceinline__ void load_word(const unsigned short* from, unsigned short& word) {
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(word) : "l"(from));
}

__device__ __forceinline__ void load_word(const unsigned int* from, unsigned int& word) {
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(from));
}

__device__ __forceinline__ void load_word(const uint2* from, uint2& word) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(from));
}

__device__ __forceinline__ void load_word(const uint4* from, uint4& word) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w) : "l"(from));
}

__device__ __forceinline__ void store_word(unsigned short* to, unsigned short word) {
  asm("st.global.u16 [%0], %1;" : : "l"(to), "h"(word));
}

__device__ __forceinline__ void store_word(unsigned int* to, unsigned int word) {
  asm("st.global.u32 [%0], %1;" : : "l"(to), "r"(word));
}

__device__ __forceinline__ void store_word(uint2* to, uint2 word) {
  asm("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(word.x), "r"(word.y));
}

__device__ __forceinline__ void store_word(uint4* to, uint4 word) {
  asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
      : : "l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w));
}
#endif

// ---- numbers -----------------------------------------------------------------------------------

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

union Bits { float value; unsigned int bits; };

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(bfloat16 x) {
  Bits f;
  f.bits = (unsigned int)x.bits << 16;
  return f.value;
}

__device__ __forceinline__ float to_float(float16 x) { return half_to_float(x.bits); }

__device__ __forceinline__ void from_float(float x, float& y) { y = x; }

__device__ __forceinline__ void from_float(float x, bfloat16& y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  Bits f;
  f.value = x;
  // To the nearest, ties to even; a NaN must not be rounded up to infinity.
  y.bits = x != x ? 0x7fff : (f.bits + 0x7fff + (f.bits >> 16 & 1)) >> 16;
#endif
}

__device__ __forceinline__ void from_float(float x, float16& y) { y.bits = float_to_half(x); }

// a / b as IEEE rounds it and PyTorch: by 1 / b, and two corrections by the remainder. The compiler's
// division branches, and loads do not move across branches; that of 1 / b leaves loops over time.
__device__ __forceinline__ float quotient(float a, float b) {
  const float y = 1.0f / b, rough = a * y;
  const float near = fmaf(fmaf(-rough, b, a), y, rough);
  const float exact = fmaf(fmaf(-near, b, a), y, near);
  return fabsf(exact) > 0.0f ? exact : rough;  // of infinities and of -0
}

// ---- memory ------------------------------------------------------------------------------------

template <int BYTES> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned int type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };
template <> struct Word<32> { typedef uint4 type; };

template <class word_t>
__device__ __forceinline__ void load_word(const word_t* from, word_t& word) { word = *from; }

template <class word_t>
__device__ __forceinline__ void store_word(word_t* to, word_t word) { *to = word; }

// VEC neighbours, moved in words of up to 16 bytes.
template <class scalar_t, int VEC>
union Pack {
  typedef typename Word<sizeof(scalar_t) * VEC>::type word_t;
  static constexpr int WORDS = sizeof(scalar_t) * VEC / sizeof(word_t);
  scalar_t lane[VEC];
  word_t word[WORDS];
};

template <class scalar_t, int VEC>
__device__ __forceinline__ void fetch(const scalar_t* from, Pack<scalar_t, VEC>& to) {
#pragma unroll
  for (int i = 0; i < to.WORDS; ++i)
    load_word(reinterpret_cast<const typename Pack<scalar_t, VEC>::word_t*>(from) + i, to.word[i]);
}

template <class scalar_t, int VEC>
__device__ __forceinline__ void store(const Pack<scalar_t, VEC>& from, scalar_t* to) {
#pragma unroll
  for (int i = 0; i < from.WORDS; ++i)
    store_word(reinterpret_cast<typename Pack<scalar_t, VEC>::word_t*>(to) + i, from.word[i]);
}

template <int VEC, class scalar_t>
__device__ __forceinline__ void load(const scalar_t* from, float (&to)[VEC]) {
  Pack<scalar_t, VEC> pack;
  fetch(from, pack);
#pragma unroll
  for (int i = 0; i < VEC; ++i) to[i] = to_float(pack.lane[i]);
}

template <int VEC, class scalar_t>
__device__ __forceinline__ void store(const float (&from)[VEC], scalar_t* to) {
  Pack<scalar_t, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) from_float(from[i], pack.lane[i]);
  store(pack, to);
}

template <int VEC>
__device__ __forceinline__ void load_or_fill(const float* from, index_t at, float fill,
                                             float (&to)[VEC]) {
  if (from) {
    load(from + at, to);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) to[i] = fill;
  }
}

// ---- the neuron --------------------------------------------------------------------------------

#include "step.h"

// A batch norm, of which weight and bias may be null.
struct Norm {
  const float *mean, *rstd, *weight, *bias;

  __device__ __forceinline__ float gain(index_t channel) const {
    return weight ? weight[channel] * rstd[channel] : rstd[channel];
  }
};

// What a neuron's kernel takes: first what does not change between the calls of a plan; then its
// operands, each of which has a value for every channel (`stride` 1) or one for all (0).
template <class scalar_t>
struct Operands : Grid {
  index_t steps, stride[room(OPERANDS)];
  float constants[even(room(CONSTANTS))];
  const scalar_t* x;
  const float *v0[room(STATES)], *operands[room(OPERANDS)];
  Norm norm;
};

// The operands of a thread's neurons: one set for all (LANES = 1) or one for each (LANES = VEC).
template <int LANES, bool NORM>
struct Neuron {
  float p[room(OPERANDS)][LANES];
  float mean[LANES], gain[LANES], bias[LANES];  // of the norm
  float a[LANES], b[LANES];                     // what x's gradient lacks: a + b (x - mean)

  // `at` is the position of the thread's first neuron in a step. With LANES > 1 neighbours are of
  // successive channels.
  template <class scalar_t>
  __device__ __forceinline__ Neuron(const Operands<scalar_t>& c, const float* ab, index_t at) {
    const index_t first = at / c.inner % c.channels;
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      const index_t channel = first + i;
#pragma unroll
      for (int k = 0; k < OPERANDS; ++k) p[k][i] = c.operands[k][channel * c.stride[k]];
      if (NORM) {
        mean[i] = c.norm.mean[channel];
        gain[i] = c.norm.gain(channel);
        bias[i] = c.norm.bias ? c.norm.bias[channel] : 0.0f;
        a[i] = ab ? ab[channel] : 0.0f;
        b[i] = ab ? ab[c.channels + channel] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ static int lane(int i) { return LANES == 1 ? 0 : i; }

  __device__ __forceinline__ float centred(float x, int i) const { return x - mean[lane(i)]; }

  __device__ __forceinline__ float input(float x, int i) const {
    return NORM ? fmaf(centred(x, i), gain[lane(i)], bias[lane(i)]) : x;
  }
};

template <int VEC>
__device__ __forceinline__ void load_states(const float* const* from, index_t at, const float* fill,
                                            float (&to)[room(STATES)][VEC]) {
#pragma unroll
  for (int k = 0; k < STATES; ++k) load_or_fill(from[k], at, fill ? fill[k] : 0.0f, to[k]);
}

template <int VEC>
__device__ __forceinline__ void store_states(const float (&from)[room(STATES)][VEC],
                                             float* const* to, index_t at) {
#pragma unroll
  for (int k = 0; k < STATES; ++k)
    if (to[k]) store(from[k], to[k] + at);
}

// The states at the beginning of a segment but the first.
template <int VEC>
__device__ __forceinline__ void save_states(const float (&from)[room(STATES)][VEC], float* to,
                                            index_t segment, index_t size, index_t at) {
#pragma unroll
  for (int k = 0; k < STATES; ++k)
    if (to) store(from[k], to + ((segment - 1) * STATES + k) * size + at);
}

template <int VEC>
__device__ __forceinline__ void reload_states(const float* from, index_t segment, index_t size,
                                              index_t at, float (&to)[room(STATES)][VEC]) {
#pragma unroll
  for (int k = 0; k < STATES; ++k) load(from + ((segment - 1) * STATES + k) * size + at, to[k]);
}

// ---- forward -----------------------------------------------------------------------------------

template <class scalar_t>
struct Forward : Operands<scalar_t> {
  scalar_t* spike;
  float *v_last[room(STATES)], *v_seq, *checkpoint;
  unsigned char* bits;
  float v_init[even(room(STATES))];
};

// STEPS steps that begin at `here`, from the states `v` to those after them. A neuron's spikes of
// 8 steps make a byte of bits, the first step its lowest bit.
template <int STEPS, bool STORE_V_SEQ, bool PACK, class N, class scalar_t, int VEC>
__device__ __forceinline__ void forward_segment(const N& neuron, const Forward<scalar_t>& c,
                                                index_t here, index_t byte_here,
                                                float (&v)[room(STATES)][VEC]) {
  float x_t[STEPS][VEC];
  unsigned int byte[VEC] = {};
#pragma unroll
  for (int t = 0; t < STEPS; ++t) load(c.x + here + t * c.size, x_t[t]);
#pragma unroll
  for (int t = 0; t < STEPS; ++t) {
    float s[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      s[i] = step_forward(neuron.input(x_t[t][i], i), v, neuron.p, c.constants, i, neuron.lane(i));
      if (PACK && s[i] != 0.0f) byte[i] |= 1u << t % 8;
    }
    store(s, c.spike + here + t * c.size);
    if (STORE_V_SEQ) store(v[0], c.v_seq + here + t * c.size);
    if (PACK && (t % 8 == 7 || t == STEPS - 1)) {
      Pack<unsigned char, VEC> bytes;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        bytes.lane[i] = (unsigned char)byte[i];
        byte[i] = 0;
      }
      store(bytes, c.bits + byte_here + t / 8 * c.size);
    }
  }
}

template <class scalar_t, int T, int VEC, int LANES, bool STORE_V_SEQ, bool NORM, bool PACK>
__global__ void __launch_bounds__(BLOCK, STATES > 1 || (NORM && LANES > 2) ? 6 : 8)  // 80 registers, or 64
neuron_forward(const Forward<scalar_t> c) {
  constexpr int STEPS = steps_in_registers(T), LEFT = steps_left(T), BYTES = SEGMENT / 8;
  static_assert(!PACK || T <= LONGEST_SWEEP || SEGMENT % 8 == 0, "a segment fills its bytes");
  const int segments = T <= LONGEST_SWEEP ? 1 : (int)(c.steps / SEGMENT);
  const index_t thread = (index_t)blockIdx.x * BLOCK + threadIdx.x, size = c.size;
  if (thread >= c.threads) return;
  const Neuron<LANES, NORM> neuron(c, nullptr, thread * VEC);
#pragma unroll 1
  for (index_t at = thread * VEC; at < size; at += c.threads * VEC) {
    float v[room(STATES)][VEC];
    load_states(c.v0, at, c.v_init, v);
#pragma unroll 1
    for (int segment = 0; segment < segments; ++segment) {
      if (segment > 0) save_states(v, c.checkpoint, segment, size, at);
      forward_segment<STEPS, STORE_V_SEQ, PACK>(neuron, c, segment * STEPS * size + at,
                                                segment * BYTES * size + at, v);
    }
    if constexpr (LEFT > 0) {
      save_states(v, c.checkpoint, segments, size, at);
      forward_segment<LEFT, STORE_V_SEQ, PACK>(neuron, c, segments * STEPS * size + at,
                                               segments * BYTES * size + at, v);
    }
    store_states(v, c.v_last, at);
  }
}

// ---- backward ----------------------------------------------------------------------------------

// A thread's sums per channel.
template <int LANES>
struct Sums {
  float total[room(TOTALS)][LANES];
  float y[LANES], y_x[LANES];  // Y's gradient, and Y's gradient times x - mean
};

template <class scalar_t>
struct Backward : Operands<scalar_t> {
  const scalar_t* grad_spike;
  const float *grad_v_last[room(STATES)], *grad_v_seq, *checkpoint;
  scalar_t* grad_x;
  float* grad_v0[room(STATES)];
  const float* ab;
  float* partial;
  float v_init[even(room(STATES))];
};

// STEPS steps that begin at `here`: from the gradients of the states after them to those before them.
template <int STEPS, bool GRAD_V_SEQ, int NEEDS, int LANES, bool NORM, class scalar_t, int VEC>
__device__ __forceinline__ void backward_segment(const Neuron<LANES, NORM>& neuron,
                                                 const Backward<scalar_t>& c, index_t here,
                                                 const float (&v_start)[room(STATES)][VEC],
                                                 float (&grad_v)[room(STATES)][VEC],
                                                 Sums<LANES>& sums) {
  Pack<scalar_t, VEC> x_t[STEPS], grad_spike_t[STEPS];
  float v[STEPS][room(STATES)][VEC];  // before each step
#pragma unroll
  for (int t = 0; t < STEPS; ++t) fetch(c.x + here + t * c.size, x_t[t]);
#pragma unroll
  for (int t = STEPS - 1; t >= 0; --t) fetch(c.grad_spike + here + t * c.size, grad_spike_t[t]);
#pragma unroll
  for (int t = 0; t < STEPS; ++t) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
#pragma unroll
      for (int k = 0; k < STATES; ++k) v[t][k][i] = t == 0 ? v_start[k][i] : v[t - (t > 0)][k][i];
      if (t > 0) {
        const float y = neuron.input(to_float(x_t[t - (t > 0)].lane[i]), i);
        step_forward(y, v[t], neuron.p, c.constants, i, neuron.lane(i));
      }
    }
  }
#pragma unroll
  for (int t = STEPS - 1; t >= 0; --t) {
    float grad_x_t[VEC], grad_v_t[VEC];
    if (GRAD_V_SEQ) load(c.grad_v_seq + here + t * c.size, grad_v_t);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const int lane = neuron.lane(i);
      const float x = to_float(x_t[t].lane[i]);
      if (GRAD_V_SEQ) grad_v[0][i] += grad_v_t[i];
      const float grad_y =
          step_backward<NEEDS>(neuron.input(x, i), v[t], neuron.p, c.constants,
                               to_float(grad_spike_t[t].lane[i]), grad_v, sums.total, i, lane);
      grad_x_t[i] = grad_y;
      if (NORM) {
        const float centred = neuron.centred(x, i);
        if (NEEDS & NEED_NORM) {
          sums.y[lane] += grad_y;
          sums.y_x[lane] = fmaf(grad_y, centred, sums.y_x[lane]);
        }
        // Both in one launch: running statistics, with nothing to subtract. (0 * inf would be NaN.)
        const float coupled = fmaf(neuron.b[lane], centred, neuron.a[lane]);
        grad_x_t[i] = NEEDS & NEED_NORM ? neuron.gain[lane] * grad_y
                                        : fmaf(neuron.gain[lane], grad_y, -coupled);
      }
    }
    if (NEEDS & NEED_X) store(grad_x_t, c.grad_x + here + t * c.size);
  }
}

template <class scalar_t, int T, int VEC, int LANES, bool GRAD_V_SEQ, bool NORM, int NEEDS>
__global__ void
__launch_bounds__(BLOCK, resident_blocks(NORM, NEEDS, GRAD_V_SEQ, T))
neuron_backward(const Backward<scalar_t> c) {
  constexpr int STEPS = steps_in_registers(T), LEFT = steps_left(T);
  const int segments = T <= LONGEST_SWEEP ? 1 : (int)(c.steps / SEGMENT);
  const index_t thread = (index_t)blockIdx.x * BLOCK + threadIdx.x, size = c.size;
  if (thread >= c.threads) return;
  const Neuron<LANES, NORM> neuron(c, c.ab, thread * VEC);
  Sums<LANES> sums = {};
#pragma unroll 1
  for (index_t at = thread * VEC; at < size; at += c.threads * VEC) {
    float v[room(STATES)][VEC], grad_v[room(STATES)][VEC];
    load_states(c.grad_v_last, at, nullptr, grad_v);
    if constexpr (LEFT > 0) {
      reload_states(c.checkpoint, segments, size, at, v);
      backward_segment<LEFT, GRAD_V_SEQ, NEEDS>(neuron, c, segments * STEPS * size + at, v, grad_v,
                                                sums);
    }
#pragma unroll 1
    for (int segment = segments - 1; segment >= 0; --segment) {
      if (segment > 0)
        reload_states(c.checkpoint, segment, size, at, v);
      else
        load_states(c.v0, at, c.v_init, v);
      backward_segment<STEPS, GRAD_V_SEQ, NEEDS>(neuron, c, segment * STEPS * size + at, v, grad_v,
                                                 sums);
    }
    store_states(grad_v, c.grad_v0, at);
  }
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    index_t slot = thread * LANES + i;
    auto put = [&](float sum) {
      c.partial[slot] = sum;
      slot += c.threads * LANES;
    };
    if (NEEDS & NEED_NORM) {
      put(sums.y[i]);
      put(sums.y_x[i]);
    }
#pragma unroll
    for (int k = 0; k < TOTALS; ++k)
      if (NEEDS & NEED_TOTAL << k) put(sums.total[k][i]);
  }
}

// ---- sums over threads: a block per channel ----------------------------------------------------

// Runs a phase on every thread of the block, and waits for all of them. Where one thread runs after
// another, as in the host build, the first of a block runs it for all.
template <class Phase>
__device__ __forceinline__ void together(Phase phase) {
#ifdef ONE_AFTER_ANOTHER
  if (threadIdx.x == 0)
    for (int thread = 0; thread < ADDERS; ++thread) phase(thread);
#else
  phase((int)threadIdx.x);
  __syncthreads();
#endif
}

// A thread's share of a channel's partial sums: every ADDERS-th of them, 8 asked for together.
__device__ __forceinline__ double add_share(const float* from, const Partials& p, int thread) {
  const unsigned int run = p.run, rows = p.rows, down = ADDERS / run, right = ADDERS % run;
  unsigned int row = thread / run, at = thread % run;
  const index_t apart = p.channels * run, further = down * apart + right;
  const float* here = from + row * apart + at;
  double total = 0.0;
  while (row < rows) {
    float group[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      group[k] = row < rows ? *here : 0.0f;
      row += down;
      at += right;
      here += further;
      if (at >= run) {
        ++row;
        at -= run;
        here += apart - run;
      }
    }
#pragma unroll
    for (int half = 4; half > 0; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) group[k] += group[k + half];
    total += group[0];
  }
  return total;
}

// Adds up SUMS sums of the block's channel, and calls `finish` with them once. `partial` has them one
// behind the other, each of every thread.
template <int SUMS, class Finish>
__device__ __forceinline__ void add_up(const float* partial, const Partials& p, index_t channel,
                                       Finish finish) {
  __shared__ double sums[SUMS][ADDERS];
  together([&](int thread) {
    for (int k = 0; k < SUMS; ++k)
      sums[k][thread] =
          add_share(partial + (k * p.rows * p.channels + channel) * p.run, p, thread);
  });
  for (int half = ADDERS / 2; half > 0; half /= 2)
    together([&](int thread) {
      if (thread < half)
        for (int k = 0; k < SUMS; ++k) sums[k][thread] += sums[k][thread + half];
    });
  together([&](int thread) {
    if (thread == 0) finish(sums);
  });
}

// The two kernels that add up are templates, of which NVRTC compiles only those that are named.
template <class sum_t>
struct NormGradients : Partials {
  double count;
  const sum_t* partial;
  Norm norm;
  float *ab, *grad_weight, *grad_bias;  // null if not needed
};

// A and B, and the gradients of weight and bias, from the sums of y's gradient and of its product
// with x - mean.
template <class sum_t>
__global__ void __launch_bounds__(ADDERS) norm_gradients(const NormGradients<sum_t> c) {
  const index_t channel = blockIdx.x;
  if (channel >= c.channels) return;
  add_up<2>(c.partial, c, channel, [&](const double (&sums)[2][ADDERS]) {
    const double rstd = c.norm.rstd[channel], gain = c.norm.gain(channel);
    const double to_bias = sums[0][0], to_weight = rstd * sums[1][0];
    if (c.grad_weight) c.grad_weight[channel] = (float)to_weight;
    if (c.grad_bias) c.grad_bias[channel] = (float)to_bias;
    if (c.ab) {
      c.ab[channel] = (float)(gain * to_bias / c.count);
      c.ab[c.channels + channel] = (float)(gain * rstd * to_weight / c.count);
    }
  });
}

template <class sum_t>
struct ParameterGradients : Partials {
  index_t first[MOST_TOTALS];  // which of the threads' sums make each total
  const sum_t* partial;
  float* total[MOST_TOTALS];
};

// Totals, each in blocks of its own. All sums are of one channel where these are scalars.
template <class sum_t>
__global__ void __launch_bounds__(ADDERS) parameter_gradients(const ParameterGradients<sum_t> c) {
  if (c.channels == 0) return;
  const index_t channel = blockIdx.x % c.channels, turn = blockIdx.x / c.channels;
  float* to = c.total[turn];
  add_up<1>(c.partial + c.first[turn] * c.rows * c.channels * c.run, c, channel,
            [&](const double (&sums)[1][ADDERS]) { to[channel] = (float)sums[0][0]; });
}

// ---- spikes as bits, counts as four bits -------------------------------------------------------

template <class scalar_t>
struct Packing {
  index_t threads, steps, neurons;
  scalar_t* values;
  unsigned char* bytes;
};

// What a thread moves: VEC bytes, and ROWS times VEC values, `rows` of which there are. A byte has a
// neuron's spikes of 8 steps, the first its lowest bit, or the counts of two neighbours.
template <class scalar_t, int VEC, bool COUNTS>
struct Share {
  static constexpr int ROWS = COUNTS ? 2 : 8, MOST = COUNTS ? 15 : 1;  // a count of 15 is NaN
  scalar_t* values;
  unsigned char* bytes;
  index_t apart, rows;

  __device__ __forceinline__ Share(const Packing<scalar_t>& c, index_t thread)
      : bytes(c.bytes + thread * VEC), apart(COUNTS ? VEC : c.neurons) {
    const index_t word = COUNTS ? 0 : thread * VEC / c.neurons, at = thread * VEC % c.neurons;
    const index_t first = COUNTS ? 2 * thread * VEC : 8 * word * c.neurons + at;
    values = c.values + first;
    rows = COUNTS ? (c.neurons - first) / VEC : c.steps - 8 * word;
  }

  // Where the value in lane i of row k lies.
  __device__ static constexpr int byte(int k, int i) { return COUNTS ? (k * VEC + i) / 2 : i; }
  __device__ static constexpr int shift(int k, int i) { return COUNTS ? (k * VEC + i) % 2 * 4 : k; }
};

template <class scalar_t, int VEC, bool COUNTS>
__global__ void __launch_bounds__(BLOCK) pack(const Packing<scalar_t> c) {
  const index_t thread = (index_t)blockIdx.x * BLOCK + threadIdx.x;
  if (thread >= c.threads) return;
  const Share<scalar_t, VEC, COUNTS> own(c, thread);
  Pack<scalar_t, VEC> values[own.ROWS];
  Pack<unsigned char, VEC> bytes = {};
#pragma unroll
  for (int k = 0; k < own.ROWS; ++k)
    if (k < own.rows) fetch(own.values + k * own.apart, values[k]);
#pragma unroll
  for (int k = 0; k < own.ROWS; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float value = k < own.rows ? to_float(values[k].lane[i]) : 0.0f;
      const int digit = COUNTS ? (value != value ? 15 : (int)value & 15) : value != 0.0f;
      bytes.lane[own.byte(k, i)] |= digit << own.shift(k, i);
    }
  }
  store(bytes, own.bytes);
}

template <class scalar_t, int VEC, bool COUNTS>
__global__ void __launch_bounds__(BLOCK) unpack(const Packing<scalar_t> c) {
  const index_t thread = (index_t)blockIdx.x * BLOCK + threadIdx.x;
  if (thread >= c.threads) return;
  const Share<scalar_t, VEC, COUNTS> own(c, thread);
  Pack<unsigned char, VEC> bytes;
  fetch(own.bytes, bytes);
#pragma unroll
  for (int k = 0; k < own.ROWS; ++k) {
    float values[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const int digit = bytes.lane[own.byte(k, i)] >> own.shift(k, i) & own.MOST;
      values[i] = digit == 15 ? 0.0f / 0.0f : digit;
    }
    if (k < own.rows) store(values, own.values + k * own.apart);
  }
}
