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

// Two numbers in bfloat16, in the form that vectors are multiplied by fastest.
#if HAS_AVX512 && defined(__AVX512BF16__)
struct Two {
  uint16_t first, second;
};
inline Two make_two(float first, float second) { return {to_bfloat16(first), to_bfloat16(second)}; }

// total + first * first' + second * second' of the two bfloat16 in each lane.
inline vf add_twos(vf total, vi lanes, Two two) {
  int32_t bits;
  std::memcpy(&bits, &two, 4);
  return vf(_mm512_dpbf16_ps(__m512(total), __m512bh(lanes), __m512bh(fill_int(bits))));
}

// Over what has been read of the same memory.
inline void store_twos(vf v, uint16_t* out) {
  _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(__m512(v)));
}
typedef uint16_t Half;
#else
struct Two {
  float first, second;
};
inline float rounded(float x) { return bfloat16_to_float(to_bfloat16(x)); }
inline Two make_two(float first, float second) { return {rounded(first), rounded(second)}; }

inline vf add_twos(vf total, vi lanes, Two two) {
  total += bits_as_floats(lanes << 16) * fill(two.first);
  return total + bits_as_floats(lanes & int32_t(0xffff0000u)) * fill(two.second);
}

inline void store_twos(vf v, float* out) { store(out, round_to_bfloat16(v)); }
typedef float Half;
#endif

// A block of attention: Q queries that share their keys.
template <int Q>
struct Pass {
  const uint16_t *keys, *values;
  int64_t dim, longest;
  int64_t counts[Q];  // positions that each query sees
  const Two* q[Q];    // two channels in each
  float* p[Q];        // scores, then weights in `Two`s; room for whole blocks
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
    constexpr int MANY = HAS_AVX512 ? (Q > 4 ? 2 : 4) : std::max(1, 4 / Q);  // vectors of positions, so that sums do not wait for each other
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
        const Two query = q[i][two];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) total[i][v] = add_twos(total[i][v], twos[v], query);
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int v = 0; v < V; ++v) store(p[i] + (first + v) * LANES, total[i][v] * scale);
  }

  // Replaces scores by weights in bfloat16, zeros behind the last; returns 1 / their sum.
  float softmax(int i) {
    float* w = p[i];
    const int64_t count = counts[i], room = (longest + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t whole = (count + LANES - 1) / LANES * LANES;
    for (int64_t j = count; j < whole; ++j) w[j] = -INFINITY;
    vf top = load(w);
    for (int64_t j = LANES; j < whole; j += LANES) top = larger(load(w + j), top);
    const vf largest = fill(largest_of(top));
    vf total = {};
    const auto put = [&](int64_t j, vf weight) {
      total += weight;
      store_twos(weight, reinterpret_cast<Half*>(w) + j);
    };
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) put(j, fast_exp(load(w + j) - largest));
    if (j < count) {
      vf weight = fast_exp(load(w + j) - largest);
      for (int lane = int(count - j); lane < LANES; ++lane) weight[lane] = 0;
      put(j, weight);
    }
    std::memset(reinterpret_cast<Half*>(w) + whole, 0, (room - whole) * sizeof(Half));
    return 1.0f / sum(total);
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
        const Two weights = reinterpret_cast<const Two*>(p[i])[two];
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
  std::vector<Two> queries;
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
  if (int64_t(scratch.queries.size()) < Q * dim / 2) scratch.queries.resize(Q * dim / 2);
  for (int i = 0; i < Q; ++i) {
    const int64_t m = (first + i) / heads.shared();
    const int64_t h = kv * heads.shared() + (first + i) % heads.shared();
    const float* query = qkv + m * heads.width() + h * dim;
    Two* twos = scratch.queries.data() + i * dim / 2;
    for (int64_t d = 0; d < dim; d += 2) twos[d / 2] = make_two(query[d], query[d + 1]);
    pass.q[i] = twos;
    pass.p[i] = scratch.weights.data() + i * room;
    pass.out[i] = out + (m * heads.queries + h) * dim;
  }
  pass.run(scale);
}
