// Products with a model's matrices, for XLA on a CPU, which reads weights as they are stored. A task is a block of outputs.
//
// Float32 weights are multiplied by x in float32, bf16 and int8 weights by x in bf16; such products are exact in float32. A row's
// sums are in one order for any number of rows, so its results are the same to the last bit: over the operands of each lane, and then
// over the lanes, halves first (Sums).

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native_few_rows.h"
#include "native_handler.h"
#include "native_many_rows.h"
#include "native_workers.h"

namespace kvcascade {
namespace {

constexpr int64_t kPanelBytes = 512 << 10;  // of x at a time: what stays in a core's second cache
constexpr int kFewRows = 16;                // from 17 on a panel of 32 is quicker

struct Matrix {
  const void* weight;     // [O, inputs]
  const void* scale;      // [O] or [O, groups], or null
  const void* low;        // [O, groups] or null: then it is -kMiddle scales
  bool wide_scale, wide_low;  // float32, else of 16 bits
  float* y;               // [R, O]
  int64_t outputs;        // O
};

// Scales of kGroup outputs from n on, past the last one its again; of groups widened, and shifted as the codes are.
template <typename T>
Scales Scaled(const Matrix& matrix, int64_t n, const Shape& shape) {
  if constexpr (!kGrouped<T>) return {matrix.scale ? static_cast<const float*>(matrix.scale) + n : nullptr, nullptr};
  const int64_t groups = shape.groups, padded = shape.sums() * kLanes;
  static thread_local std::vector<float> held;
  held.resize(std::max<size_t>(held.size(), kGroup * (groups + padded) + kLanes));
  float *const scale = held.data(), *const shift = scale + kGroup * groups + kLanes;
  auto some = [&](const void* from, bool wide, int64_t at, int64_t count) {
    const char* const next = static_cast<const char*>(from) + (wide ? 4 : 2) * (at + 2 * kGroup * groups);
    __builtin_prefetch(next);
    return wide ? Operand(static_cast<const float*>(from) + at, 0, count) : Halves(static_cast<const uint16_t*>(from) + at, count);
  };
  for (int64_t i = 0; i < kGroup; ++i) {
    const int64_t row = std::min(n + i, matrix.outputs - 1) * groups;
    for (int64_t g = 0; g < groups; g += kLanes) {
      const Lanes wide = some(matrix.scale, matrix.wide_scale, row + g, groups - g);
      std::memcpy(scale + i * groups + g, &wide, sizeof wide);  // what is too much lies where the next row's come
      if (!matrix.low) continue;
      const Lanes all = Fused(some(matrix.low, matrix.wide_low, row + g, groups - g), wide, Lanes{} + kMiddle);
      std::memcpy(shift + i * padded + g, &all, sizeof all);
    }
  }
  return {scale, matrix.low ? shift : nullptr};
}

// T is the type of the weights, X that of x: float for float, else bf16. I inputs of x are there.
template <typename T, typename X = std::conditional_t<std::is_same_v<T, float>, float, uint16_t>>
void Products(ffi::ThreadPool& pool, const X* x, const std::vector<Matrix>& matrices, int64_t I, const Shape& shape, int64_t R) {
  int64_t outputs = 0, tasks = 0;
  for (const Matrix& matrix : matrices) outputs += matrix.outputs;
  const int64_t size = Bytes<T>(shape.inputs);
  // Some 4 us of work for each thread: about as many bytes to be read, or products with so many rows.
  const int64_t threads = std::clamp<int64_t>(outputs * (size + R * I) / 200'000, 1, pool.num_threads());
  // What is read in one long piece comes faster; short ones keep all threads at work to the end, which counts with many rows.
  const bool few = R <= kFewRows;
  const int64_t piece = std::clamp<int64_t>(outputs * size / (2 * threads), 96 << 10, 576 << 10) / (few ? 1 : 4);
  const int64_t block = std::max<int64_t>(1, piece / (size * kGroup)) * kGroup;
  auto blocks = [block](const Matrix& matrix) { return (matrix.outputs + block - 1) / block; };
  for (const Matrix& matrix : matrices) tasks += blocks(matrix);
  const int64_t two_panels = 2 * kLanes * shape.row() * sizeof(Register);
  const int64_t most = std::min(RoundUp(R), std::max<int64_t>(1, kPanelBytes / two_panels) * 2 * kLanes);
  static thread_local std::vector<Register> held;
  held.resize(std::max<size_t>(held.size(), most * shape.row()));
  Register* const laid = held.data();  // this thread's, for all of them
  for (int64_t first = 0; first < R; first += most) {
    const int64_t rows = std::min(most, R - first);
    Shared().Run(RoundUp(rows) / kLanes, few ? 1 : threads, [&](int64_t panel) {
      const int64_t r = panel * kLanes;
      const X* const from = x + (first + r) * I;
      (few ? Convert<T, X> : Pack<T, X>)(from, std::min<int64_t>(kLanes, rows - r), I, shape, laid + r * shape.row());
    });
    Shared().Run(tasks, threads, [&](int64_t task) {
      const Matrix* matrix = matrices.data();
      for (; task >= blocks(*matrix); ++matrix) task -= blocks(*matrix);
      const int64_t O = matrix->outputs, end = std::min(O, (task + 1) * block);
      for (int64_t n = task * block; n < end; n += kGroup) {
        const T* const w = At(static_cast<const T*>(matrix->weight), n * shape.inputs);
        float* const y = matrix->y + first * O + n;
        const int64_t some = std::min<int64_t>(kGroup, end - n);
        (few ? FewRows<T> : ManyRows<T>)(laid, w, Scaled<T>(*matrix, n, shape), y, rows, some, shape, O);
      }
    });
  }
}

// x [R, I] times the transposes of matrices [O, I], all in float32, as x is then, or in bf16, or in int8 with a scale per output, or in
// four bits [O, bytes of inputs that are padded to whole groups], with a scale, and some with the value of code 0, per output and group.
// args: the arrays of each matrix; rets: each product.
ffi::Error Product(ffi::ThreadPool pool, int64_t arrays, ffi::AnyBuffer x, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  std::vector<Matrix> matrices;
  ffi::DataType type = ffi::DataType::INVALID;
  int64_t bytes = 0, groups = 0;
  for (size_t i = 0; i < rets.size(); ++i) {
    auto weight = args.get<ffi::AnyBuffer>(i * arrays);
    if (!weight.has_value()) return weight.error();
    if (i > 0 && weight->element_type() != type) return ffi::Error::InvalidArgument("matrices in several formats");
    type = weight->element_type();
    Matrix matrix{};
    auto put = [&](int64_t index, const void*& to, bool& wide) {
      if (index >= arrays) return;
      auto found = args.get<ffi::AnyBuffer>(i * arrays + index);
      to = found->untyped_data(), wide = found->element_type() == ffi::F32;
      if (type == ffi::U8) groups = found->dimensions()[1];
    };
    put(1, matrix.scale, matrix.wide_scale);
    put(2, matrix.low, matrix.wide_low);
    matrix.weight = weight->untyped_data(), matrix.outputs = weight->dimensions()[0], bytes = weight->dimensions()[1];
    matrix.y = (*rets.get<ffi::Buffer<ffi::F32>>(i))->typed_data();
    matrices.push_back(matrix);
  }
  const int64_t rows = x.dimensions()[0], I = x.dimensions()[1];
  const void* const data = x.untyped_data();
  const bool fits = x.element_type() == (type == ffi::F32 ? ffi::F32 : ffi::BF16);
  if (!fits) return ffi::Error::InvalidArgument("x in another format than its weights need");
  const auto* const narrow = static_cast<const uint16_t*>(data);
  switch (type) {
    case ffi::F32: Products<float>(pool, static_cast<const float*>(data), matrices, I, {I, Operands<float>(I), 0}, rows); break;
    case ffi::BF16: Products<uint16_t>(pool, narrow, matrices, I, {I, Operands<uint16_t>(I), 0}, rows); break;
    case ffi::S8: Products<int8_t>(pool, narrow, matrices, I, {I, Operands<int8_t>(I), 0}, rows); break;
    case ffi::U8: Products<Int4>(pool, narrow, matrices, I, {2 * bytes, Operands<Int4>(2 * bytes), groups}, rows); break;
    default: return ffi::Error::InvalidArgument("unknown format of weights");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_product, Guarded(Product),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("arrays")
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

}  // namespace kvcascade
