# shellcheck shell=bash
# Sourced by the batch scripts: runs the trainers under Slurm's notices, and has the job requeued when they stopped.

# shellcheck disable=SC2034  # by those that source it
readonly STOPPED=85 # of launch/node.sh: stopped when asked to, saved, to be continued

# COMMAND...: wait for its end and return its status. SIGUSR1 (the notice before the time limit) and SIGTERM (the end of
# the job by preemption, requeue or scancel) reach it as SIGUSR1: that is what srun hands on to the tasks of every
# node, where it takes SIGTERM as an order to kill them.
under_notice() {
    local status=0 ended command interrupted=true
    "$@" &
    command=$!
    trap 'interrupted=true; kill -USR1 "$command" 2>/dev/null || true' TERM USR1
    while $interrupted; do # a signal ends `wait` before its time
        interrupted=false
        ended=0
        wait "$command" || ended=$?
        [ "$ended" -eq 127 ] || status="$ended" # 127: it had ended when it was waited for already
    done
    trap '' TERM USR1 # what follows is short, and requeueing ends this very script with SIGTERM
    return "$status"
}

# JOB: put it back into the queue, unless Slurm is ending it already: a job that is being requeued comes back by
# itself, and one that was cancelled must not.
requeue() {
    local job="$1" found
    found="$(squeue --noheader --job "$job" --format %T)"
    if [ "$found" = RUNNING ]; then
        echo "job $job: stopped when asked to and saved; back into the queue"
        scontrol requeue "$job"
    else
        echo "job $job: stopped when asked to and saved; Slurm has it as ${found:-ended}, so it is not requeued from here"
    fi
}

# The folder of hdl: a batch script runs as a copy of itself, in the folder that it was submitted from.
hdl_folder() {
    local folder="${HDL:-${SLURM_SUBMIT_DIR:-$PWD}}"
    if [ ! -f "$folder/launch/node.sh" ]; then
        echo "error: $folder holds no launch/node.sh; submit from hdl's folder, or set HDL to it" >&2
        return 1
    fi
    echo "$folder"
}
