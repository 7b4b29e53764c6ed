// What is multiplied at a time in products with stored weights, and how weights of each format come into it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "native_lanes.h"

namespace kvcascade {

// Two codes of four bits. A block of 32 inputs is 8 words of 16 bits, little end first: word w has inputs w, 8 + w, 16 + w and 24 + w
// from its lowest bits on, so that one shift of the whole block by another number of bits in each quarter sets all in order.
struct Int4 {
  uint8_t codes;
};
constexpr int kBlock = 32;
constexpr int kMiddle = 8;  // is taken from a code before it is multiplied

// Weights that have a scale, and some a shift, per output and group of inputs; the others have one scale per output or none.
template <typename T>
constexpr bool kGrouped = std::is_same_v<T, Int4>;

// Inputs in a cache line, and bytes of so many inputs.
template <typename T>
constexpr int64_t kLine = kGrouped<T> ? 128 : 64 / sizeof(T);
template <typename T>
constexpr int64_t Bytes(int64_t inputs) {
  return inputs * 64 / kLine<T>;
}
// The input i of a row: the byte in which it is, or its block begins.
template <typename T>
inline const T* At(const T* row, int64_t i) {
  return row + Bytes<T>(i) / static_cast<int64_t>(sizeof(T));
}

// An operand is what is multiplied at a time: kLanes inputs in float32, or twice as many in bf16 where the processor multiplies
// pairs. On Intel's, which have float16 as well, products with int8 weights were quicker in float32 (docs/decisions.md).
#if defined(__AVX512BF16__)
#if defined(__AVX512FP16__)
template <typename T>
constexpr bool kPairs = !std::is_same_v<T, float> && !std::is_same_v<T, int8_t>;
#else
template <typename T>
constexpr bool kPairs = !std::is_same_v<T, float>;
#endif
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

// An operand from input i of a row on, of pairs or not; inputs from `count` on are zeros.
template <bool kPaired, typename T>
inline Lanes OperandOf(const T* row, int64_t i, int64_t count) {
  constexpr int kCount = kPaired ? 2 * kLanes : kLanes;
  auto whole = [](const T* from) {
#if defined(__AVX512BF16__)
    if constexpr (kPaired) return Pairs(from);
#endif
    return Widened(from);
  };
  if (count >= kCount) return whole(row + i);
  T some[kCount] = {};
  if (count > 0) std::copy_n(row + i, count, some);
  return whole(some);
}

// The same of weights.
template <typename T>
inline Lanes Operand(const T* row, int64_t i, int64_t count) {
  return OperandOf<kPairs<T>>(row, i, count);
}

// Rows of four bits are whole blocks.
inline Lanes Operand(const Int4* row, int64_t i, int64_t) {
  const Int4* const block = row + i / kBlock * (kBlock / 2);
#if defined(__AVX512BF16__)
  // bf16 of -8 to 7, twice: what is left of the next code in the fifth bit does not matter.
  alignas(64) static constexpr uint16_t kNumbers[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  constexpr int64_t k4 = 0x4000400040004, k8 = 2 * k4, k12 = 3 * k4;
  const __m512i words = _mm512_maskz_broadcast_i32x4(-1, _mm_loadu_si128(reinterpret_cast<const __m128i*>(block)));
  const __m512i codes = _mm512_maskz_srlv_epi16(-1, words, _mm512_setr_epi64(0, 0, k4, k4, k8, k8, k12, k12));
  return reinterpret_cast<Lanes>(_mm512_maskz_permutexvar_epi16(-1, codes, _mm512_load_si512(kNumbers)));
#elif defined(__AVX512F__)
  const int shift = i % kBlock / 2;
  const __m256i words = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block)));
  const auto codes = reinterpret_cast<Integers>(_mm512_maskz_cvtepu16_epi32(-1, words));
  const Integers by = {0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4};
  return Numbers((codes >> (by + shift) & 15) - kMiddle);
#elif defined(__AVX2__)
  const auto codes = reinterpret_cast<Integers>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block))));
  return Numbers((codes >> static_cast<int>(i % kBlock / 2) & 15) - kMiddle);
#else
  Integers codes;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t input = i % kBlock + lane;
    codes[lane] = block[2 * (input % 8) + input / 16].codes >> (input / 8 % 2 * 4) & 15;
  }
  return Numbers(codes - kMiddle);
#endif
}

// One lane's number, or pair, in every lane.
inline Lanes Splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);  // whatever the bits
#else
  return x - Lanes{};
#endif
}

// An operand of ones.
template <typename T>
inline Lanes Ones() {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) return reinterpret_cast<Lanes>(_mm512_set1_epi16(0x3f80));
#endif
  return Splat(1.0f);
}

template <typename T>
constexpr int64_t Operands(int64_t inputs) {
  return (inputs + kInputs<T> - 1) / kInputs<T>;
}

// sum + x y, rounded once where the processor can, whatever a compiler makes of what stands around it.
inline Lanes Fused(Lanes sum, Lanes x, Lanes y) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(x, y, sum);
#else
  return sum + x * y;
#endif
}

// sum + x y, where x and y are operands for weights of type T.
template <typename T>
inline Lanes Plus(Lanes sum, Lanes x, Lanes y) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
#endif
  return Fused(sum, x, y);
}

// A number of 16 bits with five for the exponent. Those below the least whole one come by way of an integer: the processor may be told to
// take them for zero.
inline float Half(uint16_t bits) {
  const uint32_t size = bits & 0x7fff, sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t wide = sign | (size >= 0x7c00 ? 0x7f800000 | size << 13 : (size << 13) + (112u << 23));
  float x;
  std::memcpy(&x, &wide, sizeof x);
  const float small = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
  return size >= 0x400 ? x : sign ? -small : small;
}


// kLanes of them, those from `count` on as zeros.
inline Lanes Halves(const uint16_t* from, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 there = count >= kLanes ? -1 : (1 << count) - 1;
  return _mm512_maskz_cvtph_ps(-1, _mm256_maskz_loadu_epi16(there, from));
#else
  Lanes to = {};
  for (int lane = 0; lane < std::min<int64_t>(kLanes, count); ++lane) to[lane] = Half(from[lane]);
  return to;
#endif
}

}  // namespace kvcascade
