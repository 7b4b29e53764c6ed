// What attention is called with: tiers, and queries in groups of one row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native_stored.h"

namespace kvcascade {

// A row's slots are its own, [R, heads, S], or stand in blocks of a pool: the one of position p in block table[row, p / page].
struct Tier {
  Stored k, v;
  const int32_t* pos;    // [R, heads, S]; null in blocks, where a slot's number is its position
  int64_t slots;         // S; in blocks as many as the longest row can have
  float* weights;        // [B, heads G, S], or null
  const int32_t* table;  // [R, width], -1: no block; or null
  int64_t width, page;   // blocks of a row, slots of a block: a power of two, and whole registers
  int64_t stride;        // vectors from one block to the next
  int64_t heads;         // KV heads that have slots here
  const int64_t* place;  // [K], of each of the layer's which of those it is; -1: none
};

// Consecutive queries of one row.
struct Group {
  int64_t first, count;
};

struct Call {
  const float* q;              // [B, N, H]
  const int32_t* query_pos;    // [B]
  const int32_t* query_row;    // [B], or null: each is a row of its own
  float* out;                  // [B, N, H], and beside it [B, N]:
  float *maximum, *sum;        // partial.Partial
  int64_t kv_heads, group, H;  // K, G = N / K
  int64_t window;              // positions that a query sees, 0: all
  float scale, soft_cap;       // of logits; 0: no cap
  std::vector<Tier> tiers;
  std::vector<Group> groups;  // empty: each query is one
  int64_t most;    // queries of a group, at most
  int64_t shares;  // of a group's KV head
  float* memory;   // of all shares, where there are several
};

constexpr int64_t kMost = 16;  // queries of a group

// Consecutive queries of one row as groups.
inline void Grouped(Call& call, int64_t queries) {
  for (int64_t n = 0; n < queries; ++n) {
    const bool same = n > 0 && call.query_row[n] == call.query_row[n - 1] && call.query_row[n] >= 0 && call.groups.back().count < kMost;
    if (same) {
      ++call.groups.back().count;
    } else {
      call.groups.push_back({n, 1});
    }
    call.most = std::max(call.most, call.groups.back().count);
  }
}

}  // namespace kvcascade
