#!/usr/bin/env bash
# Train on one node, one process a GPU; started on each of several nodes, it trains on all of them.
#
#   launch/node.sh RUN.toml [train.py flags]
#
#   GPUS=N            processes, one a GPU; unset: every GPU of the node that CUDA_VISIBLE_DEVICES leaves
#   PROCESSES=N       processes on a node without GPUs, or with DS_ACCELERATOR=cpu; unset: 1
#   RESTARTS=N        how often all processes are started again after one failed, from the newest checkpoint; unset: 3
#   SHM_CACHE_GIB=N   read shards by way of a cache of this size in /dev/shm, gone when this script ends
#   NODES=N NODE_RANK=I RENDEZVOUS=HOST:PORT
#                     node I (from 0) of N; HOST is node 0 as all the others reach it, PORT a free one there
#
# SIGTERM and SIGUSR1 let the trainers finish their step, save and end; this script's status is 85 then, for
# whoever started it to start it again with --resume auto.
#
# Unusual: torchrun never sees those two signals. It would pass them on, end with status 1 whatever the trainers
# made of it, and start trainers that ended with 85 again as if they had failed. So it is started with both ignored,
# they are sent to the trainers from here, and a trainer that stopped is a success to torchrun.
# shellcheck disable=SC2329,SC2016  # functions that traps and torchrun call; what another bash expands
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly STOPPED=85 # hdl.engine.faults: stopped when asked to, saved, to be continued

fail() { # what was found, what was expected, what to do
    echo "error: $*" >&2
    exit 2
}

count() { # name of a variable; value
    [[ "$2" =~ ^[0-9]+$ ]] || fail "$1 is '$2', expected a whole number; unset it for the default"
    echo "$2"
}

gpus_here() {
    if [ "${DS_ACCELERATOR:-}" = cpu ]; then
        echo 0
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        { nvidia-smi -L || true; } | grep -c ^GPU || true
    else
        echo 0
    fi
}

# ADDRESS INTERFACE by which a host and port are reached; on the host itself, those that carry its address
way_to() {
    python - "$1" "$2" <<'PYTHON'
import fcntl, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], int(sys.argv[2])))  # sends nothing
    address = probe.getsockname()[0]
    for _, name in socket.if_nameindex():
        try:  # SIOCGIFADDR
            found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))
        except OSError:
            continue  # has no IPv4 address
        if socket.inet_ntoa(found[20:24]) == address:
            print(address, name)
            break
    else:
        print(address)
PYTHON
}

[ $# -gt 0 ] || fail "usage: launch/node.sh RUN.toml [train.py flags]; RUN.toml is the TOML file of a run"
gpus="$(count GPUS "${GPUS:-$(gpus_here)}")"
processes="$gpus"
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu
    processes="$(count PROCESSES "${PROCESSES:-1}")"
    [ "$processes" -gt 0 ] || fail "PROCESSES is 0, expected at least 1; unset it for one process"
fi
restarts="$(count RESTARTS "${RESTARTS:-3}")"
nodes="$(count NODES "${NODES:-1}")"
node="$(count NODE_RANK "${NODE_RANK:-0}")"
[ "$node" -lt "$nodes" ] || fail "NODE_RANK is $node of NODES=$nodes, expected 0 to $((nodes - 1))"

# An environment that is entered already comes first, then the repository's, which is made if need be.
if ! command -v torchrun >/dev/null; then
    pushd "$here/.." >/dev/null
    if [ -x .venv/bin/torchrun ]; then
        . .venv/bin/activate
    else
        . launch/environment.sh
        make_environment ""
    fi
    popd >/dev/null
fi

# PyTorch gives each of several processes one thread otherwise, and a single one all cores of the node.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > processes ? $(nproc) / processes : 1))}"
meeting=(--rdzv-backend=c10d --nnodes="$nodes")
if [ "$nodes" -eq 1 ]; then
    # Port 0 is a free one. The address is given because a host's own name need not resolve.
    meeting+=(--rdzv-endpoint=localhost:0 --local-addr=127.0.0.1)
else
    RENDEZVOUS="${RENDEZVOUS:-}"
    host="${RENDEZVOUS%:*}" port="${RENDEZVOUS##*:}"
    if [ -z "$host" ] || [ "$host" = "$RENDEZVOUS" ] || ! [[ "$port" =~ ^[0-9]+$ ]]; then
        fail "RENDEZVOUS is '$RENDEZVOUS' with NODES=$nodes, expected HOST:PORT of node 0, the same on every node"
    fi
    way="$(way_to "$host" "$port" 2>/dev/null)" ||
        fail "RENDEZVOUS host '$host' is not reached from $(hostname): no such name, or no route; give an address of node 0"
    read -r address interface <<<"$way"
    [ "$node" -eq 0 ] && address="$host" # as the others know it
    # Gloo would take the interface of the host's own name, on many machines loopback. NCCL chooses well by itself.
    [ -n "$interface" ] && export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
    # Which node hosts the rendezvous is said, not guessed from names. The others wait five minutes for it to be there.
    meeting+=(--rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RENDEZVOUS_ID:-hdl}" --local-addr="$address")
    meeting+=(--rdzv-conf="is_host=$([ "$node" -eq 0 ] && echo true || echo false),read_timeout=300")
fi

state="$(mktemp -d)" # trainer.I: its process id; stopped.I, failed.I: how it ended
cache=""
helpers=() # that run beside torchrun
clean_up() {
    [ ${#helpers[@]} -eq 0 ] || kill -KILL "${helpers[@]}" 2>/dev/null || true
    rm -rf "$state" ${cache:+"$cache"}
}
trap clean_up EXIT

if [ -n "${SHM_CACHE_GIB:-}" ]; then
    for left in "/dev/shm/hdl-$(id -u)-"*; do # by scripts that were killed: the lock ends with their last process
        if [ -e "$left/lock" ]; then flock --nonblock "$left/lock" rm -rf "$left" || true; fi
    done
    cache="$(mktemp -d "/dev/shm/hdl-$(id -u)-XXXXXX")"
    exec 9>"$cache/lock"
    flock 9
    python "$here/slurm/shm_cache.py" "$cache" "$SHM_CACHE_GIB" "$@" >"$state/arguments"
    mapfile -d '' -t arguments <"$state/arguments"
    set -- "${arguments[@]}"
fi

# What torchrun starts as trainer $LOCAL_RANK. Python takes the subshell's place and with it the id that is written.
trainer() {
    local status=0
    rm -f "$HDL_STATE/stopped.$LOCAL_RANK" "$HDL_STATE/failed.$LOCAL_RANK"
    (echo "$BASHPID" >"$HDL_STATE/trainer.$LOCAL_RANK" && exec python "$@") || status=$?
    rm -f "$HDL_STATE/trainer.$LOCAL_RANK"
    if [ "$status" -eq "$HDL_STOPPED" ]; then
        touch "$HDL_STATE/stopped.$LOCAL_RANK"
        status=0
    elif [ "$status" -ne 0 ]; then
        touch "$HDL_STATE/failed.$LOCAL_RANK"
    fi
    exit "$status"
}
export -f trainer
export HDL_STATE="$state" HDL_STOPPED="$STOPPED"
# Should torchrun be killed, so is this in between; its trainer then sees that it is left alone (hdl/engine/watch.py).
between=(bash)
if command -v setpriv >/dev/null; then between=(setpriv --pdeathsig KILL bash); fi

# Tells each trainer once, as soon as it listens: one that is starting up ignores the signal, as it inherits that, and
# one that is leaving would die of it, because Python puts signals back to their defaults when it ends.
notify() {
    local -A told=()
    local file pid caught
    trap '' TERM USR1
    while true; do
        for file in "$state"/trainer.*; do
            pid="$(cat "$file" 2>/dev/null)" || continue
            caught="$(sed -n 's/^SigCgt:\t//p' "/proc/$pid/status" 2>/dev/null)" || continue
            if [ -z "${told[$pid]:-}" ] && ((0x${caught:-0} >> 9 & 1)); then # bit 9: SIGUSR1, signal 10
                kill -USR1 "$pid" 2>/dev/null && told[$pid]=yes
            fi
        done
        sleep 0.5 >/dev/null 2>&1
    done
}

# Ends a torchrun that waits for a node 0 that is gone. Its trainers notice that within train.patience, but it reads from
# node 0's store without a limit, for as long as TCP repeats itself: a quarter of an hour.
guard() {
    local silent=0
    trap '' TERM USR1
    while sleep 2 >/dev/null 2>&1; do
        silent=$((silent + 1))
        if ! compgen -G "$state/failed.*" >/dev/null ||
            timeout 3 bash -c ': <"/dev/tcp/$0/$1"' "$host" "$port" >/dev/null 2>&1; then
            silent=0
        elif [ "$silent" -eq 3 ]; then
            echo "launch/node.sh: node 0 does not answer at $RENDEZVOUS; torchrun, which waits for it, is ended" >&2
            touch "$state/left"
            kill -KILL "$agent" 2>/dev/null
        fi
    done
}

stop() {
    interrupted=true
    if [ -z "$notified" ]; then
        echo "launch/node.sh: asked to stop: node $node's trainers finish their step, save and end" >&2
        notified=yes
        notify &
        helpers+=($!)
        disown # bash need not tell of its end
    fi
}

interrupted=true status=0 agent="" notified=""
trap stop TERM USR1
trap 'interrupted=true; [ -z "$agent" ] || kill -INT "$agent" 2>/dev/null' INT
set -m # a process group of its own for torchrun: Ctrl-C comes to it once, from here, and not ignored
(
    trap '' TERM USR1
    exec torchrun "${meeting[@]}" --nproc-per-node="$processes" --max-restarts="$restarts" \
        --signals-to-handle=SIGINT,SIGHUP,SIGQUIT --no-python "${between[@]}" -c 'trainer "$@"' trainer "$here/../train.py" "$@"
) &
agent=$!
set +m
if [ "$node" -gt 0 ]; then
    guard &
    helpers+=($!)
    disown
fi
while $interrupted; do # a signal ends `wait` before its time
    interrupted=false
    ended=0
    wait "$agent" || ended=$?
    [ "$ended" -eq 127 ] || status="$ended" # 127: it had ended when it was waited for already
done
if [ "$status" -eq 0 ] && compgen -G "$state/stopped.*" >/dev/null; then
    status="$STOPPED"
elif [ -e "$state/left" ]; then
    status=1
fi
exit "$status"
