// The exchange of one slot per row and KV head, for XLA on a CPU: in place, where XLA would copy.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native_stored.h"

namespace kvcascade {
namespace {

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
    const float least = Least(ranks, S);
    const bool swap = ranks[S] > least;
    const int64_t slot = row_head * S + (std::find(ranks, ranks + S, least) - ranks);
    auto exchange = [&](const Stored& held, const float* coming, float* left) {
      if (!forget && swap) Decode(held, slot, H, left);
      if (!forget && !swap) std::copy_n(coming, H, left);
      if (!swap) return;
      std::copy_n(coming, H, x.data());
      Write(held, slot, H, x.data());
    };
    exchange(*held_k, k.typed_data() + row_head * H, forget ? nullptr : left_k + row_head * H);
    exchange(*held_v, v.typed_data() + row_head * H, forget ? nullptr : left_v + row_head * H);
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcascade_exchange, Guarded(Exchange),
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

}  // namespace kvcascade
