#!/usr/bin/env bash
# On a machine with a GPU and no network, from a checkout: the whole GPU test suite, the adapters' tests where their
# libraries are installed, the memory checker where there is one, all kernel benchmarks and the suite's part that fits.
# Rows and the log go to $OUT (default: benchmarks/results); the limits add up to 590 s. Afterwards
# python benchmarks/report.py puts the rows into the pages.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
python=${PYTHON:-python3}
status=0

{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader || true
  timeout 210 "$python" -m pytest -q -p no:cacheprovider -rs tests/test_kernels.py tests/test_cam.py tests/test_capture.py \
    tests/test_pipeline.py tests/test_torch_backend.py tests/test_no_sync.py tests/test_cuml.py tests/test_arrays.py \
    tests/test_several_classes.py tests/test_notices.py tests/test_threads.py tests/test_methods.py \
    tests/test_volumes.py tests/test_operators.py tests/test_guide_power.py \
    tests/test_frozen_norms.py || status=1
  timeout 40 "$python" -m pytest -q -p no:cacheprovider -rs tests/test_adapters_grad_cam.py \
    tests/test_adapters_torchcam.py tests/test_adapters_captum.py tests/test_adapters_captum_heads.py
  adapters=$?
  ((adapters == 0 || adapters == 5)) || status=1 # 5: no library is installed, so there are no tests
  if command -v compute-sanitizer >/dev/null; then
    echo "--- memcheck"
    timeout 50 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -c '
import torch
from cfcam_gpu import cf_cam
a = torch.rand(2, 130, 7, 7, device="cuda")
print(cf_cam(a, torch.randn_like(a), (32, 32), backend="triton").maps.mean())' 2>&1 | tail -8 || status=1
  else
    echo "--- memcheck: compute-sanitizer is not installed"
  fi
  echo "--- benchmarks"
  timeout 40 "$python" benchmarks/engines.py --rounds 5 --out "$OUT" || status=1
  timeout 90 "$python" benchmarks/kernels.py --out "$OUT" || status=1
  timeout 140 "$python" benchmarks/suite.py --time-limit 2 --deadline 110 --out "$OUT" || status=1
  timeout 20 "$python" benchmarks/where_time_goes.py || status=1
  [ "$OUT" = benchmarks/results ] || cp benchmarks/profile.md "$OUT"
} 2>&1 | tee "$OUT/on_gpu.log"
exit $((PIPESTATUS[0] | status))
