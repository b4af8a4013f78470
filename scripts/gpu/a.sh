#!/usr/bin/env bash
# First of two commands for a few minutes on one GPU (docs/gpu.md): kernels, parity, attention, one short row. At most
# 320 s. In the root of the repository, with .whl; results in $OUT. --toy: the same on a CPU, for rehearsal.
: "${OUT:?the folder for results}"
. scripts/gpu/site.sh || exit
export OMP_NUM_THREADS=2
X=1 ROW="lora/e2b/4096/ours+none+profile=60" KERNELS=(-n 7) G=tests/functional/test_gpu.py::test_
GPU=(-n 4 "${G}parity_in_bf16[12b-local]" "${G}parity_in_bf16[26b-a4b-local]" "${G}parity_in_bf16[e4b-local]"
  "${G}parity_in_float32[e2b-local]" "${G}the_host_waits_for_nothing_within_a_step[e2b-False-none]"
  "${G}the_host_waits_for_nothing_within_a_step[26b-a4b-False-full]" ${G}experts_in_fp8 ${G}a_step_with_experts_in_fp8)
if [ "$1" = --toy ]; then
  X=20 ROW="lora/e2b/48/ours+full+profile" KERNELS=(-n 1 -k fp8)
  GPU[1]=1 GPU+=("tests/functional/test_gpu_kit.py::test_parity[26b-a4b]")
fi
T="python3 -W ignore -m pytest -q -p no:cacheprovider --timeout $((90 * X))"
(nvidia-smi; python3 -m pip list) >$OUT/machine.txt 2>&1 &
$RUN timeout $((130 * X)) $T tests/unit/kernel_cases.py -m "not slow" "${KERNELS[@]}" >$OUT/kernels.txt 2>&1 & K=$!
timeout $((160 * X)) $T "${GPU[@]}" >$OUT/gpu.txt 2>&1 & P=$!
wait $K; RC=$?; tail -n 15 $OUT/kernels.txt
wait $P; RC=$((RC | $?)); tail -n 25 $OUT/gpu.txt
S="python3 -W ignore -m benchmarks.short_gpu"
timeout $((75 * X)) $S attention --out $OUT --seconds $((65 * X)) $1 2>$OUT/attention.err; RC=$((RC | $?))
timeout $((70 * X)) $S rows --out $OUT --seconds $((66 * X)) $1 --rows "$ROW"; exit $((RC | $?))
