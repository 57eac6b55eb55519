// What the two-stage selection of m tiles is told.
#pragma once

#include <optional>

#include "coarse.h"
#include "fine.h"

namespace hsa {

template <class T>
struct Selecting {
  Pooled<T> pooled;
  Sampled<T> sampled;
  // of each tile [m], in blocks: [0, sink) and [near, last] are forced, `free` of `candidates` others may be kept
  int64_t sink;
  const int64_t *near, *last, *free, *candidates;
  const std::vector<bool>& exhaustive;  // [G]: KV heads without stage 1, whose candidates are all others
  // with a threshold, instead of `free` of them all candidates whose mass is at least so much
  std::optional<float> threshold;
  int64_t width;
  int32_t* indices;  // [B, G, m, width], ascending, -1 = empty first
  float* scores;     // the same: estimated mass, NaN where nothing was scored
};

template <class T, class Format>
void select_blocks(const Selecting<T>& call);

// Scores [B, G, m, blocks].
template <class T, class Format>
void coarse_scores(const Pooled<T>& call, int64_t batch, int64_t blocks, float* out);

// Mass of listed blocks [B, G, m, width], -1 = empty; without a list of every block (width of them).
template <class T, class Format>
void block_mass(const Sampled<T>& call, const int64_t* blocks, int64_t width, float* out);

// Max, min and mean of every whole block of keys [B, G, N, width]: [B, G, N / block_size, 3 * width].
template <class T>
void pooled_features(const Heads<T>& keys, int64_t batch, int64_t groups, int64_t length, int64_t width,
                     int64_t block_size, T* out);

}  // namespace hsa
