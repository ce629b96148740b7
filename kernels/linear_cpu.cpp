// pifa::linear_cpu: a linear layer in PIFA form on CPUs, for float, bfloat16 and half.
//
//     y_p = x w_pivot^T        y_n = y_p coeff^T        y = [y_p, y_n][order]
//
// pifa::linear_siblings_cpu: several such layers on one x (query, key and value; gate and up) in one go.
// pifa::grouped_linear_cpu: one such layer for every expert, each on rows of its own, bias included.
//
// Few tokens: both products stream the weights once, each row of them used for all tokens, with float32 sums and a
// float32 y_p; results go straight to their output rows. ATen's GEMMs reach half of the memory's rate there. Siblings
// share one parallel region a product: with small weights that is most of the time.
// Many tokens: ATen's GEMMs write the two parts of one output buffer, and every token's row is then put into order,
// while it is in the first-level cache. Small siblings get their y_p from one GEMM over the joint pivot rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/util/Unroll.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// What is written for AVX512 needs both: vectors of that width, and a processor that has it. A process may be told to use
// narrower ones (ATEN_CPU_CAPABILITY).
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512F__)
#define PIFA_AVX512 1
#endif

using at::Tensor;
using Floats = at::vec::Vectorized<float>;

// Above so many tokens ATen's GEMMs are faster (measured with MKL and oneDNN on avx512).
constexpr int64_t kFewTokensFloat = 8, kFewTokensHalf = 16;
constexpr int64_t kRowsAtOnce = 4, kTokensAtOnce = 4;  // 16 sums, 4 rows and 1 token fill 21 of 32 vector registers
constexpr int64_t kLeastRowsPerTask = 16;

// Joining the siblings' pivot rows costs a copy of them in every call. It pays where a GEMM of each one's own would be
// too narrow to be fast and the copy is small beside it.
constexpr int64_t kJoinedNumbers = 1 << 20, kJoinedTokens = 256;

inline Floats load_floats(const float* from) { return Floats::loadu(from); }

template <typename T>
inline Floats load_floats(const T* from) {
  return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, Floats::size()));
}

// By value: a reference to an accumulator would keep it out of the registers.
inline float sum(Floats values) {
  return at::vec::vec_reduce_all<float>([](Floats a, Floats b) { return a + b; }, values);
}

// result[i] = the sum of the lanes of sums[i]
template <int Count>
inline void sum_each(const Floats* sums, float* result) {
#if defined(PIFA_AVX512)
  // 16 sums together: four rounds, each adding up neighbours and halving the number of vectors.
  if constexpr (Count == 16) {
    __m512 lanes[16];
    c10::ForcedUnroll<16>{}([&](auto i) { lanes[i] = sums[i]; });
    c10::ForcedUnroll<8>{}([&](auto i) {
      const __m512 a = lanes[2 * i], b = lanes[2 * i + 1];
      lanes[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    });
    c10::ForcedUnroll<4>{}([&](auto i) {
      const __m512d a = _mm512_castps_pd(lanes[2 * i]), b = _mm512_castps_pd(lanes[2 * i + 1]);
      lanes[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    });
    const auto join = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    _mm512_storeu_ps(result, join(join(lanes[0], lanes[1]), join(lanes[2], lanes[3])));
    return;
  }
#endif
  c10::ForcedUnroll<Count>{}([&](auto i) { result[i] = sum(sums[i]); });
}

// result[t][i] = x[t] . weight[i] for Tokens rows of x and Rows rows of the weight, both `width` long.
template <int Rows, int Tokens, typename T>
inline void dot_products(const T* weight, const float* x, int64_t width, float* result) {
  Floats sums[Tokens * Rows], row[Rows];
  c10::ForcedUnroll<Tokens * Rows>{}([&](auto i) { sums[i] = Floats(0.f); });
  int64_t k = 0;
  for (; k + Floats::size() <= width; k += Floats::size()) {
    c10::ForcedUnroll<Rows>{}([&](auto i) { row[i] = load_floats(weight + i * width + k); });
    c10::ForcedUnroll<Tokens>{}([&](auto t) {
      const Floats token = Floats::loadu(x + t * width + k);
      c10::ForcedUnroll<Rows>{}([&](auto i) { sums[t * Rows + i] = at::vec::fmadd(row[i], token, sums[t * Rows + i]); });
    });
  }
  sum_each<Tokens * Rows>(sums, result);
  for (; k < width; k++)
    for (int t = 0; t < Tokens; t++)
      for (int i = 0; i < Rows; i++) result[t * Rows + i] += float(weight[i * width + k]) * x[t * width + k];
}

#if defined(PIFA_AVX512) && defined(__AVX512BF16__)
#define PIFA_BF16_UNITS 1

// Numbers as bfloat16; Split: as a sum of two, which keeps 16 bits of each.
template <bool Split>
struct Halves {
  const at::BFloat16 *high, *low;

  Halves operator+(int64_t offset) const { return {high + offset, Split ? low + offset : low}; }
  float operator[](int64_t k) const { return float(high[k]) + (Split ? float(low[k]) : 0.f); }
};

inline __m512bh load_halves(const at::BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

// The same with the processor's units for bfloat16: products of 32 pairs at once, added up in float32.
template <int Rows, int Tokens, bool Split>
inline void dot_products(const at::BFloat16* weight, Halves<Split> x, int64_t width, float* result) {
  Floats sums[Tokens * Rows];
  __m512bh row[Rows];
  c10::ForcedUnroll<Tokens * Rows>{}([&](auto i) { sums[i] = Floats(0.f); });
  int64_t k = 0;
  const auto add = [&](auto t, const at::BFloat16* from) {
    const __m512bh token = load_halves(from);
    c10::ForcedUnroll<Rows>{}(
        [&](auto i) { sums[t * Rows + i] = _mm512_dpbf16_ps(sums[t * Rows + i], row[i], token); });
  };
  for (; k + 32 <= width; k += 32) {
    c10::ForcedUnroll<Rows>{}([&](auto i) { row[i] = load_halves(weight + i * width + k); });
    c10::ForcedUnroll<Tokens>{}([&](auto t) {
      add(t, x.high + t * width + k);
      if constexpr (Split) add(t, x.low + t * width + k);
    });
  }
  sum_each<Tokens * Rows>(sums, result);
  for (; k < width; k++)
    for (int t = 0; t < Tokens; t++)
      for (int i = 0; i < Rows; i++) result[t * Rows + i] += float(weight[i * width + k]) * x[t * width + k];
}
#endif

// store(t, n, x[t] . weight[n]) for rows n to n + Rows of the weight, which stay in the first-level cache for all tokens.
template <int Rows, typename T, typename X, typename Store>
inline void rows_times_tokens(const T* weight, int64_t n, X x, int64_t tokens, int64_t width, Store store) {
  float result[kTokensAtOnce * Rows];
  const auto put = [&](int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; t++)
      for (int i = 0; i < Rows; i++) store(first + t, n + i, result[t * Rows + i]);
  };
  const T* rows = weight + n * width;
  int64_t t = 0;
  for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce) {
    dot_products<Rows, kTokensAtOnce>(rows, x + t * width, width, result);
    put(t, kTokensAtOnce);
  }
  switch (tokens - t) {
    case 1: dot_products<Rows, 1>(rows, x + t * width, width, result); break;
    case 2: dot_products<Rows, 2>(rows, x + t * width, width, result); break;
    case 3: dot_products<Rows, 3>(rows, x + t * width, width, result); break;
  }
  put(t, tokens - t);
}

// A product of x [tokens, width] and a weight [rows, width]; `store` takes (token, row, value).
template <typename T, typename X, typename Store>
struct Product {
  const T* weight;
  int64_t rows, width;
  X x;
  Store store;
};

// All products, in one parallel region.
template <typename T, typename X, typename Store>
void stream(const std::vector<Product<T, X, Store>>& products, int64_t tokens) {
  int64_t rows = 0;
  for (const auto& product : products) rows += product.rows;
  const int64_t share = rows / (4 * at::get_num_threads()) / kRowsAtOnce * kRowsAtOnce;
  const int64_t at_once = std::max(kLeastRowsPerTask, share);
  std::vector<std::pair<int64_t, int64_t>> tasks;  // product, first row
  for (size_t i = 0; i < products.size(); i++)
    for (int64_t begin = 0; begin < products[i].rows; begin += at_once) tasks.emplace_back(i, begin);
  at::parallel_for(0, tasks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const auto& product = products[tasks[task].first];
      int64_t n = tasks[task].second;
      const int64_t end = std::min(product.rows, n + at_once);
      for (; n + kRowsAtOnce <= end; n += kRowsAtOnce)
        rows_times_tokens<kRowsAtOnce>(product.weight, n, product.x, tokens, product.width, product.store);
      for (; n < end; n++) rows_times_tokens<1>(product.weight, n, product.x, tokens, product.width, product.store);
    }
  });
}

// One layer: its weights, made contiguous, and its result [tokens, d_out].
struct Layer {
  Tensor w_pivot, coeff;
  std::optional<Tensor> order;
  Tensor y;

  int64_t rank() const { return w_pivot.size(0); }
  int64_t d_out() const { return y.size(1); }
  const int64_t* gather() const { return order ? order->const_data_ptr<int64_t>() : nullptr; }
};

// The output row of every stored row: the inverse of the order.
std::vector<int32_t> output_rows(const Layer& layer) {
  const int64_t d_out = layer.d_out();
  const int64_t* order = layer.gather();
  std::vector<int32_t> place(d_out);
  for (int64_t j = 0; j < d_out; j++) {
    TORCH_CHECK_INDEX(!order || (order[j] >= 0 && order[j] < d_out), "order[", j, "] is no stored row");
    place[order ? order[j] : j] = j;
  }
  return place;
}

// What the products of few tokens read: x, and y_p with more bits than the dtype has. Any dtype as float32,
template <typename T>
struct FewTokens {
  using Given = const float*;
  using Kept = const float*;

  std::vector<float> x, y_pivot;

  Given give(const Tensor& tokens) {
    const T* values = tokens.const_data_ptr<T>();
    if constexpr (std::is_same_v<T, float>) return values;
    x.assign(values, values + tokens.numel());
    return x.data();
  }
  void reserve(int64_t count) { y_pivot.resize(count); }
  Kept kept() const { return y_pivot.data(); }
  void keep(int64_t i, float value) { y_pivot[i] = value; }
};

#if defined(PIFA_BF16_UNITS)
// and bfloat16 as it is where the processor multiplies it.
template <>
struct FewTokens<at::BFloat16> {
  using Given = Halves<false>;
  using Kept = Halves<true>;

  std::vector<at::BFloat16> high, low;

  Given give(const Tensor& tokens) { return {tokens.const_data_ptr<at::BFloat16>(), nullptr}; }
  void reserve(int64_t count) { high.resize(count), low.resize(count); }
  Kept kept() const { return {high.data(), low.data()}; }
  void keep(int64_t i, float value) {
    high[i] = value;
    low[i] = value - float(high[i]);
  }
};
#endif

// Where results go: to y [tokens, d_out] at the rows in `place`, and those of the first product to y_p besides.
template <typename T>
struct StoreOthers {
  T* y;
  int64_t d_out;
  const int32_t* place;

  void operator()(int64_t t, int64_t n, float value) const { y[t * d_out + place[n]] = T(value); }
};

template <typename T>
struct StorePivots {
  StoreOthers<T> to_y;
  FewTokens<T>* few;
  int64_t begin, rank;

  void operator()(int64_t t, int64_t n, float value) const {
    few->keep(begin + t * rank + n, value);
    to_y(t, n, value);
  }
};

template <typename T>
void few_tokens(const Tensor& x, std::vector<Layer>& layers) {
  const int64_t tokens = x.size(0), d_in = x.size(1);
  FewTokens<T> few;
  const auto given = few.give(x);
  int64_t begin = 0;
  for (const Layer& layer : layers) begin += tokens * layer.rank();
  few.reserve(begin);
  std::vector<std::vector<int32_t>> places;
  std::vector<Product<T, typename FewTokens<T>::Given, StorePivots<T>>> pivots;
  std::vector<Product<T, typename FewTokens<T>::Kept, StoreOthers<T>>> others;
  begin = 0;
  for (const Layer& layer : layers) {
    const int64_t rank = layer.rank(), d_out = layer.d_out();
    T* y = layer.y.mutable_data_ptr<T>();
    const int32_t* place = places.emplace_back(output_rows(layer)).data();
    pivots.push_back({layer.w_pivot.const_data_ptr<T>(), rank, d_in, given, {{y, d_out, place}, &few, begin, rank}});
    others.push_back({layer.coeff.const_data_ptr<T>(), d_out - rank, rank, few.kept() + begin, {y, d_out, place + rank}});
    begin += tokens * rank;
  }
  stream(pivots, tokens);
  stream(others, tokens);
}

// How [y_p, y_n] becomes y. Pivots and others are each in ascending order, so y is the merge of two runs, one bit an
// output: vector units with an expanding load then undo the order at the speed of a copy. Any other order is gathered.
struct RowOrder {
  const int64_t* gather;
  std::vector<uint32_t> from_pivots;  // bit j % 32 of word j / 32: whether output j is a pivot row; empty: no merge

  RowOrder(const int64_t* order, int64_t rank, int64_t d_out) : gather(order), from_pivots((d_out + 31) / 32) {
    int64_t pivots = 0, others = rank;
    for (int64_t j = 0; j < d_out; j++) {
      if (order[j] == pivots && pivots < rank) {
        from_pivots[j / 32] |= 1u << (j % 32);
        pivots++;
      } else if (order[j] == others) {
        others++;
      } else {
        from_pivots.clear();
        break;
      }
    }
    for (int64_t j = 0; from_pivots.empty() && j < d_out; j++)
      TORCH_CHECK_INDEX(order[j] >= 0 && order[j] < d_out, "order[", j, "] is no stored row");
  }
};

template <typename T>
inline void gather_rest(const T* stored, T* out, int64_t begin, int64_t end, const RowOrder& order) {
  for (int64_t j = begin; j < end; j++) out[j] = stored[order.gather[j]];
}

#if defined(PIFA_AVX512) && defined(__AVX512VBMI2__)
// The number of leading outputs that were written: a multiple of 32.
template <typename T>
inline int64_t merge(const T* stored, T* out, int64_t rank, int64_t d_out, const RowOrder& order) {
  if (order.from_pivots.empty()) return 0;
  const T *pivots = stored, *others = stored + rank;
  int64_t j = 0;
  for (; j + 32 <= d_out; j += 32) {
    const uint32_t bits = order.from_pivots[j / 32];
    if constexpr (sizeof(T) == 2) {
      __m512i both = _mm512_maskz_expandloadu_epi16(bits, pivots);
      _mm512_storeu_si512(out + j, _mm512_mask_expandloadu_epi16(both, ~bits, others));
    } else {
      const __mmask16 low = bits, high = bits >> 16;
      __m512 both = _mm512_maskz_expandloadu_ps(low, pivots);
      _mm512_storeu_ps(out + j, _mm512_mask_expandloadu_ps(both, ~low, others));
      const int in_low = __builtin_popcount(low);
      both = _mm512_maskz_expandloadu_ps(high, pivots + in_low);
      _mm512_storeu_ps(out + j + 16, _mm512_mask_expandloadu_ps(both, ~high, others + 16 - in_low));
    }
    const int count = __builtin_popcount(bits);
    pivots += count;
    others += 32 - count;
  }
  return j;
}
#else
template <typename T>
inline int64_t merge(const T*, T*, int64_t, int64_t, const RowOrder&) {
  return 0;
}
#endif

// Puts every row of y, which holds [anything, y_n], into order; y_p is in `y_pivot` [tokens, rank], of any row stride.
template <typename T>
void restore_order(const Tensor& y_pivot, Tensor& y, const int64_t* gather) {
  const int64_t d_out = y.size(1), rank = y_pivot.size(1), stride = y_pivot.stride(0);
  const T* pivots = y_pivot.const_data_ptr<T>();
  T* values = y.mutable_data_ptr<T>();
  const bool apart = pivots != values;
  if (!gather && !apart) return;
  std::optional<RowOrder> order;
  if (gather) order.emplace(gather, rank, d_out);
  at::parallel_for(0, y.size(0), 16, [&](int64_t begin, int64_t end) {
    std::vector<T> stored(d_out + 64);  // what an expanding load may touch past the end is there
    for (int64_t t = begin; t < end; t++) {
      T* out = values + t * d_out;
      std::memcpy(order ? stored.data() : out, pivots + t * stride, rank * sizeof(T));
      if (!order) continue;
      std::memcpy(stored.data() + rank, out + rank, (d_out - rank) * sizeof(T));
      gather_rest(stored.data(), out, merge(stored.data(), out, rank, d_out, *order), d_out, *order);
    }
  });
}

template <typename F>
void by_dtype(at::ScalarType dtype, F run) {
  switch (dtype) {
    case at::kFloat: return run(float{});
    case at::kBFloat16: return run(at::BFloat16{});
    case at::kHalf: return run(at::Half{});
    default: TORCH_CHECK(false, "pifa::linear_cpu takes float32, bfloat16 and float16, got ", dtype);
  }
}

void many_tokens(const Tensor& x, std::vector<Layer>& layers) {
  int64_t ranks = 0;
  for (const Layer& layer : layers) ranks += layer.rank();
  const bool join = layers.size() > 1 && x.size(0) >= kJoinedTokens && ranks * x.size(1) <= kJoinedNumbers;
  Tensor joined;
  if (join) {
    std::vector<Tensor> w_pivots;
    for (const Layer& layer : layers) w_pivots.push_back(layer.w_pivot);
    joined = at::mm(x, at::cat(w_pivots).t());
  }
  int64_t begin = 0;
  for (Layer& layer : layers) {
    const int64_t rank = layer.rank(), others = layer.d_out() - rank;
    Tensor y_pivot = join ? joined.narrow(1, begin, rank) : layer.y.narrow(1, 0, rank);
    begin += rank;
    if (!join) at::mm_out(y_pivot, x, layer.w_pivot.t());
    if (others > 0) {
      Tensor y_other = layer.y.narrow(1, rank, others);
      at::mm_out(y_other, y_pivot, layer.coeff.t());
    }
    by_dtype(x.scalar_type(), [&](auto zero) { restore_order<decltype(zero)>(y_pivot, layer.y, layer.gather()); });
  }
}

Layer checked_layer(const Tensor& x, const Tensor& w_pivot, const Tensor& coeff, const std::optional<Tensor>& order) {
  const int64_t d_in = w_pivot.size(1), rank = w_pivot.size(0), d_out = rank + coeff.size(0);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == d_in, "wanted x [..., ", d_in, "], got ", x.sizes());
  TORCH_CHECK(coeff.size(1) == rank, "wanted coeff [out - r, ", rank, "], got ", coeff.sizes());
  TORCH_CHECK(x.scalar_type() == w_pivot.scalar_type() && x.scalar_type() == coeff.scalar_type(),
              "x, w_pivot and coeff must have one dtype");
  TORCH_CHECK(!order || (order->scalar_type() == at::kLong && order->numel() == d_out && order->is_contiguous()),
              "order must be ", d_out, " contiguous int64");
  return {w_pivot.contiguous(), coeff.contiguous(), order, Tensor()};
}

// Fills in the results of `layers` for x [tokens, in].
void compute(const Tensor& x, std::vector<Layer>& layers) {
  const int64_t few = x.scalar_type() == at::kFloat ? kFewTokensFloat : kFewTokensHalf;
  if (x.size(0) == 0) return;
  if (x.size(0) <= few)
    by_dtype(x.scalar_type(), [&](auto zero) { few_tokens<decltype(zero)>(x, layers); });
  else
    many_tokens(x, layers);
}

// Makes the results of `layers`, and gives them x's leading dimensions.
std::vector<Tensor> run(const Tensor& x, std::vector<Layer> layers) {
  const Tensor tokens = x.contiguous().view({-1, x.size(-1)});
  for (Layer& layer : layers)
    layer.y = at::empty({tokens.size(0), layer.rank() + layer.coeff.size(0)}, x.options());
  compute(tokens, layers);
  std::vector<Tensor> results;
  auto shape = x.sizes().vec();
  for (const Layer& layer : layers) {
    shape.back() = layer.d_out();
    results.push_back(layer.y.view(shape));
  }
  return results;
}

Tensor linear_cpu(const Tensor& x, const Tensor& w_pivot, const Tensor& coeff, const std::optional<Tensor>& order) {
  return run(x, {checked_layer(x, w_pivot, coeff, order)}).front();
}

std::vector<Tensor> linear_siblings_cpu(const Tensor& x, at::TensorList w_pivots, at::TensorList coeffs,
                                        const c10::List<std::optional<Tensor>>& orders) {
  TORCH_CHECK(w_pivots.size() == coeffs.size() && w_pivots.size() == orders.size(),
              "as many w_pivots as coeffs and orders are wanted, got ", w_pivots.size(), ", ", coeffs.size(), " and ",
              orders.size());
  std::vector<Layer> layers;
  for (size_t i = 0; i < w_pivots.size(); i++)
    layers.push_back(checked_layer(x, w_pivots[i], coeffs[i], orders.get(i)));
  return run(x, std::move(layers));
}

Tensor grouped_linear_cpu(const Tensor& x, const Tensor& w_pivot, const Tensor& coeff,
                          const std::optional<Tensor>& order, const std::optional<Tensor>& bias, const Tensor& ends) {
  const int64_t experts = w_pivot.size(0);
  TORCH_CHECK(x.dim() == 2 && w_pivot.dim() == 3 && coeff.dim() == 3 && coeff.size(0) == experts &&
                  ends.numel() == experts,
              "wanted x [rows, in], w_pivot and coeff [experts, ..., ...] and ends [experts], got ", x.sizes(), ", ",
              w_pivot.sizes(), ", ", coeff.sizes(), " and ", ends.sizes());
  const Tensor rows = x.contiguous(), stops = ends.to(at::kLong).contiguous();
  Tensor y = at::empty({x.size(0), w_pivot.size(1) + coeff.size(1)}, x.options());
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t end = stops.const_data_ptr<int64_t>()[e];
    TORCH_CHECK_INDEX(begin <= end && end <= x.size(0), "ends[", e, "] is ", end, ", wanted ", begin, "..", x.size(0));
    if (end == begin) continue;
    const Tensor own = rows.narrow(0, begin, end - begin);
    const auto its = [&](const std::optional<Tensor>& all) { return all ? std::optional(all->select(0, e)) : std::nullopt; };
    std::vector<Layer> layer{checked_layer(own, w_pivot.select(0, e), coeff.select(0, e), its(order))};
    layer[0].y = y.narrow(0, begin, end - begin);
    compute(own, layer);
    if (bias) layer[0].y.add_(bias->select(0, e));
    begin = end;
  }
  y.narrow(0, begin, x.size(0) - begin).zero_();
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(PIFA_NAMESPACE, CPU, library) {
  library.impl("linear_cpu", &linear_cpu);
  library.impl("linear_siblings_cpu", &linear_siblings_cpu);
  library.impl("grouped_linear_cpu", &grouped_linear_cpu);
}
