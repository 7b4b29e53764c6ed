// Products with a model's matrices, for XLA on a CPU, which reads weights as they are stored. A task is a block of outputs.
//
// Float32 weights are multiplied by x in float32, bf16 and int8 weights by x in bf16; such products are exact in float32. A row's
// sums are in one order for any number of rows, so its results are the same to the last bit: over the operands of each lane, and then
// over the lanes, halves first (Sums).

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native_handler.h"
#include "native_operands.h"
#include "native_workers.h"

namespace kvcascade {
namespace {

constexpr int64_t kAheadBytes = 8192;      // of weights
constexpr int64_t kPanelBytes = 512 << 10;  // of x at a time: what stays in a core's second cache
constexpr int kFewRows = 16;                // from 17 on a panel of 32 is quicker
constexpr int kGroup = 16;                  // outputs
// Outputs whose sums for two panels are held in registers, of which as many are left for operands, or for the sums of a group.
#if defined(__AVX512F__)
template <typename T>
constexpr int kOutputs = kGrouped<T> ? 4 : 8;
#else
template <typename T>
constexpr int kOutputs = kGrouped<T> ? 2 : 4;
#endif

// Of the inputs, padded to whole groups where there are such.
struct Shape {
  int64_t inputs, operands, groups;
  int64_t sums() const { return RoundUp(groups) / kLanes; }
  int64_t row() const { return operands + sums(); }  // registers of a row of x: operands, and the groups' sums, one to a lane
  int64_t group() const { return operands / groups; }
};

// What the sums of some outputs are multiplied by: [outputs], [outputs, groups], or null; and, or null, what is added to every weight of
// a group [outputs, groups filled up with zeros to whole registers].
struct Scales {
  const float* scale;
  const float* shift;
};

// Few rows: x is [R, operands], a lane is an input, and weights are converted again for every eight rows.

// The sums of x's operands in each group, for weights of type T; past the last group zeros.
template <typename T>
inline void SumGroups(Register* row, const Shape& shape) {
  for (int64_t s = 0; s < shape.sums(); ++s) {
    Lanes sums[kLanes] = {};
    for (int64_t g = s * kLanes; g < std::min((s + 1) * kLanes, shape.groups); ++g) {
      Lanes& sum = sums[g % kLanes];
      for (int64_t i = 0; i < shape.group(); ++i) sum = Plus<T>(sum, row[g * shape.group() + i].lanes, Ones<T>());
    }
    row[shape.operands + s].lanes = Sums(sums);
  }
}

// I inputs are there, the others are zeros.
template <typename T, typename X>
void Convert(const X* x, int64_t rows, int64_t I, const Shape& shape, Register* to) {
  for (int64_t r = 0; r < rows; ++r, to += shape.row()) {
    for (int64_t n = 0, i = 0; n < shape.operands; ++n, i += kInputs<X>) to[n].lanes = Operand(x + r * I, i, I - i);
    SumGroups<T>(to, shape);
  }
}

// y[r, n] = the sum over i of x[r, i] w[n, i], scaled, for kRows rows of x and kLanes / kRows outputs n: kLanes sums at once.
template <typename T, int kRows>
void Block(const Register* x, const T* w, Scales scales, float* y, int64_t rows, int64_t outputs, const Shape& shape, int64_t O) {
  constexpr int kAtOnce = kLanes / kRows;
  constexpr int kStreams = std::min(kAtOnce, 4);  // from memory at a time
  const int64_t I = shape.inputs, ahead = std::max<int64_t>(kStreams * I, kAheadBytes / 64 * kLine<T>), whole = I / kInputs<T>;
  // Past the last row or output the last one is computed again, and not written.
  const Register* xs[kRows];
  for (int r = 0; r < kRows; ++r) xs[r] = x + std::min<int64_t>(r, rows - 1) * shape.row();
  Lanes sums[kLanes];
#pragma GCC unroll 4
  for (int first = 0; first < kAtOnce; first += kStreams) {
    const T* ws[kStreams];
    int64_t index[kStreams];
    for (int n = 0; n < kStreams; ++n) {
      index[n] = std::min<int64_t>(first + n, outputs - 1);
      ws[n] = At(w, index[n] * I);
    }
    Lanes held[kRows][kStreams] = {};
    auto add = [&](Lanes(&to)[kRows][kStreams], int64_t operand, int64_t count) {
      const int64_t i = operand * kInputs<T>;
#pragma GCC unroll 4
      for (int n = 0; n < kStreams; ++n) {
        if (i % kLine<T> == 0) __builtin_prefetch(At(ws[n], i + ahead));
        const Lanes weight = Operand(ws[n], i, count);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) to[r][n] = Plus<T>(to[r][n], xs[r][operand].lanes, weight);
      }
    };
    if constexpr (kGrouped<T>) {
      for (int64_t g = 0; g < shape.groups; ++g) {
        Lanes part[kRows][kStreams] = {};
        for (int64_t i = 0; i < shape.group(); ++i) add(part, g * shape.group() + i, kInputs<T>);
#pragma GCC unroll 4
        for (int n = 0; n < kStreams; ++n) {
          const int64_t at = index[n] * shape.groups + g;
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            held[r][n] = Fused(held[r][n], part[r][n], Splat(scales.scale[at]));
          }
        }
      }
      for (int64_t s = 0; scales.shift && s < shape.sums(); ++s) {
#pragma GCC unroll 4
        for (int n = 0; n < kStreams; ++n) {
          const Lanes shift = Widened(scales.shift + (index[n] * shape.sums() + s) * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) held[r][n] = Fused(held[r][n], xs[r][shape.operands + s].lanes, shift);
        }
      }
    } else {
      for (int64_t operand = 0; operand < whole; ++operand) add(held, operand, kInputs<T>);
      if (I % kInputs<T>) add(held, whole, I % kInputs<T>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kStreams; ++n) sums[r * kAtOnce + first + n] = held[r][n];
    }
  }
  float each[kLanes];
  const Lanes folded = Sums(sums);
  std::memcpy(each, &folded, sizeof each);
  for (int n = 0; n < std::min<int64_t>(kAtOnce, outputs); ++n) {
    for (int r = 0; r < std::min<int64_t>(kRows, rows); ++r) {
      const float sum = each[r * kAtOnce + n];
      y[r * O + n] = scales.scale && !kGrouped<T> ? sum * scales.scale[n] : sum;
    }
  }
}

// The scales of the outputs from n on.
template <typename T>
inline Scales From(const Scales& scales, int64_t n, const Shape& shape) {
  const int64_t at = n * (kGrouped<T> ? shape.groups : 1), shift_at = n * shape.sums() * kLanes;
  return {scales.scale ? scales.scale + at : nullptr, scales.shift ? scales.shift + shift_at : nullptr};
}

// kGroup outputs at most for all rows; for the next rows the weights come from the nearest cache.
template <typename T>
void FewRows(const Register* x, const T* w, const Scales& scales, float* y, int64_t rows, int64_t outputs, const Shape& shape,
             int64_t O) {
  int64_t r = 0;
  while (r < rows) {  // clang does not see that a loop's lambda changes what it counts
    auto some = [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      for (int64_t n = 0; n < outputs; n += kLanes / kRows) {
        const T* const from = At(w, n * shape.inputs);
        Block<T, kRows>(x + r * shape.row(), from, From<T>(scales, n, shape), y + r * O + n, rows - r, outputs - n, shape, O);
      }
      r += kRows;
    };
    if (rows - r > 4 && kLanes > 4) {
      some(std::integral_constant<int, std::min(8, kLanes)>());
    } else if (rows - r > 2) {
      some(std::integral_constant<int, 4>());
    } else if (rows - r > 1) {
      some(std::integral_constant<int, 2>());
    } else {
      some(std::integral_constant<int, 1>());
    }
  }
}

// Many rows: x is in panels of kLanes rows, [lanes of an operand, its row of registers], a lane is a row, and weights are converted once, into a
// buffer in the nearest cache, for all panels.

// When Multiply comes to an operand's lane: the lane's bits in reverse.
constexpr int Place(int lane) {
  int place = 0;
  for (int bit = 1; bit < kLanes; bit *= 2) place = 2 * place + (lane & bit ? 1 : 0);
  return place;
}

// Past the last row the last one is taken again.
template <typename T, typename X>
void Pack(const X* x, int64_t rows, int64_t I, const Shape& shape, Register* panel) {
  static thread_local std::vector<Register> held;
  held.resize(std::max<size_t>(held.size(), kLanes * shape.row()));
  for (int r = 0; r < kLanes; ++r) {
    Convert<T>(x + std::min<int64_t>(r, rows - 1) * I, 1, I, shape, held.data() + r * shape.row());
  }
  for (int64_t n = 0; n < shape.row(); ++n) {
    Lanes block[kLanes];
    for (int r = 0; r < kLanes; ++r) block[r] = held[r * shape.row() + n].lanes;
    Transpose(block);
    for (int lane = 0; lane < kLanes; ++lane) panel[Place(lane) * shape.row() + n].lanes = block[lane];
  }
}

template <typename T, int kPanels>
struct Tile {
  Lanes sums[kPanels][kOutputs<T>];
};

// Bytes of kOutputs outputs' stored weights for each step of Multiply.
template <typename T>
constexpr int kNext = kOutputs<T> * Bytes<T>(kInputs<T>) / kLanes;

// Sums of kOutputs outputs and kPanels panels, over lanes `lane`, `lane` + distance and so on of the operands, in the order of Block.
// `next` are weights that are brought from memory meanwhile.
template <typename T, int kPanels, int distance = 1>
void Multiply(const float* weights, const Register* panels, const Shape& shape, const Scales& scales, const char* next, int lane,
              Tile<T, kPanels>& to) {
  const int64_t row = shape.row(), panel_size = kLanes * row;
  if constexpr (distance < kLanes / 2) {
    const int64_t lanes = kLanes / (2 * distance);
    Tile<T, kPanels> more = {};
    Multiply<T, kPanels, 2 * distance>(weights, panels, shape, scales, next, lane, to);
    panels += lanes * row, next += lanes * shape.operands * kNext<T>;
    Multiply<T, kPanels, 2 * distance>(weights, panels, shape, scales, next, lane + distance, more);
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma GCC unroll 8
      for (int n = 0; n < kOutputs<T>; ++n) to.sums[panel][n] += more.sums[panel][n];
    }
    return;
  }
  for (int half = 0; half < 2; ++half, panels += row) {
    Tile<T, kPanels> held = {};
    auto add = [&](Tile<T, kPanels>& sums, int64_t i) {
      __builtin_prefetch(next, 0, 2);
      next += kNext<T>;
#pragma GCC unroll 8
      for (int n = 0; n < kOutputs<T>; ++n) {
        const Lanes weight = Splat(weights[(i * kOutputs<T> + n) * kLanes + lane + half * distance]);
#pragma GCC unroll 2
        for (int panel = 0; panel < kPanels; ++panel) {
          sums.sums[panel][n] = Plus<T>(sums.sums[panel][n], panels[panel * panel_size + i].lanes, weight);
        }
      }
    };
    if constexpr (kGrouped<T>) {
      for (int64_t g = 0; g < shape.groups; ++g) {
        Tile<T, kPanels> part = {};
        for (int64_t i = 0; i < shape.group(); ++i) add(part, g * shape.group() + i);
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs<T>; ++n) {
#pragma GCC unroll 2
          for (int panel = 0; panel < kPanels; ++panel) {
            Lanes& sum = held.sums[panel][n];
            sum = Fused(sum, part.sums[panel][n], Splat(scales.scale[n * shape.groups + g]));
          }
        }
      }
      for (int64_t s = 0; scales.shift && s < shape.sums(); ++s) {
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs<T>; ++n) {
          const Lanes shift = Splat(scales.shift[(n * shape.sums() + s) * kLanes + lane + half * distance]);
#pragma GCC unroll 2
          for (int panel = 0; panel < kPanels; ++panel) {
            Lanes& sum = held.sums[panel][n];
            sum = Fused(sum, panels[panel * panel_size + shape.operands + s].lanes, shift);
          }
        }
      }
    } else {
      for (int64_t i = 0; i < shape.operands; ++i) add(held, i);
    }
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma GCC unroll 8
      for (int n = 0; n < kOutputs<T>; ++n) {
        const Lanes sum = held.sums[panel][n];
        to.sums[panel][n] = half ? to.sums[panel][n] + sum : sum;
      }
    }
  }
}

// y[r, n] for the rows of a panel and the outputs of a group, scaled.
inline void Write(Lanes* sums, const float* scale, float* y, int64_t rows, int64_t outputs, int64_t O) {
  for (int64_t first = 0; first < outputs; first += kLanes) {
    const size_t bytes = std::min<int64_t>(kLanes, outputs - first) * sizeof(float);
    Transpose(sums + first);
    Lanes factor = Lanes{} + 1.0f;
    if (scale) std::memcpy(&factor, scale + first, bytes);
    for (int r = 0; r < std::min<int64_t>(kLanes, rows); ++r) {
      const Lanes row = sums[first + r] * factor;
      if (bytes == sizeof row) {
        std::memcpy(y + r * O + first, &row, sizeof row);
      } else {
        std::memcpy(y + r * O + first, &row, bytes);
      }
    }
  }
}

// kGroup outputs at most for all rows.
template <typename T>
void ManyRows(const Register* panels, const T* w, const Scales& scales, float* y, int64_t rows, int64_t outputs,
              const Shape& shape, int64_t O) {
  const int64_t operands = shape.operands, I = shape.inputs;
  static thread_local std::vector<Register> converted;
  converted.resize(std::max<size_t>(converted.size(), operands * kGroup));
  for (int n = 0; n < kGroup; ++n) {
    const T* weights = At(w, std::min<int64_t>(n, outputs - 1) * I);
    Register* const to = converted.data() + n / kOutputs<T> * kOutputs<T> * operands + n % kOutputs<T>;
    for (int64_t i = 0; i < operands; ++i) {
      to[i * kOutputs<T>].lanes = Operand(weights, i * kInputs<T>, I - i * kInputs<T>);
    }
  }
  int64_t r = 0;
  while (r < rows) {
    auto some = [&](auto count) {
      constexpr int kPanels = decltype(count)::value;
      Lanes sums[kPanels][kGroup];
      for (int n = 0; n < kGroup; n += kOutputs<T>) {
        const float* weights = reinterpret_cast<const float*>(converted.data() + n * operands);
        const char* next = reinterpret_cast<const char*>(At(w, (kGroup + n) * I));
        Tile<T, kPanels> tile;
        Multiply<T, kPanels>(weights, panels + r * shape.row(), shape, From<T>(scales, n, shape), next, 0, tile);
        for (int panel = 0; panel < kPanels; ++panel) {
          std::memcpy(sums[panel] + n, tile.sums[panel], sizeof tile.sums[panel]);
        }
      }
      for (int panel = 0; panel < kPanels; ++panel, r += kLanes) {
        Write(sums[panel], kGrouped<T> ? nullptr : scales.scale, y + r * O, rows - r, outputs, O);
      }
    };
    if (rows - r > kLanes) {
      some(std::integral_constant<int, 2>());
    } else {
      some(std::integral_constant<int, 1>());
    }
  }
}

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
