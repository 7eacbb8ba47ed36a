// The activation of a feed-forward, such as swiglu: an epilogue of matmuls (dot.h), and an operation (linear.h).
#pragma once

#include "names.h"
#include "simd.h"

// The activations that C++ computes, by their names in config.py: ACTIVATIONS
#define ACTIVATIONS swiglu, geglu, geglu_tanh, clamped_swiglu, gelu_pytorch_tanh, relu2
enum class Activation { none, ACTIVATIONS };

// Whether the feed-forward has a gate projection beside its up projection, as config.py: is_gated says.
inline bool is_gated(Activation activation) {
  switch (activation) {
    case Activation::swiglu: case Activation::geglu: case Activation::geglu_tanh: case Activation::clamped_swiglu:
      return true;
    case Activation::none: case Activation::gelu_pytorch_tanh: case Activation::relu2: break;
  }
  return false;
}

constexpr float SWIGLU_ALPHA = GPTFAST_SWIGLU_ALPHA;  // of clamped_swiglu: see kernels/schema.py
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
    case Activation::none: return x;
    case Activation::swiglu: return x / (1 + exp_vec(-x)) * up;
    case Activation::geglu: return x * normal_cdf(x) * up;
    case Activation::geglu_tanh: return gelu_tanh(x) * up;
    case Activation::clamped_swiglu:
      x = x > SWIGLU_LIMIT ? f32x16{} + SWIGLU_LIMIT : x;
      return x / (1 + exp_vec(-SWIGLU_ALPHA * x)) * (clamp(up, SWIGLU_LIMIT) + 1);
    case Activation::gelu_pytorch_tanh: return gelu_tanh(x);
    case Activation::relu2: return x < 0.0f ? f32x16{} : x * x;  // NaN stays NaN
  }
  __builtin_unreachable();
}
