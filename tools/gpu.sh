#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds fastloss for the GPU of this machine, tests it there and measures it: `make gpu`.
#
# Needs nvcc, PyTorch with CUDA, CMake, ninja, pybind11, scikit-build-core, pytest, hypothesis and ml_dtypes in $PYTHON (python3),
# and no network; with pytest-xdist the tests take one minute instead of many. Whom benchmarks/gpu_peers.py names is measured
# where PYTHONPATH has it. Takes less than 8 minutes: each step has its limit, in seconds. Results go to
# benchmarks/results/cuda-*.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$PWD/build/gpu/site

step() {
  echo "== $1"
}

step "build"
timeout 100 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$site" \
  --config-settings=build-dir=build/gpu/objects --config-settings=cmake.define.FASTLOSS_CUDA=ON \
  --config-settings=cmake.define.FASTLOSS_CUDA_ARCHITECTURES=native .
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -m fastloss

step "tests on the GPU, beside compute-sanitizer"
"$python" -c 'import torch; assert torch.cuda.is_available(), "PyTorch finds no GPU"'
status=0

# Our kernels alone: those of PyTorch and cuBLAS are not watched.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
case $([ -z "$sanitizer" ] || "$sanitizer" --help 2>&1 || true) in # the newest name first
  *--kernel-name*) ours=--kernel-name ;;
  *--kernel-regex*) ours=--kernel-regex ;;
  *) ours=--filter ;;
esac
declare -A watched
for tool in memcheck racecheck; do
  [ -z "$sanitizer" ] && continue
  timeout -k 5 120 "$sanitizer" --tool "$tool" "$ours" kns=fastloss --report-api-errors no --error-exitcode 3 \
    "$python" tools/gpu_sanitize.py >"build/gpu/$tool.log" 2>&1 &
  watched[$tool]=$!
done
trap 'kill "${watched[@]}" 2>/dev/null || true' EXIT # Ctrl-C does not reach them

parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 12 -p no:benchmark) # of which pytest-benchmark complains
timeout 120 "$python" -m pytest -q "${parallel[@]}" -k "cuda or gpu" tests/test_gpu.py tests/test_gpu_clusters.py tests/test_gpu_linear.py \
  tests/test_torch_cross_entropy.py tests/test_torch_layouts.py tests/test_torch_autograd.py tests/test_torch_compile.py \
  tests/test_torch_inplace.py tests/test_torch_stats.py tests/test_torch_dtypes.py \
  tests/test_torch_forward_mode.py tests/test_torch_tracing.py tests/test_torch_transforms.py \
  tests/test_linear_torch.py tests/test_linear_places.py tests/test_linear_autograd.py || status=$?

for tool in memcheck racecheck; do
  step "compute-sanitizer: $tool"
  if [ -z "$sanitizer" ]; then
    echo "not found, left out"
    continue
  fi
  result=0
  wait "${watched[$tool]}" || result=$?
  tail -n 40 "build/gpu/$tool.log"
  [ "$result" -ne 124 ] || echo "not done within its time"
  [ "$result" -eq 0 ] || status=$result
done

step "benchmark"
timeout 150 "$python" -m benchmarks.gpu ${BENCH_ARGS:-} || status=$?

exit "$status"
