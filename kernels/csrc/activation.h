// The activation of a feed-forward, such as swiglu: an epilogue of matmuls (dot.h), and an operation (linear.h).
#pragma once

#include "simd.h"

// The activations that C++ computes, in the order of ACTIVATIONS in config.py
#define ACTIVATIONS SWIGLU, GEGLU, GEGLU_TANH, CLAMPED_SWIGLU, GELU_PYTORCH_TANH, RELU2
enum class Activation : int64_t { NONE, ACTIVATIONS, COUNT };  // COUNT: how many there are, with NONE

// Whether the feed-forward has a gate projection beside its up projection, as config.py: is_gated says.
inline bool is_gated(Activation activation) {
  switch (activation) {
    case Activation::SWIGLU: case Activation::GEGLU: case Activation::GEGLU_TANH: case Activation::CLAMPED_SWIGLU:
      return true;
    case Activation::NONE: case Activation::GELU_PYTORCH_TANH: case Activation::RELU2: case Activation::COUNT: break;
  }
  return false;
}

constexpr float SWIGLU_ALPHA = GPTFAST_SWIGLU_ALPHA;  // of CLAMPED_SWIGLU: see kernels/schema.py
constexpr float SWIGLU_LIMIT = GPTFAST_SWIGLU_LIMIT;

// Returns Phi(x) = (1 + erf(x / sqrt(2))) / 2, the distribution function of the normal distribution. NaN stays NaN.
// Formula 7.1.26 of Abramowitz and Stegun gives erf with an error of at most 1.5e-7:
//     1 - erf(z) = (a1 t + a2 t^2 + ... + a5 t^5) e^(-z^2)  for z >= 0, with t = 1 / (1 + 0.3275911 z)
inline f32x16 normal_cdf(f32x16 x) {
  const f32x16 z = 0.70710678f * (x < 0.0f ? -x : x), t = 1 / (1 + 0.3275911f * z);
  f32x16 p = f32x16{} + 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const f32x16 tail = 0.5f * t * p * exp_vec(-z * z);  // Phi(-|x|)
  return x < 0.0f ? tail : 1 - tail;
}

// x * Phi(x) with the tanh form of Phi: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + ...)
inline f32x16 gelu_tanh(f32x16 x) { return x / (1 + exp_vec(-1.59576912f * (x + 0.044715f * x * x * x))); }

// Computes activation(x) * up, as layers/linear.py does: x is the gate projection's output. If the activation is not
// gated, computes activation(x), and up is not used.
inline f32x16 activate_vec(f32x16 x, f32x16 up, Activation activation) {
  switch (activation) {
    case Activation::NONE: return x;
    case Activation::COUNT: break;
    case Activation::SWIGLU: return x / (1 + exp_vec(-x)) * up;
    case Activation::GEGLU: return x * normal_cdf(x) * up;
    case Activation::GEGLU_TANH: return gelu_tanh(x) * up;
    case Activation::CLAMPED_SWIGLU:
      x = x > SWIGLU_LIMIT ? f32x16{} + SWIGLU_LIMIT : x;
      return x / (1 + exp_vec(-SWIGLU_ALPHA * x)) * (clamp(up, SWIGLU_LIMIT) + 1);
    case Activation::GELU_PYTORCH_TANH: return gelu_tanh(x);
    case Activation::RELU2: return x < 0.0f ? f32x16{} : x * x;  // NaN stays NaN
  }
  __builtin_unreachable();  // ops.cpp refuses other ids
}
