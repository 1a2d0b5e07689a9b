// ALIF over a whole sequence, and the batch norm before it: a kernel for forward and one for backward,
// sums over threads, spikes as bits. README.md derives the gradients; reference.py is the definition.
//
// A step of the sequence is `size` neurons in storage order, so any dense layout will do. A thread
// owns VEC neighbouring neurons, carries them through time in registers, and continues with those
// VEC * threads further. `threads` is a multiple of the distance, in packs of VEC, after which the
// channels repeat, so that a thread stays in one channel (or in the same VEC channels, LANES = VEC):
// it reads its parameters once and sums their gradients in registers. Each writes its sums; a block per
// channel adds them up, in a fixed order.
//
// A kernel takes one struct by value. Its members are of 8 bytes, or pairs of floats, in the order in
// which cuda.py packs them: first what is the same for all calls of a plan.
//
// Up to LONGEST_SWEEP steps fit in registers. For longer sequences T stands for every length with the
// same remainder modulo SEGMENT: forward saves the voltage every SEGMENT steps (`checkpoint`), backward
// goes through the segments from the last to the first.
//
// Compiled without contraction (--fmad=false): the charge must round as in PyTorch, and in backward
// as in forward, or a recomputed spike could differ from the one emitted. Fused multiply-adds are
// written as fmaf.
//
// No standard headers: NVRTC compiles this text for a GPU and, under a prelude that defines the CUDA
// keywords, a C++ compiler for the tests. BLOCK, ADDERS, SEGMENT, LONGEST_SWEEP, the values of
// RESET and CHARGE and the bits of NEEDS come from kernels.py.

typedef long long index_t;

// How neurons or values are distributed over threads: kernels.Grid.
struct Grid { index_t size, threads, inner, channels; };

// Where a channel's sums by threads lie: `run` neighbours in each of `rows`.
struct Partials { index_t rows, run, channels; };

__device__ constexpr int steps_in_registers(int T) { return T <= LONGEST_SWEEP ? T : SEGMENT; }
__device__ constexpr int steps_left(int T) { return T <= LONGEST_SWEEP ? 0 : T % SEGMENT; }

// Blocks per multiprocessor promised to the compiler for backward, which bounds a thread's registers:
// 80 for 6 blocks, 96 for 5, 128 for 4, 168 for 3. Fewer could not hide the latency of memory; with
// v_seq's gradients a thread requests more bytes at a time, and needs more registers.
__device__ constexpr int resident_blocks(bool soft, bool norm, int needs, bool grad_v_seq,
                                         bool left) {
  const bool writes_and_sums = needs & NEED_X && needs != NEED_X;
  const bool all = soft && needs & NEED_X && needs & NEED_NORM;
  return grad_v_seq ? 3 : 6 - norm - (soft || (norm && writes_and_sums)) - (left || all);
}

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

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

// e^x for x <= 0, to 1e-6 of the largest value, 1; expf takes six instructions more.
__device__ __forceinline__ float exponential(float x) { return power_of_2(x * 1.44269504f); }

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

// A batch norm, of which weight and bias may be null.
struct Norm {
  const float *mean, *rstd, *weight, *bias;

  __device__ __forceinline__ float gain(index_t channel) const {
    return weight ? weight[channel] * rstd[channel] : rstd[channel];
  }
};

// What a neuron's kernel takes: first what does not change between the calls of a plan, a and b of the
// surrogate's; then its operands.
template <class scalar_t>
struct Operands : Grid {
  float v_reset, constant_w, constant_threshold, a, b, levels;
  index_t stride, steps;
  const scalar_t* x;
  const float *v0, *w, *v_threshold;
  Norm norm;
};

// The parameters of a thread's neurons: one set for all (LANES = 1) or one for each (LANES = VEC).
template <int LANES, int RESET, int CHARGE, bool NORM>
struct Neuron {
  float q[LANES], v_threshold[LANES], v_reset, levels;
  float mean[LANES], gain[LANES], bias[LANES];  // of the norm
  float a[LANES], b[LANES];                     // what x's gradient lacks: a + b (x - mean)
  float inverse[LANES];                         // of the threshold, for counts

  // `at` is the position of the thread's first neuron in a step. w and the threshold are numbers, or
  // tensors of every channel (`stride` 1) or one for all (0). With LANES > 1 neighbours are of
  // successive channels.
  template <class scalar_t>
  __device__ __forceinline__ Neuron(const Operands<scalar_t>& c, const float* ab, index_t at)
      : v_reset(RESET == HARD ? c.v_reset : 0.0f), levels(c.levels) {
    const index_t first = at / c.inner % c.channels;
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      const index_t channel = first + i;
      q[i] = 1.0f / (1.0f + expf(-(c.w ? c.w[channel * c.stride] : c.constant_w)));
      v_threshold[i] = c.v_threshold ? c.v_threshold[channel * c.stride] : c.constant_threshold;
      inverse[i] = 1.0f / v_threshold[i];
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

  // PyTorch's order of operations, unfused.
  __device__ __forceinline__ float charge(float x, float v, int i) const {
    float above_reset = RESET == HARD ? v - v_reset : v;
    if (CHARGE == NO_STATE) return x;
    if (CHARGE == NO_LEAK) return v + x;  // for an infinite v too
    if (CHARGE == DECAY_INPUT) return v + (x - above_reset) * q[lane(i)];
    if (RESET == COUNTS) return v * (1.0f - q[lane(i)]) + x;
    return v - above_reset * q[lane(i)] + x;
  }

  __device__ __forceinline__ bool fires(float h, int i) const { return h >= v_threshold[lane(i)]; }

  // H / V_th, by which a neuron counts, as IEEE rounds it and PyTorch: 1 / V_th, and two corrections
  // by the remainder. The compiler's division branches, and loads do not move across branches.
  __device__ __forceinline__ float over(float h, int i) const {
    const float threshold = v_threshold[lane(i)], y = inverse[lane(i)], rough = h * y;
    const float near = fmaf(fmaf(-rough, threshold, h), y, rough);
    const float exact = fmaf(fmaf(-near, threshold, h), y, near);
    return exact == exact ? exact : rough;  // of infinities
  }

  // Half to even; NaN stays NaN.
  __device__ __forceinline__ float count(float over) const {
    const float positive = over < 0.0f ? 0.0f : over;
    return rintf(positive > levels ? levels : positive);
  }

  // A spike, or a count.
  __device__ __forceinline__ float output(float h, int i) const {
    return RESET == COUNTS ? count(over(h, i)) : fires(h, i) ? 1.0f : 0.0f;
  }

  // (1 - S) H + S V_reset: where S = 1 and H = inf that is NaN.
  __device__ __forceinline__ float reset(float h, int i) const {
    if (RESET == COUNTS) return h - output(h, i) * v_threshold[lane(i)];
    float after_spike = RESET == SOFT ? h - v_threshold[lane(i)] : fmaf(0.0f, h, v_reset);
    return fires(h, i) ? after_spike : h;
  }

  // The same number, written so that the compiler does not recognise it: it would hold the voltages
  // of the whole sequence in registers, rather than subtract again.
  __device__ __forceinline__ float reset_again(float h, int i) const {
    return RESET == SOFT ? h - (fires(h, i) ? v_threshold[lane(i)] : 0.0f) : reset(h, i);
  }
};

// ---- forward -----------------------------------------------------------------------------------

template <class scalar_t>
struct Forward : Operands<scalar_t> {
  scalar_t* spike;
  float *v_last, *v_seq, *checkpoint;
  unsigned char* bits;
  float v_init, unused;
};

// STEPS steps that begin at `here`, from the voltage `v` to the one after them. A neuron's spikes of
// 8 steps make a byte of bits, the first step its lowest bit.
template <int STEPS, bool STORE_V_SEQ, bool PACK, class N, class scalar_t, int VEC>
__device__ __forceinline__ void forward_segment(const N& neuron, const Forward<scalar_t>& c,
                                                index_t here, index_t byte_here, float (&v)[VEC]) {
  float x_t[STEPS][VEC];
  unsigned int byte[VEC] = {};
#pragma unroll
  for (int t = 0; t < STEPS; ++t) load(c.x + here + t * c.size, x_t[t]);
#pragma unroll
  for (int t = 0; t < STEPS; ++t) {
    float s[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float h = neuron.charge(neuron.input(x_t[t][i], i), v[i], i);
      s[i] = neuron.output(h, i);
      if (PACK && s[i] != 0.0f) byte[i] |= 1u << t % 8;
      v[i] = neuron.reset(h, i);
    }
    store(s, c.spike + here + t * c.size);
    if (STORE_V_SEQ) store(v, c.v_seq + here + t * c.size);
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

template <class scalar_t, int T, int VEC, int LANES, int RESET, int CHARGE, bool STORE_V_SEQ,
          bool NORM, bool PACK>
__global__ void __launch_bounds__(BLOCK, NORM && LANES == 8 ? 6 : 8)  // 80 registers, or 64
alif_forward(const Forward<scalar_t> c) {
  constexpr int STEPS = steps_in_registers(T), LEFT = steps_left(T), BYTES = SEGMENT / 8;
  static_assert(!PACK || T <= LONGEST_SWEEP || SEGMENT % 8 == 0, "a segment fills its bytes");
  const int segments = T <= LONGEST_SWEEP ? 1 : (int)(c.steps / SEGMENT);
  const index_t thread = (index_t)blockIdx.x * BLOCK + threadIdx.x, size = c.size;
  if (thread >= c.threads) return;
  const Neuron<LANES, RESET, CHARGE, NORM> neuron(c, nullptr, thread * VEC);
#pragma unroll 1
  for (index_t at = thread * VEC; at < size; at += c.threads * VEC) {
    float v[VEC];
    load_or_fill(c.v0, at, c.v_init, v);
#pragma unroll 1
    for (int segment = 0; segment < segments; ++segment) {
      if (segment > 0 && c.checkpoint) store(v, c.checkpoint + (segment - 1) * size + at);
      forward_segment<STEPS, STORE_V_SEQ, PACK>(neuron, c, segment * STEPS * size + at,
                                                segment * BYTES * size + at, v);
    }
    if constexpr (LEFT > 0) {
      if (c.checkpoint) store(v, c.checkpoint + (segments - 1) * size + at);
      forward_segment<LEFT, STORE_V_SEQ, PACK>(neuron, c, segments * STEPS * size + at,
                                               segments * BYTES * size + at, v);
    }
    store(v, c.v_last + at);
  }
}

// ---- backward ----------------------------------------------------------------------------------

// A thread's sums per channel.
template <int LANES>
struct Sums {
  float w[LANES], v_threshold[LANES];
  float h[LANES], h_x[LANES];  // H's gradient, and H's gradient times x - mean
};

template <class scalar_t>
struct Backward : Operands<scalar_t> {
  const scalar_t* grad_spike;
  const float *grad_v_last, *grad_v_seq, *checkpoint;
  scalar_t* grad_x;
  float* grad_v0;
  const float* ab;
  float* partial;
  float v_init, unused;
};

// STEPS steps that begin at `here`: from dL/dV after them to dL/dV before them, in `grad_v`.
template <int STEPS, bool GRAD_V_SEQ, bool DETACH_RESET, int NEEDS, class Surrogate, int LANES,
          int RESET, int CHARGE, bool NORM, class scalar_t, int VEC>
__device__ __forceinline__ void backward_segment(
    const Neuron<LANES, RESET, CHARGE, NORM>& neuron, const Backward<scalar_t>& c, index_t here,
    const float (&v_start)[VEC], float (&grad_v)[VEC], Sums<LANES>& sums) {
  constexpr bool soft = RESET == SOFT || RESET == COUNTS;
  Pack<scalar_t, VEC> x_t[STEPS], grad_spike_t[STEPS];
  float h[STEPS][VEC];
#pragma unroll
  for (int t = 0; t < STEPS; ++t) fetch(c.x + here + t * c.size, x_t[t]);
#pragma unroll
  for (int t = STEPS - 1; t >= 0; --t) fetch(c.grad_spike + here + t * c.size, grad_spike_t[t]);
#pragma unroll
  for (int t = 0; t < STEPS; ++t) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float v = t == 0 ? v_start[i] : neuron.reset(h[t == 0 ? 0 : t - 1][i], i);
      h[t][i] = neuron.charge(neuron.input(to_float(x_t[t].lane[i]), i), v, i);
    }
  }
#pragma unroll
  for (int t = STEPS - 1; t >= 0; --t) {
    float grad_x_t[VEC], grad_v_t[VEC];
    if (GRAD_V_SEQ) load(c.grad_v_seq + here + t * c.size, grad_v_t);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const int lane = neuron.lane(i);
      const float threshold = neuron.v_threshold[lane], q = neuron.q[lane], h_t = h[t][i];
      const float v = t == 0 ? v_start[i] : neuron.reset_again(h[t == 0 ? 0 : t - 1][i], i);
      const float grad_s = to_float(grad_spike_t[t].lane[i]);
      const float over = RESET == COUNTS ? neuron.over(h_t, i) : h_t - threshold;
      const bool fired = neuron.fires(h_t, i);
      if (GRAD_V_SEQ) grad_v[i] += grad_v_t[i];
      // dL/dS is that from upstream, and that through the reset unless detached.
      const float gained = RESET == HARD ? fmaf(grad_v[i], neuron.v_reset, grad_s) : grad_s;
      const float lost = soft ? threshold : h_t;
      const float grad = DETACH_RESET ? grad_s : fmaf(-grad_v[i], lost, gained);
      float through_spike = grad * Surrogate::derivative(over, c.a, c.b);
      if (RESET == COUNTS) through_spike *= neuron.inverse[lane];
      // Products, not selections, as in PyTorch: what is not finite stays so.
      const float past_reset = soft || !fired ? 1.0f : 0.0f;
      const float grad_h = fmaf(past_reset, grad_v[i], through_spike);
      if (NEEDS & NEED_V_THRESHOLD) {
        sums.v_threshold[lane] -= RESET == COUNTS ? through_spike * over : through_spike;
        const float taken = RESET == COUNTS ? -neuron.count(over) : fired ? -1.0f : 0.0f;
        if (soft) sums.v_threshold[lane] = fmaf(taken, grad_v[i], sums.v_threshold[lane]);
      }
      if (NEEDS & NEED_W) {
        const float leaked = CHARGE == DECAY_INPUT ? h_t - v : v - neuron.v_reset;
        sums.w[lane] = fmaf(grad_h, leaked, sums.w[lane]);
      }
      const float grad_y = CHARGE == DECAY_INPUT ? grad_h * q : grad_h;
      grad_x_t[i] = grad_y;
      if (NORM) {
        const float centred = neuron.centred(to_float(x_t[t].lane[i]), i);
        if (NEEDS & NEED_NORM) {
          sums.h[lane] += grad_h;
          sums.h_x[lane] = fmaf(grad_h, centred, sums.h_x[lane]);
        }
        // Both in one launch: running statistics, with nothing to subtract. (0 * inf would be NaN.)
        const float coupled = fmaf(neuron.b[lane], centred, neuron.a[lane]);
        grad_x_t[i] = NEEDS & NEED_NORM ? neuron.gain[lane] * grad_y
                                        : fmaf(neuron.gain[lane], grad_y, -coupled);
      }
      const float kept = CHARGE == NO_LEAK ? grad_h : fmaf(-q, grad_h, grad_h);
      grad_v[i] = CHARGE == NO_STATE ? 0.0f : kept;
    }
    if (NEEDS & NEED_X) store(grad_x_t, c.grad_x + here + t * c.size);
  }
}

template <class scalar_t, int T, int VEC, int LANES, int RESET, int CHARGE, bool GRAD_V_SEQ,
          bool NORM, bool DETACH_RESET, int NEEDS, class Surrogate>
__global__ void
__launch_bounds__(BLOCK, resident_blocks(RESET == SOFT || RESET == COUNTS, NORM, NEEDS,
                                         GRAD_V_SEQ, steps_left(T) > 0))
alif_backward(const Backward<scalar_t> c) {
  constexpr int STEPS = steps_in_registers(T), LEFT = steps_left(T);
  const int segments = T <= LONGEST_SWEEP ? 1 : (int)(c.steps / SEGMENT);
  const index_t thread = (index_t)blockIdx.x * BLOCK + threadIdx.x, size = c.size;
  if (thread >= c.threads) return;
  const Neuron<LANES, RESET, CHARGE, NORM> neuron(c, c.ab, thread * VEC);
  Sums<LANES> sums = {};
#pragma unroll 1
  for (index_t at = thread * VEC; at < size; at += c.threads * VEC) {
    float v[VEC], grad_v[VEC];
    load_or_fill(c.grad_v_last, at, 0.0f, grad_v);
    if constexpr (LEFT > 0) {
      load(c.checkpoint + (segments - 1) * size + at, v);
      backward_segment<LEFT, GRAD_V_SEQ, DETACH_RESET, NEEDS, Surrogate>(
          neuron, c, segments * STEPS * size + at, v, grad_v, sums);
    }
#pragma unroll 1
    for (int segment = segments - 1; segment >= 0; --segment) {
      if (segment > 0)
        load(c.checkpoint + (segment - 1) * size + at, v);
      else
        load_or_fill(c.v0, at, c.v_init, v);
      backward_segment<STEPS, GRAD_V_SEQ, DETACH_RESET, NEEDS, Surrogate>(
          neuron, c, segment * STEPS * size + at, v, grad_v, sums);
    }
    if (c.grad_v0) store(grad_v, c.grad_v0 + at);
  }
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    const float q = neuron.q[i];
    // dH/dw = q (1-q) (X - (V - V_reset)), which is (1-q) (H - V); or -q (1-q) (V - V_reset).
    const float dw = CHARGE == DECAY_INPUT ? 1.0f - q : -q * (1.0f - q);
    const float dy = CHARGE == DECAY_INPUT ? q : 1.0f;
    index_t slot = thread * LANES + i;
    auto put = [&](float sum) {
      c.partial[slot] = sum;
      slot += c.threads * LANES;
    };
    if (NEEDS & NEED_NORM) {
      put(sums.h[i] * dy);
      put(sums.h_x[i] * dy);
    }
    if (NEEDS & NEED_W) put(sums.w[i] * dw);
    if (NEEDS & NEED_V_THRESHOLD) put(sums.v_threshold[i]);
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
  index_t before;  // sums in front of theirs, which are the norm's
  const sum_t* partial;
  float *grad_w, *grad_v_threshold;  // null if not needed
};

// The gradients of w and the threshold, each in blocks of its own. All sums are of one channel where
// these are scalars.
template <class sum_t>
__global__ void __launch_bounds__(ADDERS) parameter_gradients(const ParameterGradients<sum_t> c) {
  if (c.channels == 0) return;
  const index_t channel = blockIdx.x % c.channels, turn = blockIdx.x / c.channels;
  float* to = turn == 0 && c.grad_w ? c.grad_w : c.grad_v_threshold;
  add_up<1>(c.partial + (c.before + turn) * c.rows * c.channels * c.run, c, channel,
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
  static constexpr int ROWS = COUNTS ? 2 : 8, MOST = COUNTS ? 15 : 1;
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
      const int digit = COUNTS ? (int)value & 15 : value != 0.0f;
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
    for (int i = 0; i < VEC; ++i)
      values[i] = bytes.lane[own.byte(k, i)] >> own.shift(k, i) & own.MOST;
    if (k < own.rows) store(values, own.values + k * own.apart);
  }
}
