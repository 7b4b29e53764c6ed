// Vectors of H numbers as the codecs store them: cache/codec.py says what the bits mean.
#pragma once

#include <vector>

#include "native_handler.h"
#include "native_lanes.h"

namespace kvcascade {

enum class Format { kFloat32, kBfloat16, kInt8, kInt4 };

// Stored vectors of H numbers: values, or codes with a bf16 scale and, in four bits, a bf16 low end per vector.
struct Stored {
  Format format;
  bool turned;  // in the Walsh-Hadamard basis
  void* codes;
  uint16_t* scale;
  uint16_t* low;
};

constexpr int64_t RowBytes(Format format, int64_t H) {
  return format == Format::kFloat32 ? 4 * H : format == Format::kBfloat16 ? 2 * H : format == Format::kInt8 ? H : H / 2;
}

// Read consecutive rows into consecutive vectors; several only of a format without scales.
inline void Read(const Stored& stored, int64_t row, int64_t rows, int64_t H, float* __restrict x) {
  int64_t i = 0;
  auto store = [&](int64_t at, Lanes lanes) { std::memcpy(x + at, &lanes, sizeof lanes); };
  switch (stored.format) {
    case Format::kFloat32:
      std::memcpy(x, static_cast<const float*>(stored.codes) + row * H, rows * H * sizeof(float));
      return;
    case Format::kBfloat16: {
      const auto* values = static_cast<const uint16_t*>(stored.codes) + row * H;
      for (; i + kLanes <= rows * H; i += kLanes) store(i, Widened(values + i));
      for (; i < rows * H; ++i) x[i] = Number(values[i]);
      return;
    }
    case Format::kInt8: {
      const auto* codes = static_cast<const int8_t*>(stored.codes) + row * H;
      const float scale = Bfloat16(stored.scale[row]);
      for (; i + kLanes <= H; i += kLanes) store(i, Widened(codes + i) * scale);
      for (; i < H; ++i) x[i] = Number(codes[i]) * scale;
      return;
    }
    case Format::kInt4: {
      const int64_t half = H / 2;
      const auto* codes = static_cast<const uint8_t*>(stored.codes) + row * half;
      const float scale = Bfloat16(stored.scale[row]), low = Bfloat16(stored.low[row]);
      for (; i + kLanes <= half; i += kLanes) {
        const Integers both = Codes(codes + i);
        store(i, Numbers(both & 15) * scale + low);
        store(half + i, Numbers(both >> 4) * scale + low);
      }
      for (; i < half; ++i) {
        x[i] = (codes[i] & 15) * scale + low;
        x[half + i] = (codes[i] >> 4) * scale + low;
      }
      return;
    }
  }
}

// The normalised Walsh-Hadamard transform, in place; H is a power of two.
inline void Turn(float* x, int64_t H) {
  for (int64_t half = 1; half < H; half *= 2) {
    for (int64_t start = 0; start < H; start += 2 * half) {
      for (int64_t h = start; h < start + half; ++h) {
        const float a = x[h], b = x[h + half];
        x[h] = a + b;
        x[h + half] = a - b;
      }
    }
  }
  const float norm = 1.0f / std::sqrt(static_cast<float>(H));
  for (int64_t h = 0; h < H; ++h) x[h] *= norm;
}

// The codecs' `_scale`: a bf16 step that spans a width in so many steps, 1 for a constant vector.
inline uint16_t Step(float width, float steps) {
  return ToBfloat16(width > 0 ? std::max(width / steps * (1 + 1 / 256.0f), 0x1p-100f) : 1.0f);
}

// Encode a vector of the model's basis into a row; x may be overwritten.
inline void Write(const Stored& stored, int64_t row, int64_t H, float* x) {
  if (stored.turned) Turn(x, H);
  switch (stored.format) {
    case Format::kFloat32:
      std::memcpy(static_cast<float*>(stored.codes) + row * H, x, H * sizeof(float));
      return;
    case Format::kBfloat16:
      std::transform(x, x + H, static_cast<uint16_t*>(stored.codes) + row * H, ToBfloat16);
      return;
    case Format::kInt8: {
      float width = 0;
      for (int64_t h = 0; h < H; ++h) width = std::max(width, std::abs(x[h]));
      stored.scale[row] = Step(width, 127);
      const float scale = Bfloat16(stored.scale[row]);
      auto* codes = static_cast<int8_t*>(stored.codes) + row * H;
      for (int64_t h = 0; h < H; ++h) codes[h] = static_cast<int>(std::rint(x[h] / scale));
      return;
    }
    case Format::kInt4: {
      const auto [least, most] = std::minmax_element(x, x + H);
      stored.low[row] = ToBfloat16(*least);
      const float low = Bfloat16(stored.low[row]);
      stored.scale[row] = Step(*most - low, 15);
      const float scale = Bfloat16(stored.scale[row]);
      auto code = [&](float y) { return static_cast<int>(std::clamp(std::rint((y - low) / scale), 0.0f, 15.0f)); };
      auto* codes = static_cast<uint8_t*>(stored.codes) + row * (H / 2);
      for (int64_t h = 0; h < H / 2; ++h) codes[h] = code(x[h]) | code(x[h + H / 2]) << 4;
      return;
    }
  }
}

// Read a row into the model's basis.
inline void Decode(const Stored& stored, int64_t row, int64_t H, float* x) {
  Read(stored, row, 1, H, x);
  if (stored.turned) Turn(x, H);
}

// Stored vectors from one on.
inline Stored From(Stored stored, int64_t row, int64_t H) {
  stored.codes = static_cast<char*>(stored.codes) + row * RowBytes(stored.format, H);
  if (stored.scale) stored.scale += row;
  if (stored.low) stored.low += row;
  return stored;
}

inline ffi::ErrorOr<Stored> ReadStored(ffi::RemainingArgs& args, size_t& next, int64_t arrays, bool turned) {
  auto first = args.get<ffi::AnyBuffer>(next);
  if (!first.has_value()) return ffi::Unexpected(first.error());
  Stored stored{};
  stored.turned = turned;
  stored.codes = first->untyped_data();
  switch (first->element_type()) {
    case ffi::F32: stored.format = Format::kFloat32; break;
    case ffi::BF16: stored.format = Format::kBfloat16; break;
    case ffi::S8: stored.format = Format::kInt8; break;
    case ffi::U8: stored.format = Format::kInt4; break;
    default: return ffi::Unexpected(ffi::Error::InvalidArgument("unknown storage format"));
  }
  if (arrays > 1) stored.scale = static_cast<uint16_t*>(args.get<ffi::AnyBuffer>(next + 1)->untyped_data());
  if (arrays > 2) stored.low = static_cast<uint16_t*>(args.get<ffi::AnyBuffer>(next + 2)->untyped_data());
  next += arrays;
  return stored;
}

}  // namespace kvcascade
