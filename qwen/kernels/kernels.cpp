// Kernels of the decoder on a CPU: linear layers in int8, RMSNorm, rotary embedding, attention, gated
// activation. A plain C interface, called by `qwen.cpu_kernels`. Rows are computed in a fixed order
// of additions, so that a token's numbers do not depend on how many tokens are computed with it or by
// how many threads.

#include "attention.h"
#include "linear.h"
#include "vectors.h"

namespace {

// dtype 0 float32, 1 bfloat16, 2 float16.
inline void load_floats(const void* data, int64_t first, int64_t count, int dtype, float* out) {
  if (dtype == 0) {
    std::memcpy(out, static_cast<const float*>(data) + first, count * sizeof(float));
  } else if (dtype == 1) {
    const uint16_t* halves = static_cast<const uint16_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(halves[i]);
  } else {
    const _Float16* halves = static_cast<const _Float16*>(data) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = float(halves[i]);
  }
}

// The smallest bfloat16 that is not below x, which is not negative.
inline uint16_t bfloat16_above(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0xffff) >> 16);
}

}  // namespace

extern "C" {

int64_t group_size() { return GROUP; }
int64_t row_block() { return ROWS; }
int64_t position_block() { return BLOCK; }

// Quantise weights of shape (outputs, inputs); dtype 0 float32, 1 bfloat16, 2 float16. Writes whole
// blocks of ROWS outputs. A scale is rounded up before it is used, so that nothing is lost by it.
void pack(const void* weight, int dtype, int64_t outputs, int64_t inputs, int8_t* packed,
          uint16_t* scales, int threads) {
  const int64_t groups = (inputs + GROUP - 1) / GROUP, blocks = (outputs + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t row = 0; row < ROWS; ++row) {
        const int64_t n = block * ROWS + row, begin = g * GROUP;
        const int64_t count = n < outputs ? std::min(GROUP, inputs - begin) : 0;
        float values[GROUP] = {0}, no_number;
        load_floats(weight, n * inputs + begin, count, dtype, values);
        const float largest = largest_magnitude(values, &no_number);
        const uint16_t scale = bfloat16_above(largest / 127.0f);
        const float inverse = largest > 0 ? 1.0f / bfloat16_to_float(scale) : 0.0f;
        scales[(block * groups + g) * ROWS + row] = scale;
        int8_t whole[GROUP];
        round_to_bytes(values, inverse, whole);
        if (UNSIGNED_WEIGHTS)
          for (int64_t i = 0; i < GROUP; ++i) whole[i] = int8_t(whole[i] ^ 0x80);
        int8_t* out = packed + (block * groups + g) * BLOCK_BYTES + row * QUAD;
        for (int64_t i = 0; i < GROUP; i += QUAD) std::memcpy(out + i * ROWS, whole + i, QUAD);
      }
}

// Writes the (outputs, inputs) that packed weights stand for.
void unpack(const int8_t* packed, const uint16_t* scales, int64_t outputs, int64_t inputs,
            float* weight) {
  const int64_t groups = (inputs + GROUP - 1) / GROUP;
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t i = 0; i < inputs; ++i) {
      const int64_t place = n / ROWS * groups + i / GROUP, row = n % ROWS, within = i % GROUP;
      int8_t value = packed[place * BLOCK_BYTES + (within / QUAD * ROWS + row) * QUAD + i % QUAD];
      if (UNSIGNED_WEIGHTS) value = int8_t(value ^ 0x80);
      weight[n * inputs + i] = value * bfloat16_to_float(scales[place * ROWS + row]);
    }
}

// y (tokens, outputs) = [y +] x (tokens, inputs) W^T [+ bias].
void linear(const int8_t* packed, const uint16_t* scales, int64_t outputs, int64_t inputs,
            const float* bias, const float* x, int64_t tokens, float* y, int accumulate,
            int threads) {
  static thread_local Activations own;
  const int64_t groups = (inputs + GROUP - 1) / GROUP;
  own.reserve(tokens, groups);
  Activations& shared = own;
  const Linear layer{packed, scales, outputs, groups, bias, y, accumulate != 0};
  if (tokens == 1) shared.quantize(x, inputs, 0);
#pragma omp parallel num_threads(threads)
  {
    if (tokens > 1) {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < tokens; ++m) shared.quantize(x + m * inputs, inputs, m);
    }
    const int64_t share = std::min<int64_t>(256, outputs / threads / 4 + 1);
    const int64_t chunk = std::max(share / Linear::STEP * Linear::STEP, Linear::STEP);
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < outputs; begin += chunk)
      layer.rows(shared, begin, begin + chunk, tokens);
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t tokens, int64_t size,
              float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens > 4)
  for (int64_t m = 0; m < tokens; ++m) {
    const float* in = x + m * size;
    vf squares = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(in + i) * load(in + i);
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
    for (int64_t i = 0; i < size; i += LANES) {
      vf g = {}, u = {};
      const int64_t count = std::min<int64_t>(LANES, size - i);
      std::memcpy(&g, gate + i, count * sizeof(float));
      std::memcpy(&u, up + i, count * sizeof(float));
      g = g / (1.0f + fast_exp(-g)) * u;
      std::memcpy(out + m * size + i, &g, count * sizeof(float));
    }
  }
}

// Rotate queries in place and keys into the store, copy values there; sharpen queries by `logn`.
// qkv (tokens, (heads + 2 * kv_heads) * dim); cos, sin (tokens, rotary); written from position
// `start` on.
void rotate_and_store(float* qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                      int64_t rotary, const float* cos, const float* sin, const float* logn,
                      uint16_t* keys, uint16_t* values, int64_t capacity, int64_t start,
                      int threads) {
  const Heads sizes{heads, kv_heads, dim};
  const Store store{keys, values, capacity, start};
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens > 4)
  for (int64_t m = 0; m < tokens; ++m) {
    const float *c = cos + m * rotary, *s = sin + m * rotary;
    float* row = qkv + m * sizes.width();
    for (int64_t h = 0; h < heads + kv_heads; ++h) {
      const bool is_query = h < heads;
      float rotated[1024];
      rotate(row + h * dim, c, s, is_query && logn ? logn[m] : 1.0f, rotary, dim, rotated);
      if (is_query) std::memcpy(row + h * dim, rotated, dim * sizeof(float));
      else store.put_key(h - heads, start + m, rotated, dim);
    }
    for (int64_t h = 0; h < kv_heads; ++h)
      store.put_value(h, start + m, row + (heads + kv_heads + h) * dim, dim);
  }
  if ((start + tokens) % 2)
    for (int64_t h = 0; h < kv_heads; ++h) store.clear_value(h, start + tokens, dim);
}

// out (tokens, heads * dim): token m attends to the positions up to start + m. dim is even.
void attend(const float* qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
            uint16_t* keys, uint16_t* values, int64_t capacity, int64_t start, float scale,
            float* out, int threads) {
  const Heads sizes{heads, kv_heads, dim};
  const Store store{keys, values, capacity, start};
  const int64_t queries = tokens * sizes.shared(), passes = (queries + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t kv = 0; kv < kv_heads; ++kv)
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = pass * QUERIES;
        const auto run = [&](auto attend_queries) {
          attend_queries(qkv, sizes, store, kv, first, scale, out, scratch);
        };
        switch (std::min<int64_t>(QUERIES, queries - first)) {
          case 8: run(attend_some<8>); break;
          case 7: run(attend_some<7>); break;
          case 6: run(attend_some<6>); break;
          case 5: run(attend_some<5>); break;
          case 4: run(attend_some<4>); break;
          case 3: run(attend_some<3>); break;
          case 2: run(attend_some<2>); break;
          case 1: run(attend_some<1>); break;
        }
      }
  }
}

}  // extern "C"
