#!/usr/bin/env bash
# What only a machine with a GPU can show: the tests that are skipped elsewhere, and the GPU benchmarks' JSON lines.
#   bash benchmarks/cuda_checks.sh WORK [tests|merge|slice|train|loss|flash4 ...]
set -uo pipefail
cd "$(dirname "$0")/.."
work=$1
shift
failed=0
for part in "${@:-tests merge slice train}"; do
  for one in $part; do
    case $one in
      tests) python3 -m pytest -q -m "slow or not slow" tests/*/test_*_on_gpu.py ;;
      merge) python3 benchmarks/merge_cuda.py --work "$work/merge" --repeats 3 ;;
      slice) python3 benchmarks/merge_cuda.py --work "$work/slice" --shape 32b-slice ;;
      train) python3 benchmarks/train_mfu.py --shape 0.5b && python3 benchmarks/train_mfu.py --shape 1.5b --ways packed &&
        for shape in 0.5b 1.5b; do
          python3 benchmarks/train_mfu.py --shape $shape --compile --ways packed --profile 12 &&
            python3 benchmarks/train_mfu.py --shape $shape --compile --ways packed --rows 3
        done ;;
      loss) python3 benchmarks/loss_kernels.py ;;
      flash4) # with the package flash-attn-4
        for shape in 0.5b 1.5b; do
          python3 benchmarks/train_mfu.py --shape $shape --compile --ways packed --attn packed_sdpa_fa4 --profile 40 &&
            python3 benchmarks/train_mfu.py --shape $shape --compile --ways packed --attn packed_sdpa_fa4 --rows 3
        done &&
          python3 benchmarks/train_mfu.py --shape 1.5b --compile --ways packed --attn packed_sdpa_fa4 --rows 3 --sharded ;;
    esac || failed=1
  done
done
exit $failed
