// Causal attention of new tokens over a store of keys and values, and the rotation before it.
//
// A store keeps bfloat16, for each head of keys `capacity` positions of `dim` numbers. For vectors
// whose lanes are positions, keys lie in blocks of BLOCK positions: for each two channels, these of
// one position after the other. For vectors whose lanes are channels, values lie in twos of
// positions: for each channel, that of both. A token's sums have the same order with whatever others
// it is computed.

#pragma once

#include <vector>

#include "vectors.h"

constexpr int64_t BLOCK = 16;
constexpr int QUERIES = 8;  // that share a pass over the keys, at most

struct Heads {
  int64_t queries, keys, dim;
  int64_t width() const { return (queries + 2 * keys) * dim; }
  int64_t shared() const { return queries / keys; }
};

struct Store {
  uint16_t *keys, *values;
  int64_t capacity, start;

  void put_key(int64_t head, int64_t position, const float* key, int64_t dim) const {
    uint16_t* block = keys + (head * capacity + position / BLOCK * BLOCK) * dim;
    for (int64_t d = 0; d < dim; ++d)
      block[(d / 2 * BLOCK + position % BLOCK) * 2 + d % 2] = to_bfloat16(key[d]);
  }

  void put_value(int64_t head, int64_t position, const float* value, int64_t dim) const {
    uint16_t* two = values + (head * capacity + position / 2 * 2) * dim;
    for (int64_t d = 0; d < dim; ++d) two[2 * d + position % 2] = to_bfloat16(value[d]);
  }

  // What is read beside the last position must be a number, though it is multiplied by 0.
  void clear_value(int64_t head, int64_t position, int64_t dim) const {
    uint16_t* two = values + (head * capacity + position / 2 * 2) * dim;
    for (int64_t d = 0; d < dim; ++d) two[2 * d + position % 2] = 0;
  }
};

// The new tokens of one sequence, and where its keys and values lie: those of a layer after those
// of another. cos, sin (tokens, rotary); logn (tokens) or none.
struct Sequence {
  int64_t tokens, start, capacity;
  uint16_t *keys, *values;
  const float *cos, *sin, *logn;

  Store store(int64_t layer, const Heads& heads) const {
    const int64_t place = layer * heads.keys * capacity * heads.dim;
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

// total + first * first' + second * second' of the two bfloat16 in each lane.
inline vf add_twos(vf total, vi a, vi b) {
#if HAS_AVX512 && defined(__AVX512BF16__)
  return vf(_mm512_dpbf16_ps(__m512(total), __m512bh(a), __m512bh(b)));
#else
  const int32_t upper = int32_t(0xffff0000u);
  total += bits_as_floats(a << 16) * bits_as_floats(b << 16);
  return total + bits_as_floats(a & upper) * bits_as_floats(b & upper);
#endif
}

// A block of attention: Q queries that share their keys.
template <int Q>
struct Pass {
  const uint16_t *keys, *values;
  int64_t dim, longest;
  int64_t counts[Q];    // positions that each query sees
  const int32_t* q[Q];  // two channels in each
  float* p[Q];          // scores, then weights; room for whole blocks
  float* out[Q];

  void run(float scale) {
    score(scale);
    float factors[Q];
    for (int i = 0; i < Q; ++i) factors[i] = softmax(i);
    constexpr int MANY = HAS_AVX512 ? (Q > 4 ? 2 : 4) : (Q > 4 ? 1 : 2);
    int64_t d = 0;
    for (; d + MANY * LANES <= dim; d += MANY * LANES) mix<MANY>(d, factors);
    for (; d < dim; d += LANES) mix<1>(d, factors);  // the last vector may be a part of one
  }

 private:
  void score(float scale) {
    constexpr int MANY = 8 / Q;  // vectors of positions, so that sums do not wait for each other
    const int64_t vectors = (longest + BLOCK - 1) / BLOCK * (BLOCK / LANES);
    int64_t v = 0;
    for (; v + MANY <= vectors; v += MANY) score_vectors<MANY>(v, scale);
    for (; v < vectors; ++v) score_vectors<1>(v, scale);
  }

  template <int V>
  void score_vectors(int64_t first, float scale) {
    vf total[Q][V] = {};
    const uint16_t* k[V];
    for (int v = 0; v < V; ++v) {
      const int64_t position = (first + v) * LANES;
      k[v] = keys + position / BLOCK * BLOCK * dim + position % BLOCK * 2;
    }
    for (int64_t two = 0; two < dim / 2; ++two) {
      vi twos[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) twos[v] = load_ints(k[v] + two * BLOCK * 2);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) {
        const vi query = fill_int(q[i][two]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) total[i][v] = add_twos(total[i][v], twos[v], query);
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int v = 0; v < V; ++v) store(p[i] + (first + v) * LANES, total[i][v] * scale);
  }

  // Replaces scores by weights in twos of bfloat16, zeros behind the last; returns 1 / their sum.
  float softmax(int i) {
    float* w = p[i];
    const int64_t count = counts[i], room = (longest + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t whole = (count + LANES - 1) / LANES * LANES;
    for (int64_t j = count; j < whole; ++j) w[j] = -INFINITY;
    vf top = load(w);
    for (int64_t j = LANES; j < whole; j += LANES) top = larger(load(w + j), top);
    const vf largest = fill(largest_of(top));
    vf total = {};
    for (int64_t j = 0; j < whole; j += LANES) {
      vf weight = fast_exp(load(w + j) - largest);
      if (j + LANES > count)
        for (int lane = int(count - j); lane < LANES; ++lane) weight[lane] = 0;
      total += weight;
      to_twos(weight, reinterpret_cast<uint16_t*>(w) + j);
    }
    std::memset(reinterpret_cast<uint16_t*>(w) + whole, 0, (room - whole) * sizeof(uint16_t));
    return 1.0f / sum(total);
  }

  // Behind what has been read of the same memory.
  static void to_twos(vf weights, uint16_t* out) {
#if HAS_AVX512 && defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(__m512(weights)));
#else
    for (int lane = 0; lane < LANES; ++lane) out[lane] = to_bfloat16(weights[lane]);
#endif
  }

  template <int V>
  void mix(int64_t channel, const float* factors) {
    vf total[Q][V] = {};
    const int64_t width = std::min<int64_t>(LANES, dim - channel);
    for (int64_t two = 0; two < (longest + 1) / 2; ++two) {
      const uint16_t* v = values + (two * dim + channel) * 2;
      vi twos[V] = {};
      if (V == 1 && width < LANES) std::memcpy(twos, v, width * 4);
      else
#pragma GCC unroll 8
        for (int n = 0; n < V; ++n) twos[n] = load_ints(v + n * LANES * 2);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) {
        int32_t bits;
        std::memcpy(&bits, p[i] + two, 4);
        const vi weights = fill_int(bits);
#pragma GCC unroll 8
        for (int n = 0; n < V; ++n) total[i][n] = add_twos(total[i][n], twos[n], weights);
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int n = 0; n < V; ++n) {
        const vf mixed = total[i][n] * factors[i];
        std::memcpy(out[i] + channel + n * LANES, &mixed, width * sizeof(float));
      }
  }
};

// What a thread needs for its passes.
struct Scratch {
  std::vector<float> weights;
  std::vector<uint16_t> queries;
};

// Queries [first, first + Q) of those that share the keys of head `kv`; token by token.
template <int Q>
inline void attend_some(const float* qkv, const Heads& heads, const Store& store, int64_t kv,
                        int64_t first, float scale, float* out, Scratch& scratch) {
  const int64_t dim = heads.dim, place = kv * store.capacity * dim;
  Pass<Q> pass{store.keys + place, store.values + place, dim, 0, {}, {}, {}, {}};
  for (int i = 0; i < Q; ++i) {
    const int64_t m = (first + i) / heads.shared();
    pass.counts[i] = store.start + m + 1;
    pass.longest = std::max(pass.longest, pass.counts[i]);
  }
  const int64_t room = (pass.longest + BLOCK - 1) / BLOCK * BLOCK;
  if (int64_t(scratch.weights.size()) < Q * room) scratch.weights.resize(Q * room);
  if (int64_t(scratch.queries.size()) < Q * dim) scratch.queries.resize(Q * dim);
  for (int i = 0; i < Q; ++i) {
    const int64_t m = (first + i) / heads.shared();
    const int64_t h = kv * heads.shared() + (first + i) % heads.shared();
    const float* query = qkv + m * heads.width() + h * dim;
    uint16_t* rounded = scratch.queries.data() + i * dim;
    for (int64_t d = 0; d < dim; ++d) rounded[d] = to_bfloat16(query[d]);
    pass.q[i] = reinterpret_cast<const int32_t*>(rounded);
    pass.p[i] = scratch.weights.data() + i * room;
    pass.out[i] = out + (m * heads.queries + h) * dim;
  }
  pass.run(scale);
}
