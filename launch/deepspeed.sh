#!/usr/bin/env bash
# One run on several processes, through DeepSpeed's own launcher: on this machine, or on the nodes of a hostfile.
set -euo pipefail
. "$(dirname "$0")/supervise.sh"

usage() {
    cat <<'END'
launch/deepspeed.sh [options of deepspeed] CONFIG [key=value …]

Runs `deepspeed … --module snell_scale.cli run CONFIG key=value … --resume auto`. The engine is the config's matter:
engine.name=deepspeed, or ddp or fsdp2, which start as well this way.

  --num_gpus M         processes on a node (without GPUs: processes on the CPU)
  --hostfile FILE      nodes, one a line: NAME slots=M
  --no_ssh             started on every node by hand, with --node_rank R --master_addr HOST --master_port PORT;
                       without it, this is started once and reaches the nodes by ssh and pdsh
  …                    and every other option of deepspeed (see deepspeed --help), with its value
  --print              show the command instead of running it

A crashed process ends the run: start the same command again, it continues from the newest checkpoint.
launch/torchrun.sh restarts by itself, and runs DeepSpeed's engine too.
Exit code: 0 ok, 1 failed, 2 bad input, 3 out of memory, 4 diverged, 75 interrupted: the same command continues.

One machine:  launch/deepspeed.sh --num_gpus 2 configs/demo/pretrain.yaml engine.name=deepspeed
Two nodes:    launch/deepspeed.sh --hostfile hosts --no_ssh --node_rank 0 --master_addr node1 --master_port 29400 \
                  CONFIG engine.name=deepspeed     (on the second node with --node_rank 1)
END
}

main() {
    local options=(--no_local_rank) print=''
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) usage && exit 0 ;;
            --print) print=1 && shift ;;
            --no_ssh | --no_ssh_check | --force_multi | --save_pid | --bind_cores_to_rank | -q | --quiet)
                options+=("$1") && shift ;;
            --*=*) options+=("$1") && shift ;;
            -*)
                [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
                options+=("$1" "$2") && shift 2 ;;
            *) break ;;
        esac
    done
    [ $# -ge 1 ] || refuse "no CONFIG given; see --help"
    check_run_arguments "${@:2}"
    check_options "${options[@]}"
    # The deepspeed script's module: the script's folder may not be on the PATH.
    local command=(
        "$(find_python)" -m deepspeed.launcher.runner "${options[@]}" --module snell_scale.cli run "$@" --resume auto
    )
    [ -z "$print" ] || print_command "${command[@]}"
    supervise 75 "${command[@]}"
}

# What deepspeed passes over, and runs something else than was meant: another number of processes, or one alone.
check_options() {
    local option value by_hand=''
    local -A given=()
    while [ $# -gt 0 ]; do
        option=${1%%=*} value=${2:-}
        [[ $1 != *=* ]] || value=${1#*=}
        given[$option]=1
        case $option in
            -H | --hostfile)
                [ -f "$value" ] || refuse "$option is '$value', expected a file with one node a line: NAME slots=M" ;;
            --num_gpus | --num_nodes) check_number "$option" "$value" 1 ;;
            --no_ssh) by_hand=1 ;;
        esac
        shift
    done
    [ -n "$by_hand" ] || return 0
    for option in --node_rank --master_addr --master_port; do
        [ -n "${given[$option]:-}" ] || refuse "--no_ssh needs $option: see the example of two nodes in --help"
    done
}

main "$@"
