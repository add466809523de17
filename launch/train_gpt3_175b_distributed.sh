#!/usr/bin/env bash
# Train GPT-3 175B, with the five arguments of Megatron-LM's example of the same name.
#
#   Slurm, one process per GPU (the default for pods; 128 H100s are 16 nodes):
#     srun --nodes=16 --ntasks-per-node=8 --gpus-per-node=8 --gpu-bind=none \
#       launch/train_gpt3_175b_distributed.sh CHECKPOINT_PATH TENSORBOARD_LOGS_PATH \
#       VOCAB_FILE MERGE_FILE DATA_PATH
#   Without a launcher, once on each node, as the example; it starts one process per GPU:
#     NUM_NODES=16 NODE_RANK=0 MASTER_ADDR=node0 launch/train_gpt3_175b_distributed.sh ...
#   On one machine, for all of its GPUs, without these variables. GPUS_PER_NODE=N starts N processes.
#
# Further arguments override the recipe: ... --mesh.tensor=8 --train.n-steps 100.
# CONFIG=FILE selects another recipe, PYTHON=FILE another interpreter. COMMAND=preflight takes the
# same options and checks the machines in place of training.
set -euo pipefail

if [ $# -lt 5 ]; then
  echo "usage: $0 CHECKPOINT_PATH TENSORBOARD_LOGS_PATH VOCAB_FILE MERGE_FILE DATA_PATH [OPTION ...]" >&2
  echo "DATA_PATH is the prefix of DATA_PATH.bin and DATA_PATH.idx" >&2
  exit 2
fi
checkpoint_path=$1 tensorboard_logs_path=$2 vocab_file=$3 merge_file=$4 data_path=$5
shift 5

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
arguments=(
  --config="${CONFIG:-$repository/configs/175b.py}"
  --checkpoint.dir "$checkpoint_path"
  --log.dir "$tensorboard_logs_path"
  --data.vocab-file "$vocab_file"
  --data.merge-file "$merge_file"
  --data.paths "$data_path"
  "$@"
)
# GPUs are meant: a machine whose GPUs are not visible is refused, and does not train on its CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
# Use exec, because the run must receive the signals.
exec "${PYTHON:-python3}" -m gpt3jax.distributed.launch "gpt3jax.${COMMAND:-main}" "${arguments[@]}"
