// One register of the processor: how numbers come into it, and what is computed there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX2__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace kvcascade {

// Slots are worked on in blocks of kLanes, vectors of H padded with zeros to whole registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

struct Register {
  Lanes lanes;
};

constexpr float kNever = -std::numeric_limits<float>::infinity();

constexpr int64_t RoundUp(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline float Bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// To the nearest, ties to even; a NaN stays one, also where all that tells it from infinity is in the bits that are dropped.
inline uint16_t ToBfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// kLanes codes as integers. Written out for x86, where GCC would convert vectors of bytes lane by lane; the mask is all of them, and
// spares a warning of GCC's that the intrinsic without one begins with a register that nobody has set.
inline Integers Codes(const int8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_maskz_cvtepi8_epi32(-1, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Integers>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Integers to;
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = from[lane];
  return to;
#endif
}

inline Integers Codes(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Integers>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Integers to;
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = from[lane];
  return to;
#endif
}

inline Lanes Numbers(Integers codes) { return __builtin_convertvector(codes, Lanes); }

// kLanes stored numbers, and one.
inline Lanes Widened(const float* from) {
  Lanes to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
inline Lanes Widened(const uint16_t* from) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Lanes>(__builtin_convertvector(bits, Integers) << 16);
}
inline Lanes Widened(const int8_t* from) { return Numbers(Codes(from)); }
inline float Number(float stored) { return stored; }
inline float Number(uint16_t stored) { return Bfloat16(stored); }
inline float Number(int8_t stored) { return stored; }

// exp(x) for x <= 0 to about 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], without a branch.
inline float Exp(float x) {
  x = std::max(x, -87.0f);
  const float n = std::rint(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r + 1.0f);
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// cap * tanh(x / cap); the product of a small x and a series, because the other form would lose x's digits there.
inline Lanes Capped(Lanes x, float cap) {
  auto* each = reinterpret_cast<float*>(&x);
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) {
    const float y = each[lane] / cap, square = y * y, size = std::abs(y), shrunk = Exp(-2 * size);
    const float near = y * (1 + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
    const float far = std::copysign((1 - shrunk) / (1 + shrunk), y);
    each[lane] = cap * (size < 0.1f ? near : far);
  }
  return x;
}

// Lanes i... of x and y, those of y counted from kLanes on.
template <int... i>
inline Lanes Shuffled(Lanes x, Lanes y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, i...);
#else  // GCC has the other only from 12 on
  return __builtin_shuffle(x, y, Integers{i...});
#endif
}

// Lane i of the result: x[i] + x[i ^ distance] where that bit of i is clear, y's where it is set. Costs a blend, a shuffle, an add.
template <int distance, int... i>
inline Lanes Fold(Lanes x, Lanes y, std::integer_sequence<int, i...>) {
  return Shuffled<(i & distance ? kLanes + i : i)...>(x, y) +
         Shuffled<((i ^ distance) + (i & distance ? kLanes : 0))...>(x, y);
}

// The sum of each of 2 * distance vectors, folded; of kLanes vectors: lane i is the sum of vector i.
template <int distance = kLanes / 2>
inline Lanes Sums(Lanes* x) {
#pragma GCC unroll 16
  for (int i = 0; i < distance; ++i) {
    x[i] = Fold<distance>(x[i], x[i + distance], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (distance > 1) return Sums<distance / 2>(x);
  return x[0];
}

// The least of n numbers, n > 0. Written out, because clang does not see that minima may be taken in any order.
inline float Least(const float* x, int64_t n) {
  float least = x[0];
  int64_t i = 0;
  if (n >= kLanes) {
    Lanes lanes = Widened(x);
    for (; i + kLanes <= n; i += kLanes) {
      const Lanes next = Widened(x + i);
      lanes = next < lanes ? next : lanes;
    }
    for (int lane = 0; lane < kLanes; ++lane) least = std::min(least, lanes[lane]);
  }
  for (; i < n; ++i) least = std::min(least, x[i]);
  return least;
}

// Lane i of x moves to y[i ^ distance] where that bit of i is set, lane i of y to x[i ^ distance] where it is clear.
template <int distance, int... i>
inline void Swap(Lanes& x, Lanes& y, std::integer_sequence<int, i...>) {
  const Lanes first = Shuffled<(i & distance ? kLanes + (i ^ distance) : i)...>(x, y);
  y = Shuffled<(i & distance ? kLanes + i : i ^ distance)...>(x, y);
  x = first;
}

// x, kLanes vectors, becomes its transpose.
template <int distance = kLanes / 2>
inline void Transpose(Lanes* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & distance)) Swap<distance>(x[i], x[i + distance], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (distance > 1) Transpose<distance / 2>(x);
}

}  // namespace kvcascade
