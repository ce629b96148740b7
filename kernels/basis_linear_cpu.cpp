// pifa::basis_linear_cpu: a linear layer whose heads are in a basis of inputs, on CPUs, for float, bfloat16 and half.
//
//     y_h = x[basis] + x[others] w_h^T + bias_h        y = [x w_plain^T + bias, y_1, y_2, ...]
//
// Tokens lie side by side in the lanes of a vector, and weights are broadcast. So inputs are chosen by choosing rows of
// x^T, which costs a copy of them whatever their order is and however many bases there are; the sums start from the
// basis' rows; and weights are read as they lie, once for every few dozen tokens.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <c10/util/Unroll.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Floats = at::vec::Vectorized<float>;

// The processor's own type where sums are to stay in registers: of the class GCC keeps copies in memory.
#if defined(CPU_CAPABILITY_AVX512)
using Lanes = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using Lanes = __m256;
#else
using Lanes = Floats;
#endif

constexpr int64_t kLanes = Floats::size();
constexpr int64_t kTokens = 2 * kLanes;  // of a block
// 12 x 2 sums, the tokens' two vectors and a weight fill 27 of 32 registers; with 16 registers it is 4 x 2.
constexpr int kMostRows = kLanes >= 16 ? 12 : 4;
constexpr int64_t kChosenBytes = 16384;  // of x, half of the first-level cache
constexpr int64_t kRowsPerTask = 192;  // whose weights stay in the second-level cache for all tokens

template <typename T>
inline Floats load_floats(const T* from) {
  if constexpr (std::is_same_v<T, float>)
    return Floats::loadu(from);
  else
    return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, kLanes));
}

// How x and weights are multiplied: as float,
template <typename T>
struct Multiply {
  using Number = float;
  static constexpr int64_t kTogether = 1;  // terms of a sum

  static Lanes weight(const float* from) { return Floats(*from); }
  static Lanes tokens(const float* from) { return Floats::loadu(from); }
  static Lanes add(Lanes weight, Lanes tokens, Lanes sum) { return at::vec::fmadd<float>(weight, tokens, sum); }
  static void choose(const float* first, const float*, float* to) { std::copy_n(first, kTokens, to); }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
// and bfloat16 in pairs, where the processor multiplies these.
template <>
struct Multiply<BFloat16> {
  using Number = BFloat16;
  static constexpr int64_t kTogether = 2;

  static __m512bh weight(const BFloat16* from) {
    int both;
    std::memcpy(&both, from, sizeof(both));
    return (__m512bh)_mm512_set1_epi32(both);
  }
  static __m512bh tokens(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Lanes add(__m512bh weight, __m512bh tokens, Lanes sum) { return _mm512_dpbf16_ps(sum, weight, tokens); }

  // Each token's two numbers side by side; without a second row 0 beside the first.
  static void choose(const BFloat16* first, const BFloat16* second, BFloat16* to) {
    const __m512i a = _mm512_loadu_si512(first), b = second ? _mm512_loadu_si512(second) : _mm512_setzero_si512();
    const __m256i low[] = {_mm512_castsi512_si256(a), _mm512_castsi512_si256(b)};
    const __m256i high[] = {_mm512_extracti64x4_epi64(a, 1), _mm512_extracti64x4_epi64(b, 1)};
    const auto join = [](const __m256i* each) {
      return _mm512_or_si512(_mm512_cvtepu16_epi32(each[0]), _mm512_slli_epi32(_mm512_cvtepu16_epi32(each[1]), 16));
    };
    _mm512_storeu_si512(to, join(low));
    _mm512_storeu_si512(to + kTokens, join(high));
  }
};
#endif

// x^T: for every block of tokens [in][kTokens], 0 where there are none.
template <typename T, typename Number = typename Multiply<T>::Number>
std::vector<Number> transposed(const Tensor& x) {
  const int64_t tokens = x.size(0), d_in = x.size(1), blocks = (tokens + kTokens - 1) / kTokens;
  std::vector<Number> result(blocks * d_in * kTokens);
  const T* from = x.const_data_ptr<T>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      for (int64_t t = block * kTokens; t < std::min(tokens, (block + 1) * kTokens); t++)
        for (int64_t i = 0; i < d_in; i++)
          result[(block * d_in + i) * kTokens + t % kTokens] = Number(from[t * d_in + i]);
  });
  return result;
}

// Rows of a weight that read the same inputs in one order.
template <typename T>
struct Rows {
  const T* weight;  // [count, width]
  int64_t count, width, first;  // output
  const int32_t* inputs;  // [width]
  const int32_t* basis;  // the d inputs from which the sums of a head's rows start, or none
  int64_t d;
};

// sums[row][token] += weight[row] . x[token] over `terms` inputs, for rows of a weight `stride` apart.
template <typename T, int Count, int Vectors, typename Number = typename Multiply<T>::Number>
inline void multiply(const Number* weight, int64_t stride, int64_t terms, const Number* chosen, float* sums) {
  constexpr int64_t kLine = 64 / sizeof(Number);
  using By = Multiply<T>;
  Lanes sum[Count][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Count; r++)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) sum[r][v] = Floats::loadu(sums + r * kTokens + v * kLanes);
  int64_t k = 0;
  for (; k + By::kTogether <= terms; k += By::kTogether) {
    if (k % kLine == 0)  // rows to come, which the processor does not foresee
#pragma GCC unroll 16
      for (int r = 0; r < Count; r++) __builtin_prefetch(weight + (2 * Count + r) * stride + k);
    decltype(By::tokens(chosen)) tokens[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) tokens[v] = By::tokens(chosen + k * kTokens + v * kLanes * By::kTogether);
#pragma GCC unroll 16
    for (int r = 0; r < Count; r++) {
      const auto one = By::weight(weight + r * stride + k);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; v++) sum[r][v] = By::add(one, tokens[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Count; r++)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) Floats(sum[r][v]).store(sums + r * kTokens + v * kLanes);
  if (k < terms)  // half a pair
    for (int r = 0; r < Count; r++)
      for (int64_t t = 0; t < Vectors * kLanes; t++)
        sums[r * kTokens + t] += float(weight[r * stride + k]) * float(chosen[k * kTokens + t * By::kTogether]);
}

template <typename T, int Vectors, typename Number = typename Multiply<T>::Number>
void multiply_all(const Number* weight, int64_t count, int64_t stride, int64_t terms, const Number* chosen, float* sums) {
  int64_t n = 0;
  const auto all = [&](auto rows) {
    for (; n + rows <= count; n += rows)
      multiply<T, rows, Vectors>(weight + n * stride, stride, terms, chosen, sums + n * kTokens);
  };
  all(std::integral_constant<int, kMostRows>{});
  all(std::integral_constant<int, 4>{});
  all(std::integral_constant<int, 1>{});
}

// y[token][row] = sums[row][token], for y of any stride.
template <typename T>
void store(const float* sums, int64_t count, int64_t tokens, T* y, int64_t stride) {
  std::vector<float> by_token(kLanes * count);
  for (int64_t t0 = 0; t0 < tokens; t0 += kLanes) {
    const int64_t some = std::min(kLanes, tokens - t0);
    for (int64_t n = 0; n < count; n += kLanes)
      at::vec::transpose_mxn<float>(sums + n * kTokens + t0, kTokens, by_token.data() + n, count,
                                    std::min(kLanes, count - n), some);
    for (int64_t t = 0; t < some; t++) at::vec::convert(by_token.data() + t * count, y + (t0 + t) * stride, count);
  }
}

// Rows of `all` [begin, end) for all tokens.
template <typename T, typename Number = typename Multiply<T>::Number>
void run_rows(const Rows<T>& rows, int64_t begin, int64_t end, const Number* x, int64_t d_in, const T* bias, Tensor& y) {
  using By = Multiply<T>;
  const int64_t tokens = y.size(0), d_out = y.size(1), count = end - begin, width = rows.width;
  const T* given = rows.weight + begin * width;
  std::vector<float> sums(count * kTokens);
  constexpr int64_t kTermsAtOnce = kChosenBytes / sizeof(Number) / kTokens;
  std::vector<Number> chosen(kTermsAtOnce * kTokens), converted;
  const Number* weight;
  if constexpr (std::is_same_v<T, Number>) {
    weight = given;
  } else {
    converted.resize(count * width);
    at::vec::convert(given, converted.data(), count * width);
    weight = converted.data();
  }
  T* to = y.mutable_data_ptr<T>() + rows.first + begin;
  for (int64_t t = 0; t < tokens; t += kTokens, x += d_in * kTokens) {
    const int64_t some = std::min(kTokens, tokens - t);
    for (int64_t n = 0; n < count; n++) {
      const Number* start = rows.basis ? x + rows.basis[(begin + n) % rows.d] * kTokens : nullptr;
      const Floats add(bias ? float(bias[rows.first + begin + n]) : 0.f);
      for (int64_t v = 0; v < kTokens; v += kLanes)
        (start ? load_floats(start + v) + add : add).store(sums.data() + n * kTokens + v);
    }
    for (int64_t k = 0; k < width; k += kTermsAtOnce) {
      const int64_t terms = std::min(kTermsAtOnce, width - k);
      const int32_t* inputs = rows.inputs + k;
      for (int64_t i = 0; i < terms; i += By::kTogether)
        By::choose(x + inputs[i] * kTokens, i + 1 < terms ? x + inputs[i + 1] * kTokens : nullptr, chosen.data() + i * kTokens);
      const auto multiply_them = some > kLanes ? multiply_all<T, 2> : multiply_all<T, 1>;
      multiply_them(weight + k, count, width, terms, chosen.data(), sums.data());
    }
    store(sums.data(), count, some, to + t * d_out, d_out);
  }
}

template <typename F>
void by_dtype(at::ScalarType dtype, F run) {
  switch (dtype) {
    case at::kFloat: return run(float{});
    case at::kBFloat16: return run(BFloat16{});
    case at::kHalf: return run(at::Half{});
    default: TORCH_CHECK(false, "pifa::basis_linear_cpu takes float32, bfloat16 and float16, got ", dtype);
  }
}

Tensor basis_linear_cpu(const Tensor& x, const std::optional<Tensor>& w_plain, const Tensor& w_rest,
                        const Tensor& order, const std::optional<Tensor>& bias) {
  TORCH_CHECK(w_rest.dim() == 2 && order.dim() == 2 && x.dim() >= 1 && x.size(-1) == order.size(1) &&
                  order.size(1) > w_rest.size(1) && (!w_plain || (w_plain->dim() == 2 && w_plain->size(1) == x.size(-1))),
              "wanted x [..., in], w_plain [plain, in], w_rest [heads * d, in - d] and order [groups, in], got ",
              x.sizes(), ", ", w_plain ? w_plain->sizes() : at::IntArrayRef{}, ", ", w_rest.sizes(), " and ",
              order.sizes());
  const int64_t d_in = order.size(1), width = w_rest.size(1), d = d_in - width, groups = order.size(0);
  const int64_t plain = w_plain ? w_plain->size(0) : 0, d_out = plain + w_rest.size(0);
  TORCH_CHECK(groups > 0 && w_rest.size(0) % (groups * d) == 0, "wanted w_rest [heads * ", d, ", ", width, "] for ",
              groups, " groups of heads, got ", w_rest.sizes());
  TORCH_CHECK(!bias || bias->numel() == d_out, "wanted bias [", d_out, "], got ", bias ? bias->numel() : 0);
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == w_rest.scalar_type() && (!w_plain || w_plain->scalar_type() == dtype) &&
                  (!bias || bias->scalar_type() == dtype),
              "x, w_plain, w_rest and bias must have one dtype");
  TORCH_CHECK(order.scalar_type() == at::kInt, "wanted order of int32, got ", order.scalar_type());
  const Tensor tokens = x.contiguous().view({-1, d_in}), rest = w_rest.contiguous(), inputs = order.contiguous();
  const Tensor first = w_plain ? w_plain->contiguous() : Tensor(), added = bias ? bias->contiguous() : Tensor();
  const int32_t* chosen = inputs.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < inputs.numel(); i++)
    TORCH_CHECK_INDEX(chosen[i] >= 0 && chosen[i] < d_in, "order holds ", chosen[i], ", which is no input");
  Tensor y = at::empty({tokens.size(0), d_out}, x.options());
  std::vector<int32_t> in_order(d_in);
  std::iota(in_order.begin(), in_order.end(), 0);
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Rows<T>> all;
    if (plain) all.push_back({first.const_data_ptr<T>(), plain, d_in, 0, in_order.data(), nullptr, 1});
    const int64_t size = rest.size(0) / groups;
    for (int64_t g = 0; g < groups; g++)
      all.push_back({rest.const_data_ptr<T>() + g * size * width, size, width, plain + g * size,
                     chosen + g * d_in + d, chosen + g * d_in, d});
    const int64_t fair = (d_out / (4 * at::get_num_threads()) + kMostRows) / kMostRows * kMostRows;
    const int64_t at_once = std::clamp<int64_t>(fair, kMostRows, kRowsPerTask);
    std::vector<std::pair<const Rows<T>*, int64_t>> tasks;  // and their first row
    for (const Rows<T>& rows : all)
      for (int64_t begin = 0; begin < rows.count; begin += at_once) tasks.emplace_back(&rows, begin);
    const auto blocks = transposed<T>(tokens);
    const T* its_bias = bias ? added.const_data_ptr<T>() : nullptr;
    at::parallel_for(0, tasks.size(), 1, [&](int64_t from, int64_t until) {
      for (int64_t i = from; i < until; i++) {
        const auto [rows, begin] = tasks[i];
        run_rows<T>(*rows, begin, std::min(rows->count, begin + at_once), blocks.data(), d_in, its_bias, y);
      }
    });
  });
  auto shape = x.sizes().vec();
  shape.back() = d_out;
  return y.view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(PIFA_NAMESPACE, CPU, library) { library.impl("basis_linear_cpu", &basis_linear_cpu); }
