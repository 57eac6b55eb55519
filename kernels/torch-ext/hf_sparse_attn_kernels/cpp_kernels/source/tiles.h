// Which queries and keys meet: the grid of tiles, the lanes of a strip, the blocks of a tile's list.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "operands.h"

namespace hsa {

constexpr int CHUNK = 64;         // keys whose scores are formed at a time; a larger block is a chunk of its own
constexpr float HIDDEN = -1e30f;  // score of a key that a query does not see
constexpr float FLOOR = -1e10f;   // least maximum: the weight of every hidden score is exactly zero
constexpr float LIMIT =
    1 << 22;  // of a logit in base 2: beyond it rounding the maximum would change weights by a quarter and more

struct Grid {
  int64_t q_len, kv_len, query_tile, block_size;
  bool causal;
  int64_t tiles;  // of the call
  int64_t heads;  // query heads of a KV head
  int64_t q_offset() const { return kv_len - q_len; }
  // content position of a tile's first query
  int64_t first(int64_t tile) const { return (tile + q_offset() / query_tile) * query_tile; }
  int64_t rows() const { return heads * query_tile; }
  // content position of the last key that a query of the tile sees
  int64_t last(int64_t tile) const { return causal ? std::min(first(tile) + query_tile, kv_len) - 1 : kv_len - 1; }
  // a block that exists: reading another would leave the tensor
  int32_t checked(int64_t block) const {
    TORCH_CHECK_VALUE(block >= 0 && block <= INT32_MAX && block * block_size < kv_len, "the selection names block ",
                      block, ", but there are only ", (kv_len + block_size - 1) / block_size, " blocks of ", block_size,
                      " keys");
    return static_cast<int32_t>(block);
  }
  // The list [begin, end) of a tile without its leading -1: ascending blocks that exist and that the tile sees.
  const int32_t* checked(const int32_t* begin, const int32_t* end, int64_t tile) const {
    while (begin < end && *begin < 0) ++begin;
    if (begin == end) return begin;
    for (const int32_t* at = begin + 1; at < end; ++at)
      TORCH_CHECK_VALUE(at[-1] < at[0], "the selection names block ", at[0], " after ", at[-1],
                        ": must be ascending and unique, with -1 (empty) first");
    TORCH_CHECK_VALUE(checked(end[-1]) * block_size <= last(tile), "the selection names block ", end[-1],
                      ", which starts after its tile's last query: causal attention cannot read it");
    return begin;
  }
};

// Tokens of a batch row that attend to each other only: `grid` counts from slot `first`, its queries are those of the
// call from `query` on. Without documents a batch row is one.
struct Document {
  int64_t row, first, query;
  Grid grid;
};

// Memory of one worker, aligned to a cache line.
class Room {
 public:
  explicit Room(int64_t words)
      : data_(static_cast<float*>(std::aligned_alloc(64, (words * 4 + 127) / 64 * 64)), std::free) {
    if (!data_) throw std::bad_alloc();
  }
  float* take(int64_t words) {
    float* at = data_.get() + used_;
    used_ += (words + 15) / 16 * 16;
    return at;
  }
  static int64_t size(std::initializer_list<int64_t> parts) {
    int64_t total = 0;
    for (int64_t part : parts) total += (part + 15) / 16 * 16;
    return total;
  }

 private:
  std::unique_ptr<float, void (*)(void*)> data_;
  int64_t used_ = 0;
};

// Calls work(worker state, item) for every item, each worker taking the next one when it is free.
template <class Make, class Work>
void for_each_item(int64_t items, const Make& make, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), items);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    auto state = make();
    for (int64_t item; (item = next++) < items;) work(state, item);
  });
}

}  // namespace hsa
