# Sourced by run.sh: a Slurm of two virtual nodes on this machine, everything of it under one folder.
#
#   cluster_up FOLDER     munged, slurmctld and two slurmd; sets NODE_NAMES, exports SLURM_CONF
#   cluster_down          ends them by pid, with what they still run
#
# The nodes bear names that /etc/hosts knows already, so that processes find each other and nothing has to be added
# there. Each claims four processors and two GPUs that do not exist.

_cluster=

# _pids: of everything that was started and has left a pid file.
_pids() { cat "$_cluster"/*.pid 2>/dev/null || true; }

cluster_up() {
    _cluster=$1
    local host address node port=17910
    host=$(hostname -s)
    address=$(getent hosts "$host" | awk '{print $1; exit}')
    if [ -z "$address" ] || [ "$host" = localhost ]; then
        echo "error: the name of this machine ($host) has to be in /etc/hosts and not be localhost" >&2
        return 1
    fi
    NODE_NAMES=("$host" localhost)
    mkdir -p "$_cluster/state"
    chmod 755 "$_cluster"
    mkdir -m 700 "$_cluster/key"
    (umask 377 && head -c 1024 /dev/urandom >"$_cluster/key/munge.key")
    cat >"$_cluster/slurm.conf" <<CONF
ClusterName=virtual
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$((port + 9))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$_cluster/munge.socket
CredType=cred/munge
StateSaveLocation=$_cluster/state
SlurmdSpoolDir=$_cluster/spool.%n
SlurmctldPidFile=$_cluster/slurmctld.pid
SlurmdPidFile=$_cluster/slurmd.%n.pid
SlurmctldLogFile=$_cluster/slurmctld.log
SlurmdLogFile=$_cluster/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
# A job that was sent back to the queue, and every other, starts at once.
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait=60
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    touch "$_cluster/gres.conf" "$_cluster/gpu0" "$_cluster/gpu1"
    for node in "${NODE_NAMES[@]}"; do
        port=$((port + 1))
        mkdir -p "$_cluster/spool.$node"
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=4 RealMemory=2000 Gres=gpu:2 State=UNKNOWN" \
            >>"$_cluster/slurm.conf"
        echo "NodeName=$node Name=gpu File=$_cluster/gpu[0-1]" >>"$_cluster/gres.conf"
    done
    export SLURM_CONF=$_cluster/slurm.conf
    munged --force --key-file="$_cluster/key/munge.key" --socket="$_cluster/munge.socket" \
        --pid-file="$_cluster/munged.pid" --log-file="$_cluster/munged.log" --seed-file="$_cluster/munged.seed"
    slurmctld -c
    for node in "${NODE_NAMES[@]}"; do slurmd -N "$node"; done
    for _ in $(seq 60); do
        [ "$(timeout 10 sinfo -h -o %T 2>/dev/null | sort -u)" != idle ] || return 0
        sleep 0.5
    done
    echo "error: the virtual nodes are not idle after 30 s:" >&2
    timeout 10 scontrol show node >&2 || true
    tail -n 5 "$_cluster"/slurm*.log >&2
    return 1
}

cluster_down() {
    [ -n "$_cluster" ] || return 0
    local pid
    timeout 20 scancel --full --signal=KILL --user=root 2>/dev/null || true
    timeout 20 scancel --user=root 2>/dev/null || true
    for _ in $(seq 40); do
        [ -n "$(timeout 10 squeue -h 2>/dev/null)" ] || break
        sleep 0.5
    done
    for pid in $(_pids); do kill "$pid" 2>/dev/null || true; done
    for pid in $(_pids); do
        for _ in $(seq 20); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.5
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
    _cluster=
}
