// The operators that Python sees.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "backward.h"
#include "select.h"

namespace hsa {
namespace {

template <class T>
Heads<T> heads_of(const at::Tensor& x) {
  TORCH_CHECK(x.stride(3) == 1, "the last dimension must be contiguous");
  return {x.data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

// Calls run(element, format) with the types of a dtype.
template <class Run>
void dispatch(at::ScalarType dtype, const Run& run) {
  if (dtype == at::kFloat)
    run(float{}, Floats{});
  else if (dtype == at::kBFloat16)
    run(at::BFloat16{}, BFloat16Format{});
  else if (dtype == at::kHalf)
    run(at::Half{}, Floats{});
  else
    TORCH_CHECK(false, "dtype ", dtype, " is not supported");
}

template <class T>
Attention<T> attention_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& indices, const float* sinks,
                          int64_t query_tile, int64_t block_size, bool causal, double scale, double softcap, const at::Tensor& out,
                          const at::Tensor& lse) {
  return {heads_of<T>(q),
          heads_of<T>(k),
          heads_of<T>(v),
          indices.data_ptr<int32_t>(),
          sinks,
          out.data_ptr<T>(),
          lse.data_ptr<float>(),
          {q.size(2), k.size(2), query_tile, block_size, causal, indices.size(2), q.size(1) / k.size(1)},
          {static_cast<float>(scale), static_cast<float>(softcap)},
          k.size(0),
          k.size(1),
          indices.size(3),
          q.size(3),
          v.size(3)};
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& indices,
                                           const std::optional<at::Tensor>& sinks, int64_t query_tile, int64_t block_size, bool causal,
                                           double scale, double softcap) {
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  const float* logits = sinks ? sinks->data_ptr<float>() : nullptr;
  dispatch(q.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    attend<T, decltype(format)>(attention_of<T>(q, k, v, indices, logits, query_tile, block_size, causal, scale, softcap, out, lse));
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse,
                                                                    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                                    const at::Tensor& out, const at::Tensor& lse, const at::Tensor& indices,
                                                                    int64_t query_tile, int64_t block_size, bool causal, double scale,
                                                                    double softcap) {
  at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  at::Tensor delta = at::empty(lse.sizes(), lse.options());
  dispatch(q.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    const Gradients<T> gradients{attention_of<T>(q, k, v, indices, nullptr, query_tile, block_size, causal, scale, softcap, out, lse),
                                 heads_of<T>(grad_out),
                                 grad_lse ? grad_lse->data_ptr<float>() : nullptr,
                                 delta.data_ptr<float>(),
                                 dq.data_ptr<T>(),
                                 dk.data_ptr<T>(),
                                 dv.data_ptr<T>()};
    backward_queries<T, decltype(format)>(gradients);
    backward_keys<T, decltype(format)>(gradients);
  });
  return {dq, dk, dv, delta};
}

template <class T>
Pooled<T> pooled_of(const at::Tensor& queries, const at::Tensor& real, const at::Tensor& router_keys) {
  return {queries.data_ptr<T>(), real.data_ptr<bool>(), heads_of<T>(router_keys), queries.size(3),
          queries.size(4),       queries.size(2),       queries.size(1)};
}

template <class T>
Sampled<T> sampled_of(const at::Tensor& queries, const at::Tensor& reps, const at::Tensor& keys, const at::Tensor& tiles, int64_t q_len,
                      int64_t query_tile, int64_t block_size) {
  const Grid grid{q_len, keys.size(2), query_tile, block_size, true, tiles.numel(), reps.size(0)};
  return {
      queries.data_ptr<T>(),    reps.data_ptr<int64_t>(), heads_of<T>(keys), reps.numel(), keys.size(3), keys.size(0), keys.size(1), grid,
      tiles.data_ptr<int64_t>()};
}

std::tuple<at::Tensor, at::Tensor> select(const at::Tensor& coarse_queries, const at::Tensor& real, const at::Tensor& router_keys,
                                          const at::Tensor& queries, const at::Tensor& reps, const at::Tensor& keys,
                                          const at::Tensor& tiles, int64_t q_len, int64_t query_tile, int64_t block_size, int64_t sink,
                                          const at::Tensor& budgets, int64_t width, std::optional<double> threshold) {
  const int64_t m = tiles.numel();
  const std::array<int64_t, 4> shape{keys.size(0), keys.size(1), m, width};
  at::Tensor indices = at::empty(shape, keys.options().dtype(at::kInt)), scores = at::empty(shape, keys.options().dtype(at::kFloat));
  const int64_t* budget = budgets.data_ptr<int64_t>();  // [6, m]: sink, near, last, eligible, free, candidates
  for (int64_t t = 0; t < m; ++t) {
    const int64_t near = budget[m + t], last = budget[2 * m + t], eligible = budget[3 * m + t], free = budget[4 * m + t];
    const int64_t chosen = eligible <= free ? eligible : threshold ? budget[5 * m + t] : free;
    TORCH_CHECK(std::min(sink, near) + chosen + last - near + 1 <= width, "a tile may keep more than the ", width, " blocks of its list");
  }
  const std::optional<float> least = threshold ? std::optional<float>(static_cast<float>(*threshold)) : std::nullopt;
  dispatch(keys.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    select_blocks<T, decltype(format)>(
        {pooled_of<T>(coarse_queries, real, router_keys), sampled_of<T>(queries, reps, keys, tiles, q_len, query_tile, block_size), sink,
         budget + m, budget + 2 * m, budget + 4 * m, budget + 5 * m, least, width, indices.data_ptr<int32_t>(), scores.data_ptr<float>()});
  });
  return {indices, scores};
}

at::Tensor coarse(const at::Tensor& queries, const at::Tensor& real, const at::Tensor& router_keys) {
  const int64_t blocks = router_keys.size(2);
  at::Tensor out = at::empty({queries.size(0), queries.size(1), queries.size(2), blocks}, queries.options().dtype(at::kFloat));
  dispatch(queries.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    coarse_scores<T, decltype(format)>(pooled_of<T>(queries, real, router_keys), queries.size(0), blocks, out.data_ptr<float>());
  });
  return out;
}

at::Tensor mass(const at::Tensor& queries, const at::Tensor& reps, const at::Tensor& keys, const at::Tensor& tiles,
                const std::optional<at::Tensor>& blocks, int64_t q_len, int64_t query_tile, int64_t block_size) {
  const int64_t width = blocks ? blocks->size(-1) : (keys.size(2) + block_size - 1) / block_size;
  at::Tensor out = at::empty({keys.size(0), keys.size(1), tiles.numel(), width}, keys.options().dtype(at::kFloat));
  dispatch(keys.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    block_mass<T, decltype(format)>(sampled_of<T>(queries, reps, keys, tiles, q_len, query_tile, block_size),
                                    blocks ? blocks->data_ptr<int64_t>() : nullptr, width, out.data_ptr<float>());
  });
  return out;
}

at::Tensor features(const at::Tensor& k, int64_t block_size) {
  at::Tensor out = at::empty({k.size(0), k.size(1), k.size(2) / block_size, 3 * k.size(3)}, k.options());
  dispatch(k.scalar_type(), [&](auto element, auto) {
    using T = decltype(element);
    pooled_features<T>(heads_of<T>(k), k.size(0), k.size(1), k.size(2), k.size(3), block_size, out.data_ptr<T>());
  });
  return out;
}

}  // namespace
}  // namespace hsa

TORCH_LIBRARY(hf_sparse_attn_cpp, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? sinks, int query_tile, int block_size, bool causal, float scale, "
      "float softcap) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor indices, int query_tile, "
      "int block_size, bool causal, float scale, float softcap) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "select(Tensor coarse_queries, Tensor real, Tensor router_keys, Tensor queries, Tensor reps, Tensor keys, Tensor tiles, int q_len, "
      "int query_tile, int block_size, int sink, Tensor budgets, int width, float? threshold) -> (Tensor, Tensor)");
  m.def("coarse_scores(Tensor queries, Tensor real, Tensor router_keys) -> Tensor");
  m.def(
      "block_mass(Tensor queries, Tensor reps, Tensor keys, Tensor tiles, Tensor? blocks, int q_len, int query_tile, int block_size) -> "
      "Tensor");
  m.def("pooled_features(Tensor k, int block_size) -> Tensor");
}

TORCH_LIBRARY_IMPL(hf_sparse_attn_cpp, CPU, m) {
  m.impl("forward", &hsa::forward);
  m.impl("backward", &hsa::backward);
  m.impl("select", &hsa::select);
  m.impl("coarse_scores", &hsa::coarse);
  m.impl("block_mass", &hsa::mass);
  m.impl("pooled_features", &hsa::features);
}
