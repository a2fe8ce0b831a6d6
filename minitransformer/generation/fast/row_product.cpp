// x Wᵀ · scale + bias for a few rows x, with weights that are widened on their way from memory: to float32, or to
// integers of 16 bits.
//
// A single row reads every weight once and does one multiplication with it, so that the memory decides how long it
// takes, as long as the additions do not wait for each other (several sums at a time) nor for the memory (prefetch),
// and weights of few bits are widened by few instructions.

#include <algorithm>
#include <cmath>
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
constexpr int64_t PREFETCH_BYTES = 4096;
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 15;  // fewer are done before another thread has woken up

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float w) { return w; }
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

// The sum over the lanes of a register with `count` of them.
template <int64_t count, class Lanes>
inline float total(Lanes sums) {
  if constexpr (count == 1) {
    return sums[0];
  } else {
    typedef float Half __attribute__((vector_size(2 * count)));
    Half halves[2];
    std::memcpy(halves, &sums, sizeof sums);
    return total<count / 2>(halves[0] + halves[1]);
  }
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
    Floats all = sums[row][0];
    for (int s = 1; s < SUMS; s++) all += sums[row][s];
    float product = total<LANES>(all);
    for (int64_t rest = i; rest < in; rest++) product += widen(w[rest]) * x[row * in + rest];
    products[row] = product;
  }
}

#ifdef __AVX512BW__
constexpr int64_t WIDTH = 64;  // bytes of a register
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 32;
#else
constexpr int64_t WIDTH = 16;
#endif
typedef int8_t Bytes __attribute__((vector_size(WIDTH / 2)));
typedef int16_t Shorts __attribute__((vector_size(WIDTH)));
typedef int32_t Integers __attribute__((vector_size(WIDTH)));
typedef int32_t LongIntegers __attribute__((vector_size(2 * WIDTH)));
typedef float WideFloats __attribute__((vector_size(WIDTH)));

constexpr int64_t BLOCK = 64;  // weights
constexpr int64_t PARTS = BLOCK / WIDTH;

inline Shorts widen(const int8_t* w) {
#if defined(__AVX512BW__)
  // By itself, a compiler finds a way of twice as many instructions.
  return Shorts(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))));
#elif defined(__AVX2__)
  return Shorts(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
#else
  Bytes narrow;
  std::memcpy(&narrow, w, sizeof narrow);
  return __builtin_convertvector(narrow, Shorts);
#endif
}

// All products of a and b, added in pairs.
inline Integers products_of(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
  return Integers(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return Integers(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#else
  const LongIntegers all = __builtin_convertvector(a, LongIntegers) * __builtin_convertvector(b, LongIntegers);
  Integers halves[2];
  std::memcpy(halves, &all, sizeof all);
  return halves[0] + halves[1];
#endif
}

// 64 weights of 8 bits.
struct Int8Block {
  int8_t weights[BLOCK];

  static int64_t place_of(int64_t weight) { return weight; }

  void widen_part(int64_t part, Shorts& low, Shorts& high) const {
    low = widen(weights + part * WIDTH / 2);
    high = widen(weights + (PARTS + part) * WIDTH / 2);
  }
};

// 64 weights of 4 bits, where `pack` in models/int4.py puts them: weight 8 k + word is bits 4 k to 4 k + 3 of a word.
struct Int4Block {
  int8_t pairs[BLOCK / 2];

  static int64_t place_of(int64_t weight) {
    const int64_t k = weight / 8, word = weight % 8;
    return k % 2 * (BLOCK / 2) + 4 * word + k / 2;
  }

  void widen_part(int64_t part, Shorts& low, Shorts& high) const {
    const Shorts both = widen(pairs + part * WIDTH / 2);
    low = (both << 12) >> 12;
    high = both >> 4;
  }
};

// 64 features of a row x as integers of 16 bits times a scale, in the order in which a block of weights is widened.
//
// A feature changes by 2^-16 of the largest at most. With AVX512, one instruction multiplies 32 and adds them in pairs.
struct RoundedBlock {
  Shorts integers[2 * PARTS];
  float scale;
  int32_t group;  // of the weights
};

template <class Block>
RoundedBlock round_block(const float* x, int32_t group) {
  RoundedBlock rounded;
  Floats largest = {}, zeros = {};
  for (int64_t i = 0; i < BLOCK; i += LANES) {
    const Floats part = lanes(x + i), size = part < 0 ? -part : part;
    largest = size > largest ? size : largest;
    zeros += part * 0;  // NaN if one of them is not finite, so that all products are
  }
  float most = 1e-30f;
  for (int64_t lane = 0; lane < LANES; lane++) most = std::max(most, largest[lane]);
  const float check = total<LANES>(zeros), inverse = check == 0 ? INT16_MAX / most : 0;
  rounded.scale = most / INT16_MAX + check;
  rounded.group = group;
  int16_t integers[BLOCK], ordered[BLOCK];
  for (int64_t i = 0; i < BLOCK; i++) integers[i] = int16_t(x[i] * inverse + std::copysign(0.5f, x[i]));
#pragma GCC unroll 64
  for (int64_t i = 0; i < BLOCK; i++) ordered[Block::place_of(i)] = integers[i];
  std::memcpy(rounded.integers, ordered, sizeof ordered);
  return rounded;
}

// Rows of x, filled with zeros to whole blocks.
template <class Block>
std::vector<RoundedBlock> round_rows(const float* x, int64_t rows, int64_t in, int64_t groups) {
  const int64_t blocks = (in + BLOCK - 1) / BLOCK;
  std::vector<RoundedBlock> rounded;
  rounded.reserve(rows * blocks);
  for (int64_t row = 0; row < rows; row++, x += in) {
    for (int64_t b = 0; b < blocks; b++) {
      float block[BLOCK] = {};
      std::copy(x + b * BLOCK, x + std::min((b + 1) * BLOCK, in), block);
      rounded.push_back(round_block<Block>(block, int32_t(b * groups / blocks)));
    }
  }
  return rounded;
}

// Adds the products of a block of weights with those of ROWS rows, so many `blocks` after each other.
template <int ROWS, class Block>
inline void add_block(const Block& w, const float* scale, const RoundedBlock* x, int64_t blocks, WideFloats* sums) {
  Integers products[ROWS] = {};
  for (int64_t part = 0; part < PARTS; part++) {
    Shorts low, high;
    w.widen_part(part, low, high);
    for (int r = 0; r < ROWS; r++) {
      const Shorts* of_x = x[r * blocks].integers + part;
      products[r] += products_of(low, of_x[0]) + products_of(high, of_x[PARTS]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    sums[r] += __builtin_convertvector(products[r], WideFloats) * x[r * blocks].scale * scale[x->group];
}

// `dot` for a row of weights of so many `bytes`, with the scales of its groups.
template <int ROWS, class Block>
void dot_blocks(const char* w, int64_t bytes, const float* scale, const RoundedBlock* x, float* products) {
  const int64_t blocks = (bytes + sizeof(Block) - 1) / sizeof(Block), whole = bytes / sizeof(Block);
  WideFloats sums[ROWS] = {};
  for (int64_t b = 0; b < whole; b++, w += sizeof(Block)) {
    __builtin_prefetch(w + PREFETCH_BYTES);
    add_block<ROWS>(*reinterpret_cast<const Block*>(w), scale, x + b, blocks, sums);
  }
  if (whole < blocks) {
    Block last = {};
    std::memcpy(&last, w, bytes % sizeof(Block));
    add_block<ROWS>(last, scale, x + whole, blocks, sums);
  }
  for (int r = 0; r < ROWS; r++) products[r] = total<WIDTH / 4>(sums[r]);
}

// One of several maps of the same rows x: `to` is x Wᵀ · scale + bias, with `out` features.
struct Map {
  const char* weight;
  const float *scale, *bias;
  float* to;
  int64_t out;
};
using Maps = std::vector<Map>;

// All outputs of all maps, with the products of `dots(map, o, row, count, products)`: those of `count` rows, 1 or 4,
// with row o of the weights of a map, scaled.
template <class Dots>
void for_each_output(const Maps& maps, int64_t in, int64_t rows, Dots dots) {
  int64_t all = 0;
  for (const Map& map : maps) all += map.out;
  const int64_t least = PRODUCTS_PER_THREAD / std::max<int64_t>(1, in * rows) + 1;
  torch::stable::parallel_for(0, all, least, [&](int64_t begin, int64_t end) {
    for (const Map& map : maps) {
      for (int64_t o = std::max<int64_t>(begin, 0); o < std::min(end, map.out); o++) {
        float products[4];
        for (int64_t row = 0; row < rows;) {
          const int count = rows - row >= 4 ? 4 : 1;
          dots(map, o, row, count, products);
          for (int n = 0; n < count; n++, row++)
            map.to[row * map.out + o] = products[n] + (map.bias ? map.bias[o] : 0.0f);
        }
      }
      begin -= map.out;
      end -= map.out;
    }
  });
}

template <class Weight>
void multiply(const float* x, int64_t rows, int64_t in, const Maps& maps) {
  for_each_output(maps, in, rows, [&](const Map& map, int64_t o, int64_t row, int count, float* products) {
    const auto* w = reinterpret_cast<const Weight*>(map.weight) + o * in;
    (count == 4 ? dot<4, 2, Weight> : dot<1, 4, Weight>)(w, x + row * in, in, products);
  });
}

template <class Block>
void multiply_blocks(const float* x, int64_t rows, int64_t in, int64_t groups, const Maps& maps) {
  const int64_t blocks = (in + BLOCK - 1) / BLOCK, bytes = in * sizeof(Block) / BLOCK;
  const std::vector<RoundedBlock> rounded = round_rows<Block>(x, rows, in, groups);
  for_each_output(maps, in, rows, [&](const Map& map, int64_t o, int64_t row, int count, float* products) {
    (count == 4 ? dot_blocks<4, Block> : dot_blocks<1, Block>)(
        map.weight + o * bytes, bytes, map.scale + o * groups, &rounded[row * blocks], products);
  });
}

// Number of groups of a row that have a scale of their own.
int64_t count_groups(const Tensor& weight, const Tensor* scale, int64_t in) {
  const ScalarType type = weight.scalar_type();
  const bool is_packed = type == ScalarType::Byte, has_scale = is_packed || type == ScalarType::Char;
  STD_TORCH_CHECK(has_scale || type == ScalarType::Float || type == ScalarType::BFloat16);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(1) * (is_packed ? 2 : 1) == in && bool(scale) == has_scale);
  if (!scale) return 1;
  STD_TORCH_CHECK(scale->is_contiguous() && scale->size(0) == weight.size(0) && scale->dim() == (is_packed ? 2 : 1));
  const int64_t groups = is_packed ? scale->size(1) : 1;
  STD_TORCH_CHECK(!is_packed || (groups && in % (groups * BLOCK) == 0));
  return groups;
}

// For each of the weights, which have all a scale and a bias or none.
std::vector<Tensor> row_products(const Tensor& x, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& scales, const std::vector<Tensor>& biases) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && count);
  STD_TORCH_CHECK((scales.empty() || scales.size() == count) && (biases.empty() || biases.size() == count));
  const auto scale_of = [&](size_t i) { return scales.empty() ? nullptr : &scales[i]; };
  const auto floats = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const int64_t in = x.size(-1), rows = x.numel() / in, groups = count_groups(weights[0], scale_of(0), in);
  const ScalarType type = weights[0].scalar_type();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  std::vector<Tensor> outputs;
  Maps maps;
  for (size_t i = 0; i < count; i++) {
    STD_TORCH_CHECK(weights[i].scalar_type() == type && count_groups(weights[i], scale_of(i), in) == groups);
    shape.back() = weights[i].size(0);
    outputs.push_back(torch::stable::new_empty(x, shape));
    maps.push_back({static_cast<const char*>(weights[i].const_data_ptr()), scales.empty() ? nullptr : floats(scales[i]),
                    biases.empty() ? nullptr : floats(biases[i]),
                    static_cast<float*>(outputs[i].mutable_data_ptr()), shape.back()});
  }
  if (type == ScalarType::Float) multiply<float>(floats(x), rows, in, maps);
  if (type == ScalarType::BFloat16) multiply<BFloat16>(floats(x), rows, in, maps);
  if (type == ScalarType::Char) multiply_blocks<Int8Block>(floats(x), rows, in, groups, maps);
  if (type == ScalarType::Byte) multiply_blocks<Int4Block>(floats(x), rows, in, groups, maps);
  return outputs;
}

Tensor row_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& bias) {
  const auto list = [](const std::optional<Tensor>& each) {
    return each ? std::vector<Tensor>{*each} : std::vector<Tensor>{};
  };
  return row_products(x, {weight}, list(scale), list(bias))[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minitransformer, m) {
  m.def("row_product(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
  m.def("row_products(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(minitransformer, CPU, m) {
  m.impl("row_product", TORCH_BOX(&row_product));
  m.impl("row_products", TORCH_BOX(&row_products));
}
