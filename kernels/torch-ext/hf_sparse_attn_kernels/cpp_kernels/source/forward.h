// What the forward pass of an attention call is told.
#pragma once

#include <vector>

#include "softmax.h"

namespace hsa {

template <class T>
struct Attention {
  Heads<T> q, k, v;
  const int32_t* indices;  // [R, G, tiles, kept], ascending, -1 = empty first
  const float* sinks;      // [H] or null
  T* out;                  // [B, H, Q, Dv]
  float* lse;              // [B, H, Q]
  Grid grid;               // of all slots, with the most tiles of a document
  Logits logits;
  std::vector<Document> documents;  // R
  int64_t groups, kept, d, dv;
  int64_t heads() const { return groups * grid.heads; }
  // `group` counts documents and KV heads: r * groups + g
  const Document& document(int64_t group) const { return documents[group / groups]; }
  const int32_t* list(int64_t group, int64_t tile) const { return indices + (group * grid.tiles + tile) * kept; }
  Matrix<T> keys(int64_t group) const { return k.rows(document(group).row, group % groups, document(group).first); }
  Matrix<T> values(int64_t group) const { return v.rows(document(group).row, group % groups, document(group).first); }
  // number of a document's query of a head of KV head g among the rows of out and lse
  int64_t row(const Document& document, int64_t g, int64_t head, int64_t query) const {
    return (document.row * heads() + g * grid.heads + head) * grid.q_len + document.query + query;
  }
};

// Cuts every tile's rows into strips of up to REGISTERS vectors: visit(vectors, run) is called for each size of strip
// that occurs, and run(make) works through those strips; make() gives a worker whose run(group, tile, first row) does
// one.
template <class T, class Visit>
void for_each_strip(const Attention<T>& call, const Visit& visit) {
  const int64_t vectors = (call.grid.rows() + LANES - 1) / LANES, whole = vectors / REGISTERS,
                rest = vectors % REGISTERS;
  const auto pass = [&](auto size, int64_t first_row, int64_t count) {
    visit(size, [&](const auto& make) {
      const int64_t tiles = call.grid.tiles;
      for_each_item(call.documents.size() * call.groups * tiles * count, make, [&](auto& worker, int64_t item) {
        const int64_t group = item / count / tiles, tile = item / count % tiles;
        if (tile < call.document(group).grid.tiles) worker->run(group, tile, first_row + item % count * size() * LANES);
      });
    });
  };
  if (whole) pass(std::integral_constant<int, REGISTERS>{}, 0, whole);
  const int64_t row = whole * REGISTERS * LANES;
  if (rest == 1) pass(std::integral_constant<int, 1>{}, row, 1);
  if (rest == 2) pass(std::integral_constant<int, 2>{}, row, 1);
  if (rest == 3) pass(std::integral_constant<int, 3>{}, row, 1);
}

template <class T, class Format>
void attend(const Attention<T>& call);

}  // namespace hsa
