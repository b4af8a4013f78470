#!/usr/bin/env bash
# Builds .venv-gpu with the versions of a machine with one GPU that may be lent (requirements.txt), without one, and
# collects in .whl what that machine lacks (wheels.txt): the commands a.sh and b.sh install it there. Run it in the root
# of the repository. Both folders are ignored by git: .whl has to be taken along.
set -euo pipefail
here=scripts/gpu
PYTHON=${PYTHON:-python3.12}
"$PYTHON" -m venv .venv-gpu
.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check uv
.venv-gpu/bin/uv pip install --quiet --python .venv-gpu/bin/python -r $here/requirements.txt
rm -rf .whl
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
.venv-gpu/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]/#/--platform=}" -d .whl -r $here/wheels.txt
# Triton 3.6's interpreter, which the rehearsal needs and a GPU does not, takes no array of one number for a number.
.venv-gpu/bin/uv pip install --quiet --python .venv-gpu/bin/python --target .venv-gpu/interpreter "numpy<2.4"
bytes=$(cat .whl/*.whl | wc -c)
echo "$(ls .whl | wc -l) wheels, $bytes bytes"
[ "$bytes" -le $((8 << 20)) ] || { echo "more than 8 MiB" >&2; exit 1; }
