// SPDX-License-Identifier: Apache-2.0
#include "engine.hpp"

#include <algorithm>

#include "dispatch.hpp"
#include "layout.hpp"
#include "parallel.hpp"
#include "room.hpp"
#include "sampled.hpp"
#include "sizes.hpp"

namespace fastloss {
namespace {

constexpr int64_t kRowElements = 256;           // the cost of a row besides its classes, counted in classes
constexpr int64_t kSerialElements = 32 * 1024;  // below, waking a thread costs more than it brings
constexpr int64_t kTaskElements = 64 * 1024;    // what one task should hold at least
constexpr int64_t kTasksOfLarge = 16;           // tasks a thread in a large call: long stretches of memory, see below
// Neighbouring rows of a tile with its classes far apart: half a run reads memory slower, twice a run spills out of L2.
constexpr int64_t kRunBytes = kTileRows * 2;
constexpr int64_t kKeptElements = int64_t{1} << 20;  // of a tile: what L2 holds, or L3 after it
constexpr int kTasksPerThread = 4;                   // fewer tiles than that a thread: split within the rows

const RowKernels& kernels_for(Dtype dtype) { return dtype == kF64 ? kernels().f64 : kernels().f32; }

// Each thread keeps its buffers from call to call; pages that no call has touched cost nothing.
Scratch& scratch() {
  constexpr size_t kBytes = kTileElements * sizeof(double);
  thread_local Room<char> room;
  thread_local Scratch scratch = [] {
    char* const base = room.of(5 * kBytes);
    return Scratch{base, base + kBytes, base + 2 * kBytes, base + 3 * kBytes, base + 4 * kBytes};
  }();
  return scratch;
}

// Room of one thread for the exponentials of a tile.
void* powers_room(size_t bytes) {
  thread_local Room<char> room;
  return room.of(bytes);
}

int64_t elements(int64_t rows, int64_t classes) { return rows * (classes + kRowElements); }

int threads_for(int64_t rows, int64_t classes) { return elements(rows, classes) < kSerialElements ? 1 : get_num_threads(); }

bool adjacent(const Tensor& t) { return !t || t.strides[t.axis] == 1 || t.shape[t.axis] == 1; }

// Where the tiles of a call begin, and how many rows each holds.
class Tiling {
 public:
  Tiling(const RowLayout& layout, int64_t rows, const Tensor& logits, const Tensor& out) : inner_(layout.inner()) {
    const int64_t classes = logits.shape[logits.axis];
    const int64_t staged = (std::min<int64_t>(classes, kBlock) + kLanes - 1) / kLanes * kLanes;
    // Adjacent classes: as many short rows as fit in a block. Else enough rows for long runs of memory.
    const int64_t room = kTileElements / staged / kRowGroup * kRowGroup;
    rows_ = adjacent(logits) && adjacent(out) ? kBlock / staged : std::min(room, kRunBytes / itemsize_of(logits.dtype));
    rows_ = std::min(inner_, rows_);
    per_inner_ = divided(inner_, rows_);
    count_ = rows / inner_ * per_inner_;
  }
  int64_t count() const { return count_; }
  int64_t rows_per_tile() const { return rows_; }
  int64_t first_row(int64_t tile) const { return tile / per_inner_ * inner_ + tile % per_inner_ * rows_; }
  int rows(int64_t tile) const { return static_cast<int>(std::min(rows_, inner_ - tile % per_inner_ * rows_)); }

 private:
  int64_t inner_, rows_, per_inner_, count_;
};

struct TileWork {
  int64_t first_row = 0;
  int rows = 0;
  bool skip = false;  // all rows are ignored
  Tile logits, soft, grad;
  std::vector<int64_t> ids, ranks;
  std::vector<char> ignored;
  std::vector<double> target_z, g, corrected, partials;
  Scanned scanned;
  std::vector<RowStats> stats;
  std::vector<GradientRow> coefficients;
};

class Run {
 public:
  Run(const Sweep& sweep, int64_t rows)
      : s_(sweep),
        kernels_(kernels_for(sweep.logits.dtype)),
        layout_(sweep.logits, sweep.soft, sweep.grad),
        tiling_(layout_, rows, sweep.logits, sweep.grad),
        blocks_(divided(sweep.pass.classes, kBlock)),
        threads_(threads_for(rows, sweep.pass.classes)),
        split_(threads_ > 1 && blocks_ > 1 && tiling_.count() < threads_ * kTasksPerThread && !s_.sampled) {}

  void run() {
    if (split_) {
      run_split();
      return;
    }
    // Threads that write to one huge page at the same time both fault it in, and each clears a page of its own for it: so a
    // task is as long a stretch of rows as leaves each thread enough tasks to even out.
    const int64_t least = kTaskElements / elements(tiling_.rows_per_tile(), s_.pass.classes);
    const int64_t grain = std::max<int64_t>({1, least, tiling_.count() / (threads_ * kTasksOfLarge)});
    parallel_for(divided(tiling_.count(), grain), threads_, [&](int64_t task) {
      thread_local TileWork work;
      for (int64_t tile = task * grain; tile < std::min(tiling_.count(), (task + 1) * grain); ++tile) {
        begin(tile, work);
        scan(work, 0, blocks_);
        finish(work);
        gradient(work, 0, blocks_);
      }
    });
  }

 private:
  // Few rows: each phase shares the blocks of all tiles among the threads.
  void run_split() {
    const int64_t parts = std::min<int64_t>(blocks_, threads_ * kTasksPerThread);
    std::vector<TileWork> works(tiling_.count());
    const auto over_parts = [&](auto phase) {
      parallel_for(tiling_.count() * parts, threads_, [&](int64_t task) {
        const int64_t part = task % parts;
        phase(works[task / parts], blocks_ * part / parts, blocks_ * (part + 1) / parts);
      });
    };
    for (int64_t tile = 0; tile < tiling_.count(); ++tile) begin(tile, works[tile]);
    over_parts([&](TileWork& work, int64_t first, int64_t last) { scan(work, first, last); });
    for (TileWork& work : works) finish(work);
    over_parts([&](TileWork& work, int64_t first, int64_t last) { gradient(work, first, last); });
  }

  void begin(int64_t tile, TileWork& w) const {
    w.first_row = tiling_.first_row(tile);
    w.rows = tiling_.rows(tile);
    w.logits = layout_.tile(RowLayout::kLogits, w.first_row);
    w.soft = layout_.tile(RowLayout::kSoft, w.first_row);
    w.grad = layout_.tile(RowLayout::kGrad, w.first_row);
    const size_t k = s_.targets ? s_.targets.k : 0;
    const size_t ids = w.rows * k;
    w.ids.resize(ids);
    w.target_z.resize(ids);
    w.g.resize(ids);
    w.corrected.resize(ids);
    for (size_t i = 0; i < ids; ++i) w.ids[i] = s_.targets[w.first_row * k + i];
    w.ignored.assign(w.rows, 0);
    w.skip = s_.ignore_index != nullptr;
    for (int r = 0; r < w.rows && s_.ignore_index; ++r) {
      w.ignored[r] = w.ids[r * k] == *s_.ignore_index;
      w.skip &= w.ignored[r];
      if (w.ignored[r]) w.ids[r * k] = 0;
    }
    if (s_.want_rank && !w.skip) kernels_.gather(s_.pass, w.logits, w.rows, target_ids(w), w.target_z.data());
    if (s_.on_rows) w.partials.resize(blocks_ * kPartialFields * row_room(w));
    if (s_.want_rank) w.ranks.resize(ids * blocks_);
    w.scanned = {{w.partials.data(), row_room(w)}, w.target_z.data(), s_.want_rank ? w.ranks.data() : nullptr};
    keep_powers(w);
    w.stats.resize(w.rows);
    w.coefficients.resize(w.rows);
  }

  static int64_t row_room(const TileWork& w) { return divided(w.rows, kRowGroup) * kRowGroup; }

  // exp(z - ref) stays for a gradient that needs nothing else of the logits and follows on the same thread: over the logits
  // themselves, if those will be overwritten anyway.
  void keep_powers(TileWork& w) const {
    const bool plain = !s_.soft && !s_.pass.weight && s_.pass.transform.softcap == 0.0;
    const bool kept = !(s_.pass.want & (kWantEntropy | kWantSumSq));  // else the scan has other sums to make
    const bool one_row = tiling_.rows_per_tile() == 1;
    const size_t itemsize = s_.logits.dtype == kF64 ? sizeof(double) : sizeof(float);
    const int64_t elements = (w.rows == 1 ? 1 : row_room(w)) * (s_.pass.classes + kLanes);
    if (!s_.on_rows || !s_.coefficients || !plain || !kept || split_ || (s_.sampled && !one_row)) return;
    if (one_row && s_.grad.data == s_.logits.data && itemsize_of(s_.grad.dtype) == static_cast<int64_t>(itemsize) &&
        adjacent(s_.grad)) {
      w.scanned.powers = w.grad.data;
      w.scanned.last_powers = powers_room(kBlock * itemsize);
    } else if (elements <= kKeptElements) {
      w.scanned.powers = powers_room(elements * itemsize);
    }
  }

  TargetIds target_ids(const TileWork& w) const { return {s_.targets ? s_.targets.k : 0, w.ids.data()}; }

  void scan(TileWork& w, int64_t first, int64_t last) const {
    if (!s_.on_rows || w.skip) return;
    kernels_.scan(s_.pass, w.logits, w.soft, w.rows, first, last, target_ids(w), w.scanned, scratch());
  }

  void finish(TileWork& w) const {
    const Rows rows{w.first_row, w.rows, w.ignored.data(), w.scanned.partials, blocks_};
    if (s_.on_rows) {
      if (!w.skip) kernels_.finish(s_.pass, w.logits, w.rows, w.scanned.partials, w.stats.data(), scratch());
      if (s_.want_rank) merge_ranks(w);
      s_.on_rows(rows, w.stats.data(), w.target_z.data(), w.ranks.data());
    }
    if (s_.coefficients) {
      s_.coefficients(rows, w.coefficients.data(), w.g.data());
      for (int r = 0; r < w.rows; ++r) w.coefficients[r].zero = w.ignored[r];
    }
  }

  // Sums of the blocks, in place: then one number a target.
  void merge_ranks(TileWork& w) const {
    const int64_t k = s_.targets.k;
    for (int64_t r = 0; r < w.rows; ++r) {
      for (int64_t i = 0; i < k; ++i) {
        int64_t rank = 0;
        for (int64_t block = 0; block < blocks_; ++block) rank += w.ranks[(r * blocks_ + block) * k + i];
        w.ranks[r * k + i] = rank;
      }
    }
  }

  void gradient(TileWork& w, int64_t first, int64_t last) const {
    if (!s_.coefficients) return;
    if (s_.sampled) {
      sample(w);
      return;
    }
    kernels_.gradient(s_.pass, w.logits, w.soft, w.rows, first, last, w.coefficients.data(), target_ids(w), w.g.data(),
                      w.corrected.data(), w.scanned, w.grad, scratch());
  }

  void sample(TileWork& w) const {
    for (int r = 0; r < w.rows; ++r) {
      if (w.coefficients[r].zero) continue;
      s_.logits.dtype == kF64 ? sample_row<double>(w, r) : sample_row<float>(w, r);
    }
  }

  template <class A>
  void sample_row(TileWork& w, int r) const {
    const GradientRow& c = w.coefficients[r];
    const int64_t row = w.first_row + r;
    const size_t k = s_.targets ? s_.targets.k : 0;
    thread_local std::vector<Kept<double>> all;  // of the row, which then takes one allocation
    all.clear();
    if (k == 0 && c.rest != c.rest) all.push_back({0, c.rest});  // no target that would carry the NaN of this row
    const double* g = w.g.data() + r * k;
    const Sampling sampling{row_threshold(s_.sampled->threshold, c, k ? *g : 0.0, s_.pass.transform.inv_temperature),
                            random_key(s_.sampled->seed, s_.sampled->token[row])};
    const TargetIds id{static_cast<int>(k), w.ids.data() + r * k};
    const Tile logits = layout_.tile(RowLayout::kLogits, row), soft = layout_.tile(RowLayout::kSoft, row);
    Kept<A> kept[kBlock];
    for (int64_t block = 0; block < blocks_; ++block) {
      const int count = kernels_.sample(s_.pass, logits, soft, block, c, id, g, w.scanned, sampling, kept, scratch());
      for (int i = 0; i < count; ++i) all.push_back({kept[i].column, kept[i].value});
    }
    s_.sampled->rows[row] = all;
  }

  const Sweep& s_;
  const RowKernels& kernels_;
  const RowLayout layout_;
  const Tiling tiling_;
  const int64_t blocks_;
  const int threads_;
  const bool split_;  // the blocks of a row go to several threads
};

}  // namespace

void Sweep::run() {
  const int64_t rows = row_count(logits);
  if (rows == 0) return;
  pass.want |= soft ? kWantSoft : 0;
  pass.stream = grad && rows * pass.classes * itemsize_of(grad.dtype) >= kStreamBytes;
  Run(*this, rows).run();
}

void write_soft_gradient(const Pass& pass, const Tensor& logits, const Tensor& out,
                         const std::function<double(int64_t row, RowStats& stats)>& row_scale) {
  const int64_t rows = row_count(logits);
  if (rows == 0) return;
  const RowLayout layout(logits, {}, out);
  const Tiling tiling(layout, rows, logits, out);
  const int threads = threads_for(rows, pass.classes);
  parallel_for(tiling.count(), threads, [&](int64_t tile) {
    RowStats stats[kTileRows];
    double scale[kTileRows];
    const int64_t first = tiling.first_row(tile);
    for (int r = 0; r < tiling.rows(tile); ++r) scale[r] = row_scale(first + r, stats[r]);
    kernels_for(logits.dtype)
        .soft_gradient(pass, layout.tile(RowLayout::kLogits, first), tiling.rows(tile), 0, divided(pass.classes, kBlock), stats,
                       scale, layout.tile(RowLayout::kGrad, first), scratch());
  });
}

}  // namespace fastloss
