# SPDX-License-Identifier: Apache-2.0
# The module _cuda, by FASTLOSS_CUDA. Sets cuda_build: what build_info() says of it.

set(cuda_build "no")
if(FASTLOSS_CUDA STREQUAL "OFF" OR FASTLOSS_SANITIZE)
  return()
endif()

# AUTO goes on without CUDA whatever is missing; ON stops.
macro(cuda_is_missing reason)
  if(NOT FASTLOSS_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "fastloss: FASTLOSS_CUDA=${FASTLOSS_CUDA}, but ${reason}.")
  endif()
  message(STATUS "fastloss: built without CUDA, for ${reason}")
  return()
endmacro()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  cuda_is_missing("no working nvcc was found")
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_ARCHITECTURES OFF) # each target has its own
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  cuda_is_missing("nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0")
endif()
find_package(CUDAToolkit QUIET)
if(NOT TARGET CUDA::cudart_static)
  cuda_is_missing("the static CUDA runtime was not found")
endif()

set(cuda_architectures ${FASTLOSS_CUDA_ARCHITECTURES})
if(NOT cuda_architectures)
  set(cuda_architectures 80-real 89-real)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND cuda_architectures 90-real 100 120) # with PTX of the last two, for their relatives and for GPUs to come
  else()
    list(APPEND cuda_architectures 90)
  endif()
endif()

# No contraction, as on the CPU: a fused multiply-add happens where it is written. 1675: GCC's unroll pragmas. 20054: structures
# in shared memory have no default values, which none of them needs there.
string(APPEND CMAKE_CUDA_FLAGS
  " -O3 -fmad=false --expt-relaxed-constexpr -diag-suppress=1675,20054 -Xcompiler=-Wall,-Wextra")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  string(APPEND CMAKE_CUDA_FLAGS " --compress-mode=size") # any driver that runs CUDA 13 can read it
else()
  string(APPEND CMAKE_CUDA_FLAGS " -Xfatbin=-compress-all")
endif()
if(FASTLOSS_CUDA STREQUAL "AUTO")
  # nvcc may be there and yet not get along with this host compiler, or with these GPUs: the smallest file tells.
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
  set(CMAKE_CUDA_ARCHITECTURES ${cuda_architectures})
  try_compile(cuda_works ${CMAKE_CURRENT_BINARY_DIR}/cuda_works ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/sums.cu
    CMAKE_FLAGS -DCMAKE_RANLIB=${CMAKE_RANLIB} # which CMake 3.25 forgets of a project in CUDA alone
    CUDA_STANDARD 17 OUTPUT_VARIABLE cuda_output)
  if(NOT cuda_works)
    message(STATUS "${cuda_output}")
    cuda_is_missing("nvcc cannot compile for ${cuda_architectures}: see above")
  endif()
endif()

pybind11_add_module(_cuda MODULE NO_EXTRAS
  csrc/cuda/bf16.cu
  csrc/cuda/bind_cuda.cpp
  csrc/cuda/calls.cpp
  csrc/cuda/f16.cu
  csrc/cuda/f32.cu
  csrc/cuda/f64.cu
  csrc/cuda/linear.cpp
  csrc/cuda/plan.cpp
  csrc/cuda/sums.cu)
string(JOIN " " cuda_names ${cuda_architectures})
set_target_properties(_cuda PROPERTIES CUDA_ARCHITECTURES "${cuda_architectures}" CUDA_RUNTIME_LIBRARY Static)
target_compile_definitions(_cuda PRIVATE FASTLOSS_CUDA_MODULE=_cuda "FASTLOSS_CUDA_ARCHITECTURES=\"${cuda_names}\"")
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
install(TARGETS _cuda LIBRARY DESTINATION fastloss)
set(cuda_build "nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_names}")
