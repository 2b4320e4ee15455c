// SPDX-License-Identifier: Apache-2.0
// One call as the kernels take it: by value, as a kernel parameter.
#pragma once

#include "../kernels.hpp"

namespace fastloss {

constexpr int kThreads = 256;      // of a block
constexpr int kMostOfCluster = 8;  // blocks; what every GPU with clusters takes
constexpr int kVectorBytes = 16;   // what a thread loads at once
constexpr int kBatch = 4;          // so many times
constexpr int kAhead = 3;          // batches on their way through shared memory
constexpr int kLine = 8;           // vectors of a line of the cache: parts of a row that begins with one do, too
constexpr int kMaxAxes = 16;       // of rows that do not lie behind each other

// The rows of one tensor: `steps` along each axis of rows, in elements.
struct Matrix {
  char* data = nullptr;
  Dtype dtype = kF32;
  int64_t class_step = 1;
  int64_t steps[kMaxAxes] = {};
};

struct DeviceIds {
  const void* data = nullptr;  // null: none
  int itemsize = 8;
  int k = 0;
};

// What a warp knows of a row: sums over its columns, as the fields of PartialField; and the first of its maximal logits.
struct Part {
  double max, sum, rest, sum_x, sum_sq, weighted, weight, soft, soft_weight;
  int64_t argmax;
};

// What goes through shared memory.
struct alignas(kVectorBytes) Vector {
  uint32_t word[kVectorBytes / 4];
};

struct Problem {
  int64_t rows = 0, classes = 0;
  int axes = 1;
  int64_t extents[kMaxAxes] = {};
  Matrix logits, soft, grad;  // `soft` and `grad` may have no data
  Transform transform;
  const void* weight = nullptr;  // inside sums over classes; null stands for ones
  int want = 0;
  DeviceIds ids;
  // How threads share a row: `adjacent` where its classes lie side by side. Then the lanes of a warp take neighbouring classes
  // of one row, else the same class of neighbouring rows.
  bool adjacent = true;
  int warps_per_row = 1;  // warps of a block that share a row, or 32 rows: a power of two
  int warps_log2 = 0;
  int parts = 1;         // blocks that share them: in one trip a cluster of blocks
  int64_t blocks = 0;    // of a gradient: that the rows would fill, of which a block of the grid may take several
  int turns = 1;         // in one trip: rows that blocks take one after the other
  int batches = 0;       // of a row, that a thread has room for in shared memory
  Part* part = nullptr;  // [rows][parts * warps_per_row], where the parts are merged by another kernel
};

// Blocks of a multiprocessor at a time, as far as registers go: `less` of them for kernels that need more.
constexpr int blocks_for(size_t itemsize, int less) {
  const int blocks = (itemsize == 8 ? 2 : 3) - less;
  return blocks > 1 ? blocks : 1;
}

// Shared memory for the batches of a block; what a block of one trip takes beside them, at most, with 1 KiB of the GPU's own.
constexpr int kBatchBytes = kBatch * kThreads * kVectorBytes;
inline int shared_bytes_of(const Problem& p) { return p.batches * kBatchBytes; }
constexpr int one_trip_bytes(bool full) { return (full ? 14 : 7) << 10; }

// What a scan makes of a row.
enum class Form {
  kPlain,    // sums of the exponentials of its logits as they are
  kMoments,  // and of their squares, and of their products with the logits
  kFull,     // all that a Problem can ask for
};

inline Form form_of(const Problem& p) {
  const Transform& t = p.transform;
  if (t.inv_temperature != 1.0 || t.softcap != 0.0 || t.bias || p.soft.data || p.weight || (p.want & kWantWeighted)) {
    return Form::kFull;
  }
  return p.want & (kWantEntropy | kWantSumSq) ? Form::kMoments : Form::kPlain;
}

// Cross-entropy. Ids out of range get NaN.
struct Loss {
  bool wanted = false;
  int64_t ignore_index = 0;
  double label_smoothing = 0.0, z_loss = 0.0;
  const void* class_weight = nullptr;
  void* losses = nullptr;  // one a row, double if `wide`, else of the accumulation type
  bool wide = true;
  SavedRow* saved = nullptr;
};

// Each may be null, as in StatsOutputs.
struct Statistics {
  void* logprob = nullptr;
  void* logsumexp = nullptr;
  void* entropy = nullptr;
  void* mean_logit = nullptr;
  void* sum_sq_prob = nullptr;
  void* max_prob = nullptr;
  int64_t* argmax = nullptr;
  int64_t* rank = nullptr;
  SavedRow* saved = nullptr;
};

struct DeviceUpstream {
  const void* data = nullptr;  // null: 1
  Dtype dtype = kF32;
  int64_t step = 0;
};

// A gradient that forward made for the upstream gradient that it expected; what comes in backward is expected next.
struct Expected {
  const double* made_for = nullptr;  // null: no gradient has been made
  double* next = nullptr;            // null: nobody expects any
  int32_t* surprised = nullptr;      // whether something else came than was expected; may be memory of the host
};

// Where the coefficients of the gradient come from: the loss, times *scale and the upstream gradient, or from memory.
struct GradientSource {
  const double* scale = nullptr;  // null: 1
  DeviceUpstream upstream;
  const double* coefficients = nullptr;  // [rows][4]
  const double* g = nullptr;             // [rows][k]
  Expected expected;
};

// What sampling keeps of the gradient of each row's loss: `slots` places for each token, in the order in which the threads come
// to them. A row that needs more of them gets NaN.
struct Sample {
  const int64_t* seed = nullptr;
  double threshold = 0.0;
  const int64_t* token = nullptr;  // the number of each row: for the random numbers, and where its entries go
  int64_t slots = 0;
  int64_t* count = nullptr;    // of each token
  int32_t* columns = nullptr;  // [tokens][slots]
  void* values = nullptr;      // of the accumulation type
};

// A sparse matrix over those places: its rows are the tokens, or with `start` the classes. Then order[start[c] ... start[c +
// 1]) are the places of class c.
struct Entries {
  int64_t rows = 0;
  int64_t slots = 0;
  const int64_t* count = nullptr;
  const int32_t* columns = nullptr;
  const void* values = nullptr;
  const double* factors = nullptr;  // of each token
  const int64_t* start = nullptr;
  const int64_t* order = nullptr;
};

// A dense one, rows behind each other.
struct Dense {
  char* data = nullptr;
  int64_t width = 0;
};

}  // namespace fastloss
