// Linear layers on int8 weights and int8 activations.
//
// Weights have a scale for each GROUP inputs of an output; so has each token's activations. The
// products of a group are summed as integers, exactly. In memory ROWS outputs lie together: for each
// group, for each 4 inputs, these inputs' bytes of one output after the other, so that a lane of a
// vector is an output and nothing need be added across lanes. Rows are padded with zeros.

#pragma once

#include <vector>

#include "vectors.h"

constexpr int64_t GROUP = 32, ROWS = 16, QUAD = 4;
constexpr int64_t BLOCK_BYTES = GROUP * ROWS;

// The largest of a group; also gives 0, or the NaN that the maximum would lose.
inline float largest_magnitude(const float* x, float* no_number) {
  vf top = {}, zero = {};
  for (int64_t i = 0; i < GROUP; i += LANES) {
    const vf v = load(x + i);
    top = larger(v < 0 ? -v : v, top);
    zero += v * 0.0f;
  }
  *no_number = sum(zero);
  return largest_of(top);
}

// Writes a group times a factor in whole numbers and returns their sum.
inline int32_t round_to_bytes(const float* x, float factor, int8_t* out) {
  typedef int8_t vb __attribute__((vector_size(LANES), aligned(1)));
  const vf magic = fill(12582912.0f);  // adding it rounds to the nearest even whole number
  vf total = {};
  for (int64_t i = 0; i < GROUP; i += LANES) {
    const vf whole = (load(x + i) * factor + magic) - magic;
    *reinterpret_cast<vb*>(out + i) = __builtin_convertvector(__builtin_convertvector(whole, vi), vb);
    total += whole;
  }
  return int32_t(sum(total));
}

// Tokens' activations, quantised.
struct Activations {
  std::vector<int8_t> values;   // tokens x padded inputs
  std::vector<float> scales;    // tokens x groups
  std::vector<int32_t> shifts;  // tokens x groups: -128 * sum(values)

  void reserve(int64_t tokens, int64_t groups) {
    if (int64_t(values.size()) < tokens * groups * GROUP) values.resize(tokens * groups * GROUP);
    if (int64_t(scales.size()) >= tokens * groups) return;
    scales.resize(tokens * groups);
    shifts.resize(tokens * groups);
  }

  void quantize(const float* x, int64_t inputs, int64_t token) {
    const int64_t groups = (inputs + GROUP - 1) / GROUP;
    for (int64_t g = 0; g < groups; ++g) {
      float padded[GROUP] = {0};
      const int64_t count = std::min(GROUP, inputs - g * GROUP);
      std::memcpy(padded, x + g * GROUP, count * sizeof(float));
      float no_number;
      const float largest = largest_magnitude(padded, &no_number);
      const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
      const int64_t place = token * groups + g;
      scales[place] = largest / 127.0f + no_number;
      shifts[place] = -128 * round_to_bytes(padded, inverse, &values[place * GROUP]);
    }
  }
};

struct Linear {
  const int8_t* weights;
  const uint16_t* scales;  // bfloat16, (blocks, groups, ROWS)
  int64_t outputs, groups;
  const float* bias;
  float* y;
  bool accumulate;

  // B vectors of outputs from `row` on, for C tokens. The order of additions is the same for every
  // B and C.
  template <int B, int C>
  inline void block(const Activations& x, int64_t row, int64_t token) const {
    const int8_t* w[B];
    const uint16_t* ws[B];
    for (int b = 0; b < B; ++b) {
      const int64_t first = row + b * LANES, inside = first % ROWS;
      w[b] = weights + first / ROWS * groups * BLOCK_BYTES + inside * QUAD;
      ws[b] = scales + first / ROWS * groups * ROWS + inside;
    }
    const int8_t* a = &x.values[token * groups * GROUP];
    const float* as = &x.scales[token * groups];
    const int32_t* shifts = &x.shifts[token * groups];
    vf acc[B][C] = {};
    for (int64_t g = 0; g < groups; ++g) {
      vi total[B][C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b)
          total[b][c] = UNSIGNED_WEIGHTS ? fill_int(shifts[c * groups + g]) : vi{};
#pragma GCC unroll 8
      for (int64_t quad = 0; quad < GROUP / QUAD; ++quad) {
        vi wv[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b)
          wv[b] = load_ints(w[b] + (g * (GROUP / QUAD) + quad) * ROWS * QUAD);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          int32_t four;
          std::memcpy(&four, a + (c * groups + g) * GROUP + quad * QUAD, 4);
          const vi av = fill_int(four);
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b) total[b][c] = add_products(total[b][c], wv[b], av);
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        const vf scale = load_bfloat16(ws[b] + g * ROWS);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[b][c] += as_floats(total[b][c]) * (scale * as[c * groups + g]);
      }
    }
    for (int c = 0; c < C; ++c)
      for (int b = 0; b < B; ++b) put(acc[b][c], row + b * LANES, token + c);
  }

  inline void put(vf v, int64_t row, int64_t token) const {
    const int64_t count = std::min<int64_t>(LANES, outputs - row);
    if (count <= 0) return;
    float* out = y + token * outputs + row;
    if (count == LANES) {
      if (bias) v += load(bias + row);
      if (accumulate) v += load(out);
      return store(out, v);
    }
    for (int64_t i = 0; i < count; ++i) {
      float value = v[i];
      if (bias) value += bias[row + i];
      if (accumulate) value += out[i];
      out[i] = value;
    }
  }

  // Outputs [begin, end) for all tokens; `begin` is a multiple of STEP. One token takes the weights
  // as one stream, which is read fastest; several take tiles that stay in the second-level cache.
  static constexpr int64_t STEP = 32;

  void rows(const Activations& x, int64_t begin, int64_t end, int64_t tokens) const {
    constexpr int ONE = ROWS / LANES, SEVERAL = HAS_AVX512 ? 2 : 1;
    end = std::min(end, (outputs + ROWS - 1) / ROWS * ROWS);
    if (tokens == 1) {
      for (int64_t row = begin; row < end; row += ROWS) block<ONE, 1>(x, row, 0);
      return;
    }
    const int64_t tile = std::max<int64_t>(C_MOST, 393216 / (groups * GROUP) / C_MOST * C_MOST);
    for (int64_t from = 0; from < tokens; from += tile)
      for (int64_t n = begin; n < end; n += STEP) {
        const int64_t stop = std::min(n + STEP, end), to = std::min(tokens, from + tile);
        int64_t row = n;
        for (; row + SEVERAL * LANES <= stop; row += SEVERAL * LANES)
          all_tokens<SEVERAL>(x, row, from, to);
        for (; row < stop; row += LANES) all_tokens<1>(x, row, from, to);
      }
  }

 private:
  static constexpr int C_MOST = 6;

  template <int V>
  void all_tokens(const Activations& x, int64_t row, int64_t from, int64_t to) const {
    int64_t m = from;
    for (; m + C_MOST <= to; m += C_MOST) block<V, C_MOST>(x, row, m);
    switch (to - m) {
      case 5: return block<V, 5>(x, row, m);
      case 4: return block<V, 4>(x, row, m);
      case 3: return block<V, 3>(x, row, m);
      case 2: return block<V, 2>(x, row, m);
      case 1: return block<V, 1>(x, row, m);
    }
  }
};
