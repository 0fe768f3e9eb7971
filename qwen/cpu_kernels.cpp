// Kernels of the decoder on a CPU: int8 weights times int8 activations, RMSNorm, rotary embedding,
// attention, gated activation. Plain C interface; rows are computed one by one in a fixed order, so
// that a token's numbers do not depend on how many tokens are computed with it or by how many threads.
//
// A linear layer keeps, for each output, its weights as int8 in groups of GROUP inputs and a float32
// scale for each group. Activations are quantised the same way, each token by itself. The products
// of a group are summed as integers, exactly.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t GROUP = 32;

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define USE_VNNI 1
#else
#define USE_VNNI 0
#endif

// Activations of some tokens, quantised.
struct Activations {
  std::vector<int8_t> values;    // tokens x padded
  std::vector<float> scales;    // tokens x groups
  std::vector<int32_t> shifts;  // tokens x groups: -128 * sum(values), for unsigned weights
};

inline float load_float(const void* data, int64_t i, int dtype) {
  if (dtype == 0) return static_cast<const float*>(data)[i];
  uint16_t half = static_cast<const uint16_t*>(data)[i];
  if (dtype == 1) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return float(value);
}

void quantize_token(const float* x, int64_t inputs, int64_t groups, int8_t* values, float* scales,
                    int32_t* shifts) {
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * GROUP, count = std::min(GROUP, inputs - begin);
    float largest = 0, no_number = 0;
    for (int64_t i = 0; i < count; ++i) {
      largest = std::max(largest, std::fabs(x[begin + i]));
      no_number += x[begin + i] * 0.0f;  // 0, or NaN that the maximum would lose
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    scales[g] = largest / 127.0f + no_number;
    int32_t sum = 0;
    int8_t* out = values + begin;
    for (int64_t i = 0; i < count; ++i) {
      out[i] = int8_t(std::nearbyintf(x[begin + i] * inverse));
      sum += out[i];
    }
    for (int64_t i = count; i < GROUP; ++i) out[i] = 0;
    shifts[g] = -128 * sum;
  }
}

#if defined(__AVX2__)
inline float sum_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Bytes of weights to ask for ahead of their use: several rows at a time are no stream to the CPU's
// own prefetching, which then halves the speed.
constexpr int64_t AHEAD = 8192;

// The sum of 32 products in 8 lanes, exact: weights and activations are within +-127.
inline __m256i products(__m256i w, __m256i a, int32_t shift) {
#if USE_VNNI
  // Unsigned weights w + 128; the shift, -128 * sum(a), makes up for that.
  const __m256i start = _mm256_zextsi128_si256(_mm_cvtsi32_si128(shift));
  return _mm256_dpbusd_epi32(start, _mm256_xor_si256(w, _mm256_set1_epi8(char(0x80))), a);
#else
  (void)shift;
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// R outputs for C tokens. The order of additions is the same for every R and C.
template <int R, int C>
inline void block(const int8_t* w, const float* ws, int64_t padded, int64_t groups,
                  const int8_t* a, const float* as, const int32_t* shifts, float (*dots)[C]) {
  __m256 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    if (C == 1) _mm_prefetch((const char*)(w + AHEAD + g * GROUP * R), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 row_scale = _mm256_broadcast_ss(ws + r * groups + g);
      const __m256i wv = _mm256_loadu_si256((const __m256i*)(w + r * padded + g * GROUP));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const __m256i av = _mm256_loadu_si256((const __m256i*)(a + c * padded + g * GROUP));
        const __m256i s = products(wv, av, shifts[c * groups + g]);
        const __m256 scale = _mm256_mul_ps(row_scale, _mm256_broadcast_ss(as + c * groups + g));
        acc[r][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), scale, acc[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) dots[r][c] = sum_lanes(acc[r][c]);
}
#else
template <int R, int C>
inline void block(const int8_t* w, const float* ws, int64_t padded, int64_t groups,
                  const int8_t* a, const float* as, const int32_t*, float (*dots)[C]) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float total = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t i = 0; i < GROUP; ++i)
          sum += int32_t(w[r * padded + g * GROUP + i]) * a[c * padded + g * GROUP + i];
        total += float(sum) * (ws[r * groups + g] * as[c * groups + g]);
      }
      dots[r][c] = total;
    }
}
#endif

struct Linear {
  const int8_t* w;
  const float* ws;
  int64_t outputs, padded, groups;
  const float* bias;
  float* y;
  int accumulate;

  template <int R, int C>
  void run(const Activations& a, int64_t n, int64_t m) const {
    float dots[R][C];
    block<R, C>(w + n * padded, ws + n * groups, padded, groups, &a.values[m * padded],
                &a.scales[m * groups], &a.shifts[m * groups], dots);
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) {
        float* out = y + (m + c) * outputs + n + r;
        const float value = dots[r][c] + (bias ? bias[n + r] : 0.0f);
        *out = accumulate ? *out + value : value;
      }
  }

  template <int C>
  void rows(const Activations& a, int64_t begin, int64_t end, int64_t m) const {
    constexpr int R = 2;
    int64_t n = begin;
    for (; n + R <= end; n += R) run<R, C>(a, n, m);
    for (; n < end; ++n) run<1, C>(a, n, m);
  }

  // Outputs [begin, end) for all tokens; tiles of tokens stay in the second-level cache.
  void all(const Activations& a, int64_t begin, int64_t end, int64_t tokens) const {
    if (tokens == 1) return rows<1>(a, begin, end, 0);
    const int64_t tile = std::max<int64_t>(4, (393216 / padded) & ~3);
    for (int64_t from = 0; from < tokens; from += tile) {
      const int64_t to = std::min(tokens, from + tile);
      for (int64_t n = begin; n < end; n += 2) {
        const int64_t stop = std::min(end, n + 2);
        int64_t m = from;
        for (; m + 4 <= to; m += 4) rows<4>(a, n, stop, m);
        for (; m < to; ++m) rows<1>(a, n, stop, m);
      }
    }
  }
};

// Eight floats, on any CPU; `sum` adds the lanes in a fixed order.
typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));

inline f8 load(const float* x) { return *reinterpret_cast<const f8*>(x); }
inline void store(float* x, f8 v) { *reinterpret_cast<f8*>(x) = v; }
inline float sum(f8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
inline float largest_of(f8 v) {
  float top = v[0];
  for (int i = 1; i < 8; ++i) top = std::max(top, v[i]);
  return top;
}

// exp to about 2 units in the last place, for x from -87 to 88 (Cephes' expf).
inline f8 fast_exp(f8 x) {
  const f8 magic = f8{} + 12582912.0f;  // adding it rounds to a whole number
  x = x < -87.0f ? f8{} - 87.0f : x;
  x = x > 88.0f ? f8{} + 88.0f : x;
  const f8 n = (x * 1.44269504f + magic) - magic;
  const f8 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const i8 power = (__builtin_convertvector(n, i8) + 127) << 23;
  f8 factor;
  std::memcpy(&factor, &power, sizeof factor);
  return p * factor;
}

constexpr int QUERIES = 4;  // that share a pass over the keys

// Scores of QUERIES queries with `count` keys; scores[q] has room for count rounded up to 8.
inline void score(const float* const* q, const float* keys, int64_t count, int64_t dim, float scale,
                  float* const* scores) {
  for (int64_t j = 0; j < count; j += 2) {
    const float* k0 = keys + j * dim;
    const float* k1 = j + 1 < count ? k0 + dim : k0;
    f8 acc[QUERIES][2] = {};
    for (int64_t d = 0; d < dim; d += 8) {
      const f8 v0 = load(k0 + d), v1 = load(k1 + d);
      for (int i = 0; i < QUERIES; ++i) {
        const f8 x = load(q[i] + d);
        acc[i][0] += x * v0;
        acc[i][1] += x * v1;
      }
    }
    for (int i = 0; i < QUERIES; ++i) {
      scores[i][j] = sum(acc[i][0]) * scale;
      scores[i][j + 1] = sum(acc[i][1]) * scale;
    }
  }
}

// Softmax of the first `count` scores in place; zeros up to `padded`. Returns 1 / their sum before.
inline float softmax(float* p, int64_t count, int64_t padded) {
  for (int64_t j = count; j < padded; ++j) p[j] = -INFINITY;
  const int64_t whole = (count + 7) / 8 * 8;
  f8 top = load(p);
  for (int64_t j = 8; j < whole; j += 8) {
    const f8 v = load(p + j);
    top = v > top ? v : top;
  }
  const f8 largest = f8{} + largest_of(top);
  f8 total = {};
  for (int64_t j = 0; j < whole; j += 8) store(p + j, fast_exp(load(p + j) - largest));
  for (int64_t j = count; j < padded; ++j) p[j] = 0;
  for (int64_t j = 0; j < whole; j += 8) total += load(p + j);
  return 1.0f / sum(total);
}

// out[i] = factors[i] * sum over j of p[i][j] * values[j].
inline void mix(const float* const* p, const float* values, int64_t count, int64_t dim,
                const float* factors, float* const* out) {
  for (int64_t d = 0; d < dim; d += 8) {
    f8 acc[QUERIES] = {};
    for (int64_t j = 0; j < count; ++j) {
      const f8 v = load(values + j * dim + d);
      for (int i = 0; i < QUERIES; ++i) acc[i] += p[i][j] * v;
    }
    for (int i = 0; i < QUERIES; ++i) store(out[i] + d, acc[i] * factors[i]);
  }
}

}  // namespace

extern "C" {

int64_t group_size() { return GROUP; }

// Quantise weights of shape (outputs, inputs); dtype 0 float32, 1 bfloat16, 2 float16.
void pack(const void* weight, int dtype, int64_t outputs, int64_t inputs, int8_t* packed,
          float* scales, int threads) {
  const int64_t groups = (inputs + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * GROUP, count = std::min(GROUP, inputs - begin);
      float values[GROUP] = {0}, largest = 0;
      for (int64_t i = 0; i < count; ++i) {
        values[i] = load_float(weight, n * inputs + begin + i, dtype);
        largest = std::max(largest, std::fabs(values[i]));
      }
      const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
      scales[n * groups + g] = largest / 127.0f;
      int8_t* out = packed + (n * groups + g) * GROUP;
      for (int64_t i = 0; i < GROUP; ++i) out[i] = int8_t(std::nearbyintf(values[i] * inverse));
    }
}

// y (tokens, outputs) = [y +] x (tokens, inputs) W^T [+ bias].
void linear(const int8_t* packed, const float* scales, int64_t outputs, int64_t inputs,
            const float* bias, const float* x, int64_t tokens, float* y, int accumulate,
            int threads) {
  static thread_local Activations a;
  const int64_t groups = (inputs + GROUP - 1) / GROUP, padded = groups * GROUP;
  if (int64_t(a.values.size()) < tokens * padded) a.values.resize(tokens * padded);
  if (int64_t(a.scales.size()) < tokens * groups) {
    a.scales.resize(tokens * groups);
    a.shifts.resize(tokens * groups);
  }
  const Activations& shared = a;
  int8_t* values = a.values.data();
  float* act_scales = a.scales.data();
  int32_t* shifts = a.shifts.data();
  const Linear layer{packed, scales, outputs, padded, groups, bias, y, accumulate};
  if (tokens == 1) quantize_token(x, inputs, groups, values, act_scales, shifts);
#pragma omp parallel num_threads(threads)
  {
    if (tokens > 1) {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < tokens; ++m)
        quantize_token(x + m * inputs, inputs, groups, values + m * padded,
                       act_scales + m * groups, shifts + m * groups);
    }
    const int64_t chunk = std::max<int64_t>(16, std::min<int64_t>(256, outputs / threads / 4 + 1) & ~15);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < outputs; begin += chunk)
      layer.all(shared, begin, std::min(outputs, begin + chunk), tokens);
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t tokens, int64_t size,
              float* y) {
  for (int64_t m = 0; m < tokens; ++m) {
    const float* in = x + m * size;
    f8 squares = {};
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) squares += load(in + i) * load(in + i);
    float total = sum(squares);
    for (; i < size; ++i) total += in[i] * in[i];
    const float factor = 1.0f / std::sqrt(total / float(size) + eps);
    for (i = 0; i < size; ++i) y[m * size + i] = weight[i] * (in[i] * factor);
  }
}

// out (tokens, size) = silu(gate) * up, with gate and up side by side in (tokens, 2 * size).
void silu_mul(const float* gate_up, int64_t tokens, int64_t size, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens > 1)
  for (int64_t m = 0; m < tokens; ++m) {
    const float *gate = gate_up + 2 * m * size, *up = gate + size;
    for (int64_t i = 0; i < size; i += 8) {
      f8 g = {}, u = {};
      const int64_t count = std::min<int64_t>(8, size - i);
      std::memcpy(&g, gate + i, count * sizeof(float));
      std::memcpy(&u, up + i, count * sizeof(float));
      g = g / (1.0f + fast_exp(-g)) * u;
      std::memcpy(out + m * size + i, &g, count * sizeof(float));
    }
  }
}

// Rotate queries in place and keys into the store, copy values there; sharpen queries by `logn`.
// qkv (tokens, (heads + 2 * kv_heads) * dim); cos, sin (tokens, rotary); keys, values
// (kv_heads, capacity, dim), written from position `start` on.
void rotate_and_store(float* qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                      int64_t rotary, const float* cos, const float* sin, const float* logn,
                      float* keys, float* values, int64_t capacity, int64_t start) {
  const int64_t half = rotary / 2, width = (heads + 2 * kv_heads) * dim;
  for (int64_t m = 0; m < tokens; ++m) {
    const float *c = cos + m * rotary, *s = sin + m * rotary;
    const float sharpen = logn ? logn[m] : 1.0f;
    for (int64_t h = 0; h < heads + kv_heads; ++h) {
      float* in = qkv + m * width + h * dim;
      const int64_t kv = h - heads;
      float* out = kv < 0 ? in : keys + (kv * capacity + start + m) * dim;
      const float factor = kv < 0 ? sharpen : 1.0f;
      for (int64_t i = 0; i < half; ++i) {
        const float first = in[i], second = in[i + half];
        out[i] = (first * c[i] - second * s[i]) * factor;
        out[i + half] = (second * c[i + half] + first * s[i + half]) * factor;
      }
      for (int64_t i = rotary; i < dim; ++i) out[i] = in[i] * factor;
    }
    for (int64_t h = 0; h < kv_heads; ++h)
      std::memcpy(values + (h * capacity + start + m) * dim,
                  qkv + m * width + (heads + kv_heads + h) * dim, dim * sizeof(float));
  }
}

// out (tokens, heads * dim): token m attends to the positions up to start + m. dim is a multiple
// of 8. Each query's sums have the same order whichever queries share its pass.
void attend(const float* qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
            const float* keys, const float* values, int64_t capacity, int64_t start, float scale,
            float* out, int threads) {
  const int64_t width = (heads + 2 * kv_heads) * dim, shared = heads / kv_heads;
  const int64_t queries = tokens * shared, blocks = (queries + QUERIES - 1) / QUERIES;
  const int64_t room = (start + tokens + 15) / 8 * 8;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> buffer;
    if (int64_t(buffer.size()) < room * QUERIES) buffer.resize(room * QUERIES);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t kv = 0; kv < kv_heads; ++kv)
      for (int64_t block = 0; block < blocks; ++block) {
        const float *q[QUERIES], *k = keys + kv * capacity * dim, *v = values + kv * capacity * dim;
        float *p[QUERIES], *o[QUERIES], factors[QUERIES];
        int64_t counts[QUERIES], longest = 0;
        for (int i = 0; i < QUERIES; ++i) {
          // The last block repeats its last query, which then is computed more than once.
          const int64_t query = std::min(block * QUERIES + i, queries - 1);
          const int64_t m = query / shared, h = kv * shared + query % shared;
          q[i] = qkv + m * width + h * dim;
          o[i] = out + (m * heads + h) * dim;
          p[i] = buffer.data() + i * room;
          counts[i] = start + m + 1;
          longest = std::max(longest, counts[i]);
        }
        score(q, k, longest, dim, scale, p);
        for (int i = 0; i < QUERIES; ++i) factors[i] = softmax(p[i], counts[i], (longest + 7) / 8 * 8);
        mix(p, v, longest, dim, factors, o);
      }
  }
}

}  // extern "C"
