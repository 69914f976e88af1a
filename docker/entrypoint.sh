#!/bin/sh
# What the container runs: `serve` as SageMaker calls it, any command of `lmi`, flags of `lmi serve`, a model's name, any
# other program; with nothing it serves what the environment and /opt/ml/model say.
set -eu

look_for_gpu() {
    if [ "${LMI_NEEDS_GPU:-}" = true ] && [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ]; then
        echo "no GPU is visible: start the container with --gpus all, or set LMI_NEEDS_GPU=false to serve on CPUs" >&2
        exit 1
    fi
}

case ${1:-} in
'') set -- serve ;;
serve | lmi) ;;
check | run | -h | --help | --version) set -- lmi "$@" ;;
-*) set -- serve "$@" ;;
*) command -v -- "$1" >/dev/null || set -- serve "$@" ;;
esac
case "$1 ${2:-}" in
"serve "* | "lmi serve" | "lmi run") look_for_gpu ;;
esac
exec "$@"
