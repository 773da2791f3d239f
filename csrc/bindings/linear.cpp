#include "bindings/host.h"
#include "cpu/lm_head.h"
#include "cpu/linear.h"

namespace dflash {
namespace {

// A packed weight has more than two dimensions; a plain one is (N, K). A single row's stride may be anything, also the
// 0 that means "packed" to the kernel.
int64_t plain_stride(const Tensor& weight) {
  if (weight.dim() != 2) return 0;
  return weight.size(0) == 1 ? weight.size(1) : weight.stride(0);
}

constexpr int64_t kExact = 16;  // added to a format's number; as in dflash_kernels/formats.py

GemmParams gemm_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales, int64_t format,
                   const std::optional<Tensor>& bias, int64_t out_features) {
  return {{x.data_ptr(), x.stride(0)},
          x.size(0),
          x.size(1),
          out_features,
          weight.data_ptr(),
          format ? 0 : plain_stride(weight),
          data<const float>(scales),
          bias ? bias->data_ptr() : nullptr,
          dtype_of(x, "x"),
          static_cast<Format>(format % kExact),
          format >= kExact,
          active_isa()};
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales, int64_t format,
            const std::optional<Tensor>& bias, int64_t out_features, const Tensor& out) {
  const LinearParams p{gemm_of(x, weight, scales, format, bias, out_features), {out.data_ptr(), out.stride(0)}};
  launch(linear_kernels, p, {x, weight, scales, bias, out});
}

void lm_head_argmax(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales, int64_t format,
                    const std::optional<Tensor>& bias, int64_t out_features, int64_t num_valid, double scale,
                    double softcap, int64_t id_offset, const Tensor& out_ids, const Tensor& out_values) {
  const LmHeadArgmaxParams p{
      {gemm_of(x, weight, scales, format, bias, out_features), num_valid, float(scale), float(softcap)},
      id_offset, data<int64_t>(out_ids), data<float>(out_values)};
  launch(lm_head_argmax_kernels, p, {x, weight, scales, bias, out_ids, out_values});
}

void combine_argmax(const Tensor& values, const Tensor& ids, const Tensor& out_ids, const Tensor& out_values) {
  const CombineArgmaxParams p{data<const float>(values), data<const int64_t>(ids), values.size(0),
                            values.size(1),            data<int64_t>(out_ids),   data<float>(out_values)};
  launch(combine_argmax_kernels, p, {values, ids, out_ids, out_values});
}

void lm_head_topk(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales, int64_t format,
                  const std::optional<Tensor>& bias, int64_t out_features, int64_t num_valid, double scale,
                  double softcap, int64_t id_offset, const Tensor& out_ids, const Tensor& out_values,
                  const Tensor& out_lse) {
  const LmHeadTopkParams p{
      {gemm_of(x, weight, scales, format, bias, out_features), num_valid, float(scale), float(softcap)},
      id_offset,
      out_ids.size(1),
      data<int64_t>(out_ids),
      data<float>(out_values),
      data<float>(out_lse)};
  launch(lm_head_topk_kernels, p, {x, weight, scales, bias, out_ids, out_values, out_lse});
}

void combine_topk(const Tensor& values, const Tensor& ids, const Tensor& lse, const Tensor& out_ids,
                const Tensor& out_values, const Tensor& out_lse) {
  const CombineTopkParams p{data<const float>(values), data<const int64_t>(ids), data<const float>(lse),
                          values.size(0),            values.size(1),           values.size(2),
                          data<int64_t>(out_ids),    data<float>(out_values),  data<float>(out_lse)};
  launch(combine_topk_kernels, p, {values, ids, lse, out_ids, out_values, out_lse});
}

DFLASH_CPU_OPS(m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("lm_head_argmax", TORCH_BOX(&lm_head_argmax));
  m.impl("combine_argmax", TORCH_BOX(&combine_argmax));
  m.impl("lm_head_topk", TORCH_BOX(&lm_head_topk));
  m.impl("combine_topk", TORCH_BOX(&combine_topk));
}

}  // namespace
}  // namespace dflash
