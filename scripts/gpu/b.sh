#!/usr/bin/env bash
# Second of two commands for a few minutes on one GPU (docs/gpu.md): rows of the benchmark, by the GPU's memory. At most
# 430 s. In the root of the repository, with .whl; results in $OUT. --toy: the same on a CPU, for rehearsal.
: "${OUT:?the folder for results}"
. scripts/gpu/site.sh || exit
export OMP_NUM_THREADS=8
[ "$1" = --toy ] || MIB=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits) || exit
if [ "$1" = --toy ]; then
  export OMP_NUM_THREADS=1
  ROWS=(lora/e2b/48/ours+full+profile=900 lora/e2b/48/transformers+full+profile=900 "loss/e2b/48/head frozen+full=900")
elif [ "$MIB" -gt 100000 ]; then
  ROWS=(lora/12b/8192/ours+none+profile=75 lora/12b/8192/ours+flex_triton+none+profile=75
    lora/31b/8192/ours+flex_triton+selective=80 lora/26b-a4b/8192/ours+flex_triton+none+profile=70
    sft/e4b/4096/ours+flex_triton+full+profile=75 lora/e4b/16384/ours+none=50
    "lora/26b-a4b/8192/ours+fp8 experts+none=60" lora/26b-a4b/16384/liger=70 lora/e4b/16384/transformers=60)
else
  ROWS=(lora/12b/8192/ours+selective+profile=85 lora/12b/8192/ours+flex_triton+selective+profile=85
    lora/26b-a4b/8192/ours+flex_triton+full+profile=75 lora/31b/8192/ours+flex_triton+full=95
    lora/e4b/16384/ours+selective+profile=60 lora/e4b/16384/liger=65 "lora/26b-a4b/8192/ours+fp8 experts+full=60"
    lora/26b-a4b/16384/liger=70 lora/e4b/16384/transformers=60)
fi
SECONDS_LEFT=415; [ "$1" = --toy ] && SECONDS_LEFT=3000
timeout $((SECONDS_LEFT + 10)) python3 -W ignore -m benchmarks.short_gpu rows --out $OUT --seconds $SECONDS_LEFT $1 \
  --rows "${ROWS[@]}"
