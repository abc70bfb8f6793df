#!/usr/bin/env bash
# Runs an experiment as a SLURM job, with one process per GPU, and requeues the job if it was stopped.
#
#   sbatch --nodes=2 scripts/slurm.sh ppo --out runs/ppo      two nodes of eight GPUs; sbatch's flags come first
#
# docs/slurm.md says what to change for another cluster.
#SBATCH --job-name=rlhf_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the root of the repository}"
(($#)) || {
    echo "error: which experiment? For example: sbatch scripts/slurm.sh ppo --out runs/ppo" >&2
    exit 2
}

trap : TERM # the processes get the signal too, and save; this script waits for them
code=0
srun --kill-on-bad-exit=0 .venv/bin/python -m "experiments.$1" "${@:2}" || code=$?

# 75 means "run me again". Above 128 a signal ended a process: it was killed, or it lost the others.
if ((code == 75 || code > 128)) && ((${SLURM_RESTART_COUNT:-0} < 100)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
