// What the backward pass of an attention call is told.
#pragma once

#include "forward.h"

namespace hsa {

template <class T>
struct Gradients {
  Attention<T> call;      // its out and lse are those of the forward pass
  Heads<T> grad_out;      // [B, H, Q, Dv]
  const float* grad_lse;  // [B, H, Q] or null
  float* delta;           // [B, H, Q], what the first pass leaves for the second: out · grad_out - grad_lse
  T *dq, *dk, *dv;        // [B, H, Q, D], [B, G, N, D], [B, G, N, Dv]
};

// dQ and delta, one strip of a tile's queries at a time.
template <class T, class Format>
void backward_queries(const Gradients<T>& call);

// dK and dV, one block of keys at a time over the tiles that kept it; needs delta.
template <class T, class Format>
void backward_keys(const Gradients<T>& call);

// Weights and gradients of the products q·k from scores [rows][NV · LANES] and from what the weights' gradients are, in
// place.
struct SoftmaxGradient {
  const Logits& logits;

  // base-2 logits in `scores`, see `Softmax::transform`; lse in base 2
  void apply(Vec& score, Vec& gradient, Vec lse, Vec delta) const {
    const Vec weight = exp2_negative(score * logits.factor() - lse);
    Vec slope = splat(logits.scale);
    if (logits.softcap != 0) {
      const Vec ratio = score * (1 / (Logits::LOG2E * logits.softcap));
      slope *= 1.0f - ratio * ratio;
    }
    // a weight of zero hides whatever the key and its value hold
    gradient = blend(weight == 0.0f, Vec{}, weight * (gradient - delta) * slope);
    score = weight;
  }
};

// The log-sum-exp of a query in base 2; of one that sees nothing so large that its weights are zero.
inline float base2(float lse) { return std::isinf(lse) && lse < 0 ? -HIDDEN : lse * Logits::LOG2E; }

}  // namespace hsa
