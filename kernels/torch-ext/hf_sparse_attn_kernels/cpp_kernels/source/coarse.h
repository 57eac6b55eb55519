// Stage 1: log-sum-exp over a tile's pooled queries of their products with the key of every block.
#pragma once

#include <vector>

#include "softmax.h"

namespace hsa {

template <class T>
struct Pooled {
  const T* queries;  // [B, G, m, runs, width], scaled
  const bool* real;  // [m, runs]: the run has tokens
  Heads<T> keys;     // [B, G, blocks, width]
  int64_t runs, width, tiles, groups;
};

// Stage 1 of LANES neighbouring tiles of one row: scores [blocks][LANES].
template <class T, class Format>
class Coarse {
 public:
  explicit Coarse(const Pooled<T>& call)
      : call_(call),
        room_(Room::size({call.runs * call.width * LANES, call.runs * CHUNK * LANES, CHUNK * call.width})),
        queries_(room_.take(call.runs * call.width * LANES)),
        products_(room_.take(call.runs * CHUNK * LANES)),
        key_room_(room_.take(CHUNK * call.width)) {}

  // Blocks [begin, end) of the tiles from `first` on.
  void run(int64_t group, int64_t first, int64_t tiles, int64_t begin, int64_t end, std::vector<float>& scores) {
    const int64_t words = call_.width / Format::PACK * LANES;
    for (int64_t run = 0; run < call_.runs; ++run)
      for (int64_t l = 0; l < LANES; ++l) {
        const T* from = call_.queries + ((group * call_.tiles + first + l) * call_.runs + run) * call_.width;
        to_lane<Format>(l < tiles ? from : nullptr, call_.width, LANES, l, queries_ + run * words);
      }
    scores.resize(end * LANES);
    const Matrix<T> keys = call_.keys.rows(group / call_.groups, group % call_.groups);
    for (int64_t at = begin; at < end; at += CHUNK) {
      const int rows = std::min<int64_t>(CHUNK, end - at);
      int64_t stride;
      const float* left = key_rows<Format>(keys, at, rows, rows, call_.width, key_room_, &stride);
      for (int64_t run = 0; run < call_.runs; ++run)
        product<Format, 1>(left, stride, rows, call_.width / Format::PACK, queries_ + run * words, products_ + run * CHUNK * LANES);
      for (int i = 0; i < rows; ++i) store(scores.data() + (at + i) * LANES, combined(first, tiles, i));
    }
  }

 private:
  // log-sum-exp over the runs that have tokens
  Vec combined(int64_t first, int64_t tiles, int row) const {
    if (call_.runs == 1) return load(products_ + row * LANES);
    Vec most = splat(FLOOR), total{};
    for (int64_t run = 0; run < call_.runs; ++run) {
      const float* at = products_ + (run * CHUNK + row) * LANES;
      most = maximum(most, blend(has_tokens(first, tiles, run), load(at), splat(HIDDEN)));
    }
    for (int64_t run = 0; run < call_.runs; ++run) {
      const float* at = products_ + (run * CHUNK + row) * LANES;
      total += exp2_negative((blend(has_tokens(first, tiles, run), load(at), splat(HIDDEN)) - most) * Logits::LOG2E);
    }
    return most + log_of(total);
  }

  IVec has_tokens(int64_t first, int64_t tiles, int64_t run) const {
    IVec mask{};
    for (int64_t l = 0; l < tiles; ++l) mask[l] = call_.real[(first + l) * call_.runs + run] ? -1 : 0;
    return mask;
  }

  const Pooled<T>& call_;
  Room room_;
  float *queries_, *products_, *key_room_;
};

}  // namespace hsa
