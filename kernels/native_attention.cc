// Attention of queries over all tiers of their rows, for XLA on a CPU.
//
// XLA converts a bf16 or int8 operand of a product into a float32 copy. This reads each stored number once, as it is stored, and
// skips slots that no query sees. A task is one KV head of a group: consecutive queries of one row, often a single one, whose heads
// share every vector that is read.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "native_call.h"
#include "native_stored.h"
#include "native_workers.h"

namespace kvcascade {
namespace {

constexpr int64_t kAhead = 6;  // blocks of slots
constexpr float kNothing = -1e30f;  // partial.NEVER

// A group's KV head over its share of each tier's slots; shares merge as partials do, by the logits' maximum and the weights' sum.
// kWide registers hold a vector of H (0: known only when run).
template <int kWide>
class Share {
 public:
  Share(const Call& call, int64_t row_head, int64_t share)
      : call_(call), H_(call.H), head_(row_head % call.kv_heads), share_(share) {
    const int64_t group = row_head / call.kv_heads;
    const Group all = call.groups.empty() ? Group{group, 1} : call.groups[group];
    query_ = all.first, queries_ = all.count, G_ = call.group * all.count;
    row_ = call.query_row ? std::max(call.query_row[query_], 0) : query_;
    const auto [least, most] = std::minmax_element(call.query_pos + query_, call.query_pos + query_ + queries_);
    now_ = *most, oldest_ = Oldest(*least);
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
    memory.assign(((3 * G_ + kLanes) * stride_ + RoundUp(2 * G_)) / kLanes, Register{});
    q_ = reinterpret_cast<float*>(memory.data());
    q_turned_ = q_ + G_ * stride_;
    part_ = q_turned_ + G_ * stride_;
    block_ = part_ + G_ * stride_;
    sums_ = block_ + kLanes * stride_;
  }

  // Floats that a share keeps: maxima and sums [G] each, outputs [G, stride], weights [G, slots].
  static int64_t Size(const Call& call) {
    int64_t slots = 0;
    for (const Tier& tier : call.tiers) slots += (RoundUp(tier.slots) / kLanes / call.shares + 1) * kLanes;
    return RoundUp(2 * call.group * call.most) + call.group * call.most * (RoundUp(call.H) + slots);
  }

  void Run() {
    for (int64_t g = 0; g < G_; ++g) {
      const float* q = call_.q + Head(g) * H_;
      for (int64_t h = 0; h < H_; ++h) q_turned_[g * stride_ + h] = q_[g * stride_ + h] = q[h] * call_.scale;
    }
    if (std::any_of(call_.tiers.begin(), call_.tiers.end(), [](const Tier& tier) { return tier.k.turned; })) {
      for (int64_t g = 0; g < G_; ++g) Turn(q_turned_ + g * stride_, H_);
    }
    for (int64_t g = 0; g < G_; ++g) {
      sums_[g] = std::accumulate(q_ + g * stride_, q_ + g * stride_ + H_, 0.0f);
      sums_[G_ + g] = std::accumulate(q_turned_ + g * stride_, q_turned_ + g * stride_ + H_, 0.0f);
    }
    int64_t offset = 0;
    for (const Tier& tier : call_.tiers) {
      tier.k.scale ? Logits<true>(tier, weights_ + offset) : Logits<false>(tier, weights_ + offset);
      offset += Last(tier) - First(tier);
    }
    for (int64_t g = 0; g < G_; ++g) Softmax(weights_ + g * slots_, Maxima(share_) + g, Maxima(share_) + G_ + g);
    std::fill_n(Outputs(share_), G_ * stride_, 0.0f);
    offset = 0;
    for (const Tier& tier : call_.tiers) {
      if (Last(tier) > First(tier)) tier.v.scale ? Output<true>(tier, weights_ + offset) : Output<false>(tier, weights_ + offset);
      offset += Last(tier) - First(tier);
    }
  }

  // Once all shares have run: the head's partial, by its first share, and the weights of this share's slots.
  void Finish() {
    for (int64_t g = 0; g < G_; ++g) {
      const int64_t head = Head(g);
      float top = kNever;
      for (int64_t p = 0; p < call_.shares; ++p) top = std::max(top, Maxima(p)[g]);
      auto rescaled = [&](int64_t p) { return Maxima(p)[g] == kNever ? 0.0f : Exp(Maxima(p)[g] - top); };
      const float factor = rescaled(share_), *weights = weights_ + g * slots_;
      for (const Tier& tier : call_.tiers) {
        const int64_t first = First(tier), last = Last(tier);
        const int64_t row = Head(g, tier.heads, tier.place[head_]);
        for (int64_t s = first; tier.weights && s < std::min(last, tier.slots); ++s) {
          tier.weights[row * tier.slots + s] = factor * weights[s - first];
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
  // The query head of the g-th of a group's: those of one query, then those of the next.
  int64_t Head(int64_t g) const { return Head(g, call_.kv_heads, head_); }
  int64_t Head(int64_t g, int64_t heads, int64_t head) const {
    return ((query_ + g / call_.group) * heads + head) * call_.group + g % call_.group;
  }

  // The first position that a query at this one sees.
  int32_t Oldest(int32_t now) const { return call_.window ? std::max<int64_t>(0, now - call_.window + 1) : 0; }

  // Where slots from one on stand, in vectors; -1: nowhere.
  int64_t Start(const Tier& tier, int64_t first) const {
    if (!tier.table) return (row_ * tier.heads + tier.place[head_]) * tier.slots + first;
    const int64_t block = tier.table[row_ * tier.width + (first >> __builtin_ctzll(tier.page))];
    return block < 0 ? -1 : block * tier.stride + head_ * tier.page + (first & (tier.page - 1));
  }

  // The slots of a share: whole registers, none of other heads' tiers. In blocks a row is as long as its newest query says.
  int64_t Bound(const Tier& tier, int64_t share) const {
    if (tier.place[head_] < 0) return 0;
    const int64_t slots = tier.table ? std::min<int64_t>(tier.slots, now_ + 1) : tier.slots;
    return RoundUp(slots) / kLanes * share / call_.shares * kLanes;
  }
  int64_t First(const Tier& tier) const { return Bound(tier, share_); }
  int64_t Last(const Tier& tier) const { return Bound(tier, share_ + 1); }

  float* Memory(int64_t share) const { return memory_ + share * Size(call_); }
  float* Maxima(int64_t share) const { return Memory(share); }  // and the sums after them
  float* Outputs(int64_t share) const { return Memory(share) + RoundUp(2 * G_); }

  int64_t wide() const { return kWide ? kWide : stride_ / kLanes; }

  // Read a block of slots, zeros in place of those that are not seen; false if none is.
  template <bool kScaled>
  bool ReadBlock(const Tier& tier, const Stored& stored, int64_t first) {
    const int64_t start = Start(tier, first), slots = std::min<int64_t>(kLanes, tier.slots - first);
    pos_ = tier.table ? numbered_ : tier.pos + start;
    if (tier.table) {
      for (int j = 0; j < kLanes; ++j) numbered_[j] = start < 0 || j >= slots ? -1 : first + j;
    } else if (slots < kLanes) {
      std::fill_n(std::copy_n(pos_, slots, numbered_), kLanes - slots, -1);
      pos_ = numbered_;
    }
    const int32_t* pos = pos_;
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (int j = 0; j < kLanes; ++j) {
      const bool seen = (pos[j] >= oldest_) & (pos[j] <= now_);
      seen_[j] = seen ? 0.0f : kNever;
      count += seen;
    }
    // Between two steps the weights pass through the processor's caches, so slots come from memory: ask for them some blocks ahead.
    const int64_t bytes = RowBytes(stored, H_);
    int64_t next = first + kAhead * kLanes;
    if (tier.table) next = std::min(next, Last(tier) - kLanes);
    next = Start(tier, next);
    next = std::max<int64_t>(next, 0);
    const char* ahead = static_cast<const char*>(stored.codes) + next * bytes;
    for (int64_t i = 0; count > 0 && i < kLanes * bytes; i += 64) __builtin_prefetch(ahead + i);
    if (kScaled && stored.fine && count > 0) {
      const int64_t fine = H_ * stored.fine / 8;
      for (int64_t i = 0; i < kLanes * fine; i += 64) __builtin_prefetch(stored.fines + next * fine + i);
    }
    // In blocks steps do not follow one another for long enough that the processor would see it.
    if (kScaled && tier.table) __builtin_prefetch(stored.scale + next);
    if (kScaled && tier.table && stored.low) __builtin_prefetch(stored.low + next);
    if (!kScaled && count == kLanes && stride_ == H_) {
      Read(stored, start, kLanes, H_, block_);
    } else if (count > 0) {
      if (kScaled && count == kLanes) {
        scales_ = Widened(stored.scale + start);
        shifts_ = stored.low ? Widened(stored.low + start) + stored.middle * scales_ : Lanes{};
      }
      for (int64_t j = 0; j < kLanes; ++j) {
        const bool seen = seen_[j] == 0;
        if (seen) {
          Read(stored, start + j, 1, H_, block_ + j * stride_);
        } else {
          std::fill_n(block_ + j * stride_, H_, 0.0f);
        }
        if (!kScaled || count == kLanes) continue;
        scales_[j] = seen ? Scale(stored, start + j) : 0.0f;
        shifts_[j] = seen ? Shift(stored, start + j) : 0.0f;
      }
    }
    return count > 0;
  }

  template <bool kScaled>
  void Logits(const Tier tier, float* logits) {
    const float* queries = tier.k.turned ? q_turned_ : q_;
    const auto* block = reinterpret_cast<const Lanes*>(block_);
    const int64_t start = First(tier), end = Last(tier);
    for (int64_t first = start; first < end; first += kLanes) {
      const bool any = ReadBlock<kScaled>(tier, tier.k, first);
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
        if (kScaled) result = result * scales_ + shifts_ * sums_[tier.k.turned * G_ + g];
        if (call_.soft_cap) result = Capped(result, call_.soft_cap);
        result += *reinterpret_cast<const Lanes*>(seen_);
        if (queries_ == 1) continue;
        const int32_t now = call_.query_pos[query_ + g / call_.group], oldest = Oldest(now);
        for (int j = 0; j < kLanes; ++j) result[j] = ((pos_[j] > now) | (pos_[j] < oldest)) ? kNever : result[j];
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

  template <bool kScaled>
  void Output(const Tier tier, const float* weights) {
    const auto* block = reinterpret_cast<const Lanes*>(block_);
    std::fill_n(part_, G_ * stride_, 0.0f);
    std::fill_n(sums_, G_, 0.0f);  // from here on of weights times shifts
    const int64_t start = First(tier), end = Last(tier);
    for (int64_t first = start; first < end; first += kLanes) {
      if (!ReadBlock<kScaled>(tier, tier.v, first)) continue;
      for (int64_t g = 0; g < G_; ++g) {
        auto* part = reinterpret_cast<Lanes*>(part_ + g * stride_);
        const float* w = weights + g * slots_ + first - start;
        alignas(sizeof(Lanes)) float scaled[kLanes];
        if (kScaled) {
          const Lanes given = *reinterpret_cast<const Lanes*>(w), shifted = given * shifts_;
          *reinterpret_cast<Lanes*>(scaled) = given * scales_;
          for (int j = 0; tier.v.low && j < kLanes; ++j) sums_[g] += shifted[j];
          w = scaled;
        }
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
      for (int64_t h = 0; h < H_ && tier.v.low; ++h) part[h] += sums_[g];
      if (tier.v.turned) Turn(part, H_);
      for (int64_t h = 0; h < H_; ++h) out[h] += part[h];
    }
  }

  const Call& call_;
  const int64_t H_, head_, share_;
  int64_t query_, queries_, row_, G_;  // the first of the group's queries, how many, their row, and how many query heads in all
  int64_t slots_ = 0;  // of this share of all tiers, each padded to whole blocks
  int64_t stride_;     // H, padded
  int32_t now_, oldest_;  // the positions that some query sees
  float* memory_;                            // of this head's shares; where there is one, this thread's
  float* weights_;                           // [G, slots]
  float *q_, *q_turned_, *part_;             // [G, stride]
  float* block_;                             // [kLanes, stride]
  float* sums_;                              // [2, G], of the queries' numbers, and of the turned ones'
  const int32_t* pos_;                       // of the slots of that block
  int32_t numbered_[kLanes];
  alignas(sizeof(Lanes)) float seen_[kLanes];  // 0, or -inf for a slot that nobody sees
  Lanes scales_, shifts_;                      // of the vectors of that block; zeros of one that nobody sees
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

// args: of each query its row, if `rows`; per tier its positions or its table, the arrays of K, the arrays of V; rets: the partial, and
// the weights of each tier that is observed. places: of each tier the slots of a block, the layer, and the slots that a row has in blocks;
// zeros where it is not in blocks. members: of each tier and KV head which of the tier's heads it is. A pool's arrays are [P, L, K, Z, …].
ffi::Error Attend(ffi::ThreadPool pool, ffi::Span<const int64_t> formats, ffi::Span<const float> levels,
                  ffi::Span<const int64_t> places, ffi::Span<const int64_t> members, ffi::Span<const int64_t> observed, bool rows, int64_t window, float scale, float soft_cap, ffi::Buffer<ffi::F32> q,
                  ffi::Buffer<ffi::S32> query_pos, ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> out,
                  ffi::ResultBuffer<ffi::F32> maximum, ffi::ResultBuffer<ffi::F32> sum, ffi::RemainingRets weights) {
  const auto dims = q.dimensions();
  Call call{q.typed_data(), query_pos.typed_data(), nullptr, out->typed_data(), maximum->typed_data(), sum->typed_data(),
            0, 0, dims[2], window, scale, soft_cap, {}, {}, 1, 1, nullptr};
  size_t next = 0, weighed = 0;
  if (rows) {
    auto row = args.get<ffi::Buffer<ffi::S32>>(next++);
    if (!row.has_value()) return row.error();
    call.query_row = row->typed_data();
    Grouped(call, dims[0]);
  }
  const int32_t longest = dims[0] ? *std::max_element(call.query_pos, call.query_pos + dims[0]) + 1 : 0;
  int64_t slots = 0;  // of all KV heads
  const size_t tiers = places.size() / 3;
  Formats about{formats.begin(), levels.begin()};
  call.kv_heads = members.size() / tiers;
  for (size_t i = 0; i < tiers; ++i) {
    const int64_t* place = members.begin() + i * call.kv_heads;
    auto where = args.get<ffi::Buffer<ffi::S32>>(next++);
    if (!where.has_value()) return where.error();
    auto first = args.get<ffi::AnyBuffer>(next);
    if (!first.has_value()) return first.error();
    const auto shape = first->dimensions();
    auto k = ReadStored(args, next, about);
    if (!k.has_value()) return k.error();
    auto v = ReadStored(args, next, about);
    if (!v.has_value()) return v.error();
    const int64_t page = places[3 * i], layer = places[3 * i + 1];
    if (page) {
      const int64_t width = where->dimensions()[1], vectors = shape[2] * page;
      const int64_t room = std::min<int64_t>({width * page, places[3 * i + 2], longest});
      call.tiers.push_back({From(*k, layer * vectors, call.H), From(*v, layer * vectors, call.H), nullptr, room, nullptr,
                            where->typed_data(), width, page, shape[1] * vectors, shape[2], place});
      slots += room * shape[2];
    } else {
      float* tier_weights = observed[i] ? (*weights.get<ffi::Buffer<ffi::F32>>(weighed++))->typed_data() : nullptr;
      const int64_t heads = where->dimensions()[1];
      call.tiers.push_back({*k, *v, where->typed_data(), where->dimensions()[2], tier_weights, nullptr, 0, 0, 0, heads, place});
      slots += where->dimensions()[2] * heads;
    }
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
  const int64_t groups = rows ? call.groups.size() : dims[0];
  const int64_t work = 2 * slots * call.H * (dims[0] * call.group + 4 * groups);
  const int64_t threads = std::min<int64_t>(pool.num_threads(), work / kWorthAThread);
  run(call, groups * call.kv_heads, slots / call.kv_heads, threads);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_decode, Guarded(Attend),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<ffi::Span<const float>>("levels")
                                  .Attr<ffi::Span<const int64_t>>("places")
                                  .Attr<ffi::Span<const int64_t>>("members")
                                  .Attr<ffi::Span<const int64_t>>("observed")
                                  .Attr<bool>("rows")
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
