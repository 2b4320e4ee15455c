// SPDX-License-Identifier: Apache-2.0
// The product of bfloat16 matrices that makes gradients by the weights, cut into blocks that stay in the cache; a library
// multiplies the blocks, with instructions for bfloat16.
#pragma once

#include "engine.hpp"

namespace fastloss {

// c = a b, or c + a b, for small blocks of bfloat16: a of m rows and k columns, b of k rows in interleaved pairs; c is float32.
// These are PyTorch's at::native::cpublas::brgemm and brgemm_release: on CPUs with tile registers the product leaves them set
// up for its shape, and takes them to be so at its next call in this thread, unless they are released.
struct BlockProduct {
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t step_a, int64_t step_b, int64_t step_c, bool add, const void* a,
                   const void* b, float* c, bool b_is_interleaved);
  void (*release)(bool b_is_interleaved);
};

// total = grad^T hidden, or total + grad^T hidden, for matrices of bfloat16 with adjacent columns and a float32 total (null:
// nobody wants it). The sum goes to `rounded` as well, which may be empty. What PyTorch itself offers rounds each product to
// bfloat16.
void transposed_product(BlockProduct product, const Tensor& grad, const Tensor& hidden, float* total, bool add,
                        const Tensor& rounded);

}  // namespace fastloss
