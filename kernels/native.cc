// What a decode step spends its time on, for XLA on a CPU: attention over all tiers, the exchange of one slot, products with a
// model's matrices.
//
// XLA converts a bf16 or int8 operand of a product into a float32 copy. This reads each stored number once, as it is stored, and
// skips slots that the query does not see. A task of attention is one row's KV head, whose G query heads share every vector that
// is read; a task of a product is a block of outputs for all rows.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// One register of the processor. Slots are worked on in blocks of kLanes, vectors of H padded with zeros to whole registers.
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

constexpr int64_t kAhead = 6;  // blocks of slots
constexpr int64_t kAheadBytes = 8192;  // of weights

constexpr float kNever = -std::numeric_limits<float>::infinity();

constexpr int64_t RoundUp(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

enum class Format { kFloat32, kBfloat16, kInt8, kInt4 };

// Stored vectors of H numbers: values, or codes with a bf16 scale and, in four bits, a bf16 low end per vector.
struct Stored {
  Format format;
  bool turned;  // in the Walsh-Hadamard basis
  void* codes;
  uint16_t* scale;
  uint16_t* low;
};

struct Tier {
  Stored k, v;
  const int32_t* pos;  // [B, K, S]
  int64_t slots;       // S
  float* mass;         // [B, K, S], or null
};

struct Call {
  const float* q;              // [B, N, H]
  const int32_t* query_pos;    // [B]
  float* out;                  // [B, N, H]
  int64_t kv_heads, group, H;  // K, G = N / K
  int64_t window;              // positions that a query sees, 0: all
  std::vector<Tier> tiers;
  int64_t shares;  // of a row's KV head
  float* memory;   // of all shares, where there are several
};

constexpr int64_t RowBytes(Format format, int64_t H) {
  return format == Format::kFloat32 ? 4 * H : format == Format::kBfloat16 ? 2 * H : format == Format::kInt8 ? H : H / 2;
}

inline float Bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// To the nearest, ties to even.
inline uint16_t ToBfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// kLanes codes as integers. Written out for x86, where GCC would convert vectors of bytes lane by lane.
inline Integers Codes(const int8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
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
  return reinterpret_cast<Integers>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
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

// The normalised Walsh-Hadamard transform, in place; H is a power of two.
void Turn(float* x, int64_t H) {
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

// Lane i of the result: x[i] + x[i ^ distance] where that bit of i is clear, y's where it is set. Costs a blend, a shuffle, an add.
template <int distance, int... i>
inline Lanes Fold(Lanes x, Lanes y, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(x, y, (i & distance ? kLanes + i : i)...) +
         __builtin_shufflevector(x, y, ((i ^ distance) + (i & distance ? kLanes : 0))...);
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

// A row's KV head over its share of each tier's slots; shares merge as partials do, by the logits' maximum and the weights' sum.
// kWide registers hold a vector of H (0: known only when run).
template <int kWide>
class Share {
 public:
  Share(const Call& call, int64_t row_head, int64_t share)
      : call_(call), H_(call.H), G_(call.group), row_head_(row_head), share_(share) {
    now_ = call.query_pos[row_head / call.kv_heads];
    oldest_ = call.window ? std::max<int64_t>(0, now_ - call.window + 1) : 0;
    for (const Tier& tier : call.tiers) slots_ += Last(tier) - First(tier);
    stride_ = kWide ? kWide * kLanes : RoundUp(H_);
    thread_local std::vector<Register> own, memory;
    if (call.shares > 1) {
      memory_ = call.memory + row_head * call.shares * Size(call);
    } else {
      const size_t size = Size(call) / kLanes;
      if (own.size() < size) own.resize(size);
      memory_ = reinterpret_cast<float*>(own.data());
    }
    weights_ = Memory(share) + RoundUp(2 * G_) + G_ * stride_;
    memory.assign((3 * G_ + kLanes) * stride_ / kLanes, Register{});
    q_ = reinterpret_cast<float*>(memory.data());
    q_turned_ = q_ + G_ * stride_;
    part_ = q_turned_ + G_ * stride_;
    block_ = part_ + G_ * stride_;
  }

  // Floats that a share keeps: maxima and sums [G] each, outputs [G, stride], weights [G, slots].
  static int64_t Size(const Call& call) {
    int64_t slots = 0;
    for (const Tier& tier : call.tiers) slots += (RoundUp(tier.slots) / kLanes / call.shares + 1) * kLanes;
    return RoundUp(2 * call.group) + call.group * (RoundUp(call.H) + slots);
  }

  void Run() {
    const float scale = 1.0f / std::sqrt(static_cast<float>(H_));
    for (int64_t g = 0; g < G_; ++g) {
      const float* q = call_.q + (row_head_ * G_ + g) * H_;
      for (int64_t h = 0; h < H_; ++h) q_turned_[g * stride_ + h] = q_[g * stride_ + h] = q[h] * scale;
    }
    if (std::any_of(call_.tiers.begin(), call_.tiers.end(), [](const Tier& tier) { return tier.k.turned; })) {
      for (int64_t g = 0; g < G_; ++g) Turn(q_turned_ + g * stride_, H_);
    }
    int64_t offset = 0;
    for (const Tier& tier : call_.tiers) {
      Logits(tier, weights_ + offset);
      offset += Last(tier) - First(tier);
    }
    for (int64_t g = 0; g < G_; ++g) Softmax(weights_ + g * slots_, Maxima(share_) + g, Maxima(share_) + G_ + g);
    std::fill_n(Outputs(share_), G_ * stride_, 0.0f);
    offset = 0;
    for (const Tier& tier : call_.tiers) {
      Output(tier, weights_ + offset);
      offset += Last(tier) - First(tier);
    }
  }

  // Once all shares have run: the head's output, by its first share, and the mass of this share's slots.
  void Finish() {
    std::vector<float> factors(G_);
    for (int64_t g = 0; g < G_; ++g) {
      float top = kNever, sum = 0;
      for (int64_t p = 0; p < call_.shares; ++p) top = std::max(top, Maxima(p)[g]);
      auto rescaled = [&](int64_t p) { return Maxima(p)[g] == kNever ? 0.0f : Exp(Maxima(p)[g] - top); };
      for (int64_t p = 0; p < call_.shares; ++p) sum += Maxima(p)[G_ + g] * rescaled(p);
      factors[g] = sum > 0 ? rescaled(share_) / sum : 0.0f;
      if (share_) continue;
      float* out = call_.out + (row_head_ * G_ + g) * H_;
      std::fill_n(out, H_, 0.0f);
      for (int64_t p = 0; p < call_.shares && sum > 0; ++p) {
        const float factor = rescaled(p) / sum, *part = Outputs(p) + g * stride_;
        for (int64_t h = 0; h < H_; ++h) out[h] += factor * part[h];
      }
    }
    const float* weights = weights_;
    for (const Tier& tier : call_.tiers) {
      const int64_t first = First(tier), last = Last(tier);
      for (int64_t s = first; tier.mass && s < std::min(last, tier.slots); ++s) {
        float mass = 0;
        for (int64_t g = 0; g < G_; ++g) mass += factors[g] * weights[g * slots_ + s - first];
        tier.mass[row_head_ * tier.slots + s] = mass;
      }
      weights += last - first;
    }
  }

 private:
  // The slots of a share: whole blocks.
  int64_t Bound(const Tier& tier, int64_t share) const { return RoundUp(tier.slots) / kLanes * share / call_.shares * kLanes; }
  int64_t First(const Tier& tier) const { return Bound(tier, share_); }
  int64_t Last(const Tier& tier) const { return Bound(tier, share_ + 1); }

  float* Memory(int64_t share) const { return memory_ + share * Size(call_); }
  float* Maxima(int64_t share) const { return Memory(share); }  // and the sums after them
  float* Outputs(int64_t share) const { return Memory(share) + RoundUp(2 * G_); }

  int64_t wide() const { return kWide ? kWide : stride_ / kLanes; }

  // Read a block of slots, zeros in place of those that are not seen; false if none is.
  bool ReadBlock(const Tier& tier, const Stored& stored, int64_t first) {
    const int64_t start = row_head_ * tier.slots + first, slots = std::min<int64_t>(kLanes, tier.slots - first);
    const int32_t* pos = tier.pos + start;
    int32_t padded[kLanes];
    if (slots < kLanes) {
      std::fill_n(std::copy_n(pos, slots, padded), kLanes - slots, -1);
      pos = padded;
    }
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (int j = 0; j < kLanes; ++j) {
      const bool seen = (pos[j] >= oldest_) & (pos[j] <= now_);
      seen_[j] = seen ? 0.0f : kNever;
      count += seen;
    }
    // Between two steps the weights pass through the processor's caches, so slots come from memory: ask for them some blocks ahead.
    const int64_t bytes = RowBytes(stored.format, H_);
    const char* ahead = static_cast<const char*>(stored.codes) + (start + kAhead * kLanes) * bytes;
    for (int64_t i = 0; count > 0 && i < kLanes * bytes; i += 64) __builtin_prefetch(ahead + i);
    if (count == kLanes && stride_ == H_ && !stored.scale) {
      Read(stored, start, kLanes, H_, block_);
    } else if (count > 0) {
      for (int64_t j = 0; j < kLanes; ++j) {
        if (seen_[j] == 0) {
          Read(stored, start + j, 1, H_, block_ + j * stride_);
        } else {
          std::fill_n(block_ + j * stride_, H_, 0.0f);
        }
      }
    }
    return count > 0;
  }

  void Logits(const Tier tier, float* logits) {
    const float* queries = tier.k.turned ? q_turned_ : q_;
    const auto* block = reinterpret_cast<const Lanes*>(block_);
    const int64_t start = First(tier), end = Last(tier);
    for (int64_t first = start; first < end; first += kLanes) {
      const bool any = ReadBlock(tier, tier.k, first);
      for (int64_t g = 0; g < G_; ++g) {
        auto& result = *reinterpret_cast<Lanes*>(logits + g * slots_ + first - start);
        if (!any) {
          result = Lanes{} + kNever;
          continue;
        }
        const auto* q = reinterpret_cast<const Lanes*>(queries + g * stride_);
        Lanes products[kLanes];
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLanes; ++j) {
          products[j] = q[0] * block[j * wide()];
          for (int64_t i = 1; i < wide(); ++i) products[j] += q[i] * block[j * wide() + i];
        }
        result = Sums(products) + *reinterpret_cast<const Lanes*>(seen_);
      }
    }
  }

  // Logits become weights relative to the largest; a query that sees nothing has zeros.
  void Softmax(float* weights, float* maximum, float* total) {
    auto* w = reinterpret_cast<Lanes*>(weights);
    const int64_t blocks = slots_ / kLanes;
    Lanes tops = Lanes{} + kNever, sums = {};
    for (int64_t s = 0; s < blocks; ++s) tops = w[s] > tops ? w[s] : tops;
    float top = kNever;
    for (int j = 0; j < kLanes; ++j) top = std::max(top, tops[j]);
    *maximum = top, *total = 0;
    for (int64_t s = 0; s < blocks; ++s) {
      auto* x = reinterpret_cast<float*>(w + s);
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) x[j] = x[j] == kNever ? 0.0f : Exp(x[j] - top);
      sums += w[s];
    }
    for (int j = 0; j < kLanes; ++j) *total += sums[j];
  }

  void Output(const Tier tier, const float* weights) {
    const auto* block = reinterpret_cast<const Lanes*>(block_);
    std::fill_n(part_, G_ * stride_, 0.0f);
    const int64_t start = First(tier), end = Last(tier);
    for (int64_t first = start; first < end; first += kLanes) {
      if (!ReadBlock(tier, tier.v, first)) continue;
      for (int64_t g = 0; g < G_; ++g) {
        auto* part = reinterpret_cast<Lanes*>(part_ + g * stride_);
        const float* w = weights + g * slots_ + first - start;
        for (int64_t i = 0; i < wide(); ++i) {
          // Four sums, because one would wait for each addition.
          Lanes sums[4] = {part[i]};
#pragma GCC unroll 16
          for (int64_t j = 0; j < kLanes; ++j) sums[j % 4] += w[j] * block[j * wide() + i];
          part[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
      }
    }
    for (int64_t g = 0; g < G_; ++g) {
      float *part = part_ + g * stride_, *out = Outputs(share_) + g * stride_;
      if (tier.k.turned) Turn(part, H_);
      for (int64_t h = 0; h < H_; ++h) out[h] += part[h];
    }
  }

  const Call& call_;
  const int64_t H_, G_, row_head_, share_;
  int64_t slots_ = 0;  // of this share of all tiers, each padded to whole blocks
  int64_t stride_;     // H, padded
  int32_t now_, oldest_;  // the positions that are seen
  float* memory_;                            // of this head's shares; where there is one, this thread's
  float* weights_;                           // [G, slots]
  float *q_, *q_turned_, *part_;             // [G, stride]
  float* block_;                             // [kLanes, stride]
  alignas(sizeof(Lanes)) float seen_[kLanes];  // 0, or -inf for a slot that is not seen
};

// The codecs' `_scale`: a bf16 step that spans a width in so many steps, and 1 for a constant vector.
uint16_t Step(float width, float steps) { return ToBfloat16(width > 0 ? width / steps * (1 + 1 / 256.0f) : 1.0f); }

// Encode a vector of the model's basis into a row; x may be overwritten.
void Write(const Stored& stored, int64_t row, int64_t H, float* x) {
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
void Decode(const Stored& stored, int64_t row, int64_t H, float* x) {
  Read(stored, row, 1, H, x);
  if (stored.turned) Turn(x, H);
}

// Threads that share the tasks of a kernel. A decode step asks for them every few tens of microseconds, less than it takes the system
// to wake one, so each waits in a loop for kPatience before it sleeps.
class Workers {
 public:
  // Tasks are claimed one by one, by this thread too, so none is waited for that nobody has begun. Another caller meanwhile works alone.
  template <typename F>
  void Run(int64_t tasks, int64_t threads, const F& task) {
    const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (threads < 2 || tasks < 2 || !alone) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    while (static_cast<int64_t>(started_) + 1 < threads) std::thread(&Workers::Wait, this, started_++).detach();
    task_ = [](const void* task, int64_t i) { (*static_cast<const F*>(task))(i); };
    context_ = &task, tasks_ = tasks, wanted_ = threads - 1;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    calls_.fetch_add(1);
    if (asleep_.load()) {
      { const std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    Work();
    open_.store(false);  // who has not come in by now stays out
    for (int spins = 0; inside_.load(); ++spins) spins < 1000 ? Pause() : std::this_thread::yield();
  }

 private:
  static constexpr std::chrono::microseconds kPatience{200};

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void Work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) task_(context_, i);
  }

  void Wait(int64_t index) {
    for (uint64_t seen = 0;;) {
      const auto since = std::chrono::steady_clock::now();
      for (int spins = 1; calls_.load() == seen; ++spins) {
        Pause();
        if (spins % 64 || std::chrono::steady_clock::now() - since < kPatience) continue;
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return calls_.load() != seen; });
        asleep_.fetch_sub(1);
      }
      seen = calls_.load();
      inside_.fetch_add(1);
      if (open_.load() && index < wanted_) Work();
      inside_.fetch_sub(1);
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  void (*task_)(const void*, int64_t);
  const void* context_;
  int64_t tasks_, wanted_, started_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> open_{false};
  std::atomic<int> inside_{0}, asleep_{0};
  std::atomic<uint64_t> calls_{0};
};

// Never destroyed: its threads may be in it until the process ends.
Workers& Shared() {
  static Workers* const workers = new Workers;
  return *workers;
}

// y[r, n] = scale[n] * sum over i of x[r, i] w[n, i], for kRows rows of x and kLanes / kRows outputs n: kLanes sums at once.
template <typename T, int kRows>
void ProductBlock(const float* x, const T* w, const float* scale, float* y, int64_t I, int64_t O, int64_t rows, int64_t first) {
  constexpr int kOutputs = kLanes / kRows;
  // Outputs are taken by fours at most: memory is read in few streams, and several registers of each before the next.
  constexpr int kGroup = std::min(kOutputs, 4), kDeep = kOutputs / kGroup;
  const int64_t outputs = std::min<int64_t>(kOutputs, O - first);
  // Past the last row or output the last one is computed again, and not written.
  const float* xs[kRows];
  for (int r = 0; r < kRows; ++r) xs[r] = x + std::min<int64_t>(r, rows - 1) * I;
  auto output = [&](int n) { return w + (first + std::min<int64_t>(n, outputs - 1)) * I; };
  Lanes sums[kLanes];
  const int64_t ahead = std::max<int64_t>(kGroup * I, kAheadBytes / sizeof(T)), whole_lanes = I / kLanes * kLanes;
#pragma GCC unroll 4
  for (int group = 0; group < kOutputs; group += kGroup) {
    const T* ws[kGroup];
    for (int n = 0; n < kGroup; ++n) ws[n] = output(group + n);
    Lanes parts[kDeep][kRows][kGroup] = {};
    auto add = [&](int64_t i, auto deep) {
#pragma GCC unroll 4
      for (int d = 0; d < decltype(deep)::value; ++d) {
        Lanes row[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) std::memcpy(&row[r], xs[r] + i + d * kLanes, sizeof(Lanes));
#pragma GCC unroll 4
        for (int n = 0; n < kGroup; ++n) {
          if ((i + d * kLanes) % (64 / sizeof(T)) == 0) __builtin_prefetch(ws[n] + i + d * kLanes + ahead);
          const Lanes weight = Widened(ws[n] + i + d * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) parts[d][r][n] += row[r] * weight;
        }
      }
    };
    int64_t i = 0;
    for (; i + kDeep * kLanes <= I; i += kDeep * kLanes) add(i, std::integral_constant<int, kDeep>());
    for (; i < whole_lanes; i += kLanes) add(i, std::integral_constant<int, 1>());
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kGroup; ++n) {
        Lanes sum = parts[0][r][n];
#pragma GCC unroll 4
        for (int d = 1; d < kDeep; ++d) sum += parts[d][r][n];
        sums[r * kOutputs + group + n] = sum;
      }
    }
  }
  float whole[kLanes];
  const Lanes folded = Sums(sums);
  std::memcpy(whole, &folded, sizeof whole);
  for (int n = 0; n < outputs; ++n) {
    const T* weights = output(n);
    for (int r = 0; r < std::min<int64_t>(kRows, rows); ++r) {
      float sum = whole[r * kOutputs + n];
      for (int64_t rest = whole_lanes; rest < I; ++rest) sum += xs[r][rest] * Number(weights[rest]);
      y[r * O + first + n] = scale ? sum * scale[first + n] : sum;
    }
  }
}

constexpr int64_t kWorthAThread = 1 << 18;  // products: some 6 us of work

ffi::ErrorOr<Stored> ReadStored(ffi::RemainingArgs& args, size_t& next, int64_t arrays, bool turned) {
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

// A row's KV head: the slot of least priority is exchanged for the newcomer if the newcomer's is higher.
// args: positions, the arrays of K, those of V, the scores if there are any; rets: the same, in place, and what was left over.
ffi::Error Exchange(int64_t arrays, bool turned, bool forget, ffi::Buffer<ffi::F32> priority, ffi::Buffer<ffi::F32> k,
                    ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> pos, ffi::Buffer<ffi::F32> score, ffi::RemainingArgs args,
                    ffi::RemainingRets rets) {
  size_t next = 0;
  auto held_pos = args.get<ffi::Buffer<ffi::S32>>(next++);
  if (!held_pos.has_value()) return held_pos.error();
  auto held_k = ReadStored(args, next, arrays, turned);
  if (!held_k.has_value()) return held_k.error();
  auto held_v = ReadStored(args, next, arrays, turned);
  if (!held_v.has_value()) return held_v.error();
  int32_t* held_positions = held_pos->typed_data();
  float* held_scores = next < args.size() ? args.get<ffi::Buffer<ffi::F32>>(next++)->typed_data() : nullptr;
  for (size_t i = 0; i < next; ++i) {
    if (args.get<ffi::AnyBuffer>(i)->untyped_data() != (*rets.get<ffi::AnyBuffer>(i))->untyped_data()) {
      return ffi::Error::Internal("slots are not exchanged in place");
    }
  }
  auto left = [&](size_t i) { return static_cast<float*>((*rets.get<ffi::AnyBuffer>(next + i))->untyped_data()); };
  float *left_k = nullptr, *left_v = nullptr, *left_score = nullptr;
  int32_t* left_pos = nullptr;
  if (!forget) left_k = left(0), left_v = left(1), left_pos = reinterpret_cast<int32_t*>(left(2)), left_score = left(3);

  const int64_t S = held_pos->dimensions()[2], H = k.dimensions()[3];
  std::vector<float> x(H);
  for (int64_t row_head = 0; row_head < held_pos->dimensions()[0] * held_pos->dimensions()[1]; ++row_head) {
    const float* ranks = priority.typed_data() + row_head * (S + 1);
    float least = ranks[0];
#pragma omp simd reduction(min : least)
    for (int64_t s = 0; s < S; ++s) least = std::min(least, ranks[s]);
    const bool swap = ranks[S] > least;
    const int64_t slot = row_head * S + (std::find(ranks, ranks + S, least) - ranks);
    auto exchange = [&](const Stored& held, const float* coming, float* left) {
      if (!forget && swap) Decode(held, slot, H, left);
      if (!forget && !swap) std::copy_n(coming, H, left);
      if (!swap) return;
      std::copy_n(coming, H, x.data());
      Write(held, slot, H, x.data());
    };
    exchange(*held_k, k.typed_data() + row_head * H, left_k + row_head * H);
    exchange(*held_v, v.typed_data() + row_head * H, left_v + row_head * H);
    if (!forget) {
      left_pos[row_head] = swap ? held_positions[slot] : pos.typed_data()[row_head];
      left_score[row_head] = swap && held_scores ? held_scores[slot] : score.typed_data()[row_head];
    }
    if (!swap) continue;
    held_positions[slot] = pos.typed_data()[row_head];
    if (held_scores) held_scores[slot] = score.typed_data()[row_head];
  }
  return ffi::Error::Success();
}

constexpr int64_t kShareSlots = 256;  // at least

template <int kWide>
void AttendAll(Call& call, int64_t heads, int64_t slots, int64_t threads) {
  // Few heads are divided, so that all threads have work to the end.
  call.shares = threads < 2 ? 1 : std::max<int64_t>(1, std::min((4 * threads + heads - 1) / heads, slots / kShareSlots));
  thread_local std::vector<Register> memory;
  const size_t size = call.shares > 1 ? heads * call.shares * Share<kWide>::Size(call) / kLanes : 0;
  if (memory.size() < size) memory.resize(size);
  call.memory = reinterpret_cast<float*>(memory.data());
  Shared().Run(heads * call.shares, threads, [&](int64_t task) {
    Share<kWide> share(call, task / call.shares, task % call.shares);
    share.Run();
    if (call.shares == 1) share.Finish();
  });
  if (call.shares == 1) return;
  Shared().Run(heads * call.shares, threads, [&](int64_t task) {
    Share<kWide>(call, task / call.shares, task % call.shares).Finish();
  });
}

// args: per tier its positions, the arrays of K, the arrays of V; rets: per tier its mass, or none at all.
ffi::Error Attend(ffi::ThreadPool pool, ffi::Span<const int64_t> arrays, ffi::Span<const int64_t> turned,
                  int64_t window, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::S32> query_pos, ffi::RemainingArgs args,
                  ffi::ResultBuffer<ffi::F32> out, ffi::RemainingRets masses) {
  const auto dims = q.dimensions();
  Call call{q.typed_data(), query_pos.typed_data(), out->typed_data(), 0, 0, dims[2], window, {}, 1, nullptr};
  int64_t slots = 0;
  size_t next = 0;
  for (size_t i = 0; i < arrays.size(); ++i) {
    auto pos = args.get<ffi::Buffer<ffi::S32>>(next++);
    if (!pos.has_value()) return pos.error();
    auto k = ReadStored(args, next, arrays[i], turned[i]);
    if (!k.has_value()) return k.error();
    auto v = ReadStored(args, next, arrays[i], turned[i]);
    if (!v.has_value()) return v.error();
    float* mass = masses.size() ? (*masses.get<ffi::Buffer<ffi::F32>>(i))->typed_data() : nullptr;
    call.kv_heads = pos->dimensions()[1];
    call.tiers.push_back({*k, *v, pos->typed_data(), pos->dimensions()[2], mass});
    slots += pos->dimensions()[2];
  }
  call.group = dims[1] / call.kv_heads;
  auto* run = AttendAll<0>;
  switch (RoundUp(call.H) / kLanes) {
    case 1: run = AttendAll<1>; break;
    case 2: run = AttendAll<2>; break;
    case 4: run = AttendAll<4>; break;
    case 5: run = AttendAll<5>; break;
    case 6: run = AttendAll<6>; break;
    case 8: run = AttendAll<8>; break;
  }
  // A stored number is read at the price of four products.
  const int64_t work = 2 * dims[0] * call.kv_heads * slots * call.H * (call.group + 4);
  const int64_t threads = std::min<int64_t>(pool.num_threads(), work / kWorthAThread);
  run(call, dims[0] * call.kv_heads, slots, threads);
  return ffi::Error::Success();
}

struct Matrix {
  const void* weight;  // [O, I]
  const float* scale;  // [O], or null
  float* y;            // [R, O]
  int64_t outputs;     // O
};

// Rows in groups, so that a weight comes from memory once and is converted for several rows at a time.
template <typename T>
void Products(ffi::ThreadPool& pool, const float* x, const std::vector<Matrix>& matrices, int64_t I, int64_t rows) {
  int64_t weights = 0, tasks = 0;
  for (const Matrix& matrix : matrices) weights += matrix.outputs * I;
  const int64_t size = sizeof(T);
  // Some 4 us of work for each thread: about as many bytes to be read, or products with so many rows.
  const int64_t threads = std::clamp<int64_t>(weights * (size + rows) / 200'000, 1, pool.num_threads());
  // What is read in one long piece comes faster; short ones keep all threads at work to the end.
  const int64_t piece = std::clamp<int64_t>(weights * size / (2 * threads), 96 << 10, 576 << 10);
  const int64_t block = std::max<int64_t>(1, piece / (I * size * kLanes)) * kLanes;
  auto blocks = [block](const Matrix& matrix) { return (matrix.outputs + block - 1) / block; };
  for (const Matrix& matrix : matrices) tasks += blocks(matrix);
  Shared().Run(tasks, threads, [&](int64_t task) {
    const Matrix* matrix = matrices.data();
    for (; task >= blocks(*matrix); ++matrix) task -= blocks(*matrix);
    const int64_t O = matrix->outputs, end = std::min(O, (task + 1) * block);
    const T* w = static_cast<const T*>(matrix->weight);
    auto some = [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      for (int64_t n = task * block; n < end; n += kLanes / kRows) {
        for (int64_t r = 0; r < rows; r += kRows) {
          ProductBlock<T, kRows>(x + r * I, w, matrix->scale, matrix->y + r * O, I, O, rows - r, n);
        }
      }
    };
    if (rows > 2) {
      some(std::integral_constant<int, 4>());
    } else if (rows == 2) {
      some(std::integral_constant<int, 2>());
    } else {
      some(std::integral_constant<int, 1>());
    }
  });
}

// x [R, I] times the transposes of matrices [O, I], all in float32, all in bf16, or all in int8 with a scale per output.
// args: the arrays of each matrix; rets: each product.
ffi::Error Product(ffi::ThreadPool pool, int64_t arrays, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args, ffi::RemainingRets rets) {
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
  switch (type) {
    case ffi::F32: Products<float>(pool, x.typed_data(), matrices, I, rows); break;
    case ffi::BF16: Products<uint16_t>(pool, x.typed_data(), matrices, I, rows); break;
    case ffi::S8: Products<int8_t>(pool, x.typed_data(), matrices, I, rows); break;
    default: return ffi::Error::InvalidArgument("unknown format of weights");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_decode, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("arrays")
                                  .Attr<ffi::Span<const int64_t>>("turned")
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_exchange, Exchange,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("arrays")
                                  .Attr<bool>("turned")
                                  .Attr<bool>("forget")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("arrays")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
