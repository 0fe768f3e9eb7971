// Vectors of LANES numbers on any CPU, and the dot products that CPUs have instructions for.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_AVX512 1
#else
#define HAS_AVX512 0
#endif

constexpr int LANES = HAS_AVX512 ? 16 : 8;

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(1)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2)));

inline vf load(const float* x) { return *reinterpret_cast<const vf*>(x); }
inline vi load_ints(const void* x) { return *static_cast<const vi*>(x); }
inline void store(float* x, vf v) { *reinterpret_cast<vf*>(x) = v; }
inline vf fill(float x) { return x - vf{}; }  // adding 0 would cost an addition: -0 + 0 is 0
inline vi fill_int(int32_t x) { return vi{} + x; }
inline vf as_floats(vi v) { return __builtin_convertvector(v, vf); }
inline vf bits_as_floats(vi v) {
  vf f;
  std::memcpy(&f, &v, sizeof f);
  return f;
}
inline vf load_bfloat16(const uint16_t* x) {
  return bits_as_floats(__builtin_convertvector(*reinterpret_cast<const vh*>(x), vi) << 16);
}

// The lanes added, and their largest, always in the same order.
inline float sum(vf v) {
  float lanes[LANES];
  store(lanes, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float largest_of(vf v) {
#if HAS_AVX512
  return _mm512_reduce_max_ps(__m512(v));
#else
  float lanes[LANES];
  store(lanes, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = std::max(lanes[i], lanes[i + width]);
  return lanes[0];
#endif
}
inline vf larger(vf a, vf b) { return a > b ? a : b; }

inline float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// exp to about 2 units in the last place, for x up to 88 (Cephes' expf); below -87 as at -87.
inline vf exp_up_to_88(vf x) {
  const vf magic = fill(12582912.0f);  // adding it rounds to a whole number
  x = x < -87.0f ? fill(-87.0f) : x;
  const vf n = (x * 1.44269504f + magic) - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_as_floats((__builtin_convertvector(n, vi) + 127) << 23);
}

// Likewise, for any x; above 88 as at 88.
inline vf fast_exp(vf x) { return exp_up_to_88(x > 88.0f ? fill(88.0f) : x); }

// total + the four products of the bytes in each lane, exact: weights from 0 to 63, activations
// within +-127.
inline vi add_products(vi total, vi weights, vi activations) {
#if HAS_AVX512
  return vi(_mm512_dpbusd_epi32(__m512i(total), __m512i(weights), __m512i(activations)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(__m256i(weights), __m256i(activations));
  return total + vi(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = 24 - 8 * byte;
    total += (weights >> 8 * byte & 0xff) * (activations << shift >> 24);
  }
  return total;
#endif
}

// total + the two products of the 16-bit numbers in each lane.
inline vi add_pairs(vi total, vi a, vi b) {
#if HAS_AVX512
  return vi(_mm512_dpwssd_epi32(__m512i(total), __m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return total + vi(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#else
  return total + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Rounds to whole numbers, which must fit into 16 bits.
inline void store_halves(int16_t* out, vf v) {
#if HAS_AVX512
  _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(__m512(v))));
#else
  const vf magic = fill(12582912.0f);
  v = (v + magic) - magic;
  for (int lane = 0; lane < LANES; ++lane) out[lane] = int16_t(v[lane]);
#endif
}
