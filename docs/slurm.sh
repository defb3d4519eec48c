#!/usr/bin/env bash
# Trains a recipe on several nodes of 8 GPUs each:
#
#   sbatch --nodes=2 docs/slurm.sh recipes/ml_mamba.yaml [overrides]
#
# Submit it from the directory that holds data/ and runs/, on storage that every node sees, with ssmvl's environment
# active. Submitting it again, or Slurm's requeueing after a lost node, resumes from the latest complete checkpoint. If
# the recipe has a mistake or a process fails, the job ends with the exit code of that process.
#SBATCH --job-name=ssmvl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one launcher per node, which starts one process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96           # all cores of a node, shared by its processes
#SBATCH --mem=0                      # all memory of a node
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120          # signals this script two minutes before the limit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
set -euo pipefail

[ $# -ge 1 ] || { echo "error: no recipe given; usage: sbatch docs/slurm.sh recipes/ml_mamba.yaml [overrides]" >&2; exit 2; }

names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${names%%$'\n'*}"                              # the node whose SLURM_NODEID is 0
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))               # below Linux's ephemeral ports
export LOCAL_WORLD_SIZE="${SLURM_GPUS_ON_NODE:-8}"
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * LOCAL_WORLD_SIZE))

requeue() {
  echo "The time limit is near: job $SLURM_JOB_ID is requeued and will resume from its latest checkpoint."
  scontrol requeue "$SLURM_JOB_ID"                                 # ends srun's job step, then this script
  wait
  exit 0
}
trap requeue USR1

# Variables are expanded on each node. srun does not inherit --cpus-per-task from sbatch.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
  exec composer -n "$LOCAL_WORLD_SIZE" --world_size "$WORLD_SIZE" --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
' composer "$@" &
wait $!                                                            # returns when a signal arrives, before srun ends
