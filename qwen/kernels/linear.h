// Linear layers on weights of 6 bits and activations of 8.
//
// Weights have a scale for each GROUP inputs of an output; so has each token's activations. The
// products of a group are summed as integers, exactly. ROWS outputs lie together. Unpacked, a group
// of them has for each 4 inputs these inputs' bytes of one output after the other, a quad, so that a
// lane of a vector is an output and nothing need be added across lanes; a byte is 0 to 63 and stands
// for -32 to 31. Packed, the low 4 bits of two quads share bytes, and the high 2 bits of four. Rows
// are padded with zeros.

#pragma once

#include <vector>

#include "vectors.h"

constexpr int64_t GROUP = 32, ROWS = 16, QUAD = 4;
constexpr int64_t QUADS = GROUP / QUAD, QUAD_BYTES = QUAD * ROWS;
constexpr int64_t GROUP_BYTES = GROUP * ROWS, PACKED_BYTES = GROUP_BYTES * 6 / 8;
constexpr int32_t ZERO = 32;  // the byte that stands for 0

// The quad of a packed group, as bytes; `inside` is the place of its first one.
template <int T>
inline vi unpack_quad(const uint8_t* group, int64_t inside) {
  const vi low = load_ints(group + T / 2 * QUAD_BYTES + inside);
  const vi high = load_ints(group + (QUADS / 2 + T / 4) * QUAD_BYTES + inside);
  constexpr int PLACE = 4 - 2 * (T % 4);  // to where the high bits belong
  const vi moved = PLACE > 0 ? high << PLACE : high >> -PLACE;
  return ((T % 2 ? low >> 4 : low) & 0x0f0f0f0f) | (moved & 0x30303030);
}

// Asks memory for what comes some groups behind this one. Measured with one token: 26 ms for all
// weights of a model become 19; half and twice the distance are slower.
inline void ask_ahead(const uint8_t* group) {
  for (int64_t line = 0; line < PACKED_BYTES; line += 64) __builtin_prefetch(group + 4096 + line);
}

// Calls work(t, quad t) for all quads of a group.
template <class F>
inline void each_quad(const uint8_t* group, int64_t inside, const F& work) {
  static_assert(QUADS == 8);
  work(0, unpack_quad<0>(group, inside)), work(1, unpack_quad<1>(group, inside));
  work(2, unpack_quad<2>(group, inside)), work(3, unpack_quad<3>(group, inside));
  work(4, unpack_quad<4>(group, inside)), work(5, unpack_quad<5>(group, inside));
  work(6, unpack_quad<6>(group, inside)), work(7, unpack_quad<7>(group, inside));
}

// Bytes of a group, 0 to 63, into the places of row `row`.
inline void pack_row(const uint8_t* bytes, int64_t row, uint8_t* group) {
  for (int64_t i = 0; i < GROUP; ++i) {
    const int64_t t = i / QUAD, place = row * QUAD + i % QUAD;
    group[t / 2 * QUAD_BYTES + place] |= (bytes[i] & 15) << t % 2 * 4;
    group[(QUADS / 2 + t / 4) * QUAD_BYTES + place] |= bytes[i] >> 4 << t % 4 * 2;
  }
}

// The reverse, for one weight.
inline int32_t unpack_one(const uint8_t* group, int64_t row, int64_t i) {
  const int64_t t = i / QUAD, place = row * QUAD + i % QUAD;
  const int32_t low = group[t / 2 * QUAD_BYTES + place] >> t % 2 * 4 & 15;
  return (low | (group[(QUADS / 2 + t / 4) * QUAD_BYTES + place] >> t % 4 * 2 & 3) << 4) - ZERO;
}

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
  std::vector<int32_t> shifts;  // tokens x groups: -ZERO * sum(values)

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
      shifts[place] = -ZERO * round_to_bytes(padded, inverse, &values[place * GROUP]);
    }
  }
};

struct Linear {
  const uint8_t* weights;
  const uint16_t* scales;  // bfloat16, (blocks, groups, ROWS)
  int64_t outputs, groups;
  const float* bias;
  float* y;
  bool accumulate;

  // A vector of outputs from `row` on, for one token: unpacks on the way.
  inline void one_token(const Activations& x, int64_t row) const {
    const int64_t block = row / ROWS * groups, inside = row % ROWS;
    vf acc = {};
    for (int64_t g = 0; g < groups; ++g) {
      vi total = fill_int(x.shifts[g]);
      ask_ahead(weights + (block + g) * PACKED_BYTES);
      const int8_t* a = &x.values[g * GROUP];
      each_quad(weights + (block + g) * PACKED_BYTES, inside * QUAD, [&](int t, vi quad) {
        int32_t four;
        std::memcpy(&four, a + t * QUAD, 4);
        total = add_products(total, quad, fill_int(four));
      });
      acc += as_floats(total) * (load_bfloat16(scales + (block + g) * ROWS + inside) * x.scales[g]);
    }
    put(acc, row, 0);
  }

  // The blocks of outputs [begin, end), unpacked.
  const uint8_t* unpack(int64_t begin, int64_t end) const {
    static thread_local std::vector<uint8_t> memory;
    const int64_t first = begin / ROWS * groups, count = (end - begin) / ROWS * groups;
    if (int64_t(memory.size()) < count * GROUP_BYTES) memory.resize(count * GROUP_BYTES);
    for (int64_t g = 0; g < count; ++g) {
      ask_ahead(weights + (first + g) * PACKED_BYTES);
      for (int64_t inside = 0; inside < ROWS; inside += LANES)
        each_quad(weights + (first + g) * PACKED_BYTES, inside * QUAD, [&](int t, vi quad) {
          std::memcpy(&memory[g * GROUP_BYTES + t * QUAD_BYTES + inside * QUAD], &quad, sizeof quad);
        });
    }
    return memory.data();
  }

  // B vectors of outputs from `row` on, for C tokens; `bytes` are unpacked ones of the outputs from
  // `begin` on. The order of additions is the same for every B and C, and in `one_token`.
  template <int B, int C>
  inline void block(const uint8_t* bytes, int64_t begin, const Activations& x, int64_t row,
                    int64_t token) const {
    const uint8_t* w[B];
    const uint16_t* ws[B];
    for (int b = 0; b < B; ++b) {
      const int64_t first = row + b * LANES, inside = first % ROWS;
      w[b] = bytes + (first - begin) / ROWS * groups * GROUP_BYTES + inside * QUAD;
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
          total[b][c] = fill_int(shifts[c * groups + g]);
#pragma GCC unroll 8
      for (int64_t quad = 0; quad < QUADS; ++quad) {
        vi wv[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b)
          wv[b] = load_ints(w[b] + (g * QUADS + quad) * QUAD_BYTES);
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
    end = std::min(end, (outputs + ROWS - 1) / ROWS * ROWS);
    if (tokens == 1) {
      for (int64_t row = begin; row < end; row += LANES) one_token(x, row);
      return;
    }
    const int64_t tile = std::max<int64_t>(C_MOST, 393216 / (groups * GROUP) / C_MOST * C_MOST);
    for (int64_t from = 0; from < tokens; from += tile)
      for (int64_t n = begin; n < end; n += STEP)
        several_tokens(x, n, std::min(n + STEP, end), from, std::min(tokens, from + tile));
  }

 private:
  static constexpr int C_MOST = 6;

  void several_tokens(const Activations& x, int64_t begin, int64_t end, int64_t from,
                      int64_t to) const {
    constexpr int SEVERAL = HAS_AVX512 ? 2 : 1;
    const uint8_t* bytes = unpack(begin, end);
    int64_t row = begin;
    for (; row + SEVERAL * LANES <= end; row += SEVERAL * LANES)
      all_tokens<SEVERAL>(bytes, begin, x, row, from, to);
    for (; row < end; row += LANES) all_tokens<1>(bytes, begin, x, row, from, to);
  }

  template <int V>
  void all_tokens(const uint8_t* bytes, int64_t begin, const Activations& x, int64_t row,
                  int64_t from, int64_t to) const {
    int64_t m = from;
    for (; m + C_MOST <= to; m += C_MOST) block<V, C_MOST>(bytes, begin, x, row, m);
    switch (to - m) {
      case 5: return block<V, 5>(bytes, begin, x, row, m);
      case 4: return block<V, 4>(bytes, begin, x, row, m);
      case 3: return block<V, 3>(bytes, begin, x, row, m);
      case 2: return block<V, 2>(bytes, begin, x, row, m);
      case 1: return block<V, 1>(bytes, begin, x, row, m);
    }
  }
};
