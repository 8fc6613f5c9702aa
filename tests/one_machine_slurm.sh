#!/usr/bin/env bash
# A SLURM of this one machine, for the tests; needs root, and Debian's packages slurm-wlm and munge.
#   tests/one_machine_slurm.sh start FOLDER    prints the SLURM_CONF to use; state and logs are kept in FOLDER
#   tests/one_machine_slurm.sh stop FOLDER
set -euo pipefail
action=$1
folder=$(mkdir -p "$2" && cd "$2" && pwd)
export SLURM_CONF="$folder/slurm.conf"

if [ "$action" = stop ]; then
  scancel --user="$(id -un)" 2>/dev/null || true
  for daemon in slurmd slurmctld munged; do
    if [ -f "$folder/$daemon.pid" ]; then kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true; fi
  done
  exit 0
fi

mkdir -p "$folder/controller" "$folder/node"
cores=$(env -u OMP_NUM_THREADS nproc)  # nproc obeys the variable, which the tests set to 1
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512))
cat > "$SLURM_CONF" <<EOF
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort=${SLURM_TEST_PORT:-16817}
SlurmdPort=$((${SLURM_TEST_PORT:-16817} + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/controller
SlurmdSpoolDir=$folder/node
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=10
NodeName=localhost CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
EOF
# A munge of its own: key, socket and log in the folder, so that one of the machine is left alone.
(umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>> "$folder/munged.log"
slurmctld
slurmd -N localhost
for _ in $(seq 60); do
  if sinfo --noheader --format=%T 2>/dev/null | grep -qE 'idle|mixed'; then
    echo "$SLURM_CONF"
    exit 0
  fi
  sleep 0.5
done
echo "SLURM did not start, see $folder/slurmctld.log and $folder/slurmd.log" >&2
exit 1
