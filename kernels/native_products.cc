// Products with a model's matrices, for XLA on a CPU. A task is a block of outputs for all rows.
//
// XLA converts a bf16 or int8 operand of a product into a float32 copy. This reads each weight once, as it is stored.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native_handler.h"
#include "native_lanes.h"
#include "native_workers.h"

namespace kvcascade {
namespace {

constexpr int64_t kAheadBytes = 8192;  // of weights

// y[r, n] = scale[n] * sum over i of x[r, i] w[n, i], for kRows rows of x and kLanes / kRows outputs n: kLanes sums at once.
template <typename T, int kRows>
void ProductBlock(const float* x, const T* w, const float* scale, float* y, int64_t I, int64_t O, int64_t rows, int64_t first) {
  constexpr int kOutputs = kLanes / kRows;
  // Outputs are taken by fours at most: memory is read in few streams, and several registers of each before the next.
  constexpr int kGroup = std::min(kOutputs, 4), kDeep = kOutputs / kGroup;
  const int64_t outputs = std::min<int64_t>(kOutputs, O - first);
  // Past the last row or output the last one is computed again, and not written.
  const float* xs[kRows];
  for (int r = 0; r < kRows; ++r) xs[r] = x + std::min<int64_t>(r, rows - 1) * I;
  auto output = [&](int n) { return w + (first + std::min<int64_t>(n, outputs - 1)) * I; };
  Lanes sums[kLanes];
  const int64_t ahead = std::max<int64_t>(kGroup * I, kAheadBytes / sizeof(T)), whole_lanes = I / kLanes * kLanes;
#pragma GCC unroll 4
  for (int group = 0; group < kOutputs; group += kGroup) {
    const T* ws[kGroup];
    for (int n = 0; n < kGroup; ++n) ws[n] = output(group + n);
    Lanes parts[kDeep][kRows][kGroup] = {};
    auto add = [&](int64_t i, auto deep) {
#pragma GCC unroll 4
      for (int d = 0; d < decltype(deep)::value; ++d) {
        Lanes row[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) std::memcpy(&row[r], xs[r] + i + d * kLanes, sizeof(Lanes));
#pragma GCC unroll 4
        for (int n = 0; n < kGroup; ++n) {
          if ((i + d * kLanes) % (64 / sizeof(T)) == 0) __builtin_prefetch(ws[n] + i + d * kLanes + ahead);
          const Lanes weight = Widened(ws[n] + i + d * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) parts[d][r][n] += row[r] * weight;
        }
      }
    };
    int64_t i = 0;
    for (; i + kDeep * kLanes <= I; i += kDeep * kLanes) add(i, std::integral_constant<int, kDeep>());
    for (; i < whole_lanes; i += kLanes) add(i, std::integral_constant<int, 1>());
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kGroup; ++n) {
        Lanes sum = parts[0][r][n];
#pragma GCC unroll 4
        for (int d = 1; d < kDeep; ++d) sum += parts[d][r][n];
        sums[r * kOutputs + group + n] = sum;
      }
    }
  }
  float whole[kLanes];
  const Lanes folded = Sums(sums);
  std::memcpy(whole, &folded, sizeof whole);
  for (int n = 0; n < outputs; ++n) {
    const T* weights = output(n);
    for (int r = 0; r < std::min<int64_t>(kRows, rows); ++r) {
      float sum = whole[r * kOutputs + n];
      for (int64_t rest = whole_lanes; rest < I; ++rest) sum += xs[r][rest] * Number(weights[rest]);
      y[r * O + first + n] = scale ? sum * scale[first + n] : sum;
    }
  }
}

struct Matrix {
  const void* weight;  // [O, I]
  const float* scale;  // [O], or null
  float* y;            // [R, O]
  int64_t outputs;     // O
};

// Rows in groups, so that a weight comes from memory once and is converted for several rows at a time.
template <typename T>
void Products(ffi::ThreadPool& pool, const float* x, const std::vector<Matrix>& matrices, int64_t I, int64_t rows) {
  int64_t weights = 0, tasks = 0;
  for (const Matrix& matrix : matrices) weights += matrix.outputs * I;
  const int64_t size = sizeof(T);
  // Some 4 us of work for each thread: about as many bytes to be read, or products with so many rows.
  const int64_t threads = std::clamp<int64_t>(weights * (size + rows) / 200'000, 1, pool.num_threads());
  // What is read in one long piece comes faster; short ones keep all threads at work to the end.
  const int64_t piece = std::clamp<int64_t>(weights * size / (2 * threads), 96 << 10, 576 << 10);
  const int64_t block = std::max<int64_t>(1, piece / (I * size * kLanes)) * kLanes;
  auto blocks = [block](const Matrix& matrix) { return (matrix.outputs + block - 1) / block; };
  for (const Matrix& matrix : matrices) tasks += blocks(matrix);
  Shared().Run(tasks, threads, [&](int64_t task) {
    const Matrix* matrix = matrices.data();
    for (; task >= blocks(*matrix); ++matrix) task -= blocks(*matrix);
    const int64_t O = matrix->outputs, end = std::min(O, (task + 1) * block);
    const T* w = static_cast<const T*>(matrix->weight);
    auto some = [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      for (int64_t n = task * block; n < end; n += kLanes / kRows) {
        for (int64_t r = 0; r < rows; r += kRows) {
          ProductBlock<T, kRows>(x + r * I, w, matrix->scale, matrix->y + r * O, I, O, rows - r, n);
        }
      }
    };
    if (rows > 2) {
      some(std::integral_constant<int, 4>());
    } else if (rows == 2) {
      some(std::integral_constant<int, 2>());
    } else {
      some(std::integral_constant<int, 1>());
    }
  });
}

// x [R, I] times the transposes of matrices [O, I], all in float32, all in bf16, or all in int8 with a scale per output.
// args: the arrays of each matrix; rets: each product.
ffi::Error Product(ffi::ThreadPool pool, int64_t arrays, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  std::vector<Matrix> matrices;
  ffi::DataType type = ffi::DataType::INVALID;
  for (size_t i = 0; i < rets.size(); ++i) {
    auto weight = args.get<ffi::AnyBuffer>(i * arrays);
    if (!weight.has_value()) return weight.error();
    if (i > 0 && weight->element_type() != type) return ffi::Error::InvalidArgument("matrices in several formats");
    type = weight->element_type();
    const float* scale = arrays > 1 ? args.get<ffi::Buffer<ffi::F32>>(i * arrays + 1)->typed_data() : nullptr;
    matrices.push_back({weight->untyped_data(), scale, (*rets.get<ffi::Buffer<ffi::F32>>(i))->typed_data(), weight->dimensions()[0]});
  }
  const int64_t rows = x.dimensions()[0], I = x.dimensions()[1];
  switch (type) {
    case ffi::F32: Products<float>(pool, x.typed_data(), matrices, I, rows); break;
    case ffi::BF16: Products<uint16_t>(pool, x.typed_data(), matrices, I, rows); break;
    case ffi::S8: Products<int8_t>(pool, x.typed_data(), matrices, I, rows); break;
    default: return ffi::Error::InvalidArgument("unknown format of weights");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_product, Guarded(Product),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("arrays")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

}  // namespace kvcascade
