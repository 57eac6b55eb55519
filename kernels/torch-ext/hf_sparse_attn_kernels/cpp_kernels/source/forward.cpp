// Forward pass: exact softmax over the kept blocks, one strip of a tile's rows at a time.
//
// A strip's queries are the lanes of vectors: scores are [keys][lanes], so maxima, exponentials and sums need no
// shuffles, keys and values are read where they stand, and nothing is gathered.
#include "exact.h"

namespace hsa {
namespace {

template <class T, class Format, int NV>
class Strip {
  static constexpr int L = NV * LANES;

 public:
  explicit Strip(const Attention<T>& call)
      : call_(call),
        keys_(std::max<int64_t>(CHUNK, call.grid.block_size)),
        room_(Room::size(
            {call.d * L, keys_ * L, keys_ * L, call.dv * L, call.grid.block_size * call.d, keys_ * call.dv})),
        queries_(room_.take(call.d * L)),
        scores_(room_.take(keys_ * L)),
        weights_(room_.take(keys_ * L)),
        out_(room_.take(call.dv * L)),
        key_room_(room_.take(call.grid.block_size * call.d)),
        value_room_(room_.take(keys_ * call.dv)) {}

  // Rows [first_row, first_row + L) of a tile.
  void run(int64_t group, int64_t tile, int64_t first_row) {
    const Grid& grid = call_.document(group).grid;
    const Lanes<NV> lanes = rows_of<NV>(grid, tile, first_row);
    lanes.template load_queries<Format>(call_.q, call_.document(group), group % call_.groups, call_.d, queries_);
    Softmax<NV> softmax(call_.logits);
    if (call_.sinks) softmax.start(lanes, call_.sinks + group % call_.groups * grid.heads);
    const int32_t *list = call_.list(group, tile), *end = list + call_.kept;
    list = grid.checked(list, end, tile);
    std::fill_n(out_, call_.dv * L, 0.0f);
    const int64_t step = std::max<int64_t>(1, CHUNK / grid.block_size);
    for (; list < end; list += step) chunk(group, lanes, list, std::min<int64_t>(step, end - list), softmax);
    if (softmax.extreme() ||
        !all_finite<NV>(out_, call_.dv))  // 0 times such a value must be 0 where the query does not see it
      exactly(lanes, group, tile);
    else
      finish(lanes, softmax, group);
  }

 private:
  void chunk(int64_t group, const Lanes<NV>& lanes, const int32_t* list, int64_t blocks, Softmax<NV>& softmax) {
    const Matrix<T> k = call_.keys(group), v = call_.values(group);
    const int64_t size = call_.grid.block_size, kv_len = call_.document(group).grid.kv_len;
    Run values[CHUNK];
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t first = int64_t{list[j]} * size;
      const int count = std::min(size, kv_len - first);
      int64_t stride;
      const Word* rows = key_rows<Format>(k, first, count, size, call_.d, key_room_, &stride);
      float* scores = scores_ + j * size * L;
      product<Format, NV>(rows, stride, size, call_.d / Format::PACK, queries_, scores);
      softmax.transform(scores, size);
      lanes.hide(scores, first, size);
      float* room = value_room_ + j * size * call_.dv / Format::PACK;
      values[j].base = value_rows<Format>(v, first, count, size, call_.dv, room, &values[j].step);
    }
    Vec keep[NV];
    softmax.template weights<Format>(scores_, blocks * size, weights_, keep);
    product<Format, NV>({values, static_cast<int>(blocks), 1}, call_.dv, size / Format::PACK, weights_, keep, out_);
  }

  void finish(const Lanes<NV>& lanes, const Softmax<NV>& softmax, int64_t group) {
    float inverse[L], lse[L];
    softmax.finish(inverse, lse);
    for (int l = 0; l < L; ++l) {
      const int64_t query = lanes.query(l);
      if (query < 0) continue;
      const int64_t row = call_.row(call_.document(group), group % call_.groups, lanes.head(l), query);
      call_.lse[row] = lse[l];
      T* to = call_.out + row * call_.dv;
      for (int64_t d = 0; d < call_.dv; ++d) to[d] = static_cast<T>(out_[d * L + l] * inverse[l]);
    }
  }

  void exactly(const Lanes<NV>& lanes, int64_t group, int64_t tile) {
    ExactQuery<T> exact(call_);
    for (int l = 0; l < L; ++l)
      if (lanes.query(l) >= 0) exact.attend(group, tile, lanes.head(l), lanes.query(l));
  }

  const Attention<T>& call_;
  int64_t keys_;
  Room room_;
  float *queries_, *scores_, *weights_, *out_, *key_room_, *value_room_;
};

}  // namespace

template <class T, class Format>
void attend(const Attention<T>& call) {
  for_each_strip(
      call, [&](auto vectors, auto run) { run([&] { return std::make_unique<Strip<T, Format, vectors()>>(call); }); });
}

template void attend<float, Floats>(const Attention<float>&);
template void attend<c10::Half, Floats>(const Attention<c10::Half>&);
template void attend<c10::BFloat16, BFloat16Format>(const Attention<c10::BFloat16>&);

}  // namespace hsa
