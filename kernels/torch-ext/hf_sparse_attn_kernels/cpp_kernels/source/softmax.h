// The running softmax of a strip of queries, one query in each lane, and which keys a lane sees.
#pragma once

#include <cmath>

#include "tiles.h"

namespace hsa {

// How a product q·k becomes a logit: scale · q·k, or cap · tanh(scale · q·k / cap). Logits are kept in base 2.
struct Logits {
  float scale;
  float softcap;  // 0: none

  static constexpr float LOG2E = 1.4426950408889634f;
  // what a product is multiplied by inside the exponential; else `transform` has done it. HIDDEN stays finite and far
  // below FLOOR.
  bool plain() const { return softcap == 0 && scale > 1e-15f && scale < 1e8f; }
  float factor() const { return plain() ? scale * LOG2E : 1.0f; }
};

// The queries of a tile that are the lanes of a strip: tokens of its query heads. A token outside the call is an empty
// lane.
template <int NV>
class Lanes {
  static constexpr int L = NV * LANES;

 public:
  // `place(lane)` gives (head within the group, token of the tile); a negative head is an empty lane.
  template <class Place>
  Lanes(const Grid& grid, int64_t tile, const Place& place) : grid_(grid) {
    const int64_t base = grid.first(tile) - grid.q_offset();
    least_ = grid.kv_len;
    for (int l = 0; l < L; ++l) {
      const auto [head, token] = place(l);
      const int64_t at = base + token;
      head_[l] = static_cast<int32_t>(head);
      query_[l] = head >= 0 && at >= 0 && at < grid.q_len ? static_cast<int32_t>(at) : -1;
      last_[l] = static_cast<int32_t>(query_[l] >= 0 && grid.causal ? at + grid.q_offset() : grid.kv_len - 1);
      least_ = std::min<int64_t>(least_, last_[l]);
    }
  }

  // index of the lane's query in its document, -1 for an empty lane; its head within the group
  int64_t query(int lane) const { return query_[lane]; }
  int64_t head(int lane) const { return head_[lane]; }
  // position of the last key that it sees
  int64_t last(int lane) const { return last_[lane]; }

  template <class Format, class Tensor>
  void load_queries(const Tensor& q, const Document& document, int64_t g, int64_t width, float* to) const {
    for (int l = 0; l < L; ++l) {
      const auto* from =
          query_[l] < 0 ? nullptr : q.rows(document.row, g * grid_.heads + head_[l], document.query).row(query_[l]);
      to_lane<Format>(from, width, L, l, to);
    }
  }

  // Hide from scores [rows][L] of the keys at first, first + 1, ... those that a lane does not see.
  void hide(float* scores, int64_t first, int rows) const {
    if (first + rows - 1 <= least_) return;
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < NV; ++v) {
        IVec last;
        std::memcpy(&last, last_ + v * LANES, sizeof(last));
        float* at = scores + (i * NV + v) * LANES;
        store(at, blend(last < static_cast<int32_t>(first + i), splat(HIDDEN), load(at)));
      }
  }

 private:
  const Grid& grid_;
  int64_t least_;
  int32_t head_[L], query_[L];
  alignas(64) int32_t last_[L];
};

// Lanes of rows [first_row, first_row + NV · LANES) of a tile's (head, token) rows.
template <int NV>
Lanes<NV> rows_of(const Grid& grid, int64_t tile, int64_t first_row) {
  return Lanes<NV>(grid, tile, [&](int lane) {
    const int64_t row = first_row + lane;
    return std::pair<int64_t, int64_t>(row < grid.rows() ? row / grid.query_tile : -1, row % grid.query_tile);
  });
}

// Raises the running maximum `most` (base 2) of vector v to that of factor times scores [rows][NV · LANES];
// returns what earlier sums are multiplied by.
template <int NV>
inline Vec raise_maximum(const float* scores, int64_t rows, int v, float factor, Vec& most) {
  Vec larger = load(scores + v * LANES);
  for (int64_t i = 1; i < rows; ++i) larger = maximum(larger, load(scores + (i * NV + v) * LANES));
  larger = maximum(most, larger * factor);
  const Vec keep = exp2_negative(most - larger);
  most = larger;
  return keep;
}

template <int NV>
class Softmax {
  static constexpr int L = NV * LANES;

 public:
  explicit Softmax(const Logits& logits) : logits_(logits) {
    for (int v = 0; v < NV; ++v) max_[v] = splat(FLOOR), sum_[v] = Vec{};
  }

  // Begin with one more logit per head that has no value.
  void start(const Lanes<NV>& lanes, const float* sinks) {
    for (int l = 0; l < L; ++l)
      if (lanes.query(l) >= 0)
        max_[l / LANES][l % LANES] = sinks[lanes.head(l)] * Logits::LOG2E, sum_[l / LANES][l % LANES] = 1;
  }

  // Products [rows][L] to logits in base 2, where a factor inside the exponential does not do it.
  void transform(float* scores, int rows) const {
    if (logits_.plain()) return;
    const float cap = logits_.softcap;
    for (float* at = scores; at < scores + rows * L; at += LANES) {
      Vec x = load(at) * logits_.scale;
      if (cap != 0) {  // tanh(y) = sign(y) · (1 − e) / (1 + e) with e = exp(−2 |y|)
        const Vec y = x / cap, size = blend(y < 0.0f, -y, y), square = size * size;
        const Vec e = exp2_negative(size * (-2 * Logits::LOG2E));
        // near 0 the quotient loses digits that the series keeps
        const Vec tanh =
            blend(size < 0.0625f, size * (1.0f - square * (1 / 3.0f - square * (2 / 15.0f))), (1.0f - e) / (1.0f + e));
        x = blend(y < 0.0f, -tanh, tanh) * cap;
      }
      store(at, x * Logits::LOG2E);
    }
  }

  // Unnormalised weights of the next `rows` keys in the format's words; `keep` is what earlier outputs are multiplied
  // by.
  template <class Format>
  void weights(const float* scores, int64_t rows, float* weights, Vec* keep) {
    const float factor = logits_.factor();
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) keep[v] = raise_maximum<NV>(scores, rows, v, factor, max_[v]);
    Vec sums[NV] = {};
    for (int64_t i = 0; i < rows; i += Format::PACK)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Vec p[Format::PACK];
        for (int part = 0; part < Format::PACK; ++part) {
          p[part] = exp2_negative(load(scores + ((i + part) * NV + v) * LANES) * factor - max_[v]);
          sums[v] += p[part];
        }
        store(weights + (i / Format::PACK * NV + v) * LANES, Format::pack(p));
      }
    for (int v = 0; v < NV; ++v) sum_[v] = sum_[v] * keep[v] + sums[v];
  }

  // Whether a lane's largest logit is one that float cannot weigh others against, or below FLOOR or NaN; also where it
  // saw nothing.
  bool extreme() const {
    for (int v = 0; v < NV; ++v)
      for (int l = 0; l < LANES; ++l)
        if (!(std::abs(max_[v][l]) <= LIMIT)) return true;
    return false;
  }

  // 1 / sum of the weights (0 for a lane that saw nothing) and the natural log-sum-exp, [L] each.
  void finish(float* inverse, float* lse) const {
    for (int l = 0; l < L; ++l) {
      const float sum = sum_[l / LANES][l % LANES];
      inverse[l] = sum == 0 ? 0 : 1 / sum;
      lse[l] = (max_[l / LANES][l % LANES] + std::log2(sum)) / Logits::LOG2E;
    }
  }

 private:
  const Logits& logits_;
  Vec max_[NV], sum_[NV];
};

// Whether every entry of [rows][NV · LANES] is finite.
template <int NV>
bool all_finite(const float* x, int64_t rows) {
  Vec zero{};
  for (const float* at = x; at < x + rows * NV * LANES; at += LANES) zero += load(at) * 0.0f;
  return sum(zero) == 0;
}

}  // namespace hsa
