// The stages one by one, and the teacher: what `select.cpp` does without a detour through memory.
#include "select.h"

namespace hsa {

template <class T, class Format>
void coarse_scores(const Pooled<T>& call, int64_t batch, int64_t blocks, float* out) {
  struct Worker {
    Coarse<T, Format> coarse;
    std::vector<float> scores;
    explicit Worker(const Pooled<T>& call) : coarse(call) {}
  };
  const int64_t parts = (call.tiles + LANES - 1) / LANES;
  for_each_item(
      batch * call.groups * parts, [&] { return std::make_unique<Worker>(call); },
      [&](auto& worker, int64_t item) {
        const int64_t group = item / parts, first = item % parts * LANES,
                      tiles = std::min<int64_t>(LANES, call.tiles - first);
        worker->coarse.run(group, first, tiles, 0, blocks, worker->scores);
        for (int64_t l = 0; l < tiles; ++l)
          for (int64_t block = 0; block < blocks; ++block)
            out[(group * call.tiles + first + l) * blocks + block] = worker->scores[block * LANES + l];
      });
}

template <class T, class Format>
void block_mass(const Sampled<T>& call, const int64_t* blocks, int64_t width, float* out) {
  struct Worker {
    TileMass<T, Format> mass;
    std::vector<int32_t> listed;
    std::vector<float> found;
    explicit Worker(const Sampled<T>& call) : mass(call) {}
  };
  const int64_t tiles = call.grid.tiles;
  for_each_item(
      call.batch * call.groups * tiles, [&] { return std::make_unique<Worker>(call); },
      [&](auto& worker, int64_t item) {
        const int64_t last =
            std::min(call.grid.first(call.tiles[item % tiles]) + call.grid.query_tile, call.grid.kv_len) - 1;
        const int64_t visible = std::min(width, last / call.grid.block_size + 1);
        worker->listed.clear();
        for (int64_t i = 0; i < (blocks ? width : visible); ++i) {
          const int64_t block = blocks ? blocks[item * width + i] : i;
          if (block >= 0) worker->listed.push_back(call.grid.checked(block));
        }
        worker->mass.run(item / tiles, item % tiles, worker->listed, worker->found);
        float* to = out + item * width;
        for (int64_t i = 0, next = 0; i < width; ++i)
          to[i] = (blocks ? blocks[item * width + i] >= 0 : i < visible) ? worker->found[next++] : 0.0f;
      });
}

template <class T>
void pooled_features(const Heads<T>& keys, int64_t batch, int64_t groups, int64_t length, int64_t width,
                     int64_t block_size, T* out) {
  const int64_t blocks = length / block_size;
  at::parallel_for(0, batch * groups * blocks, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> most(width), least(width), total(width);
    for (int64_t item = begin; item < end; ++item) {
      const Matrix<T> rows = keys.rows(item / blocks / groups, item / blocks % groups);
      for (int64_t i = 0; i < block_size; ++i) {
        const T* row = rows.row(item % blocks * block_size + i);
        for (int64_t d = 0; d < width; ++d) {
          const float x = static_cast<float>(row[d]);
          const bool nan = x != x;  // it takes the place of any number, and no number takes its place
          most[d] = i == 0 || nan || x > most[d] ? x : most[d];
          least[d] = i == 0 || nan || x < least[d] ? x : least[d];
          total[d] = i == 0 ? x : total[d] + x;
        }
      }
      T* to = out + item * 3 * width;
      for (int64_t d = 0; d < width; ++d) {
        to[d] = static_cast<T>(most[d]);
        to[width + d] = static_cast<T>(least[d]);
        to[2 * width + d] = static_cast<T>(total[d] / block_size);
      }
    }
  });
}

#define HSA_INSTANTIATE(T, Format)                                                         \
  template void coarse_scores<T, Format>(const Pooled<T>&, int64_t, int64_t, float*);      \
  template void block_mass<T, Format>(const Sampled<T>&, const int64_t*, int64_t, float*); \
  template void pooled_features<T>(const Heads<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, T*);
HSA_INSTANTIATE(float, Floats)
HSA_INSTANTIATE(c10::Half, Floats)
HSA_INSTANTIATE(c10::BFloat16, BFloat16Format)

}  // namespace hsa
