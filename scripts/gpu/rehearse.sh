#!/usr/bin/env bash
# Runs a.sh and b.sh end to end on a CPU, with toys, in the environment that environment.sh builds; results in
# .gpu-rehearsal. Kernels run in Triton's interpreter.
set -uo pipefail
export PATH=$PWD/.venv-gpu/bin:$PATH HOME=$PWD/.gpu-rehearsal/home
rm -rf .gpu-rehearsal && mkdir -p .gpu-rehearsal/a .gpu-rehearsal/b "$HOME"
interpreter="env TRITON_INTERPRET=1 PYTHONPATH=$PWD/.venv-gpu/interpreter:$HOME/site"
OUT=$PWD/.gpu-rehearsal/a RUN=$interpreter bash scripts/gpu/a.sh --toy || { echo "a.sh failed" >&2; exit 1; }
OUT=$PWD/.gpu-rehearsal/b bash scripts/gpu/b.sh --toy || { echo "b.sh failed" >&2; exit 1; }
python3 -W ignore -m benchmarks.train_gpu --table .gpu-rehearsal/b/rows.jsonl
