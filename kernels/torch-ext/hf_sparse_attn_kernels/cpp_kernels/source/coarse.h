// Stage 1: log-sum-exp over a tile's pooled queries of their products with the key of every block.
#pragma once

#include "exact.h"

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
    mark_tokens(first, tiles);
    scores.resize(end * LANES);
    const Matrix<T> keys = call_.keys.rows(group / call_.groups, group % call_.groups);
    for (int64_t at = begin; at < end; at += CHUNK) {
      const int rows = std::min<int64_t>(CHUNK, end - at);
      int64_t stride;
      const Word* left = key_rows<Format>(keys, at, rows, rows, call_.width, key_room_, &stride);
      for (int64_t run = 0; run < call_.runs; ++run)
        product<Format, 1>(left, stride, rows, call_.width / Format::PACK, queries_ + run * words,
                           products_ + run * CHUNK * LANES);
      for (int i = 0; i < rows; ++i) store(scores.data() + (at + i) * LANES, combined(i));
      if (call_.runs > 1 && !ordinary(scores.data() + at * LANES, rows))
        exactly(group, first, tiles, at, rows, scores.data());
    }
  }

 private:
  // has_tokens_: which lanes' tiles have tokens in a run, all bits set or none; empty lanes as if they had
  void mark_tokens(int64_t first, int64_t tiles) {
    has_tokens_.assign(call_.runs * LANES, -1);
    for (int64_t run = 0; run < call_.runs; ++run)
      for (int64_t l = 0; l < tiles; ++l)
        has_tokens_[run * LANES + l] = call_.real[(first + l) * call_.runs + run] ? -1 : 0;
  }

  // products of a run with the keys of a row, very low where the run has no tokens
  Vec product_of(int64_t run, int row) const {
    IVec mask;
    std::memcpy(&mask, has_tokens_.data() + run * LANES, sizeof(mask));
    return blend(mask, load(products_ + (run * CHUNK + row) * LANES), splat(-FLT_MAX));
  }

  // log-sum-exp over the runs that have tokens, of the keys of a row
  Vec combined(int row) const {
    if (call_.runs == 1) return load(products_ + row * LANES);
    Vec most = splat(-FLT_MAX), total{};
    for (int64_t run = 0; run < call_.runs; ++run) most = maximum(most, product_of(run, row));
    for (int64_t run = 0; run < call_.runs; ++run)
      total += exp2_negative((product_of(run, row) - most) * Logits::LOG2E);
    return most + log_of(total);
  }

  // whether no score is NaN, infinite or near the ends of the range, as that of a tile without tokens
  static bool ordinary(const float* scores, int64_t rows) {
    Vec zero{};
    for (int64_t i = 0; i < rows; ++i) zero += load(scores + i * LANES) * 2.0f * 0.0f;
    return sum(zero) == 0;
  }

  // the same in double precision for `rows` keys from `at` on
  void exactly(int64_t group, int64_t first, int64_t tiles, int64_t at, int64_t rows, float* scores) const {
    const Matrix<T> keys = call_.keys.rows(group / call_.groups, group % call_.groups);
    std::vector<double> logits;
    for (int64_t i = at; i < at + rows; ++i)
      for (int64_t l = 0; l < tiles; ++l) {
        logits.clear();
        for (int64_t run = 0; run < call_.runs; ++run) {
          const T* query = call_.queries + ((group * call_.tiles + first + l) * call_.runs + run) * call_.width;
          if (has_tokens_[run * LANES + l]) logits.push_back(dot(query, keys.row(i), call_.width));
        }
        scores[i * LANES + l] = static_cast<float>(softmax_exactly(logits, nullptr));
      }
  }

  const Pooled<T>& call_;
  Room room_;
  std::vector<int32_t> has_tokens_;
  float *queries_, *products_, *key_room_;
};

}  // namespace hsa
