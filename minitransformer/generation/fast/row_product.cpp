// x Wᵀ · scale + bias for a few rows x, with weights that are widened to float32 on their way from memory.
//
// A single row reads every weight once and does one multiplication with it, so that the memory decides how long it
// takes, as long as the additions do not wait for each other (several sums at a time) nor for the memory (prefetch).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t LANES = 8;
constexpr int64_t PREFETCH_BYTES = 2048;
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 15;  // fewer are done before another thread has woken up

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float w) { return w; }
inline float widen(int8_t w) { return w; }
inline float widen(BFloat16 w) {
  const uint32_t bits = uint32_t(w.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline Floats lanes(const float* w) {
  Floats wide;
  std::memcpy(&wide, w, sizeof wide);
  return wide;
}

inline Floats lanes(const BFloat16* w) {
  Halves narrow;
  std::memcpy(&narrow, w, sizeof narrow);
  const Words bits = __builtin_convertvector(narrow, Words) << 16;
  Floats wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline Floats lanes(const int8_t* w) {
#ifdef __AVX2__
  // By itself, a compiler finds a way of twice as many instructions.
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
#else
  Floats wide;
  for (int64_t lane = 0; lane < LANES; lane++) wide[lane] = w[lane];
  return wide;
#endif
}

// The sum over all lanes of `count` registers.
inline float total(const Floats* sums, int count) {
  Floats all = sums[0];
  for (int s = 1; s < count; s++) all += sums[s];
  float sum = 0;
  for (int64_t lane = 0; lane < LANES; lane++) sum += all[lane];
  return sum;
}

// The products of one row of weights with ROWS rows of x, in SUMS sums at a time each.
template <int ROWS, int SUMS, class Weight>
void dot(const Weight* w, const float* x, int64_t in, float* products) {
  constexpr int64_t step = LANES * SUMS;
  Floats sums[ROWS][SUMS] = {};
  int64_t i = 0;
  for (; i + step <= in; i += step) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + i) + PREFETCH_BYTES);
    for (int s = 0; s < SUMS; s++) {
      const Floats wide = lanes(w + i + s * LANES);
      for (int row = 0; row < ROWS; row++) sums[row][s] += wide * lanes(x + row * in + i + s * LANES);
    }
  }
  for (int row = 0; row < ROWS; row++) {
    float product = total(sums[row], SUMS);
    for (int64_t rest = i; rest < in; rest++) product += widen(w[rest]) * x[row * in + rest];
    products[row] = product;
  }
}

// 64 weights of 4 bits, where `pack` in models/int4.py has put them: weight 8 k + lane is bits 4 k to 4 k + 3 of a lane.
struct Block {
  uint8_t bytes[4 * LANES];
};
constexpr int64_t BLOCK = 8 * LANES;
constexpr int32_t SIGNS = 0x08888888;  // of all weights but the last of each lane

#ifdef __AVX512F__
constexpr int64_t WIDE = 2 * LANES;
#else
constexpr int64_t WIDE = LANES;
#endif
typedef float WideFloats __attribute__((vector_size(4 * WIDE)));
typedef int32_t WideWords __attribute__((vector_size(4 * WIDE)));

// The words of a block, as often as a register holds them.
inline WideWords words_of(const Block* w) {
#ifdef __AVX512F__
  return WideWords(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))));
#else
  WideWords words;
  std::memcpy(&words, w, sizeof words);
  return words;
#endif
}

// Rows of x for blocks of weights. 4 bits are faster masked than shifted to their place, which multiplies weight k of a
// lane by 16^k: `scaled` is x / 16^k. With the sign bit inverted, a weight is larger by 8: `offset` is minus the
// sum of 8 x over each group, without the last weights of lanes, which have their sign where a word has it.
struct Rows {
  Tensor scaled, offset;

  Rows(const Tensor& x, int64_t rows, int64_t in, int64_t groups)
      : scaled(torch::stable::new_empty(x, {rows, in})), offset(torch::stable::new_empty(x, {rows, groups})) {
    const auto* from = static_cast<const float*>(x.const_data_ptr());
    auto* to = static_cast<float*>(scaled.mutable_data_ptr());
    auto* sums = static_cast<float*>(offset.mutable_data_ptr());
    std::fill(sums, sums + rows * groups, 0.0f);
    for (int64_t begin = 0; begin < rows * in; begin += BLOCK) {
      Floats sum = {};
      for (int64_t k = 0; k < 8; k++) {
        const Floats part = lanes(from + begin + k * LANES);
        const Floats small = part * (1.0f / float(uint32_t(1) << 4 * k));
        std::memcpy(to + begin + k * LANES, &small, sizeof small);
        if (k < 7) sum += part;
      }
      sums[begin * groups / in] -= 8 * total(&sum, 1);
    }
  }
};

// `dot` for rows of blocks, of which each `group` shares a scale.
template <int ROWS>
void dot_groups(const Block* w, const float* scale, const float* x, const float* offset, int64_t groups, int64_t group,
                float* products) {
  constexpr int PARTS = BLOCK / WIDE;
  WideWords masks[PARTS];
  for (int part = 0; part < PARTS; part++)
    for (int64_t lane = 0; lane < WIDE; lane++)
      masks[part][lane] = int32_t(uint32_t(15) << 4 * ((part * WIDE + lane) / LANES));
  const int64_t in = groups * group * BLOCK;
  WideFloats all[ROWS] = {};
  for (int64_t g = 0; g < groups; g++) {
    WideFloats sums[ROWS] = {};
    for (int row = 0; row < ROWS; row++) sums[row][0] = offset[row * groups + g];
    for (int64_t b = 0; b < group; b++, w++, x += BLOCK) {
      __builtin_prefetch(reinterpret_cast<const char*>(w) + PREFETCH_BYTES);
      const WideWords words = words_of(w) ^ SIGNS;
      for (int part = 0; part < PARTS; part++) {
        const WideFloats wide = __builtin_convertvector(words & masks[part], WideFloats);
        for (int row = 0; row < ROWS; row++) {
          WideFloats of_x;
          std::memcpy(&of_x, x + row * in + part * WIDE, sizeof of_x);
          sums[row] += wide * of_x;
        }
      }
    }
    for (int row = 0; row < ROWS; row++) all[row] += sums[row] * scale[g];
  }
  for (int row = 0; row < ROWS; row++) {
    Floats parts[WIDE / LANES];
    std::memcpy(parts, &all[row], sizeof parts);
    products[row] = total(parts, WIDE / LANES);
  }
}

// y = x Wᵀ · scale + bias, with the products of `dots(o, row, count, products)`: those of `count` rows, 1 or 4, with
// row o of the weights, scaled.
template <class Dots>
void for_each_output(int64_t out, int64_t in, int64_t rows, const float* bias, Tensor& y, Dots dots) {
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t least = PRODUCTS_PER_THREAD / std::max<int64_t>(1, in * rows) + 1;
  torch::stable::parallel_for(0, out, least, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) {
      float products[4];
      for (int64_t row = 0; row < rows;) {
        const int count = rows - row >= 4 ? 4 : 1;
        dots(o, row, count, products);
        for (int n = 0; n < count; n++, row++) to[row * out + o] = products[n] + (bias ? bias[o] : 0.0f);
      }
    }
  });
}

template <class Weight>
void multiply(const Tensor& x, const Tensor& weight, const float* scale, const float* bias, Tensor& y) {
  const int64_t out = weight.size(0), in = weight.size(1);
  const auto* w = static_cast<const Weight*>(weight.const_data_ptr());
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  for_each_output(out, in, x.numel() / in, bias, y, [&](int64_t o, int64_t row, int count, float* products) {
    (count == 4 ? dot<4, 2, Weight> : dot<1, 4, Weight>)(w + o * in, from + row * in, in, products);
    for (int n = 0; scale && n < count; n++) products[n] *= scale[o];
  });
}

void multiply_blocks(const Tensor& x, const Tensor& weight, const Tensor& scale, const float* bias, Tensor& y) {
  const int64_t out = weight.size(0), in = 2 * weight.size(1), rows = x.numel() / in;
  const int64_t groups = scale.size(1), group = in / BLOCK / groups;
  const auto* w = static_cast<const Block*>(weight.const_data_ptr());
  const auto* scales = static_cast<const float*>(scale.const_data_ptr());
  const Rows from(x, rows, in, groups);
  const auto* scaled = static_cast<const float*>(from.scaled.const_data_ptr());
  const auto* offset = static_cast<const float*>(from.offset.const_data_ptr());
  for_each_output(out, in, rows, bias, y, [&](int64_t o, int64_t row, int count, float* products) {
    (count == 4 ? dot_groups<4> : dot_groups<1>)(
        w + o * groups * group, scales + o * groups, scaled + row * in, offset + row * groups, groups, group, products);
  });
}

const float* floats(const std::optional<Tensor>& vector) {
  return vector ? static_cast<const float*>(vector->const_data_ptr()) : nullptr;
}

Tensor row_product(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && weight.is_contiguous());
  const ScalarType type = weight.scalar_type();
  const bool packed = type == ScalarType::Byte;
  STD_TORCH_CHECK(packed || type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Char);
  const int64_t in = weight.size(1) * (packed ? 2 : 1);
  STD_TORCH_CHECK(x.size(-1) == in);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, shape);
  if (packed) {
    const int64_t group = scale && scale->dim() == 2 && scale->size(1) ? in / scale->size(1) : 0;
    STD_TORCH_CHECK(group && group % BLOCK == 0 && group * scale->size(1) == in && scale->is_contiguous());
    multiply_blocks(x, weight, *scale, floats(bias), y);
    return y;
  }
  const auto run = type == ScalarType::Float      ? multiply<float>
                   : type == ScalarType::BFloat16 ? multiply<BFloat16>
                                                  : multiply<int8_t>;
  run(x, weight, floats(scale), floats(bias), y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minitransformer, m) {
  m.def("row_product(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minitransformer, CPU, m) { m.impl("row_product", TORCH_BOX(&row_product)); }
