// Products with many rows of x: a lane is a row, and weights are converted once, into a buffer in the nearest cache, for all of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "native_few_rows.h"

namespace kvcascade {
namespace {

// Outputs whose sums for two panels are held in registers, of which as many are left for operands, or for the sums of a group.
#if defined(__AVX512F__)
template <typename T>
constexpr int kOutputs = kGrouped<T> ? 4 : 8;
#else
template <typename T>
constexpr int kOutputs = kGrouped<T> ? 2 : 4;
#endif

// x is in panels of kLanes rows, [lanes of an operand, its row of registers].

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

}  // namespace
}  // namespace kvcascade
