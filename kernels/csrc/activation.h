// The activation of a feed-forward: a part of the epilogue of matmuls (dot.h), and an operation (linear.h).
#pragma once

#include "names.h"
#include "simd.h"

// The activations that C++ computes, by their names in config.py: ACTIVATIONS
#define ACTIVATIONS silu, gelu, gelu_tanh, clamped_silu, relu2
enum class ActivationFunction { none, ACTIVATIONS };

struct Activation {
  ActivationFunction function;
  bool gated;  // whether the feed-forward has a gate projection and an up projection
};

constexpr float CLAMPED_SILU_ALPHA = GPTFAST_CLAMPED_SILU_ALPHA;  // of clamped_silu: see kernels/schema.py
constexpr float CLAMPED_SILU_LIMIT = GPTFAST_CLAMPED_SILU_LIMIT;

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

// Computes activation(x), like layers/linear.py: activate_torch. If gated, x is the output of the gate projection, and
// the result is activation(x) * up.
inline f32x16 activate_vec(f32x16 x, f32x16 up, Activation activation) {
  switch (activation.function) {
    case ActivationFunction::none: break;
    case ActivationFunction::silu: x = x / (1 + exp_vec(-x)); break;
    case ActivationFunction::gelu: x = x * normal_cdf(x); break;
    case ActivationFunction::gelu_tanh: x = gelu_tanh(x); break;
    case ActivationFunction::clamped_silu:
      x = x > CLAMPED_SILU_LIMIT ? f32x16{} + CLAMPED_SILU_LIMIT : x;
      x = x / (1 + exp_vec(-CLAMPED_SILU_ALPHA * x));
      up = clamp(up, CLAMPED_SILU_LIMIT) + 1;
      break;
    case ActivationFunction::relu2: x = x < 0.0f ? f32x16{} : x * x; break;  // NaN stays NaN
  }
  return activation.gated ? x * up : x;
}
