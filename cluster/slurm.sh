#!/usr/bin/env bash
# Starts Ray on the nodes of a Slurm job, and runs one sweep on it. How to use it: docs/CLUSTER.md.
#   sbatch --nodes=4 cluster/slurm.sh -m model=qwen3_8b method=gptq,awq bits=2,3,4
#SBATCH --job-name=q3q
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=q3q-%j.log
set -euo pipefail

# The folder in which sbatch was called, on a file system that all nodes see, and its environment.
cd "$SLURM_SUBMIT_DIR"
source "${VENV:-.venv}/bin/activate"
storage=${STORAGE:-$SLURM_SUBMIT_DIR/mlruns}

# One token for all clusters of this user; the nodes share the home folder.
export RAY_AUTH_MODE=token
(umask 077 && mkdir -p ~/.ray && ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token)

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs may share a node

# start NODE OPTION...: start a Ray node in the background; it ends with the job. Ray would count the
# whole node's memory, and not what Slurm lets the job have of it.
start() {
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --exact --overlap --nodelist="$node" \
        bash -c 'exec ray start "$@" --memory="$(python -m q3q.limits)"' start \
        "$@" --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" &
}

start "${nodes[0]}" --head --node-ip-address="$head" --port="$port" --include-dashboard=false
for _ in $(seq 60); do
    ray health-check --address "$head:$port" > /dev/null 2>&1 && break
    sleep 2
done
for node in "${nodes[@]:1}"; do
    start "$node" --address="$head:$port"
done

# The plan counts the nodes that have joined, so wait for all of them, two minutes at most.
for _ in $(seq 60); do
    [ "$(ray status --address "$head:$port" 2> /dev/null | grep -c '^ 1 node_')" -ge "${#nodes[@]}" ] && break
    sleep 2
done

# MLflow's database is on this node's own disk, because SQLite locks badly on a shared one. The last
# command for Slurm in docs/CLUSTER.md makes it anew from the records. A trial that finds no machine
# waits for the nodes that have not joined yet.
python launch.py "$@" cluster=existing cluster.address="$head:$port" cluster.patience=300 storage="$storage" \
    track.uri="${TRACK_URI:-sqlite:///${TMPDIR:-/tmp}/q3q-$SLURM_JOB_ID.db}"
