// Two-stage selection: coarse scores -> candidates -> fine mass -> kept blocks, a few tiles at a time.
//
// Stage 1 has one tile in each lane, LANES tiles together; stage 2 has one query of a tile in each lane.
#include "select.h"

#include <limits>
#include <vector>

namespace hsa {
namespace {

constexpr float LN2 = 0.6931471805599453f;

// Natural logarithm of x >= 1.
Vec log_of(Vec x) {
  constexpr int32_t half_up = 0x3f3504f3;  // sqrt(1/2): the mantissa is taken from [sqrt(1/2), sqrt(2))
  const IVec exponent = ((IVec)x - half_up) >> 23;
  const Vec mantissa = (Vec)((IVec)x - (exponent << 23));
  const Vec t = (mantissa - 1.0f) / (mantissa + 1.0f), t2 = t * t;
  const Vec series = t * (2.0f + t2 * (2 / 3.0f + t2 * (2 / 5.0f + t2 * (2 / 7.0f + t2 * (2 / 9.0f)))));
  return __builtin_convertvector(exponent, Vec) * LN2 + series;
}

// Order-preserving bits of a score, then the inverted position: the largest are the best, ties go to the lower position. NaN counts as 0.
uint64_t rank_of(float score, uint32_t position) {
  const float clean = score != score ? 0.0f : score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &clean, 4);
  bits ^= (bits >> 31) & 0x7fffffff;
  return (uint64_t{static_cast<uint32_t>(bits) ^ 0x80000000u} << 32) | ~position;
}

// Ascending positions of the `count` best of `ranks`, which are reordered.
void best_of(std::vector<uint64_t>& ranks, int64_t count, std::vector<int32_t>& found) {
  if (count < static_cast<int64_t>(ranks.size())) std::nth_element(ranks.begin(), ranks.begin() + count, ranks.end(), std::greater<>());
  found.resize(count);
  for (int64_t i = 0; i < count; ++i) found[i] = static_cast<int32_t>(~static_cast<uint32_t>(ranks[i]));
  std::sort(found.begin(), found.end());
}

// Stage 1 of LANES neighbouring tiles of one row: scores [blocks][LANES].
template <class T, class Format>
class Coarse {
 public:
  explicit Coarse(const Selecting<T>& call)
      : call_(call),
        room_(Room::size({call.runs * call.router_dim * LANES, call.runs * CHUNK * LANES, CHUNK * call.router_dim})),
        queries_(room_.take(call.runs * call.router_dim * LANES)),
        products_(room_.take(call.runs * CHUNK * LANES)),
        key_room_(room_.take(CHUNK * call.router_dim)) {}

  void run(int64_t group, int64_t first, int64_t tiles, int64_t end, std::vector<float>& scores) {
    const int64_t words = call_.router_dim / Format::PACK * LANES;
    for (int64_t run = 0; run < call_.runs; ++run)
      for (int64_t l = 0; l < LANES; ++l) {
        const T* from = call_.coarse_queries + ((group * call_.grid.tiles + first + l) * call_.runs + run) * call_.router_dim;
        to_lane<Format>(l < tiles ? from : nullptr, call_.router_dim, LANES, l, queries_ + run * words);
      }
    scores.resize(end * LANES);
    const Matrix<T> keys = call_.router_keys.rows(group / call_.groups, group % call_.groups);
    for (int64_t at = call_.sink; at < end; at += CHUNK) {
      const int rows = std::min<int64_t>(CHUNK, end - at);
      int64_t stride;
      const float* left = key_rows<Format>(keys, at, rows, rows, call_.router_dim, key_room_, &stride);
      for (int64_t run = 0; run < call_.runs; ++run)
        product<Format, 1>(left, stride, rows, call_.router_dim / Format::PACK, queries_ + run * words, products_ + run * CHUNK * LANES);
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

  const Selecting<T>& call_;
  Room room_;
  float *queries_, *products_, *key_room_;
};

// Stage 2 of one tile for NV vectors of its sampled queries: adds their softmax mass of every listed block to `mass`.
template <class T, class Format, int NV>
class Fine {
  static constexpr int L = NV * LANES;

 public:
  explicit Fine(const Selecting<T>& call)
      : call_(call),
        keys_(std::max<int64_t>(CHUNK, call.grid.block_size)),
        room_(Room::size({call.index_dim * L, keys_ * L, call.grid.block_size * call.index_dim})),
        queries_(room_.take(call.index_dim * L)),
        scores_(room_.take(keys_ * L)),
        key_room_(room_.take(call.grid.block_size * call.index_dim)) {}

  void run(int64_t group, int64_t tile, int64_t first_sample, const std::vector<int32_t>& blocks, float share, std::vector<float>& mass) {
    const int64_t per_head = call_.samples / call_.grid.heads;
    const Lanes<NV> lanes(call_.grid, call_.tiles[tile], [&](int lane) {
      const int64_t sample = first_sample + lane;
      const bool there = sample < call_.samples;
      return std::pair<int64_t, int64_t>(there ? sample / per_head : -1, there ? call_.reps[sample] : 0);
    });
    for (int l = 0; l < L; ++l) {
      const T* from = call_.queries + ((group * call_.grid.tiles + tile) * call_.samples + first_sample + l) * call_.index_dim;
      to_lane<Format>(lanes.query(l) < 0 ? nullptr : from, call_.index_dim, L, l, queries_);
    }
    partial_.assign(blocks.size() * L, 0.0f);
    const int64_t step = std::max<int64_t>(1, CHUNK / call_.grid.block_size);
    most_.assign((blocks.size() + step - 1) / step * L, 0.0f);
    Vec most[NV], total[NV];
    for (int v = 0; v < NV; ++v) most[v] = splat(FLOOR), total[v] = Vec{};
    for (int64_t j = 0; j < static_cast<int64_t>(blocks.size()); j += step)
      chunk(lanes, group, blocks.data() + j, std::min<int64_t>(step, blocks.size() - j), j, most, total);
    add_mass(lanes, step, share, most, total, mass);
  }

 private:
  void chunk(const Lanes<NV>& lanes, int64_t group, const int32_t* list, int64_t blocks, int64_t at, Vec* most, Vec* total) {
    const int size = call_.grid.block_size;
    const Matrix<T> keys = call_.keys.rows(group / call_.groups, group % call_.groups);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t first = int64_t{list[j]} * size;
      int64_t stride;
      const float* rows =
          key_rows<Format>(keys, first, std::min<int64_t>(size, call_.grid.kv_len - first), size, call_.index_dim, key_room_, &stride);
      product<Format, NV>(rows, stride, size, call_.index_dim / Format::PACK, queries_, scores_ + j * size * L);
      lanes.hide(scores_ + j * size * L, first, size);
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec larger = load(scores_ + v * LANES);
      for (int64_t i = 1; i < blocks * size; ++i) larger = maximum(larger, load(scores_ + (i * NV + v) * LANES));
      larger = maximum(most[v], larger * Logits::LOG2E);
      total[v] *= exp2_negative(most[v] - larger);
      most[v] = larger;
      store(most_.data() + at / std::max<int64_t>(1, CHUNK / size) * L + v * LANES, larger);
      for (int64_t j = 0; j < blocks; ++j) {
        Vec weight{};
        for (int64_t i = j * size; i < (j + 1) * size; ++i)
          weight += exp2_negative(load(scores_ + (i * NV + v) * LANES) * Logits::LOG2E - larger);
        store(partial_.data() + (at + j) * L + v * LANES, weight);
        total[v] += weight;
      }
    }
  }

  // Weights relative to the maximum of their time -> each query's share of the mean.
  void add_mass(const Lanes<NV>& lanes, int64_t step, float share, const Vec* most, const Vec* total, std::vector<float>& mass) const {
    Vec norm[NV], factor[NV];
    IVec there[NV];  // an empty lane may hold anything
    for (int v = 0; v < NV; ++v) {
      for (int l = 0; l < LANES; ++l) there[v][l] = lanes.query(v * LANES + l) < 0 ? 0 : -1;
      norm[v] = share / total[v];
    }
    for (int64_t j = 0; j < static_cast<int64_t>(mass.size()); ++j) {
      Vec sums{};
      for (int v = 0; v < NV; ++v) {
        if (j % step == 0) factor[v] = exp2_negative(load(most_.data() + j / step * L + v * LANES) - most[v]) * norm[v];
        sums += blend(there[v], load(partial_.data() + j * L + v * LANES) * factor[v], Vec{});
      }
      mass[j] += sum(sums);
    }
  }

  const Selecting<T>& call_;
  int64_t keys_;
  Room room_;
  float *queries_, *scores_, *key_room_;
  std::vector<float> partial_, most_;  // [blocks][L], [chunks][L]
};

template <class T, class Format>
class Selector {
 public:
  explicit Selector(const Selecting<T>& call) : call_(call), coarse_(call), widest_(call), three_(call), two_(call), one_(call) {}

  // LANES neighbouring tiles from `first` on of a row of (batch, group).
  void run(int64_t group, int64_t first) {
    const int64_t tiles = std::min<int64_t>(LANES, call_.grid.tiles - first);
    int64_t end = call_.sink;
    for (int64_t t = first; t < first + tiles; ++t)
      if (open(t)) end = std::max(end, call_.near[t]);
    if (end > call_.sink) coarse_.run(group, first, tiles, end, scores_);
    for (int64_t t = first; t < first + tiles; ++t) {
      const int64_t forced = std::min(call_.sink, call_.near[t]);
      blocks_.clear();
      mass_.clear();
      if (open(t))
        choose(group, t, t - first);
      else
        for (int64_t block = call_.sink; block < call_.near[t]; ++block) blocks_.push_back(block), mass_.push_back(NAN);
      write(group, t, forced);
    }
  }

 private:
  int64_t eligible(int64_t t) const { return std::max<int64_t>(0, call_.near[t] - call_.sink); }
  bool open(int64_t t) const { return eligible(t) > call_.free[t]; }

  // blocks_ and mass_: the kept blocks that are not forced; forced_mass_: sinks, then [near, last].
  void choose(int64_t group, int64_t t, int64_t lane) {
    ranks_.resize(eligible(t));
    for (int64_t i = 0; i < eligible(t); ++i) ranks_[i] = rank_of(scores_[(call_.sink + i) * LANES + lane], i);
    best_of(ranks_, call_.candidates[t], listed_);
    for (int32_t& block : listed_) block += call_.sink;
    const int64_t candidates = listed_.size();
    for (int64_t block = 0; block < call_.sink; ++block) listed_.push_back(block);
    for (int64_t block = call_.near[t]; block <= call_.last[t]; ++block) listed_.push_back(block);
    fine(group, t);
    ranks_.resize(candidates);
    for (int64_t i = 0; i < candidates; ++i) ranks_[i] = rank_of(listed_mass_[i], i);
    best_of(ranks_, call_.free[t], found_);
    for (int32_t i : found_) blocks_.push_back(listed_[i]), mass_.push_back(listed_mass_[i]);
    forced_mass_.assign(listed_mass_.begin() + candidates, listed_mass_.end());
  }

  // listed_mass_: softmax mass of listed_, averaged over the tile's sampled queries that are tokens of the call
  void fine(int64_t group, int64_t t) {
    const int64_t base = call_.grid.first(call_.tiles[t]) - call_.grid.q_offset();
    int64_t there = 0;
    for (int64_t i = 0; i < call_.samples; ++i) there += base + call_.reps[i] >= 0 && base + call_.reps[i] < call_.grid.q_len;
    listed_mass_.assign(listed_.size(), 0.0f);
    const float share = 1.0f / there;
    for (int64_t at = 0; at < call_.samples;) {
      const int64_t vectors = std::min<int64_t>(REGISTERS, (call_.samples - at + LANES - 1) / LANES);
      if (vectors == REGISTERS) widest_.run(group, t, at, listed_, share, listed_mass_);
      else if (vectors == 3) three_.run(group, t, at, listed_, share, listed_mass_);
      else if (vectors == 2) two_.run(group, t, at, listed_, share, listed_mass_);
      else one_.run(group, t, at, listed_, share, listed_mass_);
      at += vectors * LANES;
    }
  }

  void write(int64_t group, int64_t t, int64_t forced) {
    const int64_t row = (group * call_.grid.tiles + t) * call_.width;
    const int64_t close = call_.last[t] - call_.near[t] + 1, kept = forced + static_cast<int64_t>(blocks_.size()) + close;
    int32_t* to = call_.indices + row;
    float* score = call_.scores + row;
    const bool scored = open(t);
    for (int64_t i = 0; i < call_.width - kept; ++i) *to++ = -1, *score++ = NAN;
    for (int64_t i = 0; i < forced; ++i) *to++ = i, *score++ = scored ? forced_mass_[i] : NAN;
    for (size_t i = 0; i < blocks_.size(); ++i) *to++ = blocks_[i], *score++ = mass_[i];
    for (int64_t i = 0; i < close; ++i) *to++ = call_.near[t] + i, *score++ = scored ? forced_mass_[forced + i] : NAN;
  }

  const Selecting<T>& call_;
  Coarse<T, Format> coarse_;
  Fine<T, Format, REGISTERS> widest_;
  Fine<T, Format, 3> three_;
  Fine<T, Format, 2> two_;
  Fine<T, Format, 1> one_;
  std::vector<float> scores_, listed_mass_, mass_, forced_mass_;
  std::vector<uint64_t> ranks_;
  std::vector<int32_t> listed_, found_, blocks_;
};

}  // namespace

template <class T, class Format>
void select_blocks(const Selecting<T>& call) {
  const int64_t parts = (call.grid.tiles + LANES - 1) / LANES;
  for_each_item(
      call.batch * call.groups * parts, [&] { return std::make_unique<Selector<T, Format>>(call); },
      [&](auto& selector, int64_t item) { selector->run(item / parts, item % parts * LANES); });
}

template void select_blocks<float, Floats>(const Selecting<float>&);
template void select_blocks<c10::Half, Floats>(const Selecting<c10::Half>&);
template void select_blocks<c10::BFloat16, BFloat16Format>(const Selecting<c10::BFloat16>&);

}  // namespace hsa
