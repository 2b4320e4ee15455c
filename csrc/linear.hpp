// SPDX-License-Identifier: Apache-2.0
// Sparse gradients of the sampled backward, and sums over them.
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

}  // namespace fastloss
