// dK and dV: one key of a block in each lane, the roles of queries and keys exchanged, so that no sum is shared between workers.
#include <vector>

#include "backward.h"

namespace hsa {
namespace {

// The tiles that kept each block of each row of (batch, group), ascending.
struct Inverse {
  std::vector<int32_t> tiles;
  std::vector<int64_t> starts;  // [rows · blocks + 1]

  Inverse(const int32_t* indices, int64_t rows, int64_t tiles_of_row, int64_t kept, int64_t blocks) : starts(rows * blocks + 1) {
    const int64_t count = rows * tiles_of_row * kept;
    for (int64_t i = 0; i < count; ++i)
      if (indices[i] >= 0) ++starts[i / (tiles_of_row * kept) * blocks + indices[i] + 1];
    for (int64_t bin = 0; bin < rows * blocks; ++bin) starts[bin + 1] += starts[bin];
    tiles.resize(starts.back());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (indices[i] >= 0) tiles[next[i / (tiles_of_row * kept) * blocks + indices[i]]++] = i / kept % tiles_of_row;
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
        room_(Room::size({call_.d * L, call_.dv * L, call_.d * L, call_.dv * L, rows_ * L, rows_ * L, rows_ * width(), rows_ * width()})),
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

  // Keys [first, first + L) of a row; `tiles` kept their block.
  void run(int64_t group, int64_t first, const int32_t* tiles, const int32_t* end) {
    const int64_t b = group / call_.groups, g = group % call_.groups;
    const Matrix<T> k = call_.k.rows(b, g), v = call_.v.rows(b, g);
    for (int l = 0; l < L; ++l) {
      const bool there = first + l < call_.grid.kv_len;
      to_lane<Format>(there ? k.row(first + l) : nullptr, call_.d, L, l, keys_);
      to_lane<Format>(there ? v.row(first + l) : nullptr, call_.dv, L, l, values_);
      key_[l] = static_cast<int32_t>(first + l);
    }
    std::fill_n(dk_, call_.d * L, 0.0f);
    std::fill_n(dv_, call_.dv * L, 0.0f);
    for (; tiles < end; ++tiles) {
      const int64_t base = call_.grid.first(*tiles) - call_.grid.q_offset();
      const int64_t from = std::max<int64_t>(base, 0), to = std::min(base + call_.grid.query_tile, call_.grid.q_len);
      for (int64_t head = g * call_.grid.heads; head < (g + 1) * call_.grid.heads; ++head) visit(b, head, from, to - from);
    }
    write(gradients_.dk, dk_, group, first, call_.d);
    write(gradients_.dv, dv_, group, first, call_.dv);
  }

 private:
  int64_t width() const { return std::max(call_.d, call_.dv); }

  // Adds what `count` queries of a head from `query` on give to the keys.
  void visit(int64_t b, int64_t head, int64_t query, int count) {
    const Matrix<T> q = call_.q.rows(b, head), grad = gradients_.grad_out.rows(b, head);
    const int rows = (count + Format::PACK - 1) / Format::PACK * Format::PACK;
    const int64_t at = (b * call_.heads() + head) * call_.grid.q_len + query;
    for (int i = 0; i < rows; ++i) {
      lse_[i] = i < count ? base2(call_.lse[at + i]) : -HIDDEN;
      delta_[i] = i < count ? gradients_.delta[at + i] : 0;
    }
    int64_t stride;
    const Word* left = key_rows<Format>(q, query, count, rows, call_.d, row_room_, &stride);
    product<Format, NV>(left, stride, rows, call_.d / Format::PACK, keys_, weights_);
    Softmax<NV>(call_.logits).transform(weights_, rows);
    hide(query, rows);
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
  void hide(int64_t query, int rows) {
    const int64_t end = call_.grid.kv_len - 1, position = query + call_.grid.q_offset();
    if (key_[L - 1] <= (call_.grid.causal ? position : end)) return;
    for (int i = 0; i < rows; ++i) {
      const int32_t last = static_cast<int32_t>(call_.grid.causal ? std::min(position + i, end) : end);
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
    const int64_t count = std::min<int64_t>(L, call_.grid.kv_len - first);
    for (int64_t l = 0; l < count; ++l) {
      T* to = out + (group * call_.grid.kv_len + first + l) * width;
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
  const int64_t size = call.grid.block_size, blocks = (call.grid.kv_len + size - 1) / size, strips = size / (NV * LANES);
  // the most popular blocks first: whoever takes one last would work alone
  std::vector<int64_t> order(call.batch * call.groups * blocks);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto visits = [&](int64_t bin) { return inverse.starts[bin + 1] - inverse.starts[bin]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return visits(a) > visits(b); });
  for_each_item(
      order.size() * strips, [&] { return std::make_unique<KeyStrip<T, Format, NV>>(gradients); },
      [&](auto& strip, int64_t item) {
        const int64_t bin = order[item / strips], first = bin % blocks * size + item % strips * NV * LANES;
        const int32_t* tiles = inverse.tiles.data();
        if (first < call.grid.kv_len) strip->run(bin / blocks, first, tiles + inverse.starts[bin], tiles + inverse.starts[bin + 1]);
      });
}

}  // namespace

template <class T, class Format>
void backward_keys(const Gradients<T>& gradients) {
  const Attention<T>& call = gradients.call;
  const int64_t size = call.grid.block_size;
  const Inverse inverse(call.indices, call.batch * call.groups, call.grid.tiles, call.kept, (call.grid.kv_len + size - 1) / size);
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
