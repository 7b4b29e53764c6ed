// Products with few rows of x: a lane is an input, and weights are converted again for every eight rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "native_operands.h"

namespace kvcascade {
namespace {

constexpr int64_t kAheadBytes = 8192;  // of weights
constexpr int kGroup = 16;              // outputs

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

// The scales of the outputs from n on.
template <typename T>
inline Scales From(const Scales& scales, int64_t n, const Shape& shape) {
  const int64_t at = n * (kGrouped<T> ? shape.groups : 1), shift_at = n * shape.sums() * kLanes;
  return {scales.scale ? scales.scale + at : nullptr, scales.shift ? scales.shift + shift_at : nullptr};
}

// x is [R, its row of registers].

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
    for (int64_t n = 0, i = 0; n < shape.operands; ++n, i += kInputs<T>) to[n].lanes = OperandOf<kPairs<T>>(x + r * I, i, I - i);
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

}  // namespace
}  // namespace kvcascade
