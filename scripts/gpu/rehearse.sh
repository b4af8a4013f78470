#!/usr/bin/env bash
# Runs a.sh and b.sh end to end on a CPU, with toys, in the environment that environment.sh builds; results in
# .gpu-rehearsal. Kernels run in Triton's interpreter. Arguments: which of `a b`.
set -uo pipefail
[ $# -gt 0 ] || set -- a b
export PATH=$PWD/.venv-gpu/bin:$PATH HOME=$PWD/.gpu-rehearsal/home
mkdir -p "$HOME"
interpreter="env TRITON_INTERPRET=1 PYTHONPATH=$PWD/.venv-gpu/interpreter:$HOME/site"
for command; do
  rm -rf ".gpu-rehearsal/$command" && mkdir -p ".gpu-rehearsal/$command"
  OUT=$PWD/.gpu-rehearsal/$command RUN=$interpreter bash "scripts/gpu/$command.sh" --toy ||
    { echo "$command.sh failed" >&2; exit 1; }
done
python3 -W ignore -m benchmarks.train_gpu --table ".gpu-rehearsal/$command/rows.jsonl"
