// Two-stage selection: coarse scores -> candidates -> fine mass -> kept blocks, a few tiles at a time.
//
// Stage 1 has one tile in each lane, LANES tiles together; stage 2 has one query of a tile in each lane.
#include "select.h"

#include <numeric>

namespace hsa {
namespace {

// Order-preserving bits of a score, then the inverted position: the largest are the best, ties go to the lower
// position. NaN counts as 0.
uint64_t rank_of(float score, uint32_t position) {
  const float clean = score != score ? 0.0f : score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &clean, 4);
  bits ^= (bits >> 31) & 0x7fffffff;
  return (uint64_t{static_cast<uint32_t>(bits) ^ 0x80000000u} << 32) | ~position;
}

// Ascending positions of the `count` best of `ranks`, which are reordered.
void best_of(std::vector<uint64_t>& ranks, int64_t count, std::vector<int32_t>& found) {
  if (count < static_cast<int64_t>(ranks.size()))
    std::nth_element(ranks.begin(), ranks.begin() + count, ranks.end(), std::greater<>());
  found.resize(count);
  for (int64_t i = 0; i < count; ++i) found[i] = static_cast<int32_t>(~static_cast<uint32_t>(ranks[i]));
  std::sort(found.begin(), found.end());
}

template <class T, class Format>
class Selector {
 public:
  explicit Selector(const Selecting<T>& call) : call_(call), coarse_(call.pooled), fine_(call.sampled) {}

  // LANES neighbouring tiles from `first` on of a row of (batch, group).
  void run(int64_t group, int64_t first) {
    exhaustive_ = call_.exhaustive[group % call_.sampled.groups];
    const int64_t tiles = std::min<int64_t>(LANES, call_.sampled.grid.tiles - first);
    int64_t end = call_.sink;
    for (int64_t t = first; t < first + tiles; ++t)
      if (open(t)) end = std::max(end, call_.near[t]);
    if (end > call_.sink && !exhaustive_) coarse_.run(group, first, tiles, call_.sink, end, scores_);
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
    if (exhaustive_) {
      listed_.resize(eligible(t));
      std::iota(listed_.begin(), listed_.end(), 0);
    } else {
      ranks_.resize(eligible(t));
      for (int64_t i = 0; i < eligible(t); ++i) ranks_[i] = rank_of(scores_[(call_.sink + i) * LANES + lane], i);
      best_of(ranks_, call_.candidates[t], listed_);
    }
    for (int32_t& block : listed_) block += call_.sink;
    const int64_t candidates = listed_.size();
    for (int64_t block = 0; block < call_.sink; ++block) listed_.push_back(block);
    for (int64_t block = call_.near[t]; block <= call_.last[t]; ++block) listed_.push_back(block);
    fine_.run(group, t, listed_, listed_mass_);
    ranks_.resize(candidates);
    for (int64_t i = 0; i < candidates; ++i) ranks_[i] = rank_of(listed_mass_[i], i);
    best_of(ranks_, call_.threshold ? call_.candidates[t] : call_.free[t], found_);
    for (int32_t i : found_)
      if (!call_.threshold || listed_mass_[i] >= *call_.threshold)
        blocks_.push_back(listed_[i]), mass_.push_back(listed_mass_[i]);
    forced_mass_.assign(listed_mass_.begin() + candidates, listed_mass_.end());
  }

  void write(int64_t group, int64_t t, int64_t forced) {
    const int64_t row = (group * call_.sampled.grid.tiles + t) * call_.width;
    const int64_t close = call_.last[t] - call_.near[t] + 1,
                  kept = forced + static_cast<int64_t>(blocks_.size()) + close;
    int32_t* to = call_.indices + row;
    float* score = call_.scores + row;
    const bool scored = open(t);
    for (int64_t i = 0; i < call_.width - kept; ++i) *to++ = -1, *score++ = NAN;
    for (int64_t i = 0; i < forced; ++i) *to++ = i, *score++ = scored ? forced_mass_[i] : NAN;
    for (size_t i = 0; i < blocks_.size(); ++i) *to++ = blocks_[i], *score++ = mass_[i];
    for (int64_t i = 0; i < close; ++i) *to++ = call_.near[t] + i, *score++ = scored ? forced_mass_[forced + i] : NAN;
  }

  const Selecting<T>& call_;
  bool exhaustive_ = false;  // the row at hand
  Coarse<T, Format> coarse_;
  TileMass<T, Format> fine_;
  std::vector<float> scores_, listed_mass_, mass_, forced_mass_;
  std::vector<uint64_t> ranks_;
  std::vector<int32_t> listed_, found_, blocks_;
};

}  // namespace

template <class T, class Format>
void select_blocks(const Selecting<T>& call) {
  const int64_t parts = (call.sampled.grid.tiles + LANES - 1) / LANES;
  for_each_item(
      call.sampled.batch * call.sampled.groups * parts, [&] { return std::make_unique<Selector<T, Format>>(call); },
      [&](auto& selector, int64_t item) { selector->run(item / parts, item % parts * LANES); });
}

template void select_blocks<float, Floats>(const Selecting<float>&);
template void select_blocks<c10::Half, Floats>(const Selecting<c10::Half>&);
template void select_blocks<c10::BFloat16, BFloat16Format>(const Selecting<c10::BFloat16>&);

}  // namespace hsa
