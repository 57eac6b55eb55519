// dQ: one query in each lane, as in the forward pass.
#include "backward.h"

namespace hsa {
namespace {

template <class T, class Format, int NV>
class QueryStrip {
  static constexpr int L = NV * LANES;

 public:
  explicit QueryStrip(const Gradients<T>& gradients)
      : gradients_(gradients),
        call_(gradients.call),
        size_(call_.grid.block_size),
        keys_(std::max<int64_t>(CHUNK, size_)),
        room_(Room::size({call_.d * L, call_.dv * L, keys_ * L, keys_ * L, call_.d * L,
                          size_ * std::max(call_.d, call_.dv), keys_ * call_.d})),
        queries_(room_.take(call_.d * L)),
        grads_(room_.take(call_.dv * L)),
        scores_(room_.take(keys_ * L)),
        dweights_(room_.take(keys_ * L)),
        dq_(room_.take(call_.d * L)),
        row_room_(room_.take(size_ * std::max(call_.d, call_.dv))),
        key_room_(room_.take(keys_ * call_.d)) {}

  void run(int64_t group, int64_t tile, int64_t first_row) {
    const Document& document = call_.document(group);
    const int64_t g = group % call_.groups;
    const Lanes<NV> lanes = rows_of<NV>(document.grid, tile, first_row);
    lanes.template load_queries<Format>(call_.q, document, g, call_.d, queries_);
    lanes.template load_queries<Format>(gradients_.grad_out, document, g, call_.dv, grads_);
    load_statistics(lanes, document, g);
    std::fill_n(dq_, call_.d * L, 0.0f);
    const int32_t *list = call_.list(group, tile), *end = list + call_.kept;
    list = document.grid.checked(list, end, tile);
    const int64_t step = std::max<int64_t>(1, CHUNK / size_);
    for (; list < end; list += step) chunk(group, lanes, list, std::min<int64_t>(step, end - list));
    for (int l = 0; l < L; ++l) {
      if (lanes.query(l) < 0) continue;
      T* to = gradients_.dq + call_.row(document, g, lanes.head(l), lanes.query(l)) * call_.d;
      for (int64_t d = 0; d < call_.d; ++d) to[d] = static_cast<T>(dq_[d * L + l]);
    }
  }

 private:
  void load_statistics(const Lanes<NV>& lanes, const Document& document, int64_t g) {
    for (int l = 0; l < L; ++l) {
      lse_[l] = -HIDDEN, delta_[l] = 0;
      if (lanes.query(l) < 0) continue;
      const int64_t at = call_.row(document, g, lanes.head(l), lanes.query(l)),
                    head = g * call_.grid.heads + lanes.head(l);
      const T *out = call_.out + at * call_.dv,
              *grad = gradients_.grad_out.rows(document.row, head, document.query).row(lanes.query(l));
      float delta = gradients_.grad_lse ? -gradients_.grad_lse[at] : 0;
      for (int64_t d = 0; d < call_.dv; ++d) delta += static_cast<float>(out[d]) * static_cast<float>(grad[d]);
      gradients_.delta[at] = delta_[l] = delta;
      lse_[l] = base2(call_.lse[at]);
    }
  }

  void chunk(int64_t group, const Lanes<NV>& lanes, const int32_t* list, int64_t blocks) {
    const Matrix<T> k = call_.keys(group), v = call_.values(group);
    const int64_t kv_len = call_.document(group).grid.kv_len;
    Run keys[CHUNK];
    int64_t stride;
    const Softmax<NV> softmax(call_.logits);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t first = int64_t{list[j]} * size_, at = j * size_ * L;
      const int count = std::min(size_, kv_len - first);
      const Word* rows = key_rows<Format>(k, first, count, size_, call_.d, row_room_, &stride);
      product<Format, NV>(rows, stride, size_, call_.d / Format::PACK, queries_, scores_ + at);
      softmax.transform(scores_ + at, size_);
      lanes.hide(scores_ + at, first, size_);
      rows = key_rows<Format>(v, first, count, size_, call_.dv, row_room_, &stride);
      product<Format, NV>(rows, stride, size_, call_.dv / Format::PACK, grads_, dweights_ + at);
      float* room = key_room_ + j * size_ * call_.d / Format::PACK;
      keys[j].base = value_rows<Format>(k, first, count, size_, call_.d, room, &keys[j].step);
    }
    differentiate(blocks * size_);
    Vec keep[NV];
    for (Vec& x : keep) x = splat(1);
    product<Format, NV>({keys, static_cast<int>(blocks), 1}, call_.d, size_ / Format::PACK, dweights_, keep, dq_);
  }

  // dweights_: gradients of the products, in the format's words
  void differentiate(int64_t rows) {
    const SoftmaxGradient softmax{call_.logits};
    for (int64_t i = 0; i < rows; i += Format::PACK)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Vec lse = load(lse_ + v * LANES), delta = load(delta_ + v * LANES);
        Vec gradient[Format::PACK];
        for (int part = 0; part < Format::PACK; ++part) {
          const int64_t at = ((i + part) * NV + v) * LANES;
          Vec score = load(scores_ + at);
          gradient[part] = load(dweights_ + at);
          softmax.apply(score, gradient[part], lse, delta);
        }
        store(dweights_ + (i / Format::PACK * NV + v) * LANES, Format::pack(gradient));
      }
  }

  const Gradients<T>& gradients_;
  const Attention<T>& call_;
  int64_t size_, keys_;
  Room room_;
  float *queries_, *grads_, *scores_, *dweights_, *dq_, *row_room_, *key_room_;
  float lse_[L], delta_[L];
};

}  // namespace

template <class T, class Format>
void backward_queries(const Gradients<T>& gradients) {
  for_each_strip(gradients.call, [&](auto vectors, auto run) {
    run([&] { return std::make_unique<QueryStrip<T, Format, vectors()>>(gradients); });
  });
}

template void backward_queries<float, Floats>(const Gradients<float>&);
template void backward_queries<c10::Half, Floats>(const Gradients<c10::Half>&);
template void backward_queries<c10::BFloat16, BFloat16Format>(const Gradients<c10::BFloat16>&);

}  // namespace hsa
