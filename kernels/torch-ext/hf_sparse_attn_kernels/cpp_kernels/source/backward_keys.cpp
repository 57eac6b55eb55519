// dK and dV: one key of a block in each lane, the roles of queries and keys exchanged, so that no sum is shared between
// workers.
#include <vector>

#include "backward.h"

namespace hsa {
namespace {

// A block of keys of a document's KV head, from key `first` on; the tiles that kept it are `count` of the inverse's
// from `start` on.
struct KeyBlock {
  int64_t group, first, start, count;
};

// The tiles that kept each block, ascending; the most popular blocks first: whoever takes one last would work alone.
struct Inverse {
  std::vector<int32_t> tiles;
  std::vector<KeyBlock> blocks;

  template <class T>
  explicit Inverse(const Attention<T>& call) {
    const int64_t groups = call.documents.size() * call.groups;
    std::vector<int64_t> first_block;  // of each group
    for (int64_t group = 0; group < groups; ++group) {
      first_block.push_back(blocks.size());
      for (int64_t first = 0; first < call.document(group).grid.kv_len; first += call.grid.block_size)
        blocks.push_back({group, first, 0, 0});
    }
    const auto for_each_link = [&](const auto& visit) {
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t tile = 0; tile < call.document(group).grid.tiles; ++tile)
          for (int64_t i = 0; i < call.kept; ++i)
            if (const int32_t block = call.list(group, tile)[i]; block >= 0)
              visit(blocks[first_block[group] + block], tile);
    };
    for_each_link([](KeyBlock& block, int64_t) { ++block.count; });
    int64_t start = 0;
    for (KeyBlock& block : blocks) block.start = start, start += block.count, block.count = 0;
    tiles.resize(start);
    for_each_link(
        [&](KeyBlock& block, int64_t tile) { tiles[block.start + block.count++] = static_cast<int32_t>(tile); });
    std::stable_sort(blocks.begin(), blocks.end(),
                     [](const KeyBlock& a, const KeyBlock& b) { return a.count > b.count; });
  }
};

template <class T, class Format, int NV>
class KeyStrip {
  static constexpr int L = NV * LANES;

 public:
  explicit KeyStrip(const Gradients<T>& gradients)
      : gradients_(gradients),
        call_(gradients.call),
        rows_((std::min(call_.grid.query_tile, call_.grid.q_len) + 1) / 2 * 2),
        room_(Room::size({call_.d * L, call_.dv * L, call_.d * L, call_.dv * L, rows_ * L, rows_ * L, rows_ * width(),
                          rows_ * width()})),
        keys_(room_.take(call_.d * L)),
        values_(room_.take(call_.dv * L)),
        dk_(room_.take(call_.d * L)),
        dv_(room_.take(call_.dv * L)),
        weights_(room_.take(rows_ * L)),
        dweights_(room_.take(rows_ * L)),
        row_room_(room_.take(rows_ * width())),
        pair_room_(room_.take(rows_ * width())),
        lse_(rows_),
        delta_(rows_) {}

  // Keys [first, first + L) of a document's KV head; `tiles` kept their block.
  void run(int64_t group, int64_t first, const int32_t* tiles, const int32_t* end) {
    const Document& document = call_.document(group);
    const Grid& grid = document.grid;
    const int64_t g = group % call_.groups;
    const Matrix<T> k = call_.keys(group), v = call_.values(group);
    for (int l = 0; l < L; ++l) {
      const bool there = first + l < grid.kv_len;
      to_lane<Format>(there ? k.row(first + l) : nullptr, call_.d, L, l, keys_);
      to_lane<Format>(there ? v.row(first + l) : nullptr, call_.dv, L, l, values_);
      key_[l] = static_cast<int32_t>(first + l);
    }
    std::fill_n(dk_, call_.d * L, 0.0f);
    std::fill_n(dv_, call_.dv * L, 0.0f);
    for (; tiles < end; ++tiles) {
      const int64_t base = grid.first(*tiles) - grid.q_offset();
      const int64_t from = std::max<int64_t>(base, 0), to = std::min(base + grid.query_tile, grid.q_len);
      for (int64_t head = 0; head < grid.heads; ++head) visit(document, g, head, from, to - from);
    }
    write(gradients_.dk, dk_, group, first, call_.d);
    write(gradients_.dv, dv_, group, first, call_.dv);
  }

 private:
  int64_t width() const { return std::max(call_.d, call_.dv); }

  // Adds what `count` queries of a head from `query` on give to the keys.
  void visit(const Document& document, int64_t g, int64_t head, int64_t query, int count) {
    const int64_t of_call = g * document.grid.heads + head;
    const Matrix<T> q = call_.q.rows(document.row, of_call, document.query);
    const Matrix<T> grad = gradients_.grad_out.rows(document.row, of_call, document.query);
    const int rows = (count + Format::PACK - 1) / Format::PACK * Format::PACK;
    const int64_t at = call_.row(document, g, head, query);
    for (int i = 0; i < rows; ++i) {
      lse_[i] = i < count ? base2(call_.lse[at + i]) : -HIDDEN;
      delta_[i] = i < count ? gradients_.delta[at + i] : 0;
    }
    int64_t stride;
    const Word* left = key_rows<Format>(q, query, count, rows, call_.d, row_room_, &stride);
    product<Format, NV>(left, stride, rows, call_.d / Format::PACK, keys_, weights_);
    Softmax<NV>(call_.logits).transform(weights_, rows);
    hide(document.grid, query, rows);
    left = key_rows<Format>(grad, query, count, rows, call_.dv, row_room_, &stride);
    product<Format, NV>(left, stride, rows, call_.dv / Format::PACK, values_, dweights_);
    differentiate(rows);
    Vec keep[NV];
    for (Vec& x : keep) x = splat(1);
    Run run;
    run.base = value_rows<Format>(grad, query, count, rows, call_.dv, pair_room_, &run.step);
    product<Format, NV>({&run, 1, 1}, call_.dv, rows / Format::PACK, weights_, keep, dv_);
    run.base = value_rows<Format>(q, query, count, rows, call_.d, pair_room_, &run.step);
    product<Format, NV>({&run, 1, 1}, call_.d, rows / Format::PACK, dweights_, keep, dk_);
  }

  // Hide from weights_ [rows][L] the keys that a query does not see.
  void hide(const Grid& grid, int64_t query, int rows) {
    const int64_t end = grid.kv_len - 1, position = query + grid.q_offset();
    if (key_[L - 1] <= (grid.causal ? position : end)) return;
    for (int i = 0; i < rows; ++i) {
      const int32_t last = static_cast<int32_t>(grid.causal ? std::min(position + i, end) : end);
      for (int v = 0; v < NV; ++v) {
        IVec key;
        std::memcpy(&key, key_ + v * LANES, sizeof(key));
        float* at = weights_ + (i * NV + v) * LANES;
        store(at, blend(key > last, splat(HIDDEN), load(at)));
      }
    }
  }

  // Scores and gradients of weights -> weights and gradients of products, in the format's words.
  void differentiate(int rows) {
    const SoftmaxGradient softmax{call_.logits};
    for (int i = 0; i < rows; i += Format::PACK)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Vec weight[Format::PACK], gradient[Format::PACK];
        for (int part = 0; part < Format::PACK; ++part) {
          const int at = ((i + part) * NV + v) * LANES;
          weight[part] = load(weights_ + at), gradient[part] = load(dweights_ + at);
          softmax.apply(weight[part], gradient[part], splat(lse_[i + part]), splat(delta_[i + part]));
        }
        const int to = (i / Format::PACK * NV + v) * LANES;
        store(weights_ + to, Format::pack(weight));
        store(dweights_ + to, Format::pack(gradient));
      }
  }

  void write(T* out, const float* sums, int64_t group, int64_t first, int64_t width) const {
    const Document& document = call_.document(group);
    const int64_t count = std::min<int64_t>(L, document.grid.kv_len - first);
    const int64_t row =
        (document.row * call_.groups + group % call_.groups) * call_.grid.kv_len + document.first + first;
    for (int64_t l = 0; l < count; ++l) {
      T* to = out + (row + l) * width;
      for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(sums[d * L + l]);
    }
  }

  const Gradients<T>& gradients_;
  const Attention<T>& call_;
  int64_t rows_;
  Room room_;
  float *keys_, *values_, *dk_, *dv_, *weights_, *dweights_, *row_room_, *pair_room_;
  std::vector<float> lse_, delta_;
  int32_t key_[L];
};

template <class T, class Format, int NV>
void key_strips(const Gradients<T>& gradients, const Inverse& inverse) {
  const Attention<T>& call = gradients.call;
  const int64_t strips = call.grid.block_size / (NV * LANES);
  for_each_item(
      inverse.blocks.size() * strips, [&] { return std::make_unique<KeyStrip<T, Format, NV>>(gradients); },
      [&](auto& strip, int64_t item) {
        const KeyBlock& block = inverse.blocks[item / strips];
        const int64_t first = block.first + item % strips * NV * LANES;
        const int32_t* tiles = inverse.tiles.data() + block.start;
        if (first < call.document(block.group).grid.kv_len) strip->run(block.group, first, tiles, tiles + block.count);
      });
}

}  // namespace

template <class T, class Format>
void backward_keys(const Gradients<T>& gradients) {
  const int64_t size = gradients.call.grid.block_size;
  const Inverse inverse(gradients.call);
  if (size >= REGISTERS * LANES)
    key_strips<T, Format, REGISTERS>(gradients, inverse);
  else if (size == 2 * LANES)
    key_strips<T, Format, 2>(gradients, inverse);
  else
    key_strips<T, Format, 1>(gradients, inverse);
}

template void backward_keys<float, Floats>(const Gradients<float>&);
template void backward_keys<c10::Half, Floats>(const Gradients<c10::Half>&);
template void backward_keys<c10::BFloat16, BFloat16Format>(const Gradients<c10::BFloat16>&);

}  // namespace hsa
