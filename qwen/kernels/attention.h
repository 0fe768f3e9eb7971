// Causal attention of new tokens over a store of keys and values, and the rotation before it.
//
// A store keeps whole numbers of 16 bits with a scale for each position of a head, and in `room(dim)`
// numbers for a position: in blocks of BLOCK positions, first their scales as float32. For vectors
// whose lanes are positions, keys follow as, for each two channels, these of one position after the
// other; for vectors whose lanes are channels, values as, for each two positions, each channel of
// both. Products are summed as integers, exactly. A token's sums have the same order with whatever
// others it is computed.

#pragma once

#include <vector>

#include "vectors.h"

constexpr int64_t BLOCK = 16;
constexpr int64_t CHUNK = 64;  // positions whose weights share a scale
constexpr int QUERIES = 8;     // that share a pass over the keys, at most

// The largest whole number, of which `count` products of two fit into 32 bits.
inline int32_t largest_whole(int64_t count) {
  return std::min<int32_t>(32767, int32_t(std::sqrt(2147483647.0 / double(count))));
}

inline int64_t room(int64_t dim) { return dim + 2; }

struct Heads {
  int64_t queries, keys, dim;
  int64_t width() const { return (queries + 2 * keys) * dim; }
  int64_t shared() const { return queries / keys; }
};

// Writes numbers as whole ones, `stride` apart in twos; returns their scale, NaN if one is none.
inline float quantize(const float* in, int64_t count, int32_t most, int16_t* out, int64_t of_two,
                      int64_t stride) {
  float largest = 0, no_number = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(in[i]));
    no_number += in[i] * 0.0f;
  }
  const float factor = largest > 0 ? float(most) / largest : 0.0f;
  for (int64_t i = 0; i < count; ++i)
    out[i / of_two * stride + i % of_two] = int16_t(std::nearbyint(in[i] * factor));
  return largest / float(most) + no_number;
}

struct Store {
  int16_t *keys, *values;
  int64_t capacity, start;

  void put_key(int64_t head, int64_t position, const float* key, int64_t dim) const {
    int16_t* block = keys + (head * capacity + position / BLOCK * BLOCK) * room(dim);
    const int64_t place = position % BLOCK;
    int16_t* out = block + 2 * BLOCK + 2 * place;
    reinterpret_cast<float*>(block)[place] =
        quantize(key, dim, largest_whole(dim), out, 2, 2 * BLOCK);
  }

  void put_value(int64_t head, int64_t position, const float* value, int64_t dim) const {
    int16_t* block = values + (head * capacity + position / BLOCK * BLOCK) * room(dim);
    const int64_t place = position % BLOCK;
    int16_t* out = block + 2 * BLOCK + place / 2 * 2 * dim + place % 2;
    reinterpret_cast<float*>(block)[place] =
        quantize(value, dim, largest_whole(CHUNK), out, 1, 2);
  }
};

// The new tokens of one sequence, and where its keys and values lie: those of a layer after those
// of another. cos, sin (tokens, rotary); logn (tokens) or none.
struct Sequence {
  int64_t tokens, start, capacity;
  int16_t *keys, *values;
  const float *cos, *sin, *logn;

  Store store(int64_t layer, const Heads& heads) const {
    const int64_t place = layer * heads.keys * capacity * room(heads.dim);
    return {keys + place, values + place, capacity, start};
  }
};

inline int64_t count_rows(const Sequence* sequences, int64_t count) {
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += sequences[i].tokens;
  return rows;
}

// The sequence that a row belongs to; the row becomes that of the sequence's own tokens.
inline const Sequence& find_row(const Sequence* sequences, int64_t* row) {
  while (*row >= sequences->tokens) *row -= sequences++->tokens;
  return *sequences;
}

inline void rotate(const float* in, const float* cos, const float* sin, float factor,
                   int64_t rotary, int64_t dim, float* out) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = in[i], second = in[i + half];
    out[i] = (first * cos[i] - second * sin[i]) * factor;
    out[i + half] = (second * cos[i + half] + first * sin[i + half]) * factor;
  }
  for (int64_t i = rotary; i < dim; ++i) out[i] = in[i] * factor;
}

// A block of attention: Q queries that share their keys.
template <int Q>
struct Pass {
  const int16_t *keys, *values;
  int64_t dim, longest;
  int64_t counts[Q];    // positions that each query sees
  const int32_t* q[Q];  // two channels in each
  float scales[Q];      // of a query's whole numbers, and of its scores
  float* p[Q];          // scores, then weights as whole numbers; room for whole chunks
  float* shares[Q];     // what a chunk's weights are multiplied by
  float* out[Q];

  void run() {
    score();
    float factors[Q];
    for (int i = 0; i < Q; ++i) factors[i] = softmax(i);
    constexpr int MANY = HAS_AVX512 ? (Q > 4 ? 2 : 4) : (Q > 4 ? 1 : 2);
    int64_t d = 0;
    for (; d + MANY * LANES <= dim; d += MANY * LANES) mix<MANY>(d, factors);
    for (; d < dim; d += LANES) mix<1>(d, factors);  // the last vector may be a part of one
  }

 private:
  void score() {
    constexpr int MANY = HAS_AVX512 ? (Q > 4 ? 2 : 4) : std::max(1, 4 / Q);  // vectors of positions
    const int64_t vectors = (longest + BLOCK - 1) / BLOCK * (BLOCK / LANES);
    int64_t v = 0;
    for (; v + MANY <= vectors; v += MANY) score_vectors<MANY>(v);
    for (; v < vectors; ++v) score_vectors<1>(v);
  }

  template <int V>
  void score_vectors(int64_t first) {
    vi total[Q][V] = {};
    const int16_t* block[V];
    int64_t place[V];
    for (int v = 0; v < V; ++v) {
      const int64_t position = (first + v) * LANES;
      block[v] = keys + position / BLOCK * BLOCK * room(dim);
      place[v] = position % BLOCK;
    }
    for (int64_t two = 0; two < dim / 2; ++two) {
      vi twos[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) twos[v] = load_ints(block[v] + 2 * ((two + 1) * BLOCK + place[v]));
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) {
        const vi query = fill_int(q[i][two]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) total[i][v] = add_pairs(total[i][v], twos[v], query);
      }
    }
    for (int v = 0; v < V; ++v) {
      const vf scale = load(reinterpret_cast<const float*>(block[v]) + place[v]);
      for (int i = 0; i < Q; ++i)
        store(p[i] + (first + v) * LANES, as_floats(total[i][v]) * (scale * scales[i]));
    }
  }

  // Replaces scores by weights times the values' scales in whole numbers, zeros behind the last;
  // returns 1 / the weights' sum.
  float softmax(int i) {
    float* w = p[i];
    const int64_t count = counts[i], whole = (count + LANES - 1) / LANES * LANES;
    for (int64_t j = count; j < whole; ++j) w[j] = -INFINITY;
    vf top = load(w);
    for (int64_t j = LANES; j < whole; j += LANES) top = larger(load(w + j), top);
    const vf largest = fill(largest_of(top));
    vf total = {}, zero = {};
    for (int64_t begin = 0; begin < longest; begin += CHUNK) {
      const int64_t end = std::min(begin + CHUNK, count);
      vf heaviest = {};
      const auto put = [&](int64_t j, vf weight, vf weighted) {
        total += weight;
        heaviest = larger(weighted, heaviest);
        zero += weighted * 0.0f;
        store(w + j, weighted);
      };
      int64_t j = begin;
      for (; j + LANES <= end; j += LANES) {
        const vf weight = exp_up_to_88(load(w + j) - largest);
        put(j, weight, weight * value_scales(j));
      }
      if (j < end) {
        vf weight = exp_up_to_88(load(w + j) - largest), weighted = weight * value_scales(j);
        for (int lane = int(end - j); lane < LANES; ++lane) weight[lane] = weighted[lane] = 0;
        put(j, weight, weighted);
        j += LANES;
      }
      for (; j < begin + CHUNK; j += LANES) store(w + j, vf{});
      const float most = largest_of(heaviest), limit = float(largest_whole(CHUNK));
      shares[i][begin / CHUNK] = most / limit;
      const vf factor = fill(most > 0 ? limit / most : 0.0f);
      int16_t* out = reinterpret_cast<int16_t*>(w) + begin;
      for (j = begin; j < begin + CHUNK; j += LANES)
        store_halves(out + j - begin, load(w + j) * factor);
    }
    return 1.0f / sum(total) + sum(zero);  // a NaN among the values would be lost
  }

  vf value_scales(int64_t position) const {
    const int16_t* block = values + position / BLOCK * BLOCK * room(dim);
    return load(reinterpret_cast<const float*>(block) + position % BLOCK);
  }

  template <int V>
  void mix(int64_t channel, const float* factors) {
    const int64_t width = std::min<int64_t>(LANES, dim - channel);
    vf mixed[Q][V] = {};
    for (int64_t begin = 0; begin < longest; begin += CHUNK) {
      vi total[Q][V] = {};
      const int64_t end = std::min(begin + CHUNK, longest);
      for (int64_t position = begin; position < end; position += 2) {
        const int16_t* block = values + position / BLOCK * BLOCK * room(dim);
        const int16_t* v = block + 2 * BLOCK + (position % BLOCK * dim + 2 * channel);
        vi twos[V] = {};
        if (V == 1 && width < LANES) std::memcpy(twos, v, width * 4);
        else
#pragma GCC unroll 8
          for (int n = 0; n < V; ++n) twos[n] = load_ints(v + n * LANES * 2);
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) {
          int32_t both;
          std::memcpy(&both, reinterpret_cast<const int16_t*>(p[i]) + position, 4);
          const vi weights = fill_int(both);
#pragma GCC unroll 8
          for (int n = 0; n < V; ++n) total[i][n] = add_pairs(total[i][n], twos[n], weights);
        }
      }
      for (int i = 0; i < Q; ++i)
        for (int n = 0; n < V; ++n)
          mixed[i][n] += as_floats(total[i][n]) * shares[i][begin / CHUNK];
    }
    for (int i = 0; i < Q; ++i)
      for (int n = 0; n < V; ++n) {
        const vf result = mixed[i][n] * factors[i];
        std::memcpy(out[i] + channel + n * LANES, &result, width * sizeof(float));
      }
  }
};

// What a thread needs for its passes.
struct Scratch {
  std::vector<float> weights, shares;
  std::vector<int16_t> queries;
};

// Queries [first, first + Q) of those that share the keys of head `kv`; token by token.
template <int Q>
inline void attend_some(const float* qkv, const Heads& heads, const Store& store, int64_t kv,
                        int64_t first, float scale, float* out, Scratch& scratch) {
  const int64_t dim = heads.dim, place = kv * store.capacity * room(dim);
  Pass<Q> pass{store.keys + place, store.values + place, dim, 0, {}, {}, {}, {}, {}, {}};
  for (int i = 0; i < Q; ++i) {
    pass.counts[i] = store.start + (first + i) / heads.shared() + 1;
    pass.longest = std::max(pass.longest, pass.counts[i]);
  }
  const int64_t chunks = (pass.longest + CHUNK - 1) / CHUNK, positions = chunks * CHUNK;
  if (int64_t(scratch.weights.size()) < Q * positions) scratch.weights.resize(Q * positions);
  if (int64_t(scratch.shares.size()) < Q * chunks) scratch.shares.resize(Q * chunks);
  if (int64_t(scratch.queries.size()) < Q * dim) scratch.queries.resize(Q * dim);
  for (int i = 0; i < Q; ++i) {
    const int64_t m = (first + i) / heads.shared();
    const int64_t h = kv * heads.shared() + (first + i) % heads.shared();
    int16_t* whole = scratch.queries.data() + i * dim;
    const float* query = qkv + m * heads.width() + h * dim;
    pass.scales[i] = scale * quantize(query, dim, largest_whole(dim), whole, 1, 1);
    pass.q[i] = reinterpret_cast<const int32_t*>(whole);
    pass.p[i] = scratch.weights.data() + i * positions;
    pass.shares[i] = scratch.shares.data() + i * chunks;
    pass.out[i] = out + (m * heads.queries + h) * dim;
  }
  pass.run();
}
