// Kernels of the decoder on a CPU: linear layers on packed weights, RMSNorm, rotary embedding,
// attention, gated activation, and all of a model's layers. A plain C interface, called by
// `qwen.cpu_kernels`. Rows are computed in a fixed order of additions, so that a token's numbers do
// not depend on how many tokens are computed with it or by how many threads.

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

// The nearest bfloat16 that is not nearer to 0 than x.
inline uint16_t bfloat16_away(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0xffff) >> 16);
}

// Quantise a group to bytes from 0 to 63; returns their scale.
inline uint16_t quantize_group(const float* values, uint8_t* bytes) {
  float largest = 0;
  for (int64_t i = 0; i < GROUP; ++i)
    if (std::fabs(values[i]) > std::fabs(largest)) largest = values[i];
  const uint16_t scale = bfloat16_away(largest / -float(ZERO));
  const float inverse = largest != 0 ? 1.0f / bfloat16_to_float(scale) : 0.0f;
  for (int64_t i = 0; i < GROUP; ++i) {
    const float whole = std::min(float(ZERO - 1), std::nearbyint(values[i] * inverse));
    bytes[i] = uint8_t(int32_t(std::max(-float(ZERO), whole)) + ZERO);
  }
  return scale;
}

// A queue of the passes of attention: `first` of the queries that share head `kv` of a sequence
// whose tokens begin at `row`.
struct Task {
  int64_t sequence, row, kv, first;
};

}  // namespace

extern "C" {

// Of a linear layer; packed and scales from `pack`, bias may be missing.
struct Weights {
  const uint8_t* packed;
  const uint16_t* scales;
  const float* bias;
  int64_t outputs, inputs;
};

struct Layer {
  const float *input_norm, *mlp_norm;
  Weights qkv, attention_output, gate_up, down;
};

int64_t group_size() { return GROUP; }
int64_t row_block() { return ROWS; }
int64_t packed_bytes() { return PACKED_BYTES; }
int64_t position_block() { return BLOCK; }
int64_t position_room(int64_t dim) { return room(dim); }

// Quantise weights of shape (outputs, inputs); dtype 0 float32, 1 bfloat16, 2 float16. Writes whole
// blocks of ROWS outputs. The number of largest size in a group becomes -32, whatever its sign: so
// what was quantised to 5 bits in like groups, as GGUF files are, keeps its values. A scale is
// rounded away from 0 before it is used, so that nothing is lost by it.
void pack(const void* weight, int dtype, int64_t outputs, int64_t inputs, uint8_t* packed,
          uint16_t* scales, int threads) {
  const int64_t groups = (inputs + GROUP - 1) / GROUP, blocks = (outputs + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t place = block * groups; place < (block + 1) * groups; ++place) {
      uint8_t* group = packed + place * PACKED_BYTES;
      std::memset(group, 0, PACKED_BYTES);
      for (int64_t row = 0; row < ROWS; ++row) {
        const int64_t n = block * ROWS + row, begin = place % groups * GROUP;
        const int64_t count = n < outputs ? std::min(GROUP, inputs - begin) : 0;
        float values[GROUP] = {0};
        load_floats(weight, n * inputs + begin, count, dtype, values);
        uint8_t bytes[GROUP];
        scales[place * ROWS + row] = quantize_group(values, bytes);
        pack_row(bytes, row, group);
      }
    }
}

// Writes the (outputs, inputs) that packed weights stand for.
void unpack(const uint8_t* packed, const uint16_t* scales, int64_t outputs, int64_t inputs,
            float* weight) {
  const int64_t groups = (inputs + GROUP - 1) / GROUP;
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t i = 0; i < inputs; ++i) {
      const int64_t place = n / ROWS * groups + i / GROUP, row = n % ROWS;
      const int32_t value = unpack_one(packed + place * PACKED_BYTES, row, i % GROUP);
      weight[n * inputs + i] = float(value) * bfloat16_to_float(scales[place * ROWS + row]);
    }
}

// y (tokens, outputs) = [y +] x (tokens, inputs) W^T [+ bias].
void linear(const Weights& weights, const float* x, int64_t tokens, float* y, int accumulate,
            int threads) {
  static thread_local Activations own;
  const int64_t inputs = weights.inputs, outputs = weights.outputs;
  const int64_t groups = (inputs + GROUP - 1) / GROUP;
  own.reserve(tokens, groups);
  Activations& shared = own;
  const Linear layer{weights.packed, weights.scales, outputs, groups, weights.bias, y,
                     accumulate != 0};
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

// Rotate queries in place and keys into the stores, copy values there; sharpen queries by `logn`.
// qkv (rows, (heads + 2 * kv_heads) * dim) holds the tokens of one sequence after those of another.
void rotate_and_store(float* qkv, const Sequence* sequences, int64_t count, int64_t layer,
                      Heads heads, int64_t rotary, int threads) {
  const int64_t rows = count_rows(sequences, count);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 4)
  for (int64_t row = 0; row < rows; ++row) {
    int64_t m = row;
    const Sequence& sequence = find_row(sequences, &m);
    const Store store = sequence.store(layer, heads);
    const float *c = sequence.cos + m * rotary, *s = sequence.sin + m * rotary;
    const float sharpening = sequence.logn ? sequence.logn[m] : 1.0f;
    float* states = qkv + row * heads.width();
    for (int64_t h = 0; h < heads.queries + heads.keys; ++h) {
      const bool is_query = h < heads.queries;
      float rotated[1024];
      float* state = states + h * heads.dim;
      rotate(state, c, s, is_query ? sharpening : 1.0f, rotary, heads.dim, rotated);
      if (is_query) std::memcpy(state, rotated, heads.dim * sizeof(float));
      else store.put_key(h - heads.queries, store.start + m, rotated, heads.dim);
    }
    const float* values = states + (heads.queries + heads.keys) * heads.dim;
    for (int64_t h = 0; h < heads.keys; ++h)
      store.put_value(h, store.start + m, values + h * heads.dim, heads.dim);
  }
}

// out (rows, heads * dim): token m of a sequence attends to its positions up to start + m. dim is
// even.
void attend(const float* qkv, const Sequence* sequences, int64_t count, int64_t layer, Heads heads,
            float scale, float* out, int threads) {
  static thread_local std::vector<Task> own;
  own.clear();
  for (int64_t i = 0, row = 0; i < count; row += sequences[i++].tokens)
    for (int64_t kv = 0; kv < heads.keys; ++kv)
      for (int64_t first = 0; first < sequences[i].tokens * heads.shared(); first += QUERIES)
        own.push_back({i, row, kv, first});
  const std::vector<Task>& tasks = own;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < int64_t(tasks.size()); ++t) {
      const Task& task = tasks[t];
      const Sequence& sequence = sequences[task.sequence];
      const Store store = sequence.store(layer, heads);
      const float* own_qkv = qkv + task.row * heads.width();
      float* own_out = out + task.row * heads.queries * heads.dim;
      const auto run = [&](auto attend_queries) {
        attend_queries(own_qkv, heads, store, task.kv, task.first, scale, own_out, scratch);
      };
      switch (std::min<int64_t>(QUERIES, sequence.tokens * heads.shared() - task.first)) {
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

// All layers of a model for the tokens of several sequences; hidden (rows, hidden size) is changed.
void run_layers(const Layer* layers, int64_t num_layers, const Sequence* sequences, int64_t count,
                Heads heads, int64_t rotary, float eps, float scale, float* hidden, int threads) {
  static thread_local std::vector<float> memory;
  const int64_t rows = count_rows(sequences, count), size = layers->qkv.inputs;
  const int64_t mixed = heads.queries * heads.dim, inner = layers->down.inputs;
  const int64_t needed = rows * (size + heads.width() + mixed + 3 * inner);
  if (int64_t(memory.size()) < needed) memory.resize(needed);
  float *normed = memory.data(), *qkv = normed + rows * size;
  float *attended = qkv + rows * heads.width(), *gate_up = attended + rows * mixed;
  float* activated = gate_up + 2 * rows * inner;
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& layer = layers[i];
    rms_norm(hidden, layer.input_norm, eps, rows, size, normed, threads);
    linear(layer.qkv, normed, rows, qkv, false, threads);
    rotate_and_store(qkv, sequences, count, i, heads, rotary, threads);
    attend(qkv, sequences, count, i, heads, scale, attended, threads);
    linear(layer.attention_output, attended, rows, hidden, true, threads);
    rms_norm(hidden, layer.mlp_norm, eps, rows, size, normed, threads);
    linear(layer.gate_up, normed, rows, gate_up, false, threads);
    silu_mul(gate_up, rows, inner, activated, threads);
    linear(layer.down, activated, rows, hidden, true, threads);
  }
}

}  // extern "C"
