// What the two-stage selection of m tiles is told.
#pragma once

#include "softmax.h"

namespace hsa {

template <class T>
struct Selecting {
  // stage 1: the tiles' pooled queries [B, G, m, runs, R] and which of them have tokens [m, runs]; keys of blocks [B, G, nb, R]
  const T* coarse_queries;
  const bool* real;
  Heads<T> router_keys;
  int64_t runs, router_dim;
  // stage 2: some queries of each tile [B, G, m, samples, E], their (head, token) and all keys [B, G, N, E]
  const T* queries;
  const int64_t* reps;  // [heads, samples / heads], tokens of the tile
  Heads<T> keys;
  int64_t samples, index_dim;
  Grid grid;             // grid.tiles: m
  const int64_t* tiles;  // their numbers in the call [m]
  // of each tile [m], in blocks: [0, sink) and [near, last] are forced, `free` of `candidates` others may be kept
  int64_t sink;
  const int64_t *near, *last, *free, *candidates;
  int64_t batch, groups, width;
  int32_t* indices;  // [B, G, m, width], ascending, -1 = empty first
  float* scores;     // the same: estimated mass, NaN where nothing was scored
};

template <class T, class Format>
void select_blocks(const Selecting<T>& call);

}  // namespace hsa
