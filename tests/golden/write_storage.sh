#!/usr/bin/env bash
# Writes the folder storage_1de2977 as commit 1de2977 wrote it: run by hand, as root, with that commit's checkout as $1
# (with its .venv) and an empty folder as $2. The host is called node, the checkout is at /home/you/q3q and the storage at
# /srv/study, whatever the machine that runs this calls them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ "${Q3Q_GOLDEN:-}" != inside ]; then
    mkdir -p /home/you /srv/study
    Q3Q_GOLDEN=inside exec unshare --mount --uts "$here/write_storage.sh" "$(realpath "$1")" "$(realpath "$2")"
fi
hostname node
mount -t tmpfs none /home/you
mkdir /home/you/q3q /home/you/golden
mount --bind "$1" /home/you/q3q
mount --bind "$here" /home/you/golden
mount --bind "$2" /srv/study
cp /home/you/golden/garden.txt /home/you/garden.txt
cd /home/you/q3q
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PATH="/home/you/q3q/.venv/bin:/usr/bin:/bin"
export USER=you LOGNAME=you RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0

small="evaluation.texts=[demo] evaluation.window=64 evaluation.limit=4 evaluation.drift_windows=2 calibration.samples=4 calibration.length=64"
launch() { echo "== $*"; python launch.py "$@" storage=/srv/study; }

launch -m name=grid 'question="What does GPTQ buy over rounding?"' 'expectation="A little."' \
    method=rtn,gptq bits=3,2 $small evaluation.task_limit=6
launch -m name=experts model=demo_moe method=none,gptq calibration.route=all $small evaluation.tasks=[]
launch method=gptq bits=3 'overrides={blocks.0:{bits:8},*.down:{group_size:64}}' 'skip=[blocks.5.o]' \
    head_bits=8 embedding_bits=8 seed=1 method.damping=0.02 $small evaluation.task_limit=6
launch method=awq bits=4 act_bits=8 method.grid=4 method.race=false $small evaluation.task_limit=6
launch method=smoothquant method.search=true 'method.alpha_grid=[0.4,0.6]' method.search_windows=2 $small \
    evaluation.task_limit=6
launch method=billm dtype=bfloat16 $small evaluation.tasks=[]
launch method=none evaluation=file evaluation.path=/home/you/garden.txt evaluation.window=32 evaluation.limit=3
launch method=rtn symmetric=true evaluation=file evaluation.path=/home/you/garden.txt evaluation.window=32 \
    evaluation.limit=3
launch method=rtn bits=2 evaluation.texts=[demo] evaluation.quick=true 'evaluation.limits={stories_who:3}' evaluation.window=64 \
    evaluation.limit=4 evaluation.drift_windows=2 memory=2GB loader=streamed evaluation.task_limit=5
launch method=gptq symmetric=true calibration=file calibration.path=/home/you/garden.txt calibration.samples=2 \
    calibration.length=64 export=gptq evaluation=none
PYTHONPATH=/home/you/q3q python /home/you/golden/failed_and_stopped.py
# What is large, and what names this boot of this machine: claims, status files, digests of files by their paths.
cd /srv/study
rm -rf exports mlflow.db hydra artifacts reports ray running trials/digests trials/*/trial.claim.* baselines/*.lock
find baselines -mindepth 1 -maxdepth 1 ! -name 0ff8ad56e62603ceddab00556909a5dd -exec rm -r {} +  # the stopped trial's stays
