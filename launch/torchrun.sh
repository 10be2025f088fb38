#!/usr/bin/env bash
# One run on several processes, through torchrun: on this machine, or as one of several nodes.
set -euo pipefail
. "$(dirname "$0")/supervise.sh"

usage() {
    cat <<'END'
launch/torchrun.sh [options] CONFIG [key=value …]

Runs `snell-scale run CONFIG key=value … --resume auto` on several processes. Set the engine in the config or as
engine.name=ddp (or fsdp2, deepspeed).

  --nproc-per-node M   processes on this node; auto (the default): one for each GPU, 1 without GPUs
  --nodes N            nodes of the run (1). With more, start this on every node with the same arguments
  --rendezvous H:P     where the nodes meet: a host of theirs, and a free port on it (with --nodes)
  --id ID              name of this meeting, the same on every node (made from CONFIG and its settings)
  --max-restarts K     times that a group with a crashed process is started again, from the newest checkpoint (3)
  --interrupted-code C exit code of a run that a signal stopped after saving (75)
  --print              show the command instead of running it

Exit code: 0 ok, 1 failed, 2 bad input, 3 out of memory, 4 diverged, 75 interrupted: the same command continues.
SIGTERM and Ctrl-C stop the run after its step, with a checkpoint (torchrun kills what needs over 30 seconds).
PYTHON names the interpreter (the repository's .venv/bin/python, else python); OMP_NUM_THREADS the threads of a
process (the cores divided by the processes).

One machine:  launch/torchrun.sh --nproc-per-node 2 configs/demo/pretrain.yaml engine.name=ddp
Two nodes:    launch/torchrun.sh --nodes 2 --rendezvous node1:29400 CONFIG engine.name=fsdp2     (on both)
END
}

main() {
    local nodes='' processes=auto rendezvous='' id='' restarts=3 interrupted_code=75 print=''
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) usage && exit 0 ;;
            --print) print=1 && shift && continue ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
            --nodes | --nproc-per-node | --rendezvous | --id | --max-restarts | --interrupted-code)
                [ $# -ge 2 ] || refuse "$1 needs a value; see --help" ;;
            -*) refuse "unknown option $1; see --help (options of snell-scale run come after CONFIG)" ;;
            *) break ;;
        esac
        case $1 in
            --nodes) nodes=$2 ;;
            --nproc-per-node) processes=$2 ;;
            --rendezvous) rendezvous=$2 ;;
            --id) id=$2 ;;
            --max-restarts) restarts=$2 ;;
            --interrupted-code) interrupted_code=$2 ;;
        esac
        shift 2
    done
    [ $# -ge 1 ] || refuse "no CONFIG given; see --help"
    check_run_arguments "${@:2}"
    [ -z "$rendezvous" ] || [ -n "$nodes" ] || refuse "--rendezvous is where several nodes meet: add --nodes N"
    nodes=${nodes:-1}
    if [ "$processes" = auto ]; then
        processes=$(count_gpus)
        [ "$processes" != 0 ] || processes=1
    fi
    check_number --nodes "$nodes" 1
    check_number --nproc-per-node "$processes" 1
    check_number --max-restarts "$restarts" 0
    check_number --interrupted-code "$interrupted_code" 0

    local meeting=(--standalone)
    if [ "$nodes" != 1 ]; then
        [[ $rendezvous =~ .:[0-9]+$ ]] || refuse "--nodes $nodes needs --rendezvous HOST:PORT, where the nodes meet;" \
            "it is '$rendezvous', e.g. node1:29400"
        # Runs that meet on one port by mistake must not take each other's nodes for their own.
        id=${id:-snell-scale-$(cksum <<<"$*" | cut -d ' ' -f 1)}
        meeting=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "$id")
    fi
    local threads=$(($(nproc) / processes))
    # A restarted group meets in a store of its own: torchrun would offer it the old one, where processes that
    # are no more still have their addresses.
    local command=(
        env OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        "$(find_python)" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$processes"
        --max-restarts "$restarts" --module snell_scale.cli run "$@" --resume auto
    )
    [ -z "$print" ] || print_command "${command[@]}"
    supervise "$interrupted_code" "${command[@]}"
}

main "$@"
