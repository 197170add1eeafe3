#!/bin/bash
# One run on four nodes under Slurm: sbatch examples/cluster/slurm.sh
# /shared is a file system that every node sees; settings, data and runs lie there. The job may be
# started as often as you like: it begins the run once, and goes on from its last checkpoint after.
#SBATCH --job-name=my-run
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Slurm puts it back into the queue when a node fails or it has to make room for others,
#SBATCH --requeue
# and tells this script two minutes before its time is up.
#SBATCH --signal=B:USR1@120
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # so that two jobs may share a node
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
# What a step and a save may take, less than the two minutes; torchrun waits for 30 s otherwise.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100

time_is_up=
trap 'time_is_up=yes; kill -TERM "$srun"' USR1 # srun passes it on to each torchrun
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$port" \
  -m truestep train /shared/train.toml \
  --run.directory /shared/runs --run.name my-run --resume auto &
srun=$!

wait "$srun" && exit 0
code=$?
if [ -n "$time_is_up" ]; then # and this wait ends with the step and the save
  wait "$srun" || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
