# shellcheck shell=bash
# Sourced by the launchers: start a launcher's command, pass signals on to it, end as the run ended.

# supervise INTERRUPTED_CODE COMMAND… : exits with the run's own code (INTERRUPTED_CODE in place of 75).
#
# torchrun makes 1 of every exit code and restarts what fails. So every process of a run that ended with a record
# exits 0 where SNELL_SCALE_EXIT_FILE is set, and one of each node writes there how the run ended: only a crash
# is a failure to the command, and restarted.
supervise() {
    local interrupted_code=$1 told code=0
    shift
    SNELL_SCALE_EXIT_FILE=$(mktemp "${TMPDIR:-/tmp}/snell-scale-exit.XXXXXX")
    export SNELL_SCALE_EXIT_FILE
    # A batch system sends SIGUSR2 to every process of the job: for the workers it means "save and stop", and
    # whoever installs no handler of its own must outlive it.
    trap '' USR2
    set -m # a process group of its own, so that a signal reaches the command once, and all of it
    "$@" &
    set +m
    supervised=$!
    trap 'kill -TERM -- "-$supervised" 2>/dev/null || true' TERM INT HUP
    while kill -0 "$supervised" 2>/dev/null; do
        wait "$supervised" && code=0 || code=$? # a signal interrupts wait
    done
    _wait_for_group
    told=$(cat "$SNELL_SCALE_EXIT_FILE" 2>/dev/null || true)
    rm -f "$SNELL_SCALE_EXIT_FILE"
    [ -z "$told" ] || code=$told
    [ "$code" -ne 75 ] || code=$interrupted_code
    exit "$code"
}

# The deepspeed launcher may end before its workers, which still save: at most a minute.
_wait_for_group() {
    for _ in $(seq 300); do
        kill -0 -- "-$supervised" 2>/dev/null || return 0
        sleep 0.2
    done
}

# The GPUs this node offers to the job; 0 where there are none.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# The Python to run: $PYTHON, else the repository's .venv, else the one on the PATH.
find_python() {
    local own
    own=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
    if [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
    elif [ -x "$own" ]; then
        realpath --no-symlinks "$own"
    else
        echo python
    fi
}

# For --print: what the shell would run, quoted so that it can be pasted.
print_command() {
    local words
    printf -v words ' %q' "$@"
    echo "${words:1}"
    exit 0
}

# Bad usage: one message and exit code 2, as the command line itself does.
refuse() {
    echo "error: $*" >&2
    exit 2
}

check_number() { # OPTION VALUE SMALLEST
    [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] && [ "$2" -ge "$3" ] || refuse "$1 is '$2', expected a number of $3 or more"
}

# What follows CONFIG is for `snell-scale run`. --overwrite would wipe the run at every restart.
check_run_arguments() {
    local argument
    for argument in "$@"; do
        case $argument in
            --overwrite)
                refuse "--overwrite does not go with a launcher, whose restarts would start over:" \
                    "delete the run's folder first" ;;
            --resume*) refuse "$argument: a launcher always adds --resume auto, so that a restart continues" ;;
            --dry-run | --quiet) ;;
            -*) refuse "$argument came after CONFIG: the launcher's own options come before it; see --help" ;;
        esac
    done
}
