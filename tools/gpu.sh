#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds fastloss for the GPU of this machine, tests it there and measures it: `make gpu`.
#
# Needs nvcc, PyTorch with CUDA, CMake, ninja, pybind11, scikit-build-core, pytest and hypothesis in $PYTHON (python3), and no
# network. Takes less than 8 minutes: each step has its limit, in seconds. Results go to benchmarks/results/cuda-*.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$PWD/build/gpu/site

step() {
  echo "== $1"
}

step "build"
timeout 150 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$site" \
  --config-settings=build-dir=build/gpu/objects --config-settings=cmake.define.FASTLOSS_CUDA=ON \
  --config-settings=cmake.define.FASTLOSS_CUDA_ARCHITECTURES=native .
export PYTHONPATH=$site PYTHONUNBUFFERED=1
"$python" -m fastloss

step "tests on the GPU"
"$python" -c 'import torch; assert torch.cuda.is_available(), "PyTorch finds no GPU"'
status=0
timeout 180 "$python" -m pytest -q -k "cuda or gpu" tests/test_gpu.py tests/test_torch_cross_entropy.py \
  tests/test_torch_stats.py tests/test_torch_dtypes.py || status=$?

step "benchmark"
timeout 140 "$python" -m benchmarks.gpu ${BENCH_ARGS:-}
exit "$status"
