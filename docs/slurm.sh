#!/usr/bin/env bash
# Trains a recipe on several nodes of 8 GPUs each:
#
#   sbatch --nodes=2 docs/slurm.sh recipes/ml_mamba.yaml [overrides]
#
# Submit it from the folder that holds data/ and runs/, on storage that every node sees, with ssmvl's environment active.
# The same line again, and Slurm's own requeueing after a lost node, go on from the newest whole checkpoint. A mistake of
# the recipe, or a process that fails, ends the job with its exit code.
#SBATCH --job-name=ssmvl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one launcher on each node, which starts a process for each of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96           # all of a node's: the processes share them
#SBATCH --mem=0                      # all of a node's
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120          # two minutes before that, this script is told
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
set -euo pipefail

[ $# -ge 1 ] || { echo "error: no recipe given; usage: sbatch docs/slurm.sh recipes/ml_mamba.yaml [overrides]" >&2; exit 2; }

names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${names%%$'\n'*}"                              # the node whose SLURM_NODEID is 0
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))               # below those that Linux gives out by itself
export LOCAL_WORLD_SIZE="${SLURM_GPUS_ON_NODE:-8}"
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * LOCAL_WORLD_SIZE))

go_on_later() {
  echo "The time limit is near: job $SLURM_JOB_ID is requeued, and will go on from its newest checkpoint."
  scontrol requeue "$SLURM_JOB_ID"                                 # ends the step, then this script
  wait
  exit 0
}
trap go_on_later USR1

# On each node, with the options as they are on that node. `srun` does not take --cpus-per-task from sbatch by itself.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
  exec composer -n "$LOCAL_WORLD_SIZE" --world_size "$WORLD_SIZE" --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
' composer "$@" &
wait $!                                                            # a signal does not wait for srun to end
