# shellcheck shell=bash
# Sourced by train.sh and torchrun.sh: `supervise LEVELS COMMAND...` runs a launcher whose training processes are its
# descendants LEVELS below it. SIGTERM, SIGUSR1 and Ctrl-C go to these processes, which then save and end; a second
# Ctrl-C kills. A launcher that fails is started again up to RESTARTS times, and goes on from the last checkpoint.
# Exits with its last exit code.

asked="" interrupts=0 launcher=""

# children PID...: their ids. Linux only, as the rest.
children() {
    local pid
    for pid in "$@"; do
        cat "/proc/$pid/task/$pid/children" 2>/dev/null || true
    done
}

# pass_on SIGNAL LEVELS: to the training processes, or to the launcher where there are none here.
pass_on() {
    local level pids=$launcher
    asked=$1
    [[ -n $launcher ]] || return 0
    for ((level = 0; level < $2; level++)); do
        # shellcheck disable=SC2086  # a list
        pids=$(children $pids)
    done
    if [[ $1 == INT ]] && ((++interrupts > 1)); then
        # shellcheck disable=SC2086
        kill -KILL -- "-$launcher" $pids 2>/dev/null || true
    elif (($2 > 0)) && [[ -n $pids ]]; then
        # shellcheck disable=SC2086
        kill "-$1" $pids 2>/dev/null || true
    else
        kill -TERM -- "-$launcher" 2>/dev/null || true
    fi
}

supervise() {
    local levels=$1 attempt=0 code
    shift
    # shellcheck disable=SC2064  # the number is known now
    {
        trap "pass_on TERM $levels" TERM
        trap "pass_on USR1 $levels" USR1
        trap "pass_on INT $levels" INT
    }
    while :; do
        # In a process group of its own: a terminal's Ctrl-C reaches this script alone, which passes it on.
        set -m
        "$@" &
        launcher=$!
        set +m
        code=0
        while kill -0 "$launcher" 2>/dev/null; do
            wait "$launcher" || true # a signal ends the wait, not the launcher
        done
        wait "$launcher" || code=$?
        launcher=""
        # 0: done, or stopped and saved. 2: a setting is wrong. 130: interrupted.
        if [[ -n $asked || $code == 0 || $code == 2 || $code == 130 ]] || ((attempt >= ${RESTARTS:-0})); then
            exit "$code"
        fi
        attempt=$((attempt + 1))
        echo "launch: ended with code $code; restart $attempt of $RESTARTS, from the last checkpoint" >&2
        sleep "${RESTART_PAUSE:-5}" & # ports and GPUs get free; in the background, for a signal not to wait
        wait $! || true
        [[ -z $asked ]] || exit "$code"
    done
}
