// How the fused block divides its work and its memory: what mlp.cpp runs.
//
// A call may use 4 MB for each thread beside its input, its
// output and the packed weights, for any image size.
#pragma once

#include "cpu/rows.h"

namespace cnk::cpu::CNK_ISA {

enum class MlpWay { kTiles, kColumns, kImages, kGroup };  // explained in mlp.cpp

template <class G>
struct MlpPlan {
  static constexpr int64_t kBytesPerThread = int64_t{4} << 20;
  static constexpr int64_t kRun = 32;  // rows whose squares are added in one chain

  MlpWay way;
  int64_t tile;   // rows that are convolved and normalised at a time
  int64_t chain;  // rows of a tile that go through both products at a time
  int64_t group;  // kColumns, kGroup: rows of the shared buffers; of whole images with GRN
  // kImages: units of rows, each with its own sums of squares and computed by one thread; the rows whose
  // hidden a thread keeps between the two passes.
  int64_t unit = 0, units = 0, kept = 0;
  // Offsets into the workspace; those of y and h into each thread's part of it.
  struct {
    int64_t y, h, per_thread, shared_y, shared_h, shared_sums, total;
  } at;

  MlpPlan(const MlpArgs& a, int threads) {
    const int64_t rows = a.n * a.h * a.w, image = a.h * a.w;
    const int64_t y_row = G::a_bytes(32, a.c) / 32, h_row = G::a_bytes(32, a.hidden) / 32;
    const int64_t weight_bytes =
        G::packed_bytes(a.hidden, a.c, a.w1.dtype) + G::packed_bytes(a.c, a.hidden, a.w2.dtype);
    // The tile takes about half of L2; the rest is for weights and x. Weights of several times the size of L2
    // are read from L3 once a tile, and then fewer, larger tiles are faster (C 768, batch 8, fp32: 12.4 ->
    // 11.8 ms; slower for smaller weights). Not where L2 has 2 MB and L3 is slow: a Xeon reads the hidden of 3 MB from there
    // for each panel of W2 (bf16, one thread: 5.2 ms, with 1.5 MB 4.3).
    const int64_t l2 = l2_cache_bytes(), most = kBytesPerThread - step_bytes(a.c) - 4096;
    int64_t budget =
        weight_bytes > 4 * l2 ? max64(l2 * 3 / 4, min64(l2 * 3 / 2, int64_t{3} << 19)) : l2 * 5 / 8;
    if (a.schedule == kHalfTiles) budget /= 2;
    if (a.schedule == kDoubleTiles) budget *= 2;
    budget = min64(budget, most);
    const int64_t room = max64(budget / (y_row + h_row), 64);
    tile = ceil_div(rows, round_up(ceil_div(rows, room), threads));
    // Weights that stay in L2 are cheap to read again, so few rows at a time keep the hidden in the caches (C
    // 96, bf16: 1.05 -> 0.93 ms on one core). Larger weights should be read for as many rows as possible.
    const bool short_chains = a.schedule == kShort || (a.schedule != kLong && weight_bytes <= l2 / 4);
    chain = short_chains ? min64(tile, 128) : tile;
    group = rows;
    // This must depend on the image only, not on the number of threads: it decides how the squares are added.
    const bool divided = a.grn_weight && (image >= 1024 || image * h_row > most / 2);
    const int64_t sums_row = a.grn_weight ? pad_channels(a.hidden) * 4 : 0;  // of images of one pixel
    // There are few rows, and the weights do not stay in L2: reading them would cost too much.
    const bool few = a.schedule == kSplitColumns
                         ? rows * (y_row + h_row + sums_row) <= kBytesPerThread * threads / 2
                         : rows <= 64 * threads && weight_bytes > l2;
    const bool choosable = a.schedule == kByShape || a.schedule == kSplitColumns;
    if (threads > 1 && !divided && few && choosable) {
      way = MlpWay::kColumns;
    } else if (!a.grn_weight) {
      way = MlpWay::kTiles;
    } else if (divided) {
      way = MlpWay::kImages;
      // At most 64 units for any image, because their sums need memory too.
      unit = max64(kRun, round_up(ceil_div(image, 64), kRun));
      units = ceil_div(image, unit);
      const int64_t share = ceil_div(units, threads) * unit;  // rows of a thread
      const int64_t sums = ceil_div(units * pad_channels(a.hidden) * 4, threads);
      tile = max64(min64(min64(room, (most - sums) / (y_row + h_row)), share) / kRun * kRun, kRun);
      chain = short_chains ? min64(tile, 128) : tile;
      // All of a thread's rows, or as many as fit beside those of the current tile.
      const int64_t left = most - sums - tile * y_row;
      const int64_t fits = left / h_row / kRun * kRun;
      kept = fits >= share ? share : max64(fits - chain, 0) / tile * tile;
    } else {
      way = MlpWay::kGroup;
      tile = round_up(tile, G::kRowGrain);  // a tile must begin at a multiple of h's grain
      const int64_t left = most - G::a_bytes(tile, a.c) - G::kRowGrain * h_row;
      group = min64(max64(left * threads / (image * h_row + pad_channels(a.hidden) * 4), 1), a.n) * image;
    }
    lay_out(a, threads);
  }

  static int64_t workspace(const MlpArgs& a, int threads) {
    return most_bytes(threads, [&](int t) { return MlpPlan(a, t).at.total; });
  }

 private:
  void lay_out(const MlpArgs& a, int threads) {
    const bool columns = way == MlpWay::kColumns, shared_hidden = columns || way == MlpWay::kGroup;
    int64_t end = align64(step_bytes(a.c));
    at.y = end;
    end += columns ? 0 : align64(G::a_bytes(tile, a.c));
    at.h = end;
    if (way == MlpWay::kTiles) end += align64(G::a_bytes(chain, a.hidden));
    if (way == MlpWay::kImages) {
      const bool all = kept * threads >= units * unit;
      end += align64(G::a_bytes(kept, a.hidden)) + (all ? 0 : align64(G::a_bytes(chain, a.hidden)));
    }
    at.per_thread = end;
    end *= threads;
    at.shared_y = end;
    end += columns ? align64(G::a_bytes(group, a.c)) : 0;
    at.shared_h = end;
    end += shared_hidden ? align64(G::a_bytes(group, a.hidden)) : 0;
    at.shared_sums = end;
    if (a.grn_weight) {
      const int64_t sums = way == MlpWay::kImages ? units : group / (a.h * a.w);
      end += align64(sums * pad_channels(a.hidden) * 4);
    }
    at.total = end;
  }
};

}  // namespace cnk::cpu::CNK_ISA
