// Attention of one query per row over all tiers, for XLA on a CPU.
//
// XLA converts a bf16 or int8 operand of a product into a float32 copy. This reads each stored number once, as it is stored, and
// skips slots that the query does not see. A task is one row's KV head, whose G query heads share every vector that is read.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native_stored.h"
#include "native_workers.h"

namespace kvcascade {
namespace {

constexpr int64_t kAhead = 6;  // blocks of slots
constexpr float kNothing = -1e30f;  // partial.NEVER

struct Tier {
  Stored k, v;
  const int32_t* pos;  // [B, K, S]
  int64_t slots;       // S
  float* weights;      // [B, N, S], or null
};

struct Call {
  const float* q;              // [B, N, H]
  const int32_t* query_pos;    // [B]
  float* out;                  // [B, N, H], and beside it [B, N]:
  float *maximum, *sum;        // partial.Partial
  int64_t kv_heads, group, H;  // K, G = N / K
  int64_t window;              // positions that a query sees, 0: all
  float scale, soft_cap;       // of logits; 0: no cap
  std::vector<Tier> tiers;
  int64_t shares;  // of a row's KV head
  float* memory;   // of all shares, where there are several
};

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
    for (int64_t g = 0; g < G_; ++g) {
      const float* q = call_.q + (row_head_ * G_ + g) * H_;
      for (int64_t h = 0; h < H_; ++h) q_turned_[g * stride_ + h] = q_[g * stride_ + h] = q[h] * call_.scale;
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

  // Once all shares have run: the head's partial, by its first share, and the weights of this share's slots.
  void Finish() {
    for (int64_t g = 0; g < G_; ++g) {
      const int64_t head = row_head_ * G_ + g;
      float top = kNever;
      for (int64_t p = 0; p < call_.shares; ++p) top = std::max(top, Maxima(p)[g]);
      auto rescaled = [&](int64_t p) { return Maxima(p)[g] == kNever ? 0.0f : Exp(Maxima(p)[g] - top); };
      const float factor = rescaled(share_), *weights = weights_ + g * slots_;
      for (const Tier& tier : call_.tiers) {
        const int64_t first = First(tier), last = Last(tier);
        for (int64_t s = first; tier.weights && s < std::min(last, tier.slots); ++s) {
          tier.weights[head * tier.slots + s] = factor * weights[s - first];
        }
        weights += last - first;
      }
      if (share_) continue;
      float sum = 0, *out = call_.out + head * H_;
      std::fill_n(out, H_, 0.0f);
      for (int64_t p = 0; p < call_.shares; ++p) {
        const float factor = rescaled(p), *part = Outputs(p) + g * stride_;
        sum += Maxima(p)[G_ + g] * factor;
        for (int64_t h = 0; h < H_; ++h) out[h] += factor * part[h];
      }
      call_.maximum[head] = std::max(top, kNothing);
      call_.sum[head] = sum;
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
        result = Sums(products);
        if (call_.soft_cap) result = Capped(result, call_.soft_cap);
        result += *reinterpret_cast<const Lanes*>(seen_);
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
      if (tier.v.turned) Turn(part, H_);
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

constexpr int64_t kShareSlots = 256;  // at least
constexpr int64_t kWorthAThread = 1 << 18;  // products: some 6 us of work

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

// args: per tier its positions, the arrays of K, the arrays of V; rets: the partial, and per tier its weights, or none at all.
ffi::Error Attend(ffi::ThreadPool pool, ffi::Span<const int64_t> arrays, ffi::Span<const int64_t> turned, int64_t window,
                  float scale, float soft_cap, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::S32> query_pos, ffi::RemainingArgs args,
                  ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> maximum, ffi::ResultBuffer<ffi::F32> sum,
                  ffi::RemainingRets weights) {
  const auto dims = q.dimensions();
  Call call{q.typed_data(), query_pos.typed_data(), out->typed_data(), maximum->typed_data(), sum->typed_data(),
            0, 0, dims[2], window, scale, soft_cap, {}, 1, nullptr};
  int64_t slots = 0;
  size_t next = 0;
  for (size_t i = 0; i < arrays.size() / 2; ++i) {
    auto pos = args.get<ffi::Buffer<ffi::S32>>(next++);
    if (!pos.has_value()) return pos.error();
    auto k = ReadStored(args, next, arrays[2 * i], turned[2 * i]);
    if (!k.has_value()) return k.error();
    auto v = ReadStored(args, next, arrays[2 * i + 1], turned[2 * i + 1]);
    if (!v.has_value()) return v.error();
    float* tier_weights = weights.size() ? (*weights.get<ffi::Buffer<ffi::F32>>(i))->typed_data() : nullptr;
    call.kv_heads = pos->dimensions()[1];
    call.tiers.push_back({*k, *v, pos->typed_data(), pos->dimensions()[2], tier_weights});
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_decode, Guarded(Attend),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("arrays")
                                  .Attr<ffi::Span<const int64_t>>("turned")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets());

}  // namespace kvcascade
