// The CPU kernels as PyTorch operations, torch.ops.gptfast_cpu.NAME. Each function checks its tensors, allocates the
// output, and submits the operation (op_list.h: submit). The checks must be here: kernels trust addresses and sizes,
// also when a CPU graph is replayed. The functions have the parameters of the schemas (kernels/schema.py). layers/
// describes the operations. kernels/build.py compiles this file, which includes the headers.
//
// The headers, in reading order:
//
//     simd.h           vectors of 16 floats; names.h: names of formats and activations; activation.h
//     threads.h        how threads share work, and how many there are
//     op_list.h        operations: executed, captured or replayed
//     weights.h        packed weights and their formats (float8.h: 8-bit floats)
//     prologue.h       the prologue of matmuls: norm, quantization
//     dot.h, amx.h     the matmul with blocks of weights; amx.h is for many tokens (dot_quantized.h, dot_unquantized.h)
//     linear.h, moe.h, rope_and_cache.h, attention.h, sampling.h    the operations; softmax.h: attention's softmax
//     prefill_linear.h, prefill_attention.h                         the operations for many tokens; microkernel.h

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "attention.h"
#include "linear.h"
#include "moe.h"
#include "prefill_attention.h"
#include "prefill_linear.h"
#include "sampling.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using OptString = std::optional<StringHandle>;
using Sizes = std::vector<int64_t>;

template <typename T> T* mutable_ptr(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }
template <typename T> const T* ptr(const Tensor& t) { return mutable_ptr<T>(t); }
template <typename T> const T* ptr(const OptTensor& t) { return t ? ptr<T>(*t) : nullptr; }

Sizes sizes(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

// Returns the sizes of t with last in place of the last size.
Sizes resized(const Tensor& t, int64_t last) {
  Sizes shape = sizes(t);
  shape.back() = last;
  return shape;
}

// Returns the sizes of t, and last after them.
Sizes extended(const Tensor& t, int64_t last) {
  Sizes shape = sizes(t);
  shape.push_back(last);
  return shape;
}

// Calls f with a value of the C++ type for type, the dtype of the activations.
template <typename F> void dispatch_type(ScalarType type, F f) {
  if (type == ScalarType::Float) f(float{});
  else if (type == ScalarType::Half) f(f16{});
  else if (type == ScalarType::BFloat16) f(bf16{});
  else STD_TORCH_CHECK(false, "activations must be float32, float16 or bfloat16");
}

// Checks that activations x are [..., k] and that the other tensors have the type of x. Returns the number of tokens.
int64_t check_rows(const Tensor& x, int64_t k, std::initializer_list<OptTensor> others) {
  const int64_t m = k ? x.numel() / k : 0;
  STD_TORCH_CHECK(x.is_contiguous() && x.size(-1) == k && m > 0, "activations must be whole rows, at least one");
  for (const OptTensor& t : others)
    STD_TORCH_CHECK(!t || t->scalar_type() == x.scalar_type(),
                    "weights, norms and caches must be of the activations' type");
  return m;
}

void check_ids(const Tensor& topk_ids, int64_t m) {
  STD_TORCH_CHECK(topk_ids.scalar_type() == ScalarType::Long && topk_ids.is_contiguous() && topk_ids.size(-1) > 0 &&
                  topk_ids.numel() / topk_ids.size(-1) == m, "experts must be named by int64 [..., top_k]");
}

// Checks a weight [n, k] or [n_experts, n, k], and returns it as Weights. The parameters up to group_size are
// WeightArguments in kernels/schema.py. type is the dtype of the activations.
Weights check_weights(const Tensor& w, const OptTensor& scales, const OptTensor& zeros, StringHandle format, int64_t n,
                      int64_t group_size, int64_t k, ScalarType type) {
  const std::string format_name = take_string(format);
  const int64_t index = find_name(NAMES_OF(FORMATS), format_name);
  STD_TORCH_CHECK(index >= 0, "'", format_name, "' is no weight format of these kernels");
  const auto stride = [](const Tensor& t) { return t.stride(0) * int64_t(t.element_size()); };
  Weights result{.format = index, .is_packed = w.scalar_type() == ScalarType::Int, .data = ptr<char>(w),
                 .scales = ptr<char>(scales), .zeros = ptr<char>(zeros),
                 .expert_strides = {stride(w), scales ? stride(*scales) : 0, zeros ? stride(*zeros) : 0},
                 .n = n, .k = k, .group_size = group_size, .n_groups = 1};
  const bool is_readable = dispatch_format(result, [&]<typename F>(F) {
    if constexpr (std::is_same_v<F, Unquantized>) {
      result.bits = 8 * w.element_size(), result.padded_k = k;
      return w.scalar_type() == type;
    } else if constexpr (std::is_same_v<F, PackedBf16>) {
      result.bits = 16, result.padded_k = round_up(k, ACT_GROUP_SIZE);
      return type == ScalarType::BFloat16 && k % 2 == 0;
    } else {
      if (!scales || (F::HAS_ZEROS && !zeros) || group_size < 1) return false;
      if (F::QUANTIZES_ACTIVATIONS && group_size < k && group_size % ACT_GROUP_SIZE) return false;
      result.bits = 32 / F::ELEMENTS_PER_WORD, result.padded_k = round_up(k, ACT_GROUP_SIZE);
      result.n_groups = divide_up(k, group_size);
      result.has_f16_scales = scales->scalar_type() == ScalarType::Half;
      return result.is_packed && scales->element_size() == F::SCALE_BYTES;
    }
  });
  STD_TORCH_CHECK(w.is_contiguous() && is_readable,
                  "weights must be packed for the CPU, or of the activations' type");
  return result;
}

Activation check_activation(OptString activation, bool gated) {
  STD_TORCH_CHECK(activation || !gated, "only an activation can be gated");
  if (!activation) return {ActivationFunction::none, false};
  const std::string name = take_string(*activation);
  const int64_t index = find_name(NAMES_OF(ACTIVATIONS), name);
  STD_TORCH_CHECK(index >= 0, "'", name, "' is no activation of these kernels");
  return {ActivationFunction(index + 1), gated};  // 0 is none
}

Tensor fused_linear(Tensor x, Tensor weight, OptTensor scales, OptTensor zeros, StringHandle format, int64_t n,
                    int64_t group_size, OptTensor bias, OptTensor norm_weight, double eps, OptTensor residual,
                    OptString activation, bool gated, double out_scale, double softcap, double clip,
                    ScalarType out_dtype) {
  const int64_t k = x.size(-1), m = check_rows(x, k, {bias, norm_weight, residual});
  const bool is_float_out = out_dtype == ScalarType::Float;
  STD_TORCH_CHECK(is_float_out || out_dtype == x.scalar_type(), "out_dtype must be float32 or the activations' type");
  const Weights w = check_weights(weight, scales, zeros, format, n, group_size, k, x.scalar_type());
  Tensor out = torch::stable::new_empty(x, resized(x, gated ? n / 2 : n), out_dtype);
  dispatch_type(x.scalar_type(), [&]<typename T>(T) {
    const FusedLinearOp<T> op{
        .x = ptr<T>(x), .m = m, .w = w, .bias = ptr<T>(bias), .norm_weight = ptr<T>(norm_weight), .eps = float(eps),
        .residual = ptr<T>(residual), .activation = check_activation(activation, gated), .out_scale = float(out_scale),
        .softcap = float(softcap), .clip = float(clip), .out = mutable_ptr<T>(out),
        .float_out = is_float_out ? mutable_ptr<float>(out) : nullptr};
#if defined(__AVX512BF16__)
    const bool quantizes_activations = dispatch_format(w, []<typename F>(F) { return QUANTIZES_ACTIVATIONS<F, T>; });
    if constexpr (std::is_same_v<T, bf16>)
      if (m > MAX_CPU_TOKENS && !quantizes_activations) return submit(PrefillLinearOp{op});
#endif
    submit(op);
  });
  return out;
}

Tensor activate(Tensor x, StringHandle activation, bool gated) {
  const int64_t k = x.size(-1), f = gated ? k / 2 : k;
  STD_TORCH_CHECK(x.is_contiguous() && (k == f || k == 2 * f), "gate and up must be contiguous halves");
  Tensor out = torch::stable::new_empty(x, resized(x, f));
  dispatch_type(x.scalar_type(), [&]<typename T>(T) {
    submit(ActivateOp<T>{.x = ptr<T>(x), .m = x.numel() / k, .f = f, .activation = check_activation(activation, gated),
                         .out = mutable_ptr<T>(out)});
  });
  return out;
}

Tensor add(Tensor x, Tensor y) {
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && sizes(x) == sizes(y) && x.scalar_type() == y.scalar_type(),
                  "what is added must be of one shape and type");
  Tensor out = torch::stable::empty_like(x);
  dispatch_type(x.scalar_type(), [&]<typename T>(T) {
    submit(AddOp<T>{.x = ptr<T>(x), .y = ptr<T>(y), .n = x.numel(), .out = mutable_ptr<T>(out)});
  });
  return out;
}

Tensor rms_norm(Tensor x, Tensor weight, double eps, OptTensor residual) {
  const int64_t k = weight.numel(), m = check_rows(x, k, {weight, residual});
  STD_TORCH_CHECK(weight.is_contiguous() && (!residual || (residual->is_contiguous() && sizes(*residual) == sizes(x))),
                  "a residual must have the activations' shape");
  Tensor out = torch::stable::empty_like(x);
  dispatch_type(x.scalar_type(), [&]<typename T>(T) {
    submit(RMSNormOp<T>{.x = ptr<T>(x), .m = m, .k = k, .weight = ptr<T>(weight), .eps = float(eps),
                        .residual = ptr<T>(residual), .out = mutable_ptr<T>(out)});
  });
  return out;
}

// Checks the values of input_order here, and not at every replay of a CPU graph: input_order is as constant as a
// weight.
Tensor permute_inputs(Tensor x, Tensor input_order) {
  const int64_t k = x.size(-1), m = check_rows(x, k, {}), n = input_order.numel();
  STD_TORCH_CHECK(input_order.scalar_type() == ScalarType::Int && input_order.is_contiguous() &&
                  input_order.dim() == 1, "input_order must be int32 [K]");
  const int32_t* order = ptr<int32_t>(input_order);
  STD_TORCH_CHECK(std::all_of(order, order + n, [&](int32_t i) { return 0 <= i && i < k; }),
                  "input_order names an input that is not there");
  Tensor out = torch::stable::new_empty(x, resized(x, n));
  dispatch_type(x.scalar_type(), [&]<typename T>(T) {
    submit(PermuteInputsOp<T>{
        .x = ptr<T>(x), .m = m, .k = k, .input_order = order, .n = n, .out = mutable_ptr<T>(out)});
  });
  return out;
}

Tensor embed(Tensor tokens, Tensor weight, OptTensor scales, OptTensor zeros, StringHandle format, int64_t n,
             int64_t group_size, int64_t k, ScalarType dtype, double scale) {
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long && tokens.is_contiguous(), "tokens must be int64");
  const Weights w = check_weights(weight, scales, zeros, format, n, group_size, k, dtype);
  Tensor out = torch::stable::new_empty(weight, extended(tokens, k), dtype);
  dispatch_type(dtype, [&]<typename T>(T) {
    submit(EmbedOp<T>{.tokens = ptr<int64_t>(tokens), .m = tokens.numel(), .w = w, .scale = float(scale),
                      .out = mutable_ptr<T>(out)});
  });
  return out;
}

// Checks the tensors and returns a RopeAndCacheOp. The caller sets the output, q.
template <typename T>
RopeAndCacheOp<T> rope_and_cache_op(const Tensor& qkv, const Tensor& start_pos, const Tensor& k_cache,
                                    const Tensor& v_cache, const Tensor& cos_sin, int64_t n_heads,
                                    const OptTensor& q_norm_weight, const OptTensor& k_norm_weight, double eps) {
  const int64_t batch = k_cache.size(0), n_kv_heads = k_cache.size(1), d = k_cache.size(3);
  const int64_t max_seq_len = k_cache.size(2);
  STD_TORCH_CHECK(start_pos.scalar_type() == ScalarType::Long && start_pos.is_contiguous(),
                  "start_pos must be int64 [B]");
  STD_TORCH_CHECK(start_pos.numel() == batch && qkv.size(0) == batch, "the cache has no room for so many rows");
  STD_TORCH_CHECK(cos_sin.scalar_type() == ScalarType::Float && cos_sin.is_contiguous() &&
                  cos_sin.size(0) >= max_seq_len && cos_sin.size(1) == d / 2, "cos_sin must be float32 [S, D / 2, 2]");
  const bool norms_all_heads = q_norm_weight && q_norm_weight->numel() != d;
  STD_TORCH_CHECK((!q_norm_weight || q_norm_weight->numel() == (norms_all_heads ? n_heads : 1) * d) &&
                  (!k_norm_weight || k_norm_weight->numel() == (norms_all_heads ? n_kv_heads : 1) * d),
                  "norms of q and k must be as wide as a head, or as all heads");
  for (const Tensor& cache : {k_cache, v_cache})
    STD_TORCH_CHECK(cache.stride(3) == 1 && cache.stride(2) == d && cache.stride(1) == k_cache.stride(1) &&
                    cache.stride(0) == k_cache.stride(0), "the caches' heads must be contiguous");
  const int64_t m = qkv.numel() / ((n_heads + 2 * n_kv_heads) * d);
  return {.qkv = ptr<T>(qkv), .start_pos = ptr<int64_t>(start_pos), .k_cache = mutable_ptr<T>(k_cache),
          .v_cache = mutable_ptr<T>(v_cache), .batch_stride = k_cache.stride(0), .head_stride = k_cache.stride(1),
          .cos_sin = ptr<float>(cos_sin), .q_norm_weight = ptr<T>(q_norm_weight),
          .k_norm_weight = ptr<T>(k_norm_weight), .norms_all_heads = norms_all_heads, .eps = float(eps),
          .batch = batch, .query_len = m / batch, .n_heads = n_heads, .n_kv_heads = n_kv_heads,
          .head_dim = d, .max_seq_len = max_seq_len, .q = nullptr};
}

int64_t qkv_width(const Tensor& k_cache, int64_t n_heads) {
  return (n_heads + 2 * k_cache.size(1)) * k_cache.size(3);
}

Tensor rope_and_cache(Tensor qkv, Tensor start_pos, Tensor k_cache, Tensor v_cache, Tensor cos_sin, int64_t n_heads,
                      OptTensor q_norm_weight, OptTensor k_norm_weight, double eps) {
  const int64_t batch = k_cache.size(0), d = k_cache.size(3);
  const int64_t m = check_rows(qkv, qkv_width(k_cache, n_heads), {k_cache, v_cache, q_norm_weight, k_norm_weight});
  Tensor q = torch::stable::new_empty(qkv, Sizes{batch, m / batch, n_heads, d});
  dispatch_type(qkv.scalar_type(), [&]<typename T>(T) {
    auto op = rope_and_cache_op<T>(qkv, start_pos, k_cache, v_cache, cos_sin, n_heads, q_norm_weight, k_norm_weight,
                                   eps);
    op.q = mutable_ptr<T>(q);
    submit(op);
  });
  return q;
}

Tensor attend(Tensor qkv, Tensor start_pos, Tensor k_cache, Tensor v_cache, Tensor cos_sin, int64_t n_heads,
              double scale, int64_t window, double softcap, OptTensor q_norm_weight, OptTensor k_norm_weight,
              double eps, OptTensor sinks, OptTensor alibi_slopes) {
  const int64_t batch = k_cache.size(0), d = k_cache.size(3);
  const int64_t m = check_rows(qkv, qkv_width(k_cache, n_heads),
                               {k_cache, v_cache, q_norm_weight, k_norm_weight, sinks});
  STD_TORCH_CHECK(!sinks || sinks->numel() == n_heads, "sinks must be [H]");
  STD_TORCH_CHECK(!alibi_slopes || (alibi_slopes->numel() == n_heads && alibi_slopes->is_contiguous() &&
                                    alibi_slopes->scalar_type() == ScalarType::Float), "slopes must be float32 [H]");
  Tensor out = torch::stable::new_empty(qkv, Sizes{batch, m / batch, n_heads * d});
  dispatch_type(qkv.scalar_type(), [&]<typename T>(T) {
    AttendOp<T> op{rope_and_cache_op<T>(qkv, start_pos, k_cache, v_cache, cos_sin, n_heads, q_norm_weight,
                                        k_norm_weight, eps)};
    op.sinks = ptr<T>(sinks), op.alibi_slopes = ptr<float>(alibi_slopes);
    op.score_mod = {.scale = float(scale), .softcap = float(softcap)}, op.window = window;
    op.out = mutable_ptr<T>(out);
    if (m <= MAX_CPU_TOKENS) submit(op);
    else submit(PrefillAttendOp<T>{op});
  });
  return out;
}

std::tuple<Tensor, Tensor> route(Tensor logits, int64_t top_k, bool norm_topk_prob, int64_t n_shared_experts) {
  const int64_t n_logits = logits.size(-1), n_experts = n_logits - (n_shared_experts ? 1 : 0);
  const int64_t n_chosen = top_k + n_shared_experts;
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float && logits.is_contiguous() && 0 < top_k &&
                  top_k <= n_experts && n_shared_experts >= 0,
                  "a router's logits must be float32, and top_k at most their number");
  Tensor topk_weights = torch::stable::new_empty(logits, resized(logits, n_chosen));
  Tensor topk_ids = torch::stable::new_empty(logits, resized(logits, n_chosen), ScalarType::Long);
  submit(RouteOp{.logits = ptr<float>(logits), .m = logits.numel() / n_logits, .n_experts = n_experts, .top_k = top_k,
                 .n_shared_experts = n_shared_experts, .norm_topk_prob = norm_topk_prob,
                 .topk_weights = mutable_ptr<float>(topk_weights), .topk_ids = mutable_ptr<int64_t>(topk_ids)});
  return {topk_weights, topk_ids};
}

Tensor experts_gate_up(Tensor x, Tensor weight, OptTensor scales, OptTensor zeros, StringHandle format, int64_t n,
                       int64_t group_size, OptTensor bias, Tensor topk_ids, OptTensor norm_weight, double eps,
                       OptString activation, bool gated) {
  const int64_t k = x.size(-1), m = check_rows(x, k, {bias, norm_weight});
  check_ids(topk_ids, m);
  const Weights w = check_weights(weight, scales, zeros, format, n, group_size, k, x.scalar_type());
  Tensor hidden = torch::stable::new_empty(x, extended(topk_ids, gated ? n / 2 : n));
  dispatch_type(x.scalar_type(), [&]<typename T>(T) {
    submit(ExpertsGateUpOp<T>{.x = ptr<T>(x), .m = m, .top_k = topk_ids.size(-1), .topk_ids = ptr<int64_t>(topk_ids),
                              .w = w, .bias = ptr<T>(bias), .norm_weight = ptr<T>(norm_weight), .eps = float(eps),
                              .activation = check_activation(activation, gated), .hidden = mutable_ptr<T>(hidden)});
  });
  return hidden;
}

Tensor experts_down(Tensor hidden, Tensor weight, OptTensor scales, OptTensor zeros, StringHandle format, int64_t n,
                    int64_t group_size, OptTensor bias, Tensor topk_ids, Tensor topk_weights, OptTensor residual) {
  const int64_t k = hidden.size(-1), top_k = topk_ids.size(-1), m = topk_ids.numel() / top_k;
  check_ids(topk_ids, m);
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.numel() == m * top_k * k &&
                  topk_weights.scalar_type() == ScalarType::Float && topk_weights.is_contiguous() &&
                  (!bias || bias->scalar_type() == hidden.scalar_type()) &&
                  (!residual || residual->scalar_type() == hidden.scalar_type()),
                  "experts are weighted by float32 [..., top_k], hidden is [..., top_k, k], the others of its type");
  const Weights w = check_weights(weight, scales, zeros, format, n, group_size, k, hidden.scalar_type());
  Tensor out = torch::stable::new_empty(hidden, resized(topk_ids, n));
  dispatch_type(hidden.scalar_type(), [&]<typename T>(T) {
    submit(ExpertsDownOp<T>{.hidden = ptr<T>(hidden), .m = m, .top_k = top_k, .topk_ids = ptr<int64_t>(topk_ids),
                            .topk_weights = ptr<float>(topk_weights), .w = w, .bias = ptr<T>(bias),
                            .residual = ptr<T>(residual), .out = mutable_ptr<T>(out)});
  });
  return out;
}

Tensor sample(Tensor logits, OptTensor temperature, OptTensor rand, int64_t top_k, double top_p, double min_p) {
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float && logits.is_contiguous() && logits.dim() == 2 &&
                  logits.numel() > 0, "logits must be float32 [B, V]");
  const int64_t m = logits.size(0);
  STD_TORCH_CHECK(!rand || (rand->scalar_type() == ScalarType::Double && rand->is_contiguous() && rand->numel() == m),
                  "random numbers must be float64 [B, 1]");
  STD_TORCH_CHECK(!temperature || (temperature->scalar_type() == ScalarType::Float && temperature->is_contiguous() &&
                                   (temperature->numel() == 1 || temperature->numel() == m)),
                  "temperature must be float32 [B, 1] or [1, 1]");
  STD_TORCH_CHECK(bool(temperature) == bool(rand), "a temperature needs random numbers, and they need a temperature");
  STD_TORCH_CHECK(top_k >= 0 && top_p > 0 && min_p >= 0 && min_p <= 1, "top_k, top_p or min_p is out of range");
  Tensor tokens = torch::stable::new_empty(logits, Sizes{m}, ScalarType::Long);
  submit(SampleOp{.logits = ptr<float>(logits), .m = m, .n = logits.size(1), .rand = ptr<double>(rand),
                  .temperature = ptr<float>(temperature),
                  .temperature_stride = temperature && temperature->numel() > 1 ? 1 : 0,
                  .filters = {.top_k = top_k, .top_p = top_p, .min_p = float(min_p)},
                  .tokens = mutable_ptr<int64_t>(tokens)});
  return tokens;
}

Tensor dequantize(Tensor weight, OptTensor scales, OptTensor zeros, StringHandle format, int64_t n, int64_t group_size,
                  int64_t k, ScalarType dtype) {
  const Weights w = check_weights(weight, scales, zeros, format, n, group_size, k, dtype);
  Tensor out = torch::stable::new_empty(weight, Sizes{n, k}, dtype);
  dispatch_type(dtype, [&]<typename T>(T) {
    dispatch_format(w, [&]<typename F>(F) {
      if constexpr (!std::is_same_v<F, Unquantized>) dequantize_to<F>(w, mutable_ptr<T>(out));
      else { STD_TORCH_CHECK(false, "W is unquantized: nothing to dequantize"); }
    });
  });
  return out;
}

extern "C" {
// What Python asks about these kernels.

// Return the names that these kernels know: "Unquantized, Int8, ...".
const char* format_names() { return NAMES_OF(FORMATS); }
const char* activation_names() { return NAMES_OF(ACTIVATIONS); }
// Returns whether the matmul with weights of this format quantizes 16-bit activations.
int format_quantizes_activations(const char* name) {
  const int64_t index = find_name(NAMES_OF(FORMATS), name);
  return dispatch(Formats{}, index, []<typename F>(F) { return F::QUANTIZES_ACTIVATIONS; });
}
// Returns up to how many tokens these kernels multiply unquantized weights faster than PyTorch does
// (docs/measurements.md).
int max_unquantized_tokens(int is_bf16) {
  return !HAS_WIDE_REGISTERS ? BLOCK_M : is_bf16 ? MAX_CPU_TOKENS : MAX_CPU_TOKENS / 2;
}
// Return whether these kernels compute more than MAX_CPU_TOKENS tokens faster than PyTorch does: matmuls that quantize
// activations, fused_linear without that, and attend. On CPUs with AMX, PyTorch multiplies bf16 with AMX. The two were
// not compared.
int has_quantized_prefill() { return HAS_FAST_DOT4 && !has_amx(); }
int has_prefill_linear(int is_bf16) { return HAS_PREFILL_LINEAR && is_bf16 && !has_amx(); }
int has_prefill_attention(int is_bf16) { return HAS_WIDE_REGISTERS && !(is_bf16 && has_amx()); }

// Only the tests call the functions below, to compare C++ with formats/ and to know what runs on AMX.
int format_elements_per_byte(const char* name) {
  return dispatch(Formats{}, find_name(NAMES_OF(FORMATS), name), []<typename F>(F) {
    if constexpr (std::is_same_v<F, Unquantized>) return 1;
    else return F::ELEMENTS_PER_WORD / 4;
  });
}
int has_amx_bf16() { return has_amx(); }
}

STABLE_TORCH_LIBRARY_IMPL(gptfast_cpu, CPU, m) {
  m.impl("fused_linear", TORCH_BOX(&fused_linear));
  m.impl("activate", TORCH_BOX(&activate));
  m.impl("add", TORCH_BOX(&add));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("permute_inputs", TORCH_BOX(&permute_inputs));
  m.impl("embed", TORCH_BOX(&embed));
  m.impl("rope_and_cache", TORCH_BOX(&rope_and_cache));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("route", TORCH_BOX(&route));
  m.impl("experts_gate_up", TORCH_BOX(&experts_gate_up));
  m.impl("experts_down", TORCH_BOX(&experts_down));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}
