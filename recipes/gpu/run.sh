#!/usr/bin/env bash
# What a GPU tells about this library, in one call of at most 8 minutes:
#
#     bash recipes/gpu/run.sh OUT          # on a machine with a GPU
#     bash recipes/gpu/run.sh --dry OUT    # the same with tiny sizes on a CPU, the kernels in Triton's interpreter
#
# OUT gets at most 8 files, each written anew as soon as it has more. Needs torch, triton, transformers, peft, accelerate and
# pytest; nothing is installed and no network is used. Exit code 1 if a kernel gives a wrong result, 2 without a GPU.
set -u
dry=()
[ "${1-}" = --dry ] && { dry=(--dry); shift; }
if [ $# -ne 1 ]; then
    sed -n '3,6s/^# \{0,1\}//p' "$0" >&2
    exit 64
fi
mkdir -p "$1" || exit 73
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH="$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
total=480

# stage NAME SECONDS COMMAND...: at most so long, and not beyond the total
stage() {
    local name=$1 most=$2 left=$((total - SECONDS)) start=$SECONDS
    shift 2
    [ "$left" -lt "$most" ] && most=$left
    if [ "$most" -lt 5 ]; then
        echo "== $name: not run, no time left"
        return 124
    fi
    echo "== $name (at most $most s)"
    timeout -k 5 "$most" "$@"
    local code=$?
    [ "$code" -ge 124 ] && echo "== $name: stopped after $most s"
    echo "== $name: $((SECONDS - start)) s"
    return "$code"
}

measure() {
    stage "$1" "$2" "$python" -m hf_sparse_attn.benchmarks.gpu "$1" "$out" --seconds "$(($2 - 10))" "${dry[@]}"
}

measure machine 60 || exit
if [ "${#dry[@]}" -gt 0 ]; then
    export TRITON_INTERPRET=1
    tests=(-n 2 -k "(test_grid and prefill and D64-S16) or waits or same_bits")
else
    tests=(-n 12)
fi
tests+=(-v --timeout 90 -p no:cacheprovider -o filterwarnings=default --confcutdir tests/interpreter tests/interpreter)
stage right 100 "$python" -m pytest "${tests[@]}" > "$out/right.log" 2>&1
right=$?
tail -n 3 "$out/right.log"
measure limits 150
measure models 150
measure causes 60
measure launches 120
"$python" recipes/gpu/read.py --table "$out"
[ "$right" -eq 0 ]
