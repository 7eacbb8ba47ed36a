// The prologue of a matmul: norms the activations. Then it quantizes them, converts them, or copies them into panels.
// Every operation with a matmul runs a Prologue first.
#pragma once

#include <cmath>

#include "weights.h"

// ---- RMSNorm --------------------------------------------------------------------------------------------------------

// Returns 1 / rms(x) of x [k].
template <typename T> float inverse_rms(const T* x, float eps, int64_t k) {
  f32x16 squares = {};
  for (int64_t i = 0; i < k; i += LANES) {
    const f32x16 v = load_partial(x, i, k);
    squares += v * v;
  }
  return 1 / std::sqrt(sum(squares) / k + eps);
}

// Returns elements [i, i + 16) of x [k] * inverse_rms * weight [k]. Rounds x * inverse_rms to T first, like
// layers/linear.py: rms_norm_torch.
template <typename T> f32x16 normed_vec(const T* x, const T* weight, float inverse_rms, int64_t i, int64_t k) {
  T rounded[LANES];
  store_vec(load_partial(x, i, k) * inverse_rms, rounded);
  return load_vec(rounded) * load_partial(weight, i, k);
}

// Computes out [k] = x [k] * inverse_rms * weight [k]. Returns out, which may be x.
template <typename T> const T* apply_norm(const T* x, const T* weight, float inverse_rms, int64_t k, T* out) {
  for (int64_t i = 0; i < k; i += LANES) store_partial(normed_vec(x, weight, inverse_rms, i, k), out, i, k);
  return out;
}

// ---- Quantization ---------------------------------------------------------------------------------------------------

// ACT_GROUP_SIZE activations x as int8: x = scale * q, |q| <= 127. ggml's block_q8_1 is the same with 32 elements.
//
// The loops multiply with unsigned weights w, and subtract the zero points afterwards:
//
//     sum of (w - zero) * x  =  sum of w * x  -  zero * (sum of x)
//
// The sum of x is the same for all outputs, so quantize_token computes it once, like s of ggml's block_q8_1. What
// zero_correction holds depends on the format:
//
//     all weights share F::SHARED_ZERO                   -F::SHARED_ZERO * (sum of q), of this ActGroup
//     each group of weights has a zero point             the sum of x from the start of that group up to here. The loop
//                                                        reads it once, in the last ActGroup of the group
//
// With groups of 48 weights, and sums s0, s1, ... of ActGroups:
//
//     group of weights    0                             1
//     ActGroup            0     1          2            3     4          5
//     zero_correction     s0    s0 + s1    s0+s1+s2     s3    s3 + s4    s3+s4+s5
//                                          read                          read
struct ActGroup {
  float scale;  // NaN if an element of x is not finite: then the outputs are NaN
  float zero_correction;  // see above
  int8_t q[ACT_GROUP_SIZE];
};

// Whether a matmul with weights of format F quantizes activations of type T. Float32 activations (--precision float32)
// are never quantized.
template <typename F, typename T>
constexpr bool QUANTIZES_ACTIVATIONS = F::QUANTIZES_ACTIVATIONS && !std::is_same_v<T, float>;

// Whether a matmul with weights of format F converts activations of type T to float.
template <typename F, typename T>
constexpr bool WIDENS_ACTIVATIONS = !std::is_same_v<F, Unquantized> && !F::QUANTIZES_ACTIVATIONS &&
                                    !std::is_same_v<T, float> && !(std::is_same_v<T, bf16> && F::BF16_ACTIVATIONS);

// Quantizes x [k] to groups [padded k / ACT_GROUP_SIZE]. F is the format of w. An f32x16 holds the x of a group.
static_assert(ACT_GROUP_SIZE == LANES);
template <typename F, typename T> void quantize_token(const T* x, const Weights& w, ActGroup* groups) {
  const auto maximum = [](i32x16 a, i32x16 b) { return a > b ? a : b; };
  const auto add = [](i32x16 a, i32x16 b) { return a + b; };
  const f32x16 to_int = f32x16{} + ROUND_TO_INT;
  float running_sum = 0;
  for (int64_t k = 0; k < w.k; k += LANES) {
    const f32x16 v = load_partial(x, k, w.k);
    // Without the sign bit, the bits of floats have the order of the floats. NaN is the largest.
    const f32x16 max = (f32x16)reduce_lanes((i32x16)v & 0x7fffffff, maximum);
    const i32x16 q = (i32x16)(v * (max > 1e-30f ? 127 / max : f32x16{}) + to_int) - (i32x16)to_int;
    const i8x16 bytes = __builtin_convertvector(q, i8x16);
    const int32_t sum = reduce_lanes(q, add)[0];
    ActGroup& act_group = groups[k / ACT_GROUP_SIZE];
    act_group.scale = max[0] * (1 / 127.0f) + max[0] * 0.0f;  // infinity becomes NaN
    running_sum = (k % w.group_size == 0 ? 0 : running_sum) + sum * act_group.scale;
    act_group.zero_correction = F::SHARED_ZERO ? -F::SHARED_ZERO * sum : running_sum;
    std::memcpy(act_group.q, &bytes, ACT_GROUP_SIZE);
  }
}

// ---- The prologue ---------------------------------------------------------------------------------------------------

// What dot.h multiplies with weights of format F, after the prologue. A token is ActGroup [k / ACT_GROUP_SIZE],
// float [k] or T [k].
template <typename F, typename T>
using ActElement =
    std::conditional_t<QUANTIZES_ACTIVATIONS<F, T>, ActGroup, std::conditional_t<WIDENS_ACTIVATIONS<F, T>, float, T>>;

// The address of a token after the prologue. It points to void because the format F is known only at run time.
// matmul_by_format (dot.h) casts it to const ActElement<F, T>*.
using TokenPtr = const void*;

// The prologue of x [m, k] W^T. If norm_weight [k] is not null, applies RMSNorm first.
//
//     run              tokens of ActElement<F, T>, for dot.h
//     run_to_panels    panels of T, for amx.h and prefill_linear.h: [k / panel_k, m, panel_k]
//
//     panel 0    token 0: inputs 0 to panel_k - 1              token 1: the same inputs     ...    token m - 1
//     panel 1    token 0: inputs panel_k to 2 panel_k - 1      token 1                      ...    token m - 1
//
// A panel's inputs beyond k are zeros. m is padded to a multiple of panel_m by tokens of any values. Their outputs are
// not stored.
template <typename T> struct Prologue {
  const T* x;
  int64_t m;
  const Weights& w;
  const T* norm_weight;
  float eps;
  int64_t panel_k = 0, panel_m = 1;  // the sizes of panels. Without panels, panel_k is 0

  bool quantizes_activations() const {
    return !panel_k && dispatch_format(w, []<typename F>(F) { return QUANTIZES_ACTIVATIONS<F, T>; });
  }
  bool widens_activations() const {
    return !panel_k && dispatch_format(w, []<typename F>(F) { return WIDENS_ACTIVATIONS<F, T>; });
  }
  int64_t padded_m() const { return round_up(m, panel_m); }
  int64_t padded_k() const { return round_up(w.k, panel_k ? panel_k : 32); }  // 32 elements of 16 bits: a cache line

  // Returns the bytes of a token after the prologue. 0 means that the matmul reads x itself.
  int64_t token_bytes() const {
    if (quantizes_activations()) return padded_k() / ACT_GROUP_SIZE * sizeof(ActGroup);
    if (widens_activations()) return padded_k() * sizeof(float);
    return norm_weight || panel_k ? padded_k() * sizeof(T) : 0;
  }
  int64_t bytes() const { return padded_m() * token_bytes(); }

  // Whether the threads share the tokens. With few tokens, each thread runs the prologue of all tokens in its own
  // scratch memory. That is cheaper than a barrier.
  bool is_shared() const { return m > BLOCK_M && token_bytes() > 0; }
  size_t shared_bytes() const { return is_shared() ? bytes() : 0; }

  // Writes the addresses of the results to tokens [m]. The results stay valid until this thread runs another prologue
  // or, if is_shared, until the operation ends. The same holds for panels.
  void run(char* shared, Barrier& barrier, TokenPtr* tokens) const {
    const char* memory = run_tokens(shared, barrier);
    for (int64_t i = 0; i < m; i++)
      tokens[i] = token_bytes() ? static_cast<TokenPtr>(memory + i * token_bytes()) : x + i * w.k;
  }

  const char* run_to_panels(char* shared, Barrier& barrier) const { return run_tokens(shared, barrier); }

  char* run_tokens(char* shared, Barrier& barrier) const {
    static thread_local Scratch scratch;
    char* memory = is_shared() ? shared : scratch.at_least<char>(bytes());
    const Range range = is_shared() ? thread_range(m) : Range{0, m};
    for (int64_t i = range.begin; i < range.end; i++) run_token(i, memory);
    if (is_shared()) barrier.wait();
    return memory;
  }

  void run_token(int64_t i, char* memory) const {
    static thread_local Scratch scratch;
    char* out = memory + i * token_bytes();
    const T* token = x + i * w.k;
    if (norm_weight) {
      const bool is_last_step = !quantizes_activations() && !widens_activations() && !panel_k;
      T* normed = is_last_step ? reinterpret_cast<T*>(out) : scratch.at_least<T>(padded_k());
      token = apply_norm(token, norm_weight, inverse_rms(token, eps, w.k), w.k, normed);
    }
    if (quantizes_activations()) quantize(token, reinterpret_cast<ActGroup*>(out));
    if (widens_activations())
      for (int64_t k = 0; k < w.k; k += LANES)
        store_partial(load_partial(token, k, w.k), reinterpret_cast<float*>(out), k, w.k);
    if (panel_k) copy_to_panels(token, i, reinterpret_cast<T*>(memory));
  }

  void quantize(const T* token, ActGroup* out) const {
    dispatch_format(w, [&]<typename F>(F) {
      if constexpr (QUANTIZES_ACTIVATIONS<F, T>) quantize_token<F>(token, w, out);
    });
  }

  void copy_to_panels(const T* token, int64_t i, T* panels) const {
    for (int64_t k = 0; k < w.k; k += panel_k, panels += padded_m() * panel_k) {
      const int64_t n = std::min(panel_k, w.k - k);
      std::memcpy(panels + i * panel_k, token + k, n * sizeof(T));
      std::fill(panels + i * panel_k + n, panels + (i + 1) * panel_k, T{});
    }
  }
};
