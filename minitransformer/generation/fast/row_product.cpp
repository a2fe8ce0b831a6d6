// x Wᵀ · scale + bias for a few rows x, with weights that are widened to float32 on their way from memory.
//
// A single row reads every weight once and does one multiplication with it, so that the memory decides how long it
// takes, as long as the additions do not wait for each other (several sums at a time) nor for the memory (prefetch).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

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
    float product = 0;
    for (int s = 0; s < SUMS; s++)
      for (int64_t lane = 0; lane < LANES; lane++) product += sums[row][s][lane];
    for (int64_t rest = i; rest < in; rest++) product += widen(w[rest]) * x[row * in + rest];
    products[row] = product;
  }
}

template <class Weight>
void multiply(const Tensor& x, const Tensor& weight, const float* scale, const float* bias, Tensor& y) {
  const int64_t out = weight.size(0), in = weight.size(1), rows = x.numel() / in;
  const auto* w = static_cast<const Weight*>(weight.const_data_ptr());
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t least = PRODUCTS_PER_THREAD / std::max<int64_t>(1, in * rows) + 1;
  torch::stable::parallel_for(0, out, least, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) {
      float products[4];
      for (int64_t row = 0; row < rows;) {
        const int count = rows - row >= 4 ? 4 : 1;
        (count == 4 ? dot<4, 2, Weight> : dot<1, 4, Weight>)(w + o * in, from + row * in, in, products);
        for (int n = 0; n < count; n++, row++)
          to[row * out + o] = products[n] * (scale ? scale[o] : 1.0f) + (bias ? bias[o] : 0.0f);
      }
    }
  });
}

const float* floats(const std::optional<Tensor>& vector) {
  return vector ? static_cast<const float*>(vector->const_data_ptr()) : nullptr;
}

Tensor row_product(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && weight.is_contiguous());
  STD_TORCH_CHECK(x.size(-1) == weight.size(1));
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, shape);
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Char);
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
