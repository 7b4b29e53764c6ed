// Vectors of H numbers as the codecs store them: cache/codec.py says what the bits mean.
#pragma once

#include <vector>

#include "native_handler.h"
#include "native_lanes.h"

namespace kvcascade {

enum class Format { kFloat32, kBfloat16, kInt8, kPacked };

// Stored vectors of H numbers: values, or codes with a bf16 scale and, of some, a bf16 low end per vector. Packed codes have so many bits in
// one plane and the `fine` lowest in another (cache/codec.py, `pack`), and `skipped` ones below that are not read; they stand for levels, or for
// themselves.
struct Stored {
  Format format;
  bool turned;  // in the Walsh-Hadamard basis
  int bits, fine, skipped;
  const float* levels;
  void* codes;
  uint8_t* fines;
  uint16_t* scale;
  uint16_t* low;
  // What the bits of a code in its first plane add to what it stands for, less `middle`; of one fine bit that is clear, and that is set.
  float table[2][16];
  float middle;  // of codes that stand for themselves, so that what is multiplied is about zero
};

constexpr int64_t RowBytes(const Stored& stored, int64_t H) {
  return stored.format == Format::kFloat32    ? 4 * H
         : stored.format == Format::kBfloat16 ? 2 * H
         : stored.format == Format::kInt8     ? H
                                              : H * stored.bits / 8;
}

// What codes of the first plane stand for, whose lowest bits are theirs: what is above them does not matter.
template <int kBits>
inline Lanes Looked(Integers codes, const Stored& stored, int which) {
#if defined(__AVX512F__)
  return _mm512_maskz_permutexvar_ps(-1, reinterpret_cast<__m512i>(codes), _mm512_loadu_ps(stored.table[which]));
#else
  codes &= (1 << kBits) - 1;
  if (!stored.levels) return Numbers(codes << (stored.fine + stored.skipped)) + stored.table[which][0];
  Lanes to;
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = stored.table[which][codes[lane]];
  return to;
#endif
}

// What kLanes codes stand for, of channels from c on, given their bits in the first plane.
template <int kBits, int kFine>
inline Lanes Values(Integers codes, const Stored& stored, const uint8_t* fines, int64_t c, int64_t H) {
  if constexpr (kFine == 0) return Looked<kBits>(codes, stored, 0);
  if constexpr (kFine == 4) {
    const int64_t half = H / 2;
    const Integers fine = Codes(fines + c % half) >> (c < half ? 0 : 4) & 15;
    return Looked<kBits>(codes, stored, 0) + Numbers(fine);
  }
  uint32_t mask = 0;
  std::memcpy(&mask, fines + c / 8, kLanes < 8 ? 1 : kLanes / 8);
  mask >>= c % 8;  // of four lanes
#if defined(__AVX512F__)
  const Lanes clear = Looked<kBits>(codes, stored, 0);
  const __m512 set = _mm512_loadu_ps(stored.table[1]);
  return _mm512_mask_permutexvar_ps(clear, static_cast<__mmask16>(mask), reinterpret_cast<__m512i>(codes), set);
#else
  const Lanes clear = Looked<kBits>(codes, stored, 0), set = Looked<kBits>(codes, stored, 1);
  Lanes to;
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = mask >> lane & 1 ? set[lane] : clear[lane];
  return to;
#endif
}

// The bits of one code in a plane of so many.
inline int CodeOf(const uint8_t* plane, int bits, int64_t c, int64_t H) {
  if (bits == 1) return plane[c / 8] >> c % 8 & 1;
  const int64_t part = H * bits / 8;
  return plane[c % part] >> bits * (c / part) & ((1 << bits) - 1);
}

template <int kBits, int kFine>
__attribute__((noinline)) void ReadPacked(const Stored& stored, int64_t row, int64_t H, float* __restrict x) {
  constexpr int kEach = 8 / kBits;
  const int64_t part = H / kEach;
  const auto* codes = static_cast<const uint8_t*>(stored.codes) + row * part;
  const uint8_t* fines = kFine ? stored.fines + row * (H * kFine / 8) : nullptr;
  int64_t i = 0;
  const bool whole = kFine != 1 || part % 8 == 0;  // else a register's channels begin within a byte of the plane
  for (; whole && i + kLanes <= part; i += kLanes) {
    Integers packed = Codes(codes + i);
#pragma GCC unroll 4
    for (int place = 0; place < kEach; ++place, packed >>= kBits) {
      const Lanes values = Values<kBits, kFine>(packed, stored, fines, place * part + i, H);
      std::memcpy(x + place * part + i, &values, sizeof values);
    }
  }
  for (; i < part; ++i) {
    for (int64_t c = i; c < H; c += part) {
      const int code = CodeOf(codes, kBits, c, H), fine = kFine ? CodeOf(fines, kFine, c, H) : 0;
      x[c] = kFine == 4 ? stored.table[0][code] + fine : stored.table[fine][code];
    }
  }
}

// Read consecutive rows into consecutive vectors, less their scales and low ends; several only of a format without scales.
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
      for (; i + kLanes <= H; i += kLanes) store(i, Widened(codes + i));
      for (; i < H; ++i) x[i] = Number(codes[i]);
      return;
    }
    case Format::kPacked:
      if (stored.fine == 4) return ReadPacked<4, 4>(stored, row, H, x);
      if (stored.fine == 1) return ReadPacked<2, 1>(stored, row, H, x);
      if (stored.bits == 2) return ReadPacked<2, 0>(stored, row, H, x);
      return ReadPacked<4, 0>(stored, row, H, x);
  }
}

// By what a row is multiplied that was read, and what is added to it then.
inline float Scale(const Stored& stored, int64_t row) { return stored.scale ? Bfloat16(stored.scale[row]) : 1.0f; }
inline float Shift(const Stored& stored, int64_t row) {
  return stored.low ? Bfloat16(stored.low[row]) + stored.middle * Bfloat16(stored.scale[row]) : 0.0f;
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

// The codes of a vector in the stored basis.
inline void WritePacked(const Stored& stored, int64_t row, int64_t H, float* x) {
  const int bits = stored.bits + stored.fine + stored.skipped;
  float scale, low = 0;
  if (stored.levels) {
    float most = 0, squares = 0;
    for (int64_t h = 0; h < H; ++h) most = std::max(most, std::abs(x[h]));
    for (int64_t h = 0; h < H && most > 0; ++h) squares += x[h] / most * (x[h] / most);
    stored.scale[row] = most > 0 ? ToBfloat16(std::max(most * std::sqrt(squares / H), 0x1p-100f)) : 0;
    scale = most > 0 ? Bfloat16(stored.scale[row]) : 1;
  } else {
    const auto [least, most] = std::minmax_element(x, x + H);
    stored.low[row] = ToBfloat16(*least);
    low = Bfloat16(stored.low[row]);
    stored.scale[row] = Step(*most - low, (1 << bits) - 1);
    scale = Bfloat16(stored.scale[row]);
  }
  auto code = [&](float y) {
    if (!stored.levels) return static_cast<int>(std::clamp(std::rint((y - low) / scale), 0.0f, (1 << bits) - 1.0f));
    int found = 0;
    for (int i = 1; i < 1 << bits; ++i) found += y / scale > (stored.levels[i] + stored.levels[i - 1]) / 2;
    return found;
  };
  auto put = [&](uint8_t* plane, int width, int64_t c, int code) {
    const int64_t part = width == 1 ? 8 : H * width / 8;
    const int64_t byte = width == 1 ? c / 8 : c % part, place = width == 1 ? c % 8 : c / part;
    plane[byte] = (place ? plane[byte] : 0) | code << width * place;
  };
  auto* codes = static_cast<uint8_t*>(stored.codes) + row * (H * stored.bits / 8);
  for (int64_t c = 0; c < H; ++c) {
    const int found = code(x[c]) >> stored.skipped;
    put(codes, stored.bits, c, found >> stored.fine);
    if (stored.fine) put(stored.fines + row * (H * stored.fine / 8), stored.fine, c, found & ((1 << stored.fine) - 1));
  }
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
    case Format::kPacked: return WritePacked(stored, row, H, x);
  }
}

// Read a row into the model's basis.
inline void Decode(const Stored& stored, int64_t row, int64_t H, float* x) {
  Read(stored, row, 1, H, x);
  const float scale = Scale(stored, row), low = stored.low ? Bfloat16(stored.low[row]) : 0.0f, middle = stored.middle;
  for (int64_t h = 0; h < H && stored.scale; ++h) x[h] = (x[h] + middle) * scale + low;
  if (stored.turned) Turn(x, H);
}

// Stored vectors from one on.
inline Stored From(Stored stored, int64_t row, int64_t H) {
  stored.codes = static_cast<char*>(stored.codes) + row * RowBytes(stored, H);
  if (stored.fines) stored.fines += row * (H * stored.fine / 8);
  if (stored.scale) stored.scale += row;
  if (stored.low) stored.low += row;
  return stored;
}

// What a call says of its formats, one after the other: how many arrays, whether turned, the bits of a code in each plane and below; and levels.
struct Formats {
  const int64_t* next;
  const float* levels;
};

inline ffi::ErrorOr<Stored> ReadStored(ffi::RemainingArgs& args, size_t& next, Formats& formats) {
  auto first = args.get<ffi::AnyBuffer>(next);
  if (!first.has_value()) return ffi::Unexpected(first.error());
  Stored stored{};
  const int64_t arrays = formats.next[0];
  stored.turned = formats.next[1], stored.bits = formats.next[2], stored.fine = formats.next[3], stored.skipped = formats.next[4];
  formats.next += 5;
  stored.codes = first->untyped_data();
  switch (first->element_type()) {
    case ffi::F32: stored.format = Format::kFloat32; break;
    case ffi::BF16: stored.format = Format::kBfloat16; break;
    case ffi::S8: stored.format = Format::kInt8; break;
    case ffi::U8: stored.format = Format::kPacked; break;
    default: return ffi::Unexpected(ffi::Error::InvalidArgument("unknown storage format"));
  }
  auto array = [&](int64_t i) { return args.get<ffi::AnyBuffer>(next + i)->untyped_data(); };
  int64_t place = 1;
  if (stored.fine) stored.fines = static_cast<uint8_t*>(array(place++));
  if (place < arrays) stored.scale = static_cast<uint16_t*>(array(place++));
  if (place < arrays) stored.low = static_cast<uint16_t*>(array(place++));
  if (stored.format == Format::kPacked) {
    const int bits = stored.bits, codes = 1 << (bits + stored.fine);
    if (!stored.low) stored.levels = formats.levels, formats.levels += codes;
    const int step = 1 << stored.skipped;
    stored.middle = stored.levels ? 0.0f : (codes * step - 1) / 2.0f;
    for (int which = 0; which < 2; ++which) {
      for (int i = 0; i < 16; ++i) {
        const int code = std::min((i & ((1 << bits) - 1)) << stored.fine | which, codes - 1);
        stored.table[which][i] = stored.levels ? stored.levels[code] : code * step + (step - 1) / 2.0f - stored.middle;
      }
    }
  }
  next += arrays;
  return stored;
}

}  // namespace kvcascade
