# SPDX-License-Identifier: Apache-2.0
# The module _cuda for tests, as C++: tests/cuda_emulation stands in for the GPU.

set(cuda_sources csrc/cuda/f32.cu csrc/cuda/f64.cu csrc/cuda/f16.cu csrc/cuda/bf16.cu csrc/cuda/sums.cu)
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
pybind11_add_module(_cuda_emulated MODULE NO_EXTRAS csrc/cuda/bind_cuda.cpp csrc/cuda/calls.cpp csrc/cuda/linear.cpp
  csrc/cuda/plan.cpp ${cuda_sources})
target_include_directories(_cuda_emulated PRIVATE csrc tests/cuda_emulation)
target_compile_definitions(_cuda_emulated PRIVATE FASTLOSS_CUDA_MODULE=_cuda_emulated FASTLOSS_CUDA_ARCHITECTURES="emulated")
# Loops that a GPU unrolls only take time to compile here.
target_compile_options(_cuda_emulated PRIVATE -O1 -Wno-unknown-pragmas -Wno-unused-function)
