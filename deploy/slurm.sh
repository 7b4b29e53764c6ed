#!/bin/bash
# A server on a node of a cluster, for as long as the job lives: sbatch deploy/slurm.sh
#SBATCH --job-name=kvcascade
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
set -euo pipefail
port=$((8000 + SLURM_JOB_ID % 1000))
echo "http://$(hostname -f):$port/v1, when /ready answers 200"
# Signals go to the step; what runs may end within the minute before the job does.
exec srun "${KVCASCADE:-kvcascade}" serve --host 0.0.0.0 --port "$port" --drain 50 \
  --model "${MODEL:-smollm2}" --weights int8 --cache "full@int8 on blocks" --keys "${KEYS:?a file with a tenant and a key on each line}"
