# What every rank needs of its environment; nothing else is set. docs/slurm.md says what was left out, and why.

# One thread pool per rank, not one per rank and core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# A network that fails says so in the log; at this level NCCL is silent otherwise.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Tensor parallelism starts a collective and then the product that hides it. With one queue to the GPU they run in that
# order; with several the product may take all of the GPU first. Megatron-Core's linear layers count on it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
