#!/usr/bin/env bash
# A run that is longer than its job's time limit, on a SLURM of this machine: it has to requeue itself until it has ended.
# By hand, since SLURM counts in minutes: about five of them.   tests/slurm_time_limit.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
folder=$(mktemp -d)
SLURM_CONF=$(tests/one_machine_slurm.sh start "$folder/slurm")
export SLURM_CONF OMP_NUM_THREADS=1
trap 'tests/one_machine_slurm.sh stop "$folder/slurm"' EXIT

"$python" run_with_submitit.py --gpus_per_node 0 --cpus_per_task 1 --timeout 1 --signal_delay 30 \
  @recipes/digits.args --epochs 24 --output_dir "$folder/%j" | tee "$folder/submitted"
job=$(grep -oE '^job [0-9]+' "$folder/submitted" | grep -oE '[0-9]+')
for _ in $(seq 600); do
  state=$(squeue --noheader --format=%T --jobs="$job" --states=all)
  case $state in
    PENDING) scontrol update jobid="$job" StartTime=now ;;  # a requeued job is held for two minutes
    RUNNING | COMPLETING | CONFIGURING) ;;
    *) break ;;
  esac
  sleep 2
done
grep -h -E 'resuming after|stopped by|done:' "$folder"/submitit/*.out
requeued=$(grep -h -c 'resuming after step' "$folder/submitit/${job}_0_log.out")
echo "$state, requeued $requeued times"
[ "$state" = COMPLETED ] && [ "$requeued" -gt 0 ]
