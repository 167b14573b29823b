#!/usr/bin/env bash
# A Slurm job of two parts: one node with a GPU, the learner, and two CPU nodes for rollouts. The
# package is installed where all nodes see it (QVPO_VENV, default ~/qvpo-venv):
#
#   sbatch cluster/slurm.sh train --env Ant-v5 --num-env-runners 24 --run-dir runs/ant
#   sbatch cluster/slurm.sh tune k_sweep.yaml
#
# The arguments are those of cluster/submit.py; relative results go below the home directory. Sent
# again, or requeued by Slurm, the job goes on where it stopped. Watch it:
#
#   ssh -L 8265:127.0.0.1:8265 -J LOGIN_NODE HEAD_NODE      # http://127.0.0.1:8265, the dashboard
#
# Ray's ports listen on all addresses of the nodes and ask for the job's token; whoever reaches the
# nodes reaches them. Compute nodes are not usually reached from the internet: see that yours are not.
#
#SBATCH --job-name=qvpo
#SBATCH --output=qvpo-%j.log
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --mem=32G --gpus-per-node=1
#SBATCH hetjob
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=16 --mem=16G
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "slurm.sh: error: give a qvpo command, such as: tune k_sweep.yaml" >&2
  exit 2
fi
# Slurm runs a copy of this script: the package is where the job was sent from.
package=${QVPO_PACKAGE:-$SLURM_SUBMIT_DIR}
venv=${QVPO_VENV:-$HOME/qvpo-venv}
PATH=$venv/bin:$PATH
port=$((20000 + SLURM_JOB_ID % 10000))

# A token of this job's own, in a file that nobody else can read.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$HOME/.ray/slurm-$SLURM_JOB_ID
mkdir -p "$HOME/.ray"
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"

# The address under which the rollout nodes know the head.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0" | head -n 1)
head_ip=$(srun --het-group=1 --nodes=1 --ntasks=1 getent ahostsv4 "$head" | awk 'NR == 1 {print $1}')
export RAY_ADDRESS=$head_ip:$port
echo "Head: $head ($RAY_ADDRESS)"

steps=()
# shellcheck disable=SC2329 # the trap calls it
finish() {
  # Ends the Ray of this job alone: its own steps, by their process ids.
  for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
  wait || true
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT

srun --het-group=0 --overlap ray start --block --head --node-ip-address="$head_ip" --port="$port" \
  --num-cpus="$SLURM_CPUS_PER_TASK_HET_GROUP_0" --dashboard-host=127.0.0.1 &
steps+=($!)
for _ in $(seq 60); do
  ray status >/dev/null 2>&1 && break
  sleep 2
done
srun --het-group=1 ray start --block --address="$RAY_ADDRESS" \
  --num-cpus="$SLURM_CPUS_PER_TASK_HET_GROUP_1" &
steps+=($!)

# The learner runs here, in the batch step. Slurm signals this script two minutes before the time is
# up: passed on, it makes the command save and end, and the job is queued again.
python "$package/cluster/submit.py" "$@" &
command=$!
stopped=no
trap 'stopped=yes; kill -TERM "$command"' TERM
code=0
while kill -0 "$command" 2>/dev/null; do
  code=0
  wait "$command" || code=$?
done
if [ "$stopped" = yes ]; then scontrol requeue "$SLURM_JOB_ID" || true; fi
exit "$code"
