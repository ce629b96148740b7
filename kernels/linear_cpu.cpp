// pifa::linear_cpu: a linear layer in PIFA form on CPUs, for float, bfloat16 and half.
//
//     y_p = x w_pivot^T        y_n = y_p coeff^T        y = [y_p, y_n][order]
//
// Few tokens: both products stream the weights once, each row of them used for all tokens, with float32 sums and a
// float32 y_p; results go straight to their output rows. ATen's GEMMs reach half of the memory's rate there.
// Many tokens: ATen's GEMMs write the two parts of one output buffer, and every token's row is then put into order in
// place, while it is in the first-level cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/util/Unroll.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using Floats = at::vec::Vectorized<float>;

// Above so many tokens ATen's GEMMs are faster (measured with MKL and oneDNN on avx512 without bf16 units).
constexpr int64_t kFewTokensFloat = 8, kFewTokensHalf = 16;
constexpr int64_t kRowsAtOnce = 4, kTokensAtOnce = 4;  // 16 sums, 4 rows and 1 token fill 21 of 32 vector registers
constexpr int64_t kRowsPerTask = 64;

inline Floats load_floats(const float* from) { return Floats::loadu(from); }

template <typename T>
inline Floats load_floats(const T* from) {
  return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, Floats::size()));
}

// By value: a reference to an accumulator would keep it out of the registers.
inline float sum(Floats values) {
  return at::vec::vec_reduce_all<float>([](Floats a, Floats b) { return a + b; }, values);
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
  c10::ForcedUnroll<Tokens * Rows>{}([&](auto i) { result[i] = sum(sums[i]); });
  for (; k < width; k++)
    for (int t = 0; t < Tokens; t++)
      for (int i = 0; i < Rows; i++) result[t * Rows + i] += float(weight[i * width + k]) * x[t * width + k];
}

template <int Tokens, typename T, typename Store>
inline void rows_times_tokens(const T* weight, int64_t begin, int64_t end, const float* x, int64_t width, Store store) {
  float result[Tokens * kRowsAtOnce];
  int64_t n = begin;
  for (; n + kRowsAtOnce <= end; n += kRowsAtOnce) {
    dot_products<kRowsAtOnce, Tokens>(weight + n * width, x, width, result);
    for (int t = 0; t < Tokens; t++)
      for (int i = 0; i < kRowsAtOnce; i++) store(t, n + i, result[t * kRowsAtOnce + i]);
  }
  for (; n < end; n++) {
    dot_products<1, Tokens>(weight + n * width, x, width, result);
    for (int t = 0; t < Tokens; t++) store(t, n, result[t]);
  }
}

// store(t, n, x[t] . weight[n]) for all tokens and all `count` rows of the weight [count, width].
template <typename T, typename Store>
void stream(const T* weight, int64_t count, const float* x, int64_t tokens, int64_t width, Store store) {
  const int64_t tasks = (count + kRowsPerTask - 1) / kRowsPerTask;
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const int64_t begin = task * kRowsPerTask, end = std::min(count, begin + kRowsPerTask);
      int64_t t = 0;
      const auto from = [&](int64_t token, int64_t n, float value) { store(t + token, n, value); };
      for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce)
        rows_times_tokens<kTokensAtOnce>(weight, begin, end, x + t * width, width, from);
      switch (tokens - t) {
        case 1: rows_times_tokens<1>(weight, begin, end, x + t * width, width, from); break;
        case 2: rows_times_tokens<2>(weight, begin, end, x + t * width, width, from); break;
        case 3: rows_times_tokens<3>(weight, begin, end, x + t * width, width, from); break;
      }
    }
  });
}

template <typename T>
void few_tokens(const Tensor& x, const Tensor& w_pivot, const Tensor& coeff, const int64_t* order, Tensor& y) {
  const int64_t tokens = x.size(0), d_in = x.size(1), rank = w_pivot.size(0), d_out = y.size(1);
  std::vector<int32_t> place(d_out);  // of every stored row: the inverse of order
  for (int64_t j = 0; j < d_out; j++) {
    TORCH_CHECK_INDEX(!order || (order[j] >= 0 && order[j] < d_out), "order[", j, "] is no stored row");
    place[order ? order[j] : j] = j;
  }
  const int32_t* rows = place.data();
  std::vector<float> scratch(tokens * (d_in + rank));
  float *wide = scratch.data(), *y_pivot = wide + tokens * d_in;
  const T* given = x.const_data_ptr<T>();
  for (int64_t i = 0; i < tokens * d_in; i++) wide[i] = float(given[i]);
  T* out = y.mutable_data_ptr<T>();
  const auto put = [=](int64_t t, int64_t stored, float value) {
    out[t * d_out + rows[stored]] = T(value);
  };
  stream(w_pivot.const_data_ptr<T>(), rank, wide, tokens, d_in, [=](int64_t t, int64_t n, float value) {
    y_pivot[t * rank + n] = value;
    put(t, n, value);
  });
  stream(coeff.const_data_ptr<T>(), d_out - rank, y_pivot, tokens, rank,
         [=](int64_t t, int64_t n, float value) { put(t, rank + n, value); });
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

#if defined(__AVX512F__) && defined(__AVX512VBMI2__)
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

template <typename T>
void restore_order(Tensor& y, const RowOrder& order, int64_t rank) {
  const int64_t d_out = y.size(1);
  T* values = y.mutable_data_ptr<T>();
  at::parallel_for(0, y.size(0), 16, [&](int64_t begin, int64_t end) {
    std::vector<T> stored(d_out + 64);  // what an expanding load may touch past the end is there
    for (int64_t t = begin; t < end; t++) {
      T* out = values + t * d_out;
      std::memcpy(stored.data(), out, d_out * sizeof(T));
      gather_rest(stored.data(), out, merge(stored.data(), out, rank, d_out, order), d_out, order);
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

Tensor linear_cpu(const Tensor& x, const Tensor& w_pivot, const Tensor& coeff, const std::optional<Tensor>& order) {
  const int64_t d_in = w_pivot.size(1), rank = w_pivot.size(0), d_out = rank + coeff.size(0);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == d_in, "wanted x [..., ", d_in, "], got ", x.sizes());
  TORCH_CHECK(coeff.size(1) == rank, "wanted coeff [out - r, ", rank, "], got ", coeff.sizes());
  TORCH_CHECK(x.scalar_type() == w_pivot.scalar_type() && x.scalar_type() == coeff.scalar_type(),
              "x, w_pivot and coeff must have one dtype");
  TORCH_CHECK(!order || (order->scalar_type() == at::kLong && order->numel() == d_out && order->is_contiguous()),
              "order must be ", d_out, " contiguous int64");
  auto shape = x.sizes().vec();
  shape.back() = d_out;
  const Tensor tokens = x.contiguous().view({-1, d_in}), first = w_pivot.contiguous(), second = coeff.contiguous();
  Tensor y = at::empty({tokens.size(0), d_out}, x.options());
  if (y.numel() == 0) return y.view(shape);
  const int64_t* indices = order ? order->const_data_ptr<int64_t>() : nullptr;
  const int64_t few = x.scalar_type() == at::kFloat ? kFewTokensFloat : kFewTokensHalf;
  if (tokens.size(0) <= few) {
    by_dtype(x.scalar_type(), [&](auto zero) { few_tokens<decltype(zero)>(tokens, first, second, indices, y); });
    return y.view(shape);
  }
  Tensor y_pivot = y.narrow(1, 0, rank), y_other = y.narrow(1, rank, d_out - rank);
  at::mm_out(y_pivot, tokens, first.t());
  if (d_out > rank) at::mm_out(y_other, y_pivot, second.t());
  if (indices) {
    const RowOrder row_order(indices, rank, d_out);
    by_dtype(x.scalar_type(), [&](auto zero) { restore_order<decltype(zero)>(y, row_order, rank); });
  }
  return y.view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(pifa, CPU, library) { library.impl("linear_cpu", &linear_cpu); }
