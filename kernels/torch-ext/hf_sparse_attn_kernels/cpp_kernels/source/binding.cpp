// The operators that Python sees.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "backward.h"
#include "checks.h"
#include "select.h"

namespace hsa {
namespace {

template <class T>
Heads<T> heads_of(const at::Tensor& x) {
  static const T nothing{};  // rows of no elements, which an empty tensor gives no address
  return {x.numel() ? x.const_data_ptr<T>() : &nothing, x.stride(0), x.stride(1), x.stride(2)};
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
    TORCH_CHECK_VALUE(false, "dtype ", dtype, " is not supported; supported: Float, BFloat16, Half");
}

// Where an attention call's queries lie, and which of its tokens attend to each other.
struct Places {
  Grid grid;
  std::vector<Document> documents;
};

// What the tensors of an attention call must have in common.
Places attention_places(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& indices,
                        const std::optional<at::Tensor>& documents, int64_t query_tile, int64_t block_size,
                        bool causal) {
  Grid grid = grid_of(q.dim() == 4 ? q.size(2) : 0, k.dim() == 4 ? k.size(2) : 0, query_tile, block_size, causal,
                      query_heads(q, k));
  const at::ScalarType dtype = q.scalar_type();
  expect_rows("q", q, dtype, {k.size(0), ANY, ANY, ANY});
  expect_rows("k", k, dtype, {ANY, ANY, ANY, q.size(3)});
  expect_rows("v", v, dtype, {k.size(0), k.size(1), k.size(2), ANY});
  expect_even("q", q);
  expect_even("v", v);
  if (documents) expect_whole("documents", *documents, at::kLong, {ANY, 3});
  expect_whole("indices", indices, at::kInt,
               {documents ? documents->size(0) : k.size(0), k.size(1), documents ? ANY : grid.tiles, ANY});
  grid.tiles = indices.size(2);
  return {grid, documents ? documents_of(*documents, grid, k.size(0)) : whole_rows(grid, k.size(0))};
}

template <class T>
Attention<T> attention_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& indices,
                          const Places& places, const float* sinks, double scale, double softcap, const at::Tensor& out,
                          const at::Tensor& lse) {
  return {heads_of<T>(q),
          heads_of<T>(k),
          heads_of<T>(v),
          indices.const_data_ptr<int32_t>(),
          sinks,
          out.data_ptr<T>(),
          lse.data_ptr<float>(),
          places.grid,
          {static_cast<float>(scale), static_cast<float>(softcap)},
          places.documents,
          k.size(1),
          indices.size(3),
          q.size(3),
          v.size(3)};
}

// Memory for what every document writes its part of; zero where there may be tokens of no document.
at::Tensor room_for(at::IntArrayRef sizes, const at::TensorOptions& options, bool documents) {
  return documents ? at::zeros(sizes, options) : at::empty(sizes, options);
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           const at::Tensor& indices, const std::optional<at::Tensor>& documents,
                                           const std::optional<at::Tensor>& sinks, int64_t query_tile,
                                           int64_t block_size, bool causal, double scale, double softcap) {
  const Places places = attention_places(q, k, v, indices, documents, query_tile, block_size, causal);
  if (sinks) expect_whole("sinks", *sinks, at::kFloat, {q.size(1)});
  at::Tensor out = room_for({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options(), documents.has_value());
  at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  if (documents) lse.fill_(-INFINITY);
  const float* logits = sinks ? sinks->const_data_ptr<float>() : nullptr;
  dispatch(q.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    if (lse.numel())
      attend<T, decltype(format)>(attention_of<T>(q, k, v, indices, places, logits, scale, softcap, out, lse));
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& indices,
    const std::optional<at::Tensor>& documents, int64_t query_tile, int64_t block_size, bool causal, double scale,
    double softcap) {
  const Places places = attention_places(q, k, v, indices, documents, query_tile, block_size, causal);
  const std::array<int64_t, 4> shape{q.size(0), q.size(1), q.size(2), v.size(3)};
  const at::IntArrayRef rows(shape.data(), 3);
  expect_rows("grad_out", grad_out, q.scalar_type(), shape);
  expect_whole("out", out, q.scalar_type(), shape);
  expect_whole("lse", lse, at::kFloat, rows);
  if (grad_lse) expect_whole("grad_lse", *grad_lse, at::kFloat, rows);
  const auto room_like = [&](const at::Tensor& x) { return room_for(x.sizes(), x.options(), documents.has_value()); };
  at::Tensor dq = room_like(q), dk = room_like(k), dv = room_like(v), delta = room_like(lse);
  if (!lse.numel()) return {dq, dk.zero_(), dv.zero_(), delta};
  dispatch(q.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    const Gradients<T> gradients{attention_of<T>(q, k, v, indices, places, nullptr, scale, softcap, out, lse),
                                 heads_of<T>(grad_out),
                                 grad_lse ? grad_lse->const_data_ptr<float>() : nullptr,
                                 delta.data_ptr<float>(),
                                 dq.data_ptr<T>(),
                                 dk.data_ptr<T>(),
                                 dv.data_ptr<T>()};
    backward_queries<T, decltype(format)>(gradients);
    backward_keys<T, decltype(format)>(gradients);
  });
  return {dq, dk, dv, delta};
}

// Pooled queries [B, G, m, runs, R] of `tiles` tiles, and the keys of at least `blocks` blocks.
void expect_pooled(const at::Tensor& queries, const char* name, const at::Tensor& real, const at::Tensor& router_keys,
                   at::ScalarType dtype, int64_t batch, int64_t groups, int64_t tiles) {
  expect_whole(name, queries, dtype, {batch, groups, tiles, ANY, ANY});
  TORCH_CHECK_VALUE(queries.size(3) >= 1, name, " is ", queries.sizes(), ": must have at least one run of tokens");
  expect_even(name, queries);
  expect_whole("real", real, at::kBool, {queries.size(2), queries.size(3)});
  expect_rows("router_keys", router_keys, dtype, {queries.size(0), queries.size(1), ANY, queries.size(4)});
}

template <class T>
Pooled<T> pooled_of(const at::Tensor& queries, const at::Tensor& real, const at::Tensor& router_keys) {
  return {queries.const_data_ptr<T>(),
          real.const_data_ptr<bool>(),
          heads_of<T>(router_keys),
          queries.size(3),
          queries.size(4),
          queries.size(2),
          queries.size(1)};
}

// What sampled queries [B, G, m, heads, r, E] and their keys must have in common; the grid of the call, its tiles those
// of `tiles`.
Grid sampled_grid(const at::Tensor& queries, const at::Tensor& reps, const at::Tensor& keys, const at::Tensor& tiles,
                  int64_t q_len, int64_t query_tile, int64_t block_size) {
  expect_rows("keys", keys, keys.scalar_type(), {ANY, ANY, ANY, ANY});
  Grid grid = grid_of(q_len, keys.size(2), query_tile, block_size, true, 0);
  expect_tiles(tiles, grid);
  expect_tokens(reps, query_tile);
  expect_whole("queries", queries, keys.scalar_type(),
               {keys.size(0), keys.size(1), tiles.numel(), reps.size(0), reps.size(1), keys.size(3)});
  expect_even("keys", keys);
  grid.tiles = tiles.numel();
  grid.heads = reps.size(0);
  return grid;
}

template <class T>
Sampled<T> sampled_of(const at::Tensor& queries, const at::Tensor& reps, const at::Tensor& keys,
                      const at::Tensor& tiles, const Grid& grid) {
  return {queries.const_data_ptr<T>(),
          reps.const_data_ptr<int64_t>(),
          heads_of<T>(keys),
          reps.numel(),
          keys.size(3),
          keys.size(0),
          keys.size(1),
          grid,
          tiles.const_data_ptr<int64_t>()};
}

// `budgets` [6, m]: sink, near, last, eligible, free, candidates of each tile, which leave neither its blocks nor its
// list.
void expect_budgets(const at::Tensor& budgets, int64_t sink, int64_t blocks, int64_t summaries, int64_t width,
                    bool threshold) {
  const int64_t m = budgets.size(1), *budget = budgets.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(sink >= 0, "sink is ", sink, ": must not be negative");
  TORCH_CHECK_VALUE(0 <= width && width <= blocks, "width is ", width, ": must be in [0, ", blocks,
                    "], the number of blocks");
  for (int64_t t = 0; t < m; ++t) {
    const int64_t near = budget[m + t], last = budget[2 * m + t], free = budget[4 * m + t],
                  candidates = budget[5 * m + t];
    TORCH_CHECK_VALUE(0 <= near && near <= last + 1 && last < blocks, "budgets force blocks ", near, " to ", last,
                      " on tile ", t, ": there are ", blocks);
    const int64_t eligible = std::max<int64_t>(0, near - sink);
    const bool open = eligible > free;
    TORCH_CHECK_VALUE(
        0 <= free && (!open || (0 <= candidates && candidates <= eligible && (threshold || free <= candidates))),
        "budgets keep ", free, " of ", candidates, " candidates on tile ", t, ", of ", eligible,
        " that may be selected");
    TORCH_CHECK_VALUE(!open || near <= summaries, "router_keys has ", summaries, " blocks: tile ", t, " needs ", near);
    const int64_t chosen = !open ? eligible : threshold ? candidates : free;
    TORCH_CHECK_VALUE(std::min(sink, near) + chosen + last - near + 1 <= width, "a tile may keep more than the ", width,
                      " blocks of its list");
  }
}

std::tuple<at::Tensor, at::Tensor> select(const at::Tensor& coarse_queries, const at::Tensor& real,
                                          const at::Tensor& router_keys, const at::Tensor& queries,
                                          const at::Tensor& reps, const at::Tensor& keys, const at::Tensor& tiles,
                                          at::IntArrayRef exhaustive, int64_t q_len, int64_t query_tile,
                                          int64_t block_size, int64_t sink, const at::Tensor& budgets, int64_t width,
                                          std::optional<double> threshold) {
  const Grid grid = sampled_grid(queries, reps, keys, tiles, q_len, query_tile, block_size);
  const int64_t m = grid.tiles, blocks = (grid.kv_len + block_size - 1) / block_size;
  expect_pooled(coarse_queries, "coarse_queries", real, router_keys, keys.scalar_type(), keys.size(0), keys.size(1), m);
  expect_whole("budgets", budgets, at::kLong, {6, m});
  expect_budgets(budgets, sink, blocks, router_keys.size(2), width, threshold.has_value());
  std::vector<bool> whole(keys.size(1), false);
  for (int64_t head : exhaustive) {
    TORCH_CHECK_VALUE(head >= 0 && head < keys.size(1), "exhaustive names KV head ", head, ": there are ",
                      keys.size(1));
    whole[head] = true;
  }
  const std::array<int64_t, 4> shape{keys.size(0), keys.size(1), m, width};
  at::Tensor indices = at::empty(shape, keys.options().dtype(at::kInt)),
             scores = at::empty(shape, keys.options().dtype(at::kFloat));
  if (!indices.numel()) return {indices, scores};
  const int64_t* budget = budgets.const_data_ptr<int64_t>();
  const std::optional<float> least = threshold ? std::optional<float>(static_cast<float>(*threshold)) : std::nullopt;
  dispatch(keys.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    select_blocks<T, decltype(format)>({pooled_of<T>(coarse_queries, real, router_keys),
                                        sampled_of<T>(queries, reps, keys, tiles, grid), sink, budget + m,
                                        budget + 2 * m, budget + 4 * m, budget + 5 * m, whole, least, width,
                                        indices.data_ptr<int32_t>(), scores.data_ptr<float>()});
  });
  return {indices, scores};
}

at::Tensor coarse(const at::Tensor& queries, const at::Tensor& real, const at::Tensor& router_keys) {
  expect_pooled(queries, "queries", real, router_keys, queries.scalar_type(), ANY, ANY, ANY);
  const int64_t blocks = router_keys.size(2);
  at::Tensor out =
      at::empty({queries.size(0), queries.size(1), queries.size(2), blocks}, queries.options().dtype(at::kFloat));
  dispatch(queries.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    if (out.numel())
      coarse_scores<T, decltype(format)>(pooled_of<T>(queries, real, router_keys), queries.size(0), blocks,
                                         out.data_ptr<float>());
  });
  return out;
}

at::Tensor mass(const at::Tensor& queries, const at::Tensor& reps, const at::Tensor& keys, const at::Tensor& tiles,
                const std::optional<at::Tensor>& blocks, int64_t q_len, int64_t query_tile, int64_t block_size) {
  const Grid grid = sampled_grid(queries, reps, keys, tiles, q_len, query_tile, block_size);
  const int64_t rows = keys.size(0) * keys.size(1);
  if (blocks) expect_whole("blocks", *blocks, at::kLong, {rows, grid.tiles, ANY});
  const int64_t width = blocks ? blocks->size(2) : (keys.size(2) + block_size - 1) / block_size;
  at::Tensor out = at::empty({keys.size(0), keys.size(1), grid.tiles, width}, keys.options().dtype(at::kFloat));
  if (!out.numel()) return out;
  dispatch(keys.scalar_type(), [&](auto element, auto format) {
    using T = decltype(element);
    block_mass<T, decltype(format)>(sampled_of<T>(queries, reps, keys, tiles, grid),
                                    blocks ? blocks->const_data_ptr<int64_t>() : nullptr, width, out.data_ptr<float>());
  });
  return out;
}

at::Tensor features(const at::Tensor& k, int64_t block_size) {
  expect_rows("k", k, k.scalar_type(), {ANY, ANY, ANY, ANY});
  TORCH_CHECK_VALUE(block_size >= 1, "block_size is ", block_size, ": must be positive");
  at::Tensor out = at::empty({k.size(0), k.size(1), k.size(2) / block_size, 3 * k.size(3)}, k.options());
  dispatch(k.scalar_type(), [&](auto element, auto) {
    using T = decltype(element);
    if (out.numel())
      pooled_features<T>(heads_of<T>(k), k.size(0), k.size(1), k.size(2), k.size(3), block_size, out.data_ptr<T>());
  });
  return out;
}

}  // namespace
}  // namespace hsa

TORCH_LIBRARY(hf_sparse_attn_cpp, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? documents, Tensor? sinks, int query_tile, int "
      "block_size, "
      "bool causal, float scale, float softcap) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor "
      "indices, "
      "Tensor? documents, int query_tile, int block_size, bool causal, float scale, float softcap) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "select(Tensor coarse_queries, Tensor real, Tensor router_keys, Tensor queries, Tensor reps, Tensor keys, Tensor "
      "tiles, int[] exhaustive, int q_len, "
      "int query_tile, int block_size, int sink, Tensor budgets, int width, float? threshold) -> (Tensor, Tensor)");
  m.def("coarse_scores(Tensor queries, Tensor real, Tensor router_keys) -> Tensor");
  m.def(
      "block_mass(Tensor queries, Tensor reps, Tensor keys, Tensor tiles, Tensor? blocks, int q_len, int query_tile, "
      "int block_size) -> "
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
