// The slow way, in double precision, one query at a time: for the few whose logits or values leave the range of float.
#pragma once

#include <cfloat>
#include <cmath>
#include <vector>

#include "forward.h"

namespace hsa {

template <class T>
inline double dot(const T* a, const T* b, int64_t width) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += static_cast<double>(static_cast<float>(a[d])) * static_cast<float>(b[d]);
  return sum;
}

inline double logit_of(const Logits& logits, double product) {
  const double x = logits.scale * product, cap = logits.softcap;
  return cap == 0 ? x : cap * std::tanh(x / cap);
}

// Logits -> weights that sum to 1 with what `sink` takes, if it is not null; returns the log-sum-exp. As torch does it:
// all are NaN where one is NaN or infinite, or all are -inf.
inline double softmax_exactly(std::vector<double>& x, const float* sink) {
  double most = sink ? *sink : -INFINITY, total = 0;
  for (double logit : x) most = logit != logit || logit > most ? logit : most;
  if (sink) total = std::exp(*sink - most);
  for (double& logit : x) total += logit = std::exp(logit - most);
  for (double& weight : x) weight /= total;
  return std::isinf(most) ? most : most + std::log(total);
}

// One query of an attention call.
template <class T>
class ExactQuery {
 public:
  explicit ExactQuery(const Attention<T>& call) : call_(call) {}

  // Weights of the keys it sees, `keys()`; returns the log-sum-exp.
  double weigh(int64_t group, int64_t tile, int64_t head, int64_t query) {
    const Document& document = call_.document(group);
    const Grid& grid = document.grid;
    const int64_t g = group % call_.groups;
    const T* q = call_.q.rows(document.row, g * grid.heads + head, document.query).row(query);
    const Matrix<T> k = call_.keys(group);
    const int32_t *list = call_.list(group, tile), *end = list + call_.kept;
    const int64_t seen = grid.causal ? query + grid.q_offset() + 1 : grid.kv_len;
    keys_.clear();
    weights_.clear();
    for (list = grid.checked(list, end, tile); list < end; ++list)
      for (int64_t key = *list * grid.block_size; key < std::min((*list + 1) * grid.block_size, seen); ++key) {
        keys_.push_back(key);
        weights_.push_back(logit_of(call_.logits, dot(q, k.row(key), call_.d)));
      }
    return softmax_exactly(weights_, call_.sinks ? call_.sinks + g * grid.heads + head : nullptr);
  }

  const std::vector<int64_t>& keys() const { return keys_; }
  const std::vector<double>& weights() const { return weights_; }

  void attend(int64_t group, int64_t tile, int64_t head, int64_t query) {
    const int64_t row = call_.row(call_.document(group), group % call_.groups, head, query);
    call_.lse[row] = static_cast<float>(weigh(group, tile, head, query));
    out_.assign(call_.dv, 0.0);
    const Matrix<T> v = call_.values(group);
    for (size_t i = 0; i < keys_.size(); ++i) {
      if (weights_[i] == 0) continue;  // hides even a NaN or infinite value
      const T* value = v.row(keys_[i]);
      for (int64_t d = 0; d < call_.dv; ++d) out_[d] += weights_[i] * static_cast<float>(value[d]);
    }
    T* to = call_.out + row * call_.dv;
    for (int64_t d = 0; d < call_.dv; ++d)
      to[d] = static_cast<T>(std::isfinite(out_[d]) ? static_cast<float>(out_[d]) : NAN);
  }

 private:
  const Attention<T>& call_;
  std::vector<int64_t> keys_;
  std::vector<double> weights_, out_;
};

}  // namespace hsa
