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
inline vi floats_as_bits(vf v) {
  vi bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
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
  float top = v[0];
  for (int i = 1; i < LANES; ++i) top = std::max(top, v[i]);
  return top;
}
inline vf larger(vf a, vf b) { return a > b ? a : b; }

inline float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To the nearest bfloat16, ties to even; what is no number stays none.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Likewise, as float32.
inline vf round_to_bfloat16(vf v) {
  const vi bits = floats_as_bits(v);
  const vf rounded = bits_as_floats((bits + 0x7fff + (bits >> 16 & 1)) & int32_t(0xffff0000u));
  return v == v ? rounded : v;
}

// exp to about 2 units in the last place, for x from -87 to 88 (Cephes' expf).
inline vf fast_exp(vf x) {
  const vf magic = fill(12582912.0f);  // adding it rounds to a whole number
  x = x < -87.0f ? fill(-87.0f) : x;
  x = x > 88.0f ? fill(88.0f) : x;
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

// Whether `add_products` wants weights w as w + 128, without a sign.
constexpr bool UNSIGNED_WEIGHTS = HAS_AVX512;

// total + the four products of the bytes in each lane, exact. Bytes are within +-127; with
// UNSIGNED_WEIGHTS, the total must begin with -128 times the sum of all activations.
inline vi add_products(vi total, vi weights, vi activations) {
#if HAS_AVX512
  return vi(_mm512_dpbusd_epi32(__m512i(total), __m512i(weights), __m512i(activations)));
#elif defined(__AVX2__)
  const __m256i w = __m256i(weights), a = __m256i(activations);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
  return total + vi(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = 24 - 8 * byte;
    total += (weights << shift >> 24) * (activations << shift >> 24);
  }
  return total;
#endif
}
