// Products with a model's matrices, for XLA on a CPU, which reads weights as they are stored. A task is a block of outputs.
//
// Float32 weights are multiplied by x in float32, bf16 and int8 weights by x in bf16; such products are exact in float32. A row's
// sums are in one order for any number of rows, so its results are the same to the last bit: over the operands of each lane, and then
// over the lanes, halves first (Sums).

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "native_handler.h"
#include "native_lanes.h"
#include "native_workers.h"

namespace kvcascade {
namespace {

constexpr int64_t kAheadBytes = 8192;      // of weights
constexpr int64_t kPanelBytes = 512 << 10;  // of x at a time: what stays in a core's second cache
constexpr int kFewRows = 16;                // from 17 on a panel of 32 is quicker
constexpr int kGroup = 16;                  // outputs
// Outputs whose sums for two panels are held in registers, of which as many are left for operands.
#if defined(__AVX512F__)
constexpr int kOutputs = 8;
#else
constexpr int kOutputs = 4;
#endif

// An operand is what is multiplied at a time: kLanes inputs in float32, or twice as many in bf16 where the processor multiplies
// pairs.
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kPairs = !std::is_same_v<T, float>;
inline Lanes Pairs(const int8_t* from) {
  return reinterpret_cast<Lanes>(_mm512_cvtne2ps_pbh(Widened(from + kLanes), Widened(from)));
}
inline Lanes Pairs(const uint16_t* from) {
  Lanes to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
#else
template <typename T>
constexpr bool kPairs = false;
#endif

template <typename T>
constexpr int kInputs = kPairs<T> ? 2 * kLanes : kLanes;

// kInputs numbers, those from `count` on as zeros.
template <typename T>
inline Lanes Operand(const T* from, int64_t count) {
  T some[kInputs<T>];
  if (count < kInputs<T>) {
    std::fill(std::copy(from, from + count, some), some + kInputs<T>, 0);
    from = some;
  }
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) return Pairs(from);
#endif
  return Widened(from);
}

// One lane's number, or pair, in every lane.
inline Lanes Splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);  // whatever the bits
#else
  return x - Lanes{};
#endif
}

template <typename T>
constexpr int64_t Operands(int64_t inputs) {
  return (inputs + kInputs<T> - 1) / kInputs<T>;
}

// sum + x y, where x and y are operands for weights of type T.
template <typename T>
inline Lanes Plus(Lanes sum, Lanes x, Lanes y) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
#endif
  return sum + x * y;
}

// Few rows: x is [R, operands], a lane is an input, and weights are converted again for every eight rows.

template <typename T>
void Convert(const T* x, int64_t rows, int64_t I, Register* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < I; i += kInputs<T>, ++to) to->lanes = Operand(x + r * I + i, I - i);
  }
}

// y[r, n] = scale[n] * sum over i of x[r, i] w[n, i], for kRows rows of x and kLanes / kRows outputs n: kLanes sums at once.
template <typename T, int kRows>
void Block(const Register* x, const T* w, const float* scale, float* y, int64_t rows, int64_t outputs, int64_t I,
           int64_t O) {
  constexpr int kAtOnce = kLanes / kRows;
  constexpr int kStreams = std::min(kAtOnce, 4);  // from memory at a time
  const int64_t ahead = std::max<int64_t>(kStreams * I, kAheadBytes / sizeof(T)), whole = I / kInputs<T>;
  // Past the last row or output the last one is computed again, and not written.
  const Register* xs[kRows];
  for (int r = 0; r < kRows; ++r) xs[r] = x + std::min<int64_t>(r, rows - 1) * Operands<T>(I);
  Lanes sums[kLanes];
#pragma GCC unroll 4
  for (int first = 0; first < kAtOnce; first += kStreams) {
    const T* ws[kStreams];
    for (int n = 0; n < kStreams; ++n) ws[n] = w + std::min<int64_t>(first + n, outputs - 1) * I;
    Lanes held[kRows][kStreams] = {};
    auto add = [&](int64_t operand, int64_t count) {
      const int64_t i = operand * kInputs<T>;
#pragma GCC unroll 4
      for (int n = 0; n < kStreams; ++n) {
        if (i % (64 / sizeof(T)) == 0) __builtin_prefetch(ws[n] + i + ahead);
        const Lanes weight = Operand(ws[n] + i, count);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) held[r][n] = Plus<T>(held[r][n], xs[r][operand].lanes, weight);
      }
    };
    for (int64_t operand = 0; operand < whole; ++operand) add(operand, kInputs<T>);
    if (I % kInputs<T>) add(whole, I % kInputs<T>);
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
      y[r * O + n] = scale ? sum * scale[n] : sum;
    }
  }
}

// kGroup outputs at most for all rows; for the next rows the weights come from the nearest cache.
template <typename T>
void FewRows(const Register* x, const T* w, const float* scale, float* y, int64_t rows, int64_t outputs, int64_t I,
             int64_t O) {
  int64_t r = 0;
  while (r < rows) {  // clang does not see that a loop's lambda changes what it counts
    auto some = [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      for (int64_t n = 0; n < outputs; n += kLanes / kRows) {
        const float* const scales = scale ? scale + n : nullptr;
        Block<T, kRows>(x + r * Operands<T>(I), w + n * I, scales, y + r * O + n, rows - r, outputs - n, I, O);
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

// Many rows: x is in panels of kLanes rows, [lanes of an operand, operands], a lane is a row, and weights are converted once, into a
// buffer in the nearest cache, for all panels.

// When Multiply comes to an operand's lane: the lane's bits in reverse.
constexpr int Place(int lane) {
  int place = 0;
  for (int bit = 1; bit < kLanes; bit *= 2) place = 2 * place + (lane & bit ? 1 : 0);
  return place;
}

// Past the last row the last one is taken again.
template <typename T>
void Pack(const T* x, int64_t rows, int64_t I, Register* panel) {
  const int64_t operands = Operands<T>(I);
  for (int64_t n = 0; n < operands; ++n) {
    Lanes block[kLanes];
    const int64_t i = n * kInputs<T>;
    for (int r = 0; r < kLanes; ++r) block[r] = Operand(x + std::min<int64_t>(r, rows - 1) * I + i, I - i);
    Transpose(block);
    for (int lane = 0; lane < kLanes; ++lane) panel[Place(lane) * operands + n].lanes = block[lane];
  }
}

template <int kPanels>
struct Tile {
  Lanes sums[kPanels][kOutputs];
};

// Bytes of kOutputs outputs' stored weights for each step of Multiply.
template <typename T>
constexpr int kNext = kOutputs * kInputs<T> * sizeof(T) / kLanes;

// Sums of kOutputs outputs and kPanels panels, over lanes `lane`, `lane` + distance and so on of the operands, in the order of Block.
// `next` are weights that are brought from memory meanwhile.
template <typename T, int kPanels, int distance = 1>
void Multiply(const float* weights, const Register* panels, int64_t operands, const char* next, int lane,
              Tile<kPanels>& to) {
  if constexpr (distance < kLanes / 2) {
    const int64_t steps = kLanes / (2 * distance) * operands;
    Tile<kPanels> more;
    Multiply<T, kPanels, 2 * distance>(weights, panels, operands, next, lane, to);
    panels += steps, next += steps * kNext<T>;
    Multiply<T, kPanels, 2 * distance>(weights, panels, operands, next, lane + distance, more);
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma GCC unroll 8
      for (int n = 0; n < kOutputs; ++n) to.sums[panel][n] += more.sums[panel][n];
    }
    return;
  }
  for (int half = 0; half < 2; ++half) {
    Tile<kPanels> held = {};
    for (int64_t i = 0; i < operands; ++i, ++panels, next += kNext<T>) {
      __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 8
      for (int n = 0; n < kOutputs; ++n) {
        const Lanes weight = Splat(weights[(i * kOutputs + n) * kLanes + lane + half * distance]);
#pragma GCC unroll 2
        for (int panel = 0; panel < kPanels; ++panel) {
          held.sums[panel][n] = Plus<T>(held.sums[panel][n], panels[panel * kLanes * operands].lanes, weight);
        }
      }
    }
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma GCC unroll 8
      for (int n = 0; n < kOutputs; ++n) {
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
void ManyRows(const Register* panels, const T* w, const float* scale, float* y, int64_t rows, int64_t outputs,
              int64_t I, int64_t O) {
  const int64_t operands = Operands<T>(I);
  static thread_local std::vector<Register> converted;
  converted.resize(std::max<size_t>(converted.size(), operands * kGroup));
  for (int n = 0; n < kGroup; ++n) {
    const T* weights = w + std::min<int64_t>(n, outputs - 1) * I;
    Register* const to = converted.data() + n / kOutputs * kOutputs * operands + n % kOutputs;
    for (int64_t i = 0; i < operands; ++i) {
      to[i * kOutputs].lanes = Operand(weights + i * kInputs<T>, I - i * kInputs<T>);
    }
  }
  int64_t r = 0;
  while (r < rows) {
    auto some = [&](auto count) {
      constexpr int kPanels = decltype(count)::value;
      Lanes sums[kPanels][kGroup];
      for (int n = 0; n < kGroup; n += kOutputs) {
        const float* weights = reinterpret_cast<const float*>(converted.data() + n * operands);
        const char* next = reinterpret_cast<const char*>(w + (kGroup + n) * I);
        Tile<kPanels> tile;
        Multiply<T, kPanels>(weights, panels + r * operands, operands, next, 0, tile);
        for (int panel = 0; panel < kPanels; ++panel) {
          std::memcpy(sums[panel] + n, tile.sums[panel], sizeof tile.sums[panel]);
        }
      }
      for (int panel = 0; panel < kPanels; ++panel, r += kLanes) {
        Write(sums[panel], scale, y + r * O, rows - r, outputs, O);
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
  const void* weight;  // [O, I]
  const float* scale;  // [O], or null
  float* y;            // [R, O]
  int64_t outputs;     // O
};

// T is the type of the weights, X that of x: float for float, else bf16.
template <typename T, typename X = std::conditional_t<std::is_same_v<T, float>, float, uint16_t>>
void Products(ffi::ThreadPool& pool, const X* x, const std::vector<Matrix>& matrices, int64_t I, int64_t R) {
  int64_t weights = 0, tasks = 0;
  for (const Matrix& matrix : matrices) weights += matrix.outputs * I;
  const int64_t size = sizeof(T);
  // Some 4 us of work for each thread: about as many bytes to be read, or products with so many rows.
  const int64_t threads = std::clamp<int64_t>(weights * (size + R) / 200'000, 1, pool.num_threads());
  // What is read in one long piece comes faster; short ones keep all threads at work to the end, which counts with many rows.
  const bool few = R <= kFewRows;
  const int64_t piece = std::clamp<int64_t>(weights * size / (2 * threads), 96 << 10, 576 << 10) / (few ? 1 : 4);
  const int64_t block = std::max<int64_t>(1, piece / (I * size * kGroup)) * kGroup;
  auto blocks = [block](const Matrix& matrix) { return (matrix.outputs + block - 1) / block; };
  for (const Matrix& matrix : matrices) tasks += blocks(matrix);
  const int64_t operands = Operands<T>(I), two_panels = 2 * kLanes * operands * sizeof(Register);
  const int64_t most = std::min(RoundUp(R), std::max<int64_t>(1, kPanelBytes / two_panels) * 2 * kLanes);
  static thread_local std::vector<Register> held;
  held.resize(std::max<size_t>(held.size(), most * operands));
  Register* const laid = held.data();  // this thread's, for all of them
  for (int64_t first = 0; first < R; first += most) {
    const int64_t rows = std::min(most, R - first);
    Shared().Run(RoundUp(rows) / kLanes, few ? 1 : threads, [&](int64_t panel) {
      const int64_t r = panel * kLanes;
      const X* const from = x + (first + r) * I;
      (few ? Convert<X> : Pack<X>)(from, std::min<int64_t>(kLanes, rows - r), I, laid + r * operands);
    });
    Shared().Run(tasks, threads, [&](int64_t task) {
      const Matrix* matrix = matrices.data();
      for (; task >= blocks(*matrix); ++matrix) task -= blocks(*matrix);
      const int64_t O = matrix->outputs, end = std::min(O, (task + 1) * block);
      for (int64_t n = task * block; n < end; n += kGroup) {
        const T* const w = static_cast<const T*>(matrix->weight) + n * I;
        const float* const scale = matrix->scale ? matrix->scale + n : nullptr;
        float* const y = matrix->y + first * O + n;
        (few ? FewRows<T> : ManyRows<T>)(laid, w, scale, y, rows, std::min<int64_t>(kGroup, end - n), I, O);
      }
    });
  }
}

// x [R, I] times the transposes of matrices [O, I], all in float32, as x is then, or in bf16, or in int8 with a scale per output.
// args: the arrays of each matrix; rets: each product.
ffi::Error Product(ffi::ThreadPool pool, int64_t arrays, ffi::AnyBuffer x, ffi::RemainingArgs args, ffi::RemainingRets rets) {
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
  const void* const data = x.untyped_data();
  const bool fits = x.element_type() == (type == ffi::F32 ? ffi::F32 : ffi::BF16);
  if (!fits) return ffi::Error::InvalidArgument("x in another format than its weights need");
  switch (type) {
    case ffi::F32: Products<float>(pool, static_cast<const float*>(data), matrices, I, rows); break;
    case ffi::BF16: Products<uint16_t>(pool, static_cast<const uint16_t*>(data), matrices, I, rows); break;
    case ffi::S8: Products<int8_t>(pool, static_cast<const uint16_t*>(data), matrices, I, rows); break;
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
