# What a.sh and b.sh begin with: the wheels that the machine lacks, once, and the environment of the runs.
if [ ! -d "$HOME/site" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$HOME/site" .whl/*.whl || return
fi
export PYTHONPATH=$HOME/site PYTHONUNBUFFERED=1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo HF_HUB_OFFLINE=1
export TORCHINDUCTOR_COMPILE_THREADS=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
