// Stage 2: softmax mass that some queries of a tile give to listed blocks of keys.
#pragma once

#include "exact.h"

namespace hsa {

template <class T>
struct Sampled {
  const T* queries;     // [B, G, m, samples, width], scaled
  const int64_t* reps;  // [heads, samples / heads], their tokens in the tile
  Heads<T> keys;        // [B, G, N, width]
  int64_t samples, width, batch, groups;
  Grid grid;             // grid.tiles: m
  const int64_t* tiles;  // their numbers in the call [m]
};

// Stage 2 of one tile for NV vectors of its sampled queries: adds their softmax mass of every listed block to `mass`.
template <class T, class Format, int NV>
class Fine {
  static constexpr int L = NV * LANES;

 public:
  explicit Fine(const Sampled<T>& call)
      : call_(call),
        step_(std::max<int64_t>(1, CHUNK / call.grid.block_size)),
        keys_(step_ * call.grid.block_size),
        room_(Room::size({call.width * L, keys_ * L, call.grid.block_size * call.width})),
        queries_(room_.take(call.width * L)),
        scores_(room_.take(keys_ * L)),
        key_room_(room_.take(call.grid.block_size * call.width)) {}

  void run(int64_t group, int64_t tile, int64_t first_sample, const std::vector<int32_t>& blocks, float share,
           std::vector<float>& mass) {
    const int64_t per_head = call_.samples / call_.grid.heads;
    const Lanes<NV> lanes(call_.grid, call_.tiles[tile], [&](int lane) {
      const int64_t sample = first_sample + lane;
      const bool there = sample < call_.samples;
      return std::pair<int64_t, int64_t>(there ? sample / per_head : -1, there ? call_.reps[sample] : 0);
    });
    for (int l = 0; l < L; ++l) {
      const T* from =
          call_.queries + ((group * call_.grid.tiles + tile) * call_.samples + first_sample + l) * call_.width;
      to_lane<Format>(lanes.query(l) < 0 ? nullptr : from, call_.width, L, l, queries_);
    }
    partial_.assign(blocks.size() * L, 0.0f);
    most_.assign((blocks.size() + step_ - 1) / step_ * L, 0.0f);
    Vec most[NV], total[NV];
    for (int v = 0; v < NV; ++v) most[v] = splat(FLOOR), total[v] = Vec{};
    const Matrix<T> keys = call_.keys.rows(group / call_.groups, group % call_.groups);
    for (size_t at = 0; at < blocks.size(); at += step_) chunk(lanes, keys, blocks, at, most, total);
    if (extreme(lanes, most, total))
      exactly(lanes, group, tile, first_sample, blocks, share, mass);
    else
      add_mass(lanes, share, most, total, mass);
  }

 private:
  static bool extreme(const Lanes<NV>& lanes, const Vec* most, const Vec* total) {
    for (int l = 0; l < L; ++l)
      if (lanes.query(l) >= 0 &&
          !(std::abs(most[l / LANES][l % LANES]) <= LIMIT && std::isfinite(total[l / LANES][l % LANES])))
        return true;
    return false;
  }

  void exactly(const Lanes<NV>& lanes, int64_t group, int64_t tile, int64_t first_sample,
               const std::vector<int32_t>& blocks, float share, std::vector<float>& mass) const {
    const Matrix<T> keys = call_.keys.rows(group / call_.groups, group % call_.groups);
    const int64_t size = call_.grid.block_size;
    std::vector<double> weights;
    for (int l = 0; l < L; ++l) {
      if (lanes.query(l) < 0) continue;
      const T* query =
          call_.queries + ((group * call_.grid.tiles + tile) * call_.samples + first_sample + l) * call_.width;
      weights.clear();
      for (int64_t block : blocks)
        for (int64_t key = block * size; key < (block + 1) * size; ++key)
          weights.push_back(key <= lanes.last(l) ? dot(query, keys.row(key), call_.width) : -INFINITY);
      softmax_exactly(weights, nullptr);
      for (size_t i = 0; i < weights.size(); ++i) mass[i / size] += share * static_cast<float>(weights[i]);
    }
  }

  // The next step_ blocks from blocks[at] on.
  void chunk(const Lanes<NV>& lanes, Matrix<T> keys, const std::vector<int32_t>& blocks, size_t at, Vec* most,
             Vec* total) {
    const int size = call_.grid.block_size;
    const int64_t count = std::min<int64_t>(step_, blocks.size() - at);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t first = int64_t{blocks[at + j]} * size;
      if (call_.grid.query_tile == 1 && at + j + 1 < blocks.size())
        prefetch_rows(keys, int64_t{blocks[at + j + 1]} * size, size, call_.width);
      int64_t stride;
      const Word* rows = key_rows<Format>(keys, first, std::min<int64_t>(size, call_.grid.kv_len - first), size,
                                          call_.width, key_room_, &stride);
      product<Format, NV>(rows, stride, size, call_.width / Format::PACK, queries_, scores_ + j * size * L);
      lanes.hide(scores_ + j * size * L, first, size);
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      total[v] *= raise_maximum<NV>(scores_, count * size, v, Logits::LOG2E, most[v]);
      store(most_.data() + at / step_ * L + v * LANES, most[v]);
      for (int64_t j = 0; j < count; ++j) {
        Vec weight{};
        for (int64_t i = j * size; i < (j + 1) * size; ++i)
          weight += exp2_negative(load(scores_ + (i * NV + v) * LANES) * Logits::LOG2E - most[v]);
        store(partial_.data() + (at + j) * L + v * LANES, weight);
        total[v] += weight;
      }
    }
  }

  // Weights relative to the maximum of their time -> each query's share of the mean.
  void add_mass(const Lanes<NV>& lanes, float share, const Vec* most, const Vec* total,
                std::vector<float>& mass) const {
    Vec norm[NV], factor[NV];
    IVec there[NV];  // an empty lane may hold anything
    for (int v = 0; v < NV; ++v) {
      for (int l = 0; l < LANES; ++l) there[v][l] = lanes.query(v * LANES + l) < 0 ? 0 : -1;
      norm[v] = share / total[v];
    }
    for (int64_t j = 0; j < static_cast<int64_t>(mass.size()); ++j) {
      Vec sums{};
      for (int v = 0; v < NV; ++v) {
        if (j % step_ == 0)
          factor[v] = exp2_negative(load(most_.data() + j / step_ * L + v * LANES) - most[v]) * norm[v];
        sums += blend(there[v], load(partial_.data() + j * L + v * LANES) * factor[v], Vec{});
      }
      mass[j] += sum(sums);
    }
  }

  const Sampled<T>& call_;
  int64_t step_, keys_;  // blocks and keys of a chunk
  Room room_;
  float *queries_, *scores_, *key_room_;
  std::vector<float> partial_, most_;  // [blocks][L], [chunks][L]
};

// Stage 2 of one tile: the mass of every listed block, averaged over the sampled queries that are tokens of the call.
template <class T, class Format>
class TileMass {
 public:
  explicit TileMass(const Sampled<T>& call) : call_(call), widest_(call), three_(call), two_(call), one_(call) {}

  void run(int64_t group, int64_t tile, const std::vector<int32_t>& blocks, std::vector<float>& mass) {
    const int64_t base = call_.grid.first(call_.tiles[tile]) - call_.grid.q_offset();
    int64_t there = 0;
    for (int64_t i = 0; i < call_.samples; ++i)
      there += base + call_.reps[i] >= 0 && base + call_.reps[i] < call_.grid.q_len;
    mass.assign(blocks.size(), 0.0f);
    const float share = 1.0f / there;
    for (int64_t at = 0; at < call_.samples;) {
      const int64_t vectors = std::min<int64_t>(REGISTERS, (call_.samples - at + LANES - 1) / LANES);
      if (vectors == REGISTERS)
        widest_.run(group, tile, at, blocks, share, mass);
      else if (vectors == 3)
        three_.run(group, tile, at, blocks, share, mass);
      else if (vectors == 2)
        two_.run(group, tile, at, blocks, share, mass);
      else
        one_.run(group, tile, at, blocks, share, mass);
      at += vectors * LANES;
    }
  }

 private:
  const Sampled<T>& call_;
  Fine<T, Format, REGISTERS> widest_;
  Fine<T, Format, 3> three_;
  Fine<T, Format, 2> two_;
  Fine<T, Format, 1> one_;
};

}  // namespace hsa
