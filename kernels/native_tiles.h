// Products in a processor's tiles (AMX): weights of 16 outputs and 32 inputs times the same inputs of 16 rows of x.
#pragma once

#include "native_many_rows.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace kvcascade {
namespace {

// Whether products with weights of type T can be made so.
template <typename T>
constexpr bool kTiled = kPairs<T>;

// Whether the system lets this process have the tiles' registers, for which it has to be asked once.
inline bool Tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// While it lives this thread has eight tiles of 16 rows of 64 bytes, if they are wanted.
class Configured {
 public:
  explicit Configured(bool wanted) : wanted_(wanted) {
    if (!wanted) return;
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Configured() {
    if (wanted_) _tile_release();
  }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  const bool wanted_;
};

constexpr int64_t kTile = kLanes;              // registers
constexpr int64_t kStride = sizeof(Register);  // from a row of a tile to the next
constexpr int kTogether = 4;                   // tiles of sums

template <int kCount>
inline void Zero() {
  _tile_zero(0);
  if constexpr (kCount > 1) _tile_zero(1);
  if constexpr (kCount > 2) _tile_zero(2);
  if constexpr (kCount > 3) _tile_zero(3);
}

// Weights in bf16: where they begin, and bytes from an output to the next and from an operand to the next.
struct Weights {
  const char* at;
  int64_t output, operand;
};

// Adds weights times x to tiles 0 to kCount - 1. Each tile's x are x_step registers on, its weights weights_step bytes.
template <int kCount>
inline void Add(Weights w, const Register* x, int64_t operands, int64_t weights_step, int64_t x_step) {
  asm volatile("" ::: "memory");  // GCC does not know that tiles are loaded from memory
  const char* weights = w.at;
  for (int64_t i = 0; i < operands; ++i, weights += w.operand, x += kTile) {
    _tile_loadd(4, weights, w.output);
    _tile_loadd(5, x, kStride);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kCount > 1) {
      if (weights_step) _tile_loadd(4, weights + weights_step, w.output);
      _tile_loadd(6, x + x_step, kStride);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kCount > 2) {
      if (weights_step) _tile_loadd(4, weights + 2 * weights_step, w.output);
      _tile_loadd(5, x + 2 * x_step, kStride);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (kCount > 3) {
      if (weights_step) _tile_loadd(4, weights + 3 * weights_step, w.output);
      _tile_loadd(6, x + 3 * x_step, kStride);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
}

// What is in tiles 0 to kCount - 1: [output, row].
template <int kCount>
inline void Store(Lanes (*to)[kGroup]) {
  _tile_stored(0, to[0], kStride);
  if constexpr (kCount > 1) _tile_stored(1, to[1], kStride);
  if constexpr (kCount > 2) _tile_stored(2, to[2], kStride);
  if constexpr (kCount > 3) _tile_stored(3, to[3], kStride);
}

// Calls `some` with a number from 1 to kTogether that the compiler knows.
template <typename F>
inline void WithCount(int64_t count, const F& some) {
  if (count >= 4) {
    some(std::integral_constant<int, 4>());
  } else if (count == 3) {
    some(std::integral_constant<int, 3>());
  } else if (count == 2) {
    some(std::integral_constant<int, 2>());
  } else {
    some(std::integral_constant<int, 1>());
  }
}

// kGroup outputs at most for all rows. Every sum is over the inputs in order, within each group where there are such.
template <typename T>
void TiledRows(const Register* panels, const T* w, const Scales& scales, float* y, int64_t rows, int64_t outputs, const Shape& shape,
               int64_t O) {
  const int64_t operands = shape.operands, I = shape.inputs, panel_size = kLanes * shape.row();
  static thread_local std::vector<Register> held;
  held.resize(std::max<size_t>(held.size(), operands * kTile));
  Register* const converted = held.data();
  const T* from[kGroup];
  for (int n = 0; n < kGroup; ++n) from[n] = At(w, std::min<int64_t>(n, outputs - 1) * I);
  const bool as_stored = std::is_same_v<T, uint16_t> && I % kInputs<T> == 0 && outputs == kGroup;
  auto laid = [&](int64_t i) -> Weights {
    if (as_stored) return {reinterpret_cast<const char*>(w) + i * kStride, 2 * I, kStride};
    return {reinterpret_cast<const char*>(converted + i * kTile), kStride, kTile * kStride};
  };
  // Weights are fetched and converted when the first rows come to them, so that the processor does all at once.
  int64_t there = 0;
  auto need = [&](int64_t count) {
    for (; there < count; ++there) {
      const int64_t i = there * kInputs<T>;
#pragma GCC unroll 16
      for (int n = 0; n < kGroup; ++n) {
        if (i % kLine<T> == 0) __builtin_prefetch(At(from[n], kGroup * I + i));
        if (!as_stored) converted[there * kTile + n].lanes = Operand(from[n], i, I - i);
      }
    }
  };
  Lanes sums[kTogether][kGroup];
  if constexpr (kGrouped<T>) {
    for (int64_t r = 0; r < rows; r += kLanes, panels += panel_size) {
      Lanes all[kGroup] = {};
      for (int64_t first = 0; first < shape.groups; first += kTogether) {
        WithCount(shape.groups - first, [&](auto count) {
          constexpr int kCount = decltype(count)::value;
          const int64_t step = shape.group() * kTile, at = first * step;
          need((first + kCount) * shape.group());
          Zero<kCount>();
          Add<kCount>(laid(first * shape.group()), panels + at, shape.group(), step * kStride, step);
          Store<kCount>(sums);
          for (int g = 0; g < kCount; ++g) {
            for (int n = 0; n < kGroup; ++n) {
              all[n] = Fused(all[n], sums[g][n], Splat(scales.scale[n * shape.groups + first + g]));
            }
          }
        });
      }
      for (int64_t g = 0; scales.shift && g < shape.groups; ++g) {
        const Lanes x = panels[operands * kTile + g].lanes;
        for (int n = 0; n < kGroup; ++n) all[n] = Fused(all[n], x, Splat(scales.shift[n * shape.sums() * kLanes + g]));
      }
      Write(all, nullptr, y + r * O, rows - r, outputs, O);
    }
  } else {
    for (int64_t r = 0; r < rows; r += kTogether * kLanes) {
      WithCount((rows - r + kLanes - 1) / kLanes, [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        Zero<kCount>();
        for (int64_t i = 0; i < operands; i += kTogether) {
          need(std::min(operands, i + 2 * kTogether));
          Add<kCount>(laid(i), panels + r * shape.row() + i * kTile, std::min<int64_t>(kTogether, operands - i), 0, panel_size);
        }
        Store<kCount>(sums);
        for (int panel = 0; panel < kCount; ++panel) {
          const int64_t at = r + panel * kLanes;
          Write(sums[panel], scales.scale, y + at * O, rows - at, outputs, O);
        }
      });
    }
  }
}

}  // namespace
}  // namespace kvcascade
#else
namespace kvcascade {
namespace {

template <typename T>
constexpr bool kTiled = false;
template <typename T>
constexpr auto TiledRows = &ManyRows<T>;  // nobody comes here
inline bool Tiles() { return false; }
struct Configured {
  explicit Configured(bool) {}
};

}  // namespace
}  // namespace kvcascade
#endif
