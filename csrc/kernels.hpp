// SPDX-License-Identifier: Apache-2.0
// What the program may ask of one instruction set: a table of functions for each accumulation type.
//
// Every function works on a tile: a few rows of a matrix of N rows (tokens) and V columns (classes). A tile is one row where
// the classes lie side by side in memory, and up to kTileRows neighbouring rows where they do not. Columns are taken in blocks
// of kBlock; results never depend on how blocks and tiles are shared out among threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Marks what nvcc compiles for the GPU as well.
#if defined(__CUDACC__)
#define FASTLOSS_HD __host__ __device__
#else
#define FASTLOSS_HD
#endif

namespace fastloss {

enum Dtype : int { kF32 = 0, kF64 = 1, kF16 = 2, kBF16 = 3 };

constexpr int kBlock = 4096;                // columns in a block: 16 KiB of float32, so that a block stays in L1
constexpr int kLanes = 64;                  // virtual lanes of every sum and maximum, on every instruction set
constexpr int kRowGroup = 16;               // rows in one register, at most, on any instruction set
constexpr int kTileRows = 512;              // rows in a tile, at most
constexpr int kTileElements = 32 * kBlock;  // elements of a staged tile, at most

// z = softcap * tanh(x / temperature / softcap) + bias_j
struct Transform {
  double inv_temperature = 1.0;
  double softcap = 0.0;        // 0: none
  const void* bias = nullptr;  // V values of the accumulation type, or null
};

// Rows of one strided matrix. Steps are in elements.
struct Tile {
  char* data = nullptr;
  Dtype dtype = kF32;
  int64_t row_step = 0;
  int64_t class_step = 1;
};

enum Want : int {
  kWantEntropy = 1,   // mean_x
  kWantSumSq = 2,     // sum_sq, and mean_x
  kWantWeighted = 4,  // weighted, weight
  kWantArgmax = 8,    // argmax
  kWantSoft = 16,     // soft, soft_weight
};

// What stays the same over all tiles of a call.
struct Pass {
  int64_t classes = 0;
  Transform transform;
  const void* weight = nullptr;  // w: V values of the accumulation type; null stands for ones
  int want = 0;                  // bits of Want
  bool stream = false;           // a gradient too large for the caches: store past them
};

// Sums over blocks, relative to ref = the maximum of the block (0 where that is -inf).
enum PartialField : int {
  kMax,         // max z
  kSum,         // sum exp(z - ref)
  kRest,        // sum - 1; where that is less than 1, summed without the maximal class
  kSumX,        // sum exp(z - ref) * (z - ref)
  kSumSq,       // sum exp(z - ref)^2
  kWeighted,    // sum w (z - ref)
  kWeight,      // sum w
  kSoft,        // sum w q (z - ref)
  kSoftWeight,  // sum w q
  kPartialFields
};

// data[(block * kPartialFields + field) * row_room + row]: the rows of a tile side by side, with room for a whole kRowGroup.
struct Partials {
  double* data = nullptr;
  int64_t row_room = 0;
  FASTLOSS_HD double* row(int64_t block, PartialField field) const {
    return data + (block * kPartialFields + field) * row_room;
  }
};

// What a scan of a tile leaves.
struct Scanned {
  Partials partials = {};
  double* target_z = nullptr;  // of the target ids
  int64_t* ranks = nullptr;    // if wanted: how many classes of a block come before each target in a stable descending sort
  // exp(z - ref), block after block as panels (powers_of in staging.hpp), from which a gradient is made without the logits.
  // Null: not kept. May be the logits; then those of a last block that needs padding lie elsewhere.
  void* powers = nullptr;
  void* last_powers = nullptr;
};

// Statistics of one row; what is not wanted holds nothing. The normaliser is kept as (max, rest): sum_j exp(z_j - max) = 1 +
// rest, log-sum-exp = max + log1p(rest). Where one class holds most of the probability, rest is summed without it, so that
// nothing of 1 - p is lost.
struct RowStats {
  double max;
  double rest;
  double log_sum;      // log1p(rest): log-sum-exp less max
  double mean_x;       // sum p (z - max)
  double sum_sq;       // sum p^2
  double weighted;     // sum w (z - max)
  double weight;       // sum w
  double soft;         // sum w q (z - max)
  double soft_weight;  // sum w q
  int64_t argmax;      // first class of the maximal logit; -1 where rest is NaN
};

// What the backward needs of a row besides the logits; `mass` is the factor of log-sum-exp in the loss. On the CPU the maxima
// of the blocks follow it.
struct SavedRow {
  double max, rest, mass;
};
constexpr int kSavedFields = sizeof(SavedRow) / sizeof(double);

// A row's probabilities are made as exp(z - ref) exp(ref - max) / (1 + rest), with the ref of each block: so they have the same
// bits whether a scan kept its exponentials or not.
//
// grad_z_j = p_j (a + b x_j + c p_j) + w_j (d + e q_j) - sum_k g_k [j = id_k],  x_j = z_j - max
struct GradientRow {
  double max = 0, rest = 0;
  double a = 0, b = 0, c = 0, d = 0, e = 0;
  bool zero = false;                  // an ignored row: zeros, whatever its logits hold
  const double* block_max = nullptr;  // of each block
  double mass = 0;                    // of a cross-entropy: the sum of its label, for row_threshold
};

// Target ids of the rows of a tile: id[row * k + i].
struct TargetIds {
  int k = 0;
  const int64_t* id = nullptr;
};

// Buffers of one thread, each of kTileElements elements of the accumulation type.
struct Scratch {
  void* logits;
  void* derivative;
  void* soft;
  void* weight;
  void* gradient;  // of what is sampled
};

// Two words that make the random numbers of one row.
struct RandomKey {
  uint32_t first, second;
};

// An entry of a gradient that sampling kept.
template <class A>
struct Kept {
  int32_t column;
  A value;
};

struct Sampling {
  double threshold = 0.0;
  RandomKey key = {};
};

// The sums of a product: one chain of additions, new or from what is there, which may go on in a later product; or those of
// blocks of ProductBlocks::depth terms, added up, whose error does not grow with their number as that of a chain does.
enum class ProductSums { kNew, kAdded, kInBlocks };

struct RowKernels {
  // z of the target ids, in double: z[row * k + i].
  void (*gather)(const Pass&, const Tile& logits, int rows, const TargetIds&, double* z);

  // Fills in what Scanned has room for, of the blocks [begin, end) and the ids that lie in them. Ranks, which need all of
  // target_z gathered before, lie at [(row * blocks_of_a_row + block) * k + i].
  void (*scan)(const Pass&, const Tile& logits, const Tile& soft, int rows, int64_t begin, int64_t end, const TargetIds&,
               const Scanned&, Scratch&);

  // Merges the partials of whole rows.
  void (*finish)(const Pass&, const Tile& logits, int rows, const Partials&, RowStats* stats, Scratch&);

  // The gradient of the blocks [begin, end), into `grad` (which may be the logits). g[row * k + i] goes with the ids;
  // `corrected` is room for rows * k doubles. Of what was scanned it takes the powers, if there are any.
  void (*gradient)(const Pass&, const Tile& logits, const Tile& soft, int rows, int64_t begin, int64_t end,
                   const GradientRow* coefficients, const TargetIds&, const double* g, double* corrected, const Scanned&,
                   const Tile& grad, Scratch&);

  // One row's gradient as `gradient` makes it, sampled (sampled.hpp): writes the kept entries of one block, in ascending order
  // of columns, to `kept` (Kept<A>, room for kBlock of them), and returns how many.
  int (*sample)(const Pass&, const Tile& logits, const Tile& soft, int64_t block, const GradientRow& coefficients,
                const TargetIds&, const double* g, const Scanned&, const Sampling&, void* kept, Scratch&);

  // out[h] = sum_k values[k] matrix[ids[k]][h], values of the accumulation type; no k at all gives zeros.
  void (*weighted_rows)(const Tile& matrix, int64_t width, const int32_t* ids, const void* values, int64_t count,
                        const Tile& out, bool stream);

  // Rounds rows of numbers, `step` apart, to those of `out`, whose columns are adjacent.
  void (*round)(const void* numbers, int64_t step, int64_t rows, int columns, const Tile& out, bool stream);

  // out_ij = scale_i w_j (L_i - z_ij): the gradient of a loss by its soft targets.
  void (*soft_gradient)(const Pass&, const Tile& logits, int rows, int64_t begin, int64_t end, const RowStats* stats,
                        const double* scale, const Tile& out, Scratch&);

  // The columns [begin, end) of left matrix^T + bias, summed in the order of the features and rounded once. The rows of `left`,
  // `step` apart, and bias (or null) have the accumulation type; `room` is for depth * kLanes numbers of it.
  void (*ordered_product)(const void* left, int64_t step, int64_t rows, const Tile& matrix, int64_t begin, int64_t end,
                          int64_t depth, const void* bias, const Tile& out, bool stream, void* room);

  // out[i][j] = sum_k left[i][k] right[j][k]; `out` has the accumulation type, and `room` is for room_of_product numbers of it.
  void (*product)(const Tile& left, int64_t rows, const Tile& right, int64_t columns, int64_t depth, ProductSums sums,
                  void* out, int64_t out_step, void* room);
};

namespace {

// What a product takes at a time of its sums, and of the rows of its left factor: they share L2 with a panel of the right one.
struct ProductBlocks {
  int64_t depth, rows;
};
inline ProductBlocks product_blocks(int64_t depth) {
  constexpr int64_t kMostDepth = 1408, kLeastRows = 48;  // 256 KiB of float32
  const int64_t blocks = depth > kMostDepth ? (depth + kMostDepth - 1) / kMostDepth : 1;
  const int64_t of_block = depth > blocks ? (depth + blocks - 1) / blocks : 1;
  return {of_block, kMostDepth / of_block * kLeastRows};
}
inline int64_t room_of_product(int64_t columns, int64_t depth) {
  const ProductBlocks blocks = product_blocks(depth);
  return ((columns + kLanes - 1) / kLanes * kLanes + blocks.rows) * blocks.depth;
}

}  // namespace

struct Kernels {
  const char* name;
  RowKernels f32;  // logits of float32, float16, bfloat16: accumulated in float32
  RowKernels f64;  // logits of float64
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_neon;

}  // namespace fastloss
