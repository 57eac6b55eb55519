// What fits what. An operator compares all its tensors before it takes a pointer of one: what does not fit is a
// ValueError.
#pragma once

#include <ATen/core/Tensor.h>

#include <sstream>
#include <vector>

#include "tiles.h"

namespace hsa {

constexpr int64_t ANY = -1;  // in the sizes of a tensor: as many as it has

// `x` is in this machine's memory and has this dtype and these sizes.
inline void expect(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  bool fits =
      x.device().is_cpu() && x.layout() == at::kStrided && x.scalar_type() == dtype && x.sizes().size() == sizes.size();
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] == ANY || sizes[i] == x.size(i);
  if (fits) return;
  std::ostringstream wanted;
  for (size_t i = 0; i < sizes.size(); ++i) {
    wanted << (i ? ", " : "");
    if (sizes[i] == ANY)
      wanted << "*";
    else
      wanted << sizes[i];
  }
  TORCH_CHECK_VALUE(false, name, " is ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ": must be ", dtype, " [",
                    wanted.str(), "] on cpu");
}

// The same, and without gaps.
inline void expect_whole(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  expect(name, x, dtype, sizes);
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " has strides ", x.strides(), ": must be contiguous");
}

// The same, and rows, along the last dimension, without gaps.
inline void expect_rows(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  expect(name, x, dtype, sizes);
  TORCH_CHECK_VALUE(x.stride(-1) == 1 || x.size(-1) <= 1 || x.numel() == 0, name, " has strides ", x.strides(),
                    ": the last dimension must be contiguous");
}

// A width that every format can pack.
inline void expect_even(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.size(-1) % 2 == 0, name, " has rows of ", x.size(-1), " elements: must be an even number");
}

inline int64_t query_heads(const at::Tensor& q, const at::Tensor& k) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "q is ", q.sizes(), " and k ", k.sizes(),
                    ": must be [B, H, Q, D] and [B, G, N, D]");
  const int64_t heads = q.size(1), groups = k.size(1);
  TORCH_CHECK_VALUE(groups ? heads % groups == 0 : heads == 0, heads, " query heads cannot share ", groups,
                    " KV heads: the first must be a multiple of the second");
  return groups ? heads / groups : 0;
}

inline Grid grid_of(int64_t q_len, int64_t kv_len, int64_t query_tile, int64_t block_size, bool causal, int64_t heads) {
  constexpr int64_t most = INT32_MAX;
  TORCH_CHECK_VALUE(0 <= q_len && q_len <= kv_len && kv_len <= most, "q_len=", q_len,
                    " queries cannot be the last of kv_len=", kv_len, " keys: need 0 <= q_len <= kv_len < 2^31");
  TORCH_CHECK_VALUE(1 <= query_tile && query_tile <= most, "query_tile is ", query_tile, ": must be in [1, 2^31)");
  TORCH_CHECK_VALUE(block_size == 16 || block_size == 32 || block_size == 64 || block_size == 128, "block_size is ",
                    block_size, ": must be 16, 32, 64 or 128");
  Grid grid{q_len, kv_len, query_tile, block_size, causal, 0, heads};
  grid.tiles = q_len ? (grid.q_offset() % query_tile + q_len + query_tile - 1) / query_tile : 0;
  return grid;
}

// Every row of a call of `grid`.
inline std::vector<Document> whole_rows(const Grid& grid, int64_t batch) {
  std::vector<Document> rows;
  for (int64_t row = 0; row < batch; ++row) rows.push_back({row, 0, 0, grid});
  return rows;
}

// The documents [R, 3], (batch row, first slot, end slot), of a call of `grid`, each of which has at most `grid.tiles`
// tiles.
inline std::vector<Document> documents_of(const at::Tensor& documents, const Grid& grid, int64_t batch) {
  std::vector<Document> parts;
  for (int64_t r = 0; r < documents.size(0); ++r) {
    const int64_t *place = documents.const_data_ptr<int64_t>() + r * 3, row = place[0], first = place[1],
                  end = place[2];
    TORCH_CHECK_VALUE(0 <= row && row < batch && 0 <= first && first < end && end <= grid.kv_len, "documents holds [",
                      row, ", ", first, ", ", end, "]: must lie in ", batch, " rows of ", grid.kv_len, " slots");
    const int64_t begin = std::max(first, grid.q_offset());
    const Grid within = grid_of(std::max<int64_t>(end - begin, 0), end - first, grid.query_tile, grid.block_size,
                                grid.causal, grid.heads);
    TORCH_CHECK_VALUE(within.tiles <= grid.tiles, "indices has ", grid.tiles, " tiles, but document [", row, ", ",
                      first, ", ", end, "] has ", within.tiles);
    parts.push_back({row, first, begin - grid.q_offset(), within});
  }
  std::vector<const Document*> ordered;
  for (const Document& part : parts) ordered.push_back(&part);
  std::sort(ordered.begin(), ordered.end(), [](const Document* a, const Document* b) {
    return std::pair(a->row, a->first) < std::pair(b->row, b->first);
  });
  for (size_t i = 1; i < ordered.size(); ++i) {
    const Document &before = *ordered[i - 1], &part = *ordered[i];
    TORCH_CHECK_VALUE(before.row != part.row || before.first + before.grid.kv_len <= part.first, "documents holds [",
                      part.row, ", ", part.first, ", ", part.first + part.grid.kv_len, "] after [", before.row, ", ",
                      before.first, ", ", before.first + before.grid.kv_len,
                      "]: must share no slot with another document");
  }
  return parts;
}

// Numbers [m] of tiles of a call of `grid`, ascending.
inline void expect_tiles(const at::Tensor& tiles, const Grid& grid) {
  expect_whole("tiles", tiles, at::kLong, {ANY});
  const int64_t* tile = tiles.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tiles.numel(); ++i) {
    TORCH_CHECK_VALUE(0 <= tile[i] && tile[i] < grid.tiles, "tiles holds ", tile[i], ": must be in [0, ", grid.tiles,
                      ")");
    TORCH_CHECK_VALUE(i == 0 || tile[i - 1] < tile[i], "tiles holds ", tile[i], " after ", tile[i - 1],
                      ": must be ascending and unique");
  }
}

// Tokens of a tile [heads, r].
inline void expect_tokens(const at::Tensor& reps, int64_t query_tile) {
  expect_whole("reps", reps, at::kLong, {ANY, ANY});
  const int64_t* token = reps.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < reps.numel(); ++i)
    TORCH_CHECK_VALUE(0 <= token[i] && token[i] < query_tile, "reps holds ", token[i], ": must be in [0, ", query_tile,
                      ")");
}

}  // namespace hsa
