// SPDX-License-Identifier: Apache-2.0
// The few names of the CUDA runtime that csrc/cuda uses, for a pretended GPU: see emulated_gpu.hpp. It has 4 multiprocessors
// and no clusters, or what FASTLOSS_EMULATION_{MULTIPROCESSORS,SHARED_BYTES,CLUSTERS} say.
#pragma once

#include <stdlib.h>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  constexpr const char* kNames[] = {"FASTLOSS_EMULATION_MULTIPROCESSORS", "FASTLOSS_EMULATION_SHARED_BYTES",
                                    "FASTLOSS_EMULATION_SHARED_BYTES", "FASTLOSS_EMULATION_CLUSTERS"};
  constexpr int kOtherwise[] = {4, 128 << 10, 128 << 10, 0};
  const char* set = getenv(kNames[attribute]);
  *value = set ? atoi(set) : kOtherwise[attribute];
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "invalid device"; }
