// ALIF over a whole sequence: one kernel forward, one backward. README.md beside this file derives
// the gradients; reference.py is the definition these kernels are tested against.
//
// A step of the sequence is `size` neurons in storage order, so any dense layout will do. A thread
// owns VEC neighbouring neurons, carries them through time in registers, and goes on to those
// VEC * threads further. `threads` is a multiple of the distance, in packs of VEC, after which the
// channels repeat, so that a thread meets the same channel (or the same VEC channels, LANES = VEC)
// all along: it reads its parameters once and sums their gradients in registers. No shared memory,
// no atomics, no synchronisation: results do not depend on the order in which threads run.
//
// Up to 16 steps fit in registers. For longer sequences T stands for every length that leaves the
// same rest when divided by SEGMENT: forward keeps the voltage every SEGMENT steps (`checkpoint`),
// backward goes through the segments from the last to the first.
//
// Compiled without contraction (--fmad=false): the charge must round as it does in PyTorch, and in
// backward as in forward, or a recomputed spike could differ from the one emitted. Fused
// multiply-adds are written out as fmaf.
//
// Standard headers are not needed and not available: the same text is compiled by NVRTC for a GPU
// and, under a prelude that defines the CUDA keywords, by a C++ compiler for the tests. BLOCK,
// SEGMENT, LONGEST_SWEEP, the values of RESET and the bits of NEEDS come from kernels.py.

typedef long long index_t;

constexpr float FLOAT_MAX = 3.402823466e38f;

__device__ constexpr int steps_in_registers(int T) { return T <= LONGEST_SWEEP ? T : SEGMENT; }
__device__ constexpr int steps_left(int T) { return T <= LONGEST_SWEEP ? 0 : T % SEGMENT; }

// Blocks per multiprocessor promised to the compiler, which bounds a thread's registers: 64 for 8
// blocks, 128 for 4, 168 for 3, 255 for 2. Without a bound it would load every gradient ahead and
// use three times as many. A soft reset and the gradients of v_seq keep more values alive: a block
// fewer for each of them.
__device__ constexpr int resident_blocks(int values, bool soft, bool grad_v_seq) {
  return (values <= 9 ? 8 : values <= 20 ? 4 : 3) - soft - grad_v_seq;
}

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

__device__ __forceinline__ float to_float(float16 x) {
#ifdef __CUDA_ARCH__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  _Float16 h;
  __builtin_memcpy(&h, &x.bits, sizeof h);
  return h;
#endif
}

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

__device__ __forceinline__ void from_float(float x, float16& y) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  _Float16 h = (_Float16)x;
  __builtin_memcpy(&y.bits, &h, sizeof h);
#endif
}

// 1 / x to one unit in the last place; the IEEE division costs a call. Used in backward only.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

// ---- memory ------------------------------------------------------------------------------------

template <int BYTES> struct Word;
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned int type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };
template <> struct Word<32> { typedef uint4 type; };

// By hand on the GPU: of plain assignments the compiler splits most into 4 bytes each.
#ifdef __CUDA_ARCH__
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
#else
template <class word_t> void store_word(word_t* to, word_t word) { *to = word; }
#endif

// VEC neighbours, moved in words of up to 16 bytes.
template <class scalar_t, int VEC>
union Pack {
  typedef typename Word<sizeof(scalar_t) * VEC>::type word_t;
  static constexpr int WORDS = sizeof(scalar_t) * VEC / sizeof(word_t);
  scalar_t lane[VEC];
  word_t word[WORDS];
};

template <int VEC, class scalar_t>
__device__ __forceinline__ void load(const scalar_t* from, float (&to)[VEC]) {
  typedef Pack<scalar_t, VEC> pack_t;
  pack_t pack;
#pragma unroll
  for (int i = 0; i < pack_t::WORDS; ++i)
    pack.word[i] = reinterpret_cast<const typename pack_t::word_t*>(from)[i];
#pragma unroll
  for (int i = 0; i < VEC; ++i) to[i] = to_float(pack.lane[i]);
}

template <int VEC, class scalar_t>
__device__ __forceinline__ void store(const float (&from)[VEC], scalar_t* to) {
  typedef Pack<scalar_t, VEC> pack_t;
  pack_t pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) from_float(from[i], pack.lane[i]);
#pragma unroll
  for (int i = 0; i < pack_t::WORDS; ++i)
    store_word(reinterpret_cast<typename pack_t::word_t*>(to) + i, pack.word[i]);
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

// The parameters of a thread's neurons: one pair for all (LANES = 1) or one for each (LANES = VEC).
template <int LANES, int RESET, bool DECAY_INPUT>
struct Neuron {
  float q[LANES], v_threshold[LANES], v_reset;

  // `at` is the position of the thread's first neuron in a step.
  __device__ __forceinline__ Neuron(const float* w, const float* threshold, float v_reset,
                                    index_t at, index_t inner, index_t channels)
      : v_reset(RESET == HARD ? v_reset : 0.0f) {
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      index_t channel = (at + i) / inner % channels;
      q[i] = 1.0f / (1.0f + expf(-w[channel]));
      v_threshold[i] = threshold[channel];
    }
  }

  __device__ __forceinline__ static int lane(int i) { return LANES == 1 ? 0 : i; }

  // PyTorch's order of operations, unfused.
  __device__ __forceinline__ float charge(float x, float v, int i) const {
    float above_reset = RESET == HARD ? v - v_reset : v;
    return DECAY_INPUT ? v + (x - above_reset) * q[lane(i)] : v - above_reset * q[lane(i)] + x;
  }

  __device__ __forceinline__ bool fires(float h, int i) const { return h >= v_threshold[lane(i)]; }

  __device__ __forceinline__ float reset(float h, int i) const {
    float after_spike = RESET == SOFT ? h - v_threshold[lane(i)] : v_reset;
    return fires(h, i) ? after_spike : h;
  }

  // The same number, written so that the compiler does not recognise it: it would keep the voltages
  // of the whole sequence in registers, beside h, rather than subtract again.
  __device__ __forceinline__ float reset_again(float h, int i) const {
    return RESET == SOFT ? h - (fires(h, i) ? v_threshold[lane(i)] : 0.0f) : reset(h, i);
  }
};

// ---- forward -----------------------------------------------------------------------------------

// STEPS steps that begin at `here`, from the voltage `v` to the one after them.
template <int STEPS, bool STORE_V_SEQ, class N, class scalar_t, int VEC>
__device__ __forceinline__ void forward_segment(const N& neuron, const scalar_t* x, scalar_t* spike,
                                                float* v_seq, index_t here, index_t size,
                                                float (&v)[VEC]) {
  float x_t[STEPS][VEC];
#pragma unroll
  for (int t = 0; t < STEPS; ++t) load(x + here + t * size, x_t[t]);
#pragma unroll
  for (int t = 0; t < STEPS; ++t) {
    float s[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      float h = neuron.charge(x_t[t][i], v[i], i);
      s[i] = neuron.fires(h, i) ? 1.0f : 0.0f;
      v[i] = neuron.reset(h, i);
    }
    store(s, spike + here + t * size);
    if (STORE_V_SEQ) store(v, v_seq + here + t * size);
  }
}

template <class scalar_t, int T, int VEC, int LANES, int RESET, bool DECAY_INPUT, bool STORE_V_SEQ>
__global__ void __launch_bounds__(BLOCK, 8)
alif_forward(const scalar_t* __restrict__ x, const float* __restrict__ v0, float v_init,
             const float* __restrict__ w, const float* __restrict__ v_threshold, float v_reset,
             scalar_t* __restrict__ spike, float* __restrict__ v_last, float* __restrict__ v_seq,
             float* __restrict__ checkpoint, index_t steps, index_t size, index_t threads,
             index_t inner, index_t channels) {
  constexpr int STEPS = steps_in_registers(T), LEFT = steps_left(T);
  const int segments = T <= LONGEST_SWEEP ? 1 : (int)(steps / SEGMENT);
  const index_t thread = (index_t)blockIdx.x * BLOCK + threadIdx.x;
  if (thread >= threads) return;
  Neuron<LANES, RESET, DECAY_INPUT> neuron(w, v_threshold, v_reset, thread * VEC, inner, channels);
#pragma unroll 1
  for (index_t at = thread * VEC; at < size; at += threads * VEC) {
    float v[VEC];
    load_or_fill(v0, at, v_init, v);
#pragma unroll 1
    for (int segment = 0; segment < segments; ++segment) {
      if (segment > 0 && checkpoint) store(v, checkpoint + (segment - 1) * size + at);
      forward_segment<STEPS, STORE_V_SEQ>(neuron, x, spike, v_seq, segment * STEPS * size + at,
                                          size, v);
    }
    if constexpr (LEFT > 0) {
      if (checkpoint) store(v, checkpoint + (segments - 1) * size + at);
      forward_segment<LEFT, STORE_V_SEQ>(neuron, x, spike, v_seq, segments * STEPS * size + at,
                                         size, v);
    }
    store(v, v_last + at);
  }
}

// ---- backward ----------------------------------------------------------------------------------

// STEPS steps that begin at `here`: from dL/dV after them to dL/dV before them, in `grad_v`.
template <int STEPS, bool GRAD_V_SEQ, bool DETACH_RESET, int NEEDS, class Surrogate, int LANES,
          int RESET, bool DECAY_INPUT, class scalar_t, int VEC>
__device__ __forceinline__ void backward_segment(
    const Neuron<LANES, RESET, DECAY_INPUT>& neuron, const scalar_t* grad_spike,
    const float* grad_v_seq, const scalar_t* x, scalar_t* grad_x, float a, float b, index_t steps,
    index_t here, index_t size, const float (&v_start)[VEC], float (&grad_v)[VEC],
    float (&sum_w)[LANES], float (&sum_v_threshold)[LANES]) {
  float h[STEPS][VEC];
#pragma unroll
  for (int t = 0; t < STEPS; ++t) {
    load(x + here + t * size, h[t]);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      float v = t == 0 ? v_start[i] : neuron.reset(h[t == 0 ? 0 : t - 1][i], i);
      h[t][i] = neuron.charge(h[t][i], v, i);
    }
  }
#pragma unroll
  for (int t = STEPS - 1; t >= 0; --t) {
    // Never taken, which the compiler cannot know: it stops it from loading every gradient ahead.
    if (STEPS >= 8 && t % 4 == 3 && t >= steps) break;
    float grad_s[VEC], grad_v_t[VEC];
    load(grad_spike + here + t * size, grad_s);
    if (GRAD_V_SEQ) load(grad_v_seq + here + t * size, grad_v_t);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const int lane = neuron.lane(i);
      const float threshold = neuron.v_threshold[lane], q = neuron.q[lane], h_t = h[t][i];
      const float v = t == 0 ? v_start[i] : neuron.reset_again(h[t == 0 ? 0 : t - 1][i], i);
      const bool fired = neuron.fires(h_t, i);
      if (GRAD_V_SEQ) grad_v[i] += grad_v_t[i];
      // dL/dS comes from upstream, and through the reset unless that is left out.
      const bool overflow = RESET != SOFT && h_t > FLOAT_MAX;
      const float reset_by_spike =
          RESET == SOFT ? -threshold : overflow ? 0.0f : neuron.v_reset - h_t;
      const float grad = DETACH_RESET ? grad_s[i] : fmaf(grad_v[i], reset_by_spike, grad_s[i]);
      const float through_spike = grad * Surrogate::derivative(h_t - threshold, a, b);
      // Products, not choices, as PyTorch's: what is not finite stays so.
      const float past_reset = overflow ? 0.0f : (RESET == SOFT || !fired ? 1.0f : 0.0f) * grad_v[i];
      const float grad_h = through_spike + past_reset;
      if (NEEDS & NEED_V_THRESHOLD)
        sum_v_threshold[lane] -=
            through_spike + (RESET == SOFT ? (fired ? 1.0f : 0.0f) * grad_v[i] : 0.0f);
      if (NEEDS & NEED_W)
        sum_w[lane] = fmaf(grad_h, DECAY_INPUT ? h_t - v : v - neuron.v_reset, sum_w[lane]);
      grad_s[i] = DECAY_INPUT ? grad_h * q : grad_h;
      grad_v[i] = fmaf(-q, grad_h, grad_h);
    }
    if (NEEDS & NEED_X) store(grad_s, grad_x + here + t * size);
  }
}

template <class scalar_t, int T, int VEC, int LANES, int RESET, bool DECAY_INPUT, bool GRAD_V_SEQ,
          bool DETACH_RESET, int NEEDS, class Surrogate>
__global__ void
__launch_bounds__(BLOCK, resident_blocks(steps_in_registers(T) * VEC + LANES, RESET == SOFT,
                                         GRAD_V_SEQ))
alif_backward(const scalar_t* __restrict__ grad_spike, const float* __restrict__ grad_v_last,
              const float* __restrict__ grad_v_seq, const scalar_t* __restrict__ x,
              const float* __restrict__ v0, float v_init, const float* __restrict__ w,
              const float* __restrict__ v_threshold, float v_reset,
              const float* __restrict__ checkpoint, float a, float b,
              scalar_t* __restrict__ grad_x, float* __restrict__ grad_v0,
              float* __restrict__ partial, index_t steps, index_t size, index_t threads,
              index_t inner, index_t channels) {
  constexpr int STEPS = steps_in_registers(T), LEFT = steps_left(T);
  const int segments = T <= LONGEST_SWEEP ? 1 : (int)(steps / SEGMENT);
  const index_t thread = (index_t)blockIdx.x * BLOCK + threadIdx.x;
  if (thread >= threads) return;
  Neuron<LANES, RESET, DECAY_INPUT> neuron(w, v_threshold, v_reset, thread * VEC, inner, channels);
  float sum_w[LANES] = {}, sum_v_threshold[LANES] = {};
#pragma unroll 1
  for (index_t at = thread * VEC; at < size; at += threads * VEC) {
    float v[VEC], grad_v[VEC];
    load_or_fill(grad_v_last, at, 0.0f, grad_v);
    if constexpr (LEFT > 0) {
      load(checkpoint + (segments - 1) * size + at, v);
      backward_segment<LEFT, GRAD_V_SEQ, DETACH_RESET, NEEDS, Surrogate>(
          neuron, grad_spike, grad_v_seq, x, grad_x, a, b, steps, segments * STEPS * size + at,
          size, v, grad_v, sum_w, sum_v_threshold);
    }
#pragma unroll 1
    for (int segment = segments - 1; segment >= 0; --segment) {
      if (segment > 0)
        load(checkpoint + (segment - 1) * size + at, v);
      else
        load_or_fill(v0, at, v_init, v);
      backward_segment<STEPS, GRAD_V_SEQ, DETACH_RESET, NEEDS, Surrogate>(
          neuron, grad_spike, grad_v_seq, x, grad_x, a, b, steps, segment * STEPS * size + at,
          size, v, grad_v, sum_w, sum_v_threshold);
    }
    if (grad_v0) store(grad_v, grad_v0 + at);
  }
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    const float q = neuron.q[i];
    index_t slot = thread * LANES + i;
    if (NEEDS & NEED_W) {
      // dH/dw = q (1-q) (X - (V - V_reset)), which is (1-q) (H - V); or -q (1-q) (V - V_reset).
      partial[slot] = sum_w[i] * (DECAY_INPUT ? 1.0f - q : -q * (1.0f - q));
      slot += threads * LANES;
    }
    if (NEEDS & NEED_V_THRESHOLD) partial[slot] = sum_v_threshold[i];
  }
}
