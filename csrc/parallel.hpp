// SPDX-License-Identifier: Apache-2.0
// parallel_for: PyTorch's own threads once PyTorch is loaded, else a small pool of ours, started at its first use.
//
// Which thread runs which task never changes a result: the kernels give the same bits for any split.
#pragma once

#include <stdint.h>

#include <functional>

namespace fastloss {

// Runs task(i) once for each i in [0, count), on at most `threads` threads, the caller among them; returns when all are done.
// Where one throws, no more are begun, and what it threw is thrown again.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// What set_num_threads asked for, else FASTLOSS_NUM_THREADS, else PyTorch's number once its pool is in use, else the CPUs that
// this process may use.
int get_num_threads();
void set_num_threads(int threads);  // from 1 to kMostThreads; 0 takes back what was asked for
constexpr int kMostThreads = 1024;

// PyTorch's C entry points torch_parallel_for and torch_get_num_threads, by address. Both return 0 for success.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                     void* context);
using TorchGetNumThreads = int32_t (*)(uint32_t* threads);
void use_torch_pool(TorchParallelFor parallel, TorchGetNumThreads count);

}  // namespace fastloss
