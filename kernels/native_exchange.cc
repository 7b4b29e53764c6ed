// Writing into slots and into blocks, for XLA on a CPU: in place, where XLA would copy.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "native_stored.h"

namespace kvcascade {
namespace {

// The slot that goes first: of those of least priority the one of the oldest position, and so an empty one before all others.
int64_t First(const float* ranks, const int32_t* positions, int64_t S) {
  const float least = Least(ranks, S);
  const int64_t first = std::find(ranks, ranks + S, least) - ranks;
  if (first == S || positions[first] < 0) return first % S;
  int32_t oldest = positions[first];
#pragma omp simd reduction(min : oldest)
  for (int64_t s = first; s < S; ++s) {
    const int32_t position = positions[s];  // read in any case, so that it can be in registers
    oldest = std::min(oldest, ranks[s] == least ? position : std::numeric_limits<int32_t>::max());
  }
  int64_t slot = first;
  while (ranks[slot] != least || positions[slot] != oldest) ++slot;
  return slot;
}

// The newcomers that may come in, the best first: of equals the one of the highest position.
int64_t Coming(const float* ranks, const int32_t* positions, std::vector<int64_t>& order) {
  const auto end = std::partition(order.begin(), order.end(), [&](int64_t t) { return ranks[t] > kNever; });
  std::sort(order.begin(), end, [&](int64_t a, int64_t b) {
    return ranks[a] != ranks[b] ? ranks[a] > ranks[b] : positions[a] != positions[b] ? positions[a] > positions[b] : a < b;
  });
  return end - order.begin();
}

// As many slots that go first, in that order; not a number goes last.
void First(const float* ranks, const int32_t* positions, int64_t count, std::vector<int64_t>& order) {
  if (count == 1) {
    order[0] = First(ranks, positions, order.size());
    return;
  }
  std::iota(order.begin(), order.end(), 0);
  auto rank = [&](int64_t s) { return std::isnan(ranks[s]) ? std::numeric_limits<float>::infinity() : ranks[s]; };
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int64_t a, int64_t b) {
    const float x = rank(a), y = rank(b);
    return x != y ? x < y : positions[a] != positions[b] ? positions[a] < positions[b] : a < b;
  });
}

// A row's KV head: the i-th slot that goes first is exchanged for the i-th best newcomer if that ranks higher.
// args: the newcomers' numbers; positions, the arrays of K, those of V, the slots' numbers; rets: the latter, in place, and what was
// left over: key, value, position, numbers.
ffi::Error Exchange(ffi::Span<const int64_t> formats, ffi::Span<const float> levels, int64_t numbers, bool forget,
                    ffi::Buffer<ffi::F32> priority, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> pos,
                    ffi::RemainingArgs args, ffi::RemainingRets rets) {
  auto floats = [](auto buffer) { return static_cast<float*>(buffer->untyped_data()); };
  size_t next = numbers;
  auto held_pos = args.get<ffi::Buffer<ffi::S32>>(next++);
  if (!held_pos.has_value()) return held_pos.error();
  Formats about{formats.begin(), levels.begin()};
  auto held_k = ReadStored(args, next, about);
  if (!held_k.has_value()) return held_k.error();
  auto held_v = ReadStored(args, next, about);
  if (!held_v.has_value()) return held_v.error();
  std::vector<float*> coming(numbers), held(numbers), left(numbers);
  for (int64_t i = 0; i < numbers; ++i) {
    coming[i] = floats(args.get<ffi::AnyBuffer>(i));
    held[i] = floats(args.get<ffi::AnyBuffer>(next++));
  }
  const size_t in_place = next - numbers;
  for (size_t i = 0; i < in_place; ++i) {
    if (args.get<ffi::AnyBuffer>(numbers + i)->untyped_data() != (*rets.get<ffi::AnyBuffer>(i))->untyped_data()) {
      return ffi::Error::Internal("slots are not exchanged in place");
    }
  }
  float *left_k = nullptr, *left_v = nullptr;
  int32_t* left_pos = nullptr;
  if (!forget) {
    auto after = [&](size_t i) { return floats(*rets.get<ffi::AnyBuffer>(in_place + i)); };
    left_k = after(0), left_v = after(1), left_pos = reinterpret_cast<int32_t*>(after(2));
    for (int64_t i = 0; i < numbers; ++i) left[i] = after(3 + i);
  }

  const auto dims = held_pos->dimensions();
  const int64_t S = dims[2], T = pos.dimensions()[2];
  std::vector<float> x(std::max(k.dimensions()[3], v.dimensions()[3]));
  std::vector<int64_t> slots(S), newcomers(T);
  for (int64_t head = 0; head < dims[0] * dims[1]; ++head) {
    const float* ranks = priority.typed_data() + head * (S + T);
    const int32_t* offered = pos.typed_data() + head * T;
    int32_t* positions = held_pos->typed_data() + head * S;
    if (!forget) {
      for (auto [vectors, all_left] : {std::pair{&k, left_k}, std::pair{&v, left_v}}) {
        const int64_t size = T * vectors->dimensions()[3];
        std::copy_n(vectors->typed_data() + head * size, size, all_left + head * size);
      }
      std::copy_n(offered, T, left_pos + head * T);
      for (int64_t i = 0; i < numbers; ++i) std::copy_n(coming[i] + head * T, T, left[i] + head * T);
    }
    std::iota(newcomers.begin(), newcomers.end(), 0);
    const int64_t count = std::min(S, Coming(ranks + S, offered, newcomers));
    if (count) First(ranks, positions, count, slots);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = slots[i], t = newcomers[i];
      const float mine = ranks[S + t], least = ranks[slot];
      if (!(mine > least || (mine == least && offered[t] > positions[slot]))) continue;
      auto exchange = [&](const Stored& stored, ffi::Buffer<ffi::F32>& vectors, float* all_left) {
        const int64_t H = vectors.dimensions()[3], row = head * T + t;
        if (!forget) Decode(stored, head * S + slot, H, all_left + row * H);
        std::copy_n(vectors.typed_data() + row * H, H, x.data());
        Write(stored, head * S + slot, H, x.data());
      };
      exchange(*held_k, k, left_k);
      exchange(*held_v, v, left_v);
      if (!forget) left_pos[head * T + t] = positions[slot];
      positions[slot] = offered[t];
      for (int64_t n = 0; n < numbers; ++n) {
        float* number = held[n] + head * S + slot;
        if (!forget) left[n][head * T + t] = *number;
        *number = coming[n][head * T + t];
      }
    }
  }
  return ffi::Error::Success();
}

// Tokens written into blocks: each into the slot of a block that its number says, slots counted through all blocks; -1: none.
// args, and rets in place: the arrays of K, those of V [P, L, K, Z, …].
ffi::Error WriteBlocks(ffi::Span<const int64_t> formats, ffi::Span<const float> levels, int64_t layer, ffi::Buffer<ffi::F32> k,
                       ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> slot, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  for (size_t i = 0; i < args.size(); ++i) {
    if (args.get<ffi::AnyBuffer>(i)->untyped_data() != (*rets.get<ffi::AnyBuffer>(i))->untyped_data()) {
      return ffi::Error::Internal("blocks are not written in place");
    }
  }
  size_t next = 0;
  auto first = args.get<ffi::AnyBuffer>(0);
  if (!first.has_value()) return first.error();
  const auto shape = first->dimensions();
  const int64_t K = shape[2], Z = shape[3];
  Formats about{formats.begin(), levels.begin()};
  auto held_k = ReadStored(args, next, about);
  if (!held_k.has_value()) return held_k.error();
  auto held_v = ReadStored(args, next, about);
  if (!held_v.has_value()) return held_v.error();
  std::vector<float> x(std::max(k.dimensions()[2], v.dimensions()[2]));
  for (int64_t n = 0; n < slot.dimensions()[0]; ++n) {
    const int64_t at = slot.typed_data()[n];
    if (at < 0 || at >= shape[0] * Z) continue;
    for (int64_t head = 0; head < K; ++head) {
      const int64_t row = ((at / Z * shape[1] + layer) * K + head) * Z + at % Z;
      auto write = [&](const Stored& stored, ffi::Buffer<ffi::F32>& vectors) {
        const int64_t H = vectors.dimensions()[2];
        std::copy_n(vectors.typed_data() + (n * K + head) * H, H, x.data());
        Write(stored, row, H, x.data());
      };
      write(*held_k, k);
      write(*held_v, v);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_write, Guarded(WriteBlocks),
                              ffi::Ffi::Bind()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<ffi::Span<const float>>("levels")
                                  .Attr<int64_t>("layer")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_exchange, Guarded(Exchange),
                              ffi::Ffi::Bind()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<ffi::Span<const float>>("levels")
                                  .Attr<int64_t>("numbers")
                                  .Attr<bool>("forget")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

}  // namespace kvcascade
