// How the fused block divides its work and its memory: what mlp.cpp runs.
//
// A call may use 4 MB for each thread besides its input, its output and the packed weights, whatever the
// image's size.
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
  // kImages: units of rows, each with its own sums of squares and handled by one thread; rows whose hidden a
  // thread keeps between the passes.
  int64_t unit = 0, units = 0, kept = 0;
  // Offsets into the workspace; y and h into each thread's part of it.
  struct {
    int64_t y, h, per_thread, shared_y, shared_h, shared_sums, total;
  } at;

  MlpPlan(const MlpArgs& a, int threads) {
    const int64_t rows = a.n * a.h * a.w, image = a.h * a.w;
    const int64_t y_row = G::a_bytes(32, a.c) / 32, h_row = G::a_bytes(32, a.hidden) / 32;
    const int64_t weight_bytes = G::packed_bytes(a.hidden, a.c) + G::packed_bytes(a.c, a.hidden);
    // Half of L2 for the tile leaves room for weights and x passing through. Weights of several times L2 come
    // from L3 once a tile, and then fewer, larger tiles win (C 768, batch 8, fp32: 12.4 -> 11.8 ms; the
    // others lose by it).
    const int64_t l2 = l2_cache_bytes(), most = kBytesPerThread - step_bytes(a.c) - 4096;
    const int64_t budget = min64(weight_bytes > 4 * l2 ? l2 * 3 / 2 : l2 * 5 / 8, most);
    const int64_t room = max64(budget / (y_row + h_row), 64);
    tile = ceil_div(rows, round_up(ceil_div(rows, room), threads));
    // Weights that stay in L2 are cheap to read again, so a short chain keeps the hidden near (C 96,
    // bf16: 1.05 -> 0.93 ms on one core); larger weights want as many rows as possible to each reading.
    const bool short_chains = weight_bytes <= l2 / 4;
    chain = short_chains ? min64(tile, 128) : tile;
    group = rows;
    // A question of the image, not of the number of threads: how the squares are added depends on it.
    const bool divided = a.grn_weight && (image >= 1024 || image * h_row > most / 2);
    // Too few rows to spread the cost of reading the weights, which do not stay in L2.
    if (threads > 1 && !divided && rows <= 64 * threads && weight_bytes > l2) {
      way = MlpWay::kColumns;
    } else if (!a.grn_weight) {
      way = MlpWay::kTiles;
    } else if (divided) {
      way = MlpWay::kImages;
      // At most 64 units, however large the image: their sums are memory too.
      unit = max64(kRun, round_up(ceil_div(image, 64), kRun));
      units = ceil_div(image, unit);
      const int64_t share = ceil_div(units, threads) * unit;  // rows of a thread
      const int64_t sums = ceil_div(units * pad_channels(a.hidden) * 4, threads);
      tile = max64(min64(min64(room, (most - sums) / (y_row + h_row)), share) / kRun * kRun, kRun);
      chain = short_chains ? min64(tile, 128) : tile;
      // All of a thread's rows, or as many as there is room for beside those passing through.
      const int64_t left = most - sums - tile * y_row;
      const int64_t fits = left / h_row / kRun * kRun;
      kept = fits >= share ? share : max64(fits - chain, 0) / tile * tile;
    } else {
      way = MlpWay::kGroup;
      tile = round_up(tile, G::kRowGrain);  // tiles of a thread's rows begin at h's grain
      const int64_t left = most - G::a_bytes(tile, a.c) - pad_channels(a.hidden) * 4;
      group = min64(max64(left * threads / (image * h_row), 1), a.n) * image;
    }
    lay_out(a, threads);
  }

  static int64_t workspace(const MlpArgs& a, int threads) {
    // Not monotonic in the size of the team, which may turn out smaller than asked for.
    int64_t most = 0;
    for (int t = 1; t <= threads; ++t) most = max64(most, MlpPlan(a, t).at.total);
    return most;
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
