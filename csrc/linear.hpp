// SPDX-License-Identifier: Apache-2.0
// What linear cross-entropy needs besides matrix products and the kernels of logits: sparse gradients, and sums over them.
#pragma once

#include "engine.hpp"

namespace fastloss {

// A sparse matrix in compressed rows: row r holds ids[start[r]] ... ids[start[r + 1]], in ascending order, with their values
// of the accumulation type.
struct SparseRows {
  int64_t rows = 0;
  int64_t* start = nullptr;
  int32_t* ids = nullptr;
  void* values = nullptr;
};

// out[r] = sum_k values[k] matrix[ids[k]] over the entries of row r: sparse times dense, both dense matrices with adjacent
// columns, of one dtype, rounded once.
void multiply(const SparseRows& sparse, const Tensor& matrix, const Tensor& out);

// `out` has as many rows as `sparse` has columns; entries of a row stay in the order of the rows they came from.
void transpose(const SparseRows& sparse, Dtype values, const SparseRows& out);

// c = a b, or c + a b, for small blocks: a of m rows and k columns; b of k rows, for bfloat16 in pairs that are interleaved; c
// float32. These are PyTorch's at::native::cpublas::brgemm and brgemm_release: on CPUs with tile registers the product leaves
// them set up for its shape, and takes them to be so at its next call in this thread, unless they are released.
struct BlockProduct {
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t step_a, int64_t step_b, int64_t step_c, bool add, const void* a,
                   const void* b, float* c, bool b_is_interleaved);
  void (*release)(bool b_is_interleaved);
};

// total = grad^T hidden, or total + grad^T hidden, for matrices of bfloat16 or float32 with adjacent columns and a float32
// total (null: nobody wants it). The sum goes to `rounded` as well, which may be empty. What PyTorch itself offers rounds each
// product of bfloat16 matrices to bfloat16, and has no fast form of this product of float32 matrices.
void transposed_product(BlockProduct product, const Tensor& grad, const Tensor& hidden, float* total, bool add,
                        const Tensor& rounded);

}  // namespace fastloss
