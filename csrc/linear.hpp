// SPDX-License-Identifier: Apache-2.0
// What linear cross-entropy needs, with the same bits everywhere: its products, sparse gradients, and sums over them.
#pragma once

#include "engine.hpp"

namespace fastloss {

// out = hidden weight^T + bias, each sum in the order of the features and rounded once. The weight may have any strides; hidden
// and bias (or null) have the accumulation type of weight and out; hidden and out have adjacent columns.
void ordered_product(const Tensor& hidden, const Tensor& weight, const void* bias, const Tensor& out);

// out = left right, or that added to `out`, each sum in one order, as ProductSums says. The factors may have any strides and
// types of the accumulation type that `out` has; its columns are adjacent.
void product(const Tensor& left, const Tensor& right, ProductSums sums, const Tensor& out);

// A sparse matrix in compressed rows: row r holds ids[start[r]] ... ids[start[r + 1]], in ascending order, with their values
// of the accumulation type.
struct SparseRows {
  int64_t rows = 0;
  int64_t* start = nullptr;
  int32_t* ids = nullptr;
  void* values = nullptr;
};

// What sampling kept, all rows side by side, its values rounded to the accumulation type.
void collect(const SampledGradient& sampled, Dtype values, const SparseRows& out);

// out[r] = sum_k values[k] matrix[ids[k]] over the entries of row r: sparse times dense, both dense matrices with adjacent
// columns, of one dtype, rounded once.
void multiply(const SparseRows& sparse, const Tensor& matrix, const Tensor& out);

// `out` has as many rows as `sparse` has columns; entries of a row stay in the order of the rows they came from.
void transpose(const SparseRows& sparse, Dtype values, const SparseRows& out);

}  // namespace fastloss
