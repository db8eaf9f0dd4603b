#!/usr/bin/env bash
# Everything that a day with a GPU should leave behind, most valuable first, in at most eight minutes:
#
#     benchmarks/gpu_day.sh [PART ...]                build checks kernels steps samples tokenizer sanitizer
#     benchmarks/gpu_day.sh --rehearse [PART ...]     the same on the CPU, tiny, into a temporary folder
#
# Needs a Python (PYTHON, else python3) with torch, triton, timm, rich, safetensors and pytest; no DeepSpeed, network or
# installation. A part has its seconds and those that the parts before it left over. One that fails, or is stopped by
# its limit, does not stop the next, and its rows so far stay. Rows go to VADIT_RESULTS (benchmarks/results); into its
# folder gpu-day-DATE go PART.log, all that a part printed, and summary.txt. Ends with 1 where a part failed.
# VADIT_BATCH: images of a step of XL (128; fewer where the card has less than 120 GB). VADIT_COMMIT: without git, what
# is measured.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
unset PYTHONSAFEPATH # benchmarks import their neighbours
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
declare -A seconds=([build]=70 [checks]=70 [kernels]=100 [steps]=150 [samples]=40 [tokenizer]=30 [sanitizer]=20)

if [[ ${1:-} == --rehearse ]]; then
    export VADIT_REHEARSE=1 CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1 VADIT_RESULTS=${VADIT_RESULTS:-$(mktemp -d)}
    shift
fi
export VADIT_RESULTS=${VADIT_RESULTS:-$PWD/benchmarks/results}
if [[ ${VADIT_REHEARSE:-} ]]; then
    device=cpu patience=10 backends=(cpp) rounds=2 warmup=1 debug=-debug batch=4 images=2 compile=(on) also=()
    tests=(tests/test_op_swiglu.py -k "triton and test_empty")
    sampling=(--precision fp32 bf16)
else
    device=cuda patience=1 backends=(triton cuda) rounds=7 warmup=3 debug="" batch=${VADIT_BATCH:-128} images=32
    compile=(on off) also=(autocast)
    tests=(-m gpu tests/test_op_*.py tests/test_dispatch.py)
    sampling=(--precision bf16 tf32 --compile on off --rounds 3)
fi

# ---------------------------------------------------------------------------------------------------- one part
SELF_CHECK='
import sys, torch
from vadit.kernels import dispatch
from vadit.kernels.self_check import self_check
found = {}
for name in sys.argv[2:]:
    missing = dispatch.BACKENDS[name].missing
    if missing is None:
        with dispatch.setting(name):
            found[name] = self_check(torch.device(sys.argv[1]))
    print(f"self-check of {name}:", missing or found[name] or "every op passes", flush=True)
sys.exit(any(found.values()))
'
status=0
run() { "$@" || status=1; }
bench() { run "$python" "benchmarks/bench_$1.py" --device "$device" --rounds "$rounds" "${@:2}"; }
step() { bench step --recipe "lightningdit-xl-64ep$debug" --batch "$batch" --warmup "$warmup" "$@"; }
has() { command -v "$1" || { echo "no $1 here" && false; }; }

if [[ ${1:-} == --inside ]]; then
    case $2 in
        build)
            if [[ $device == cuda ]] && has nvcc; then
                VADIT_CUDA_ARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
                export VADIT_CUDA_ARCHS VADIT_BUILD=require VADIT_CUDA=require
                run "$python" setup.py -q build_ext --inplace
            fi
            ;;
        checks)
            run "$python" -c "$SELF_CHECK" "$device" "${backends[@]}"
            [[ $device == cuda ]] && "$python" -c 'import xdist' && tests+=(-n 8)
            run "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
            ;;
        kernels)
            for op in $("$python" -c 'from vadit.kernels import dispatch; print(*dispatch.OPS)'); do bench "$op" --first; done
            ;;
        steps)
            step --precision autocast --compile "${compile[@]}" --contender plain
            step --precision bf16 --compile on --kernels "${backends[0]}"
            if [[ $device == cuda ]]; then
                step --precision bf16 --compile on --kernels cuda reference
                step --precision bf16 --compile on --with engine.float8=fused
                "$python" -c 'import torchao' && step --precision bf16 --compile on --with engine.float8=rowwise
                step --precision autocast --compile on --kernels cuda reference
                step --precision autocast bf16 --compile off --kernels triton cuda reference
            fi
            ;;
        samples) bench sample "${sampling[@]}" ;;
        tokenizer) bench step --recipe "vavae-f16d32-dinov2$debug" --batch "$images" --precision bf16 "${also[@]}" ;;
        sanitizer)
            if has compute-sanitizer; then
                run compute-sanitizer --error-exitcode 1 "$python" -c "$SELF_CHECK" "$device" "${backends[@]}"
            fi
            ;;
        *)
            echo "no part is named $2" >&2
            status=2
            ;;
    esac
    exit "$status"
fi

# ---------------------------------------------------------------------------------------------------- all parts
rows() { cat "$VADIT_RESULTS"/*.csv 2>/dev/null | grep -vc ^date,; }

[[ $# -gt 0 ]] || set -- build checks kernels steps samples tokenizer sanitizer
for part in "$@"; do
    [[ -n ${seconds[$part]:-} ]] || { echo "no part is named $part; the parts are ${!seconds[*]}" >&2; exit 2; }
done
log=$VADIT_RESULTS/gpu-day-$(date +%F)
mkdir -p "$log"
until=0 failed=0
summary=$(printf '%-10s %7s %5s  %s' part seconds rows result)
for part in "$@"; do
    until=$((until + patience * ${seconds[$part]:-1})) start=$SECONDS before=$(rows)
    echo "== $part, $((until - start)) s at most"
    timeout -k 5 $((until - start)) bash "$0" --inside "$part" 2>&1 | tee "$log/$part.log"
    case ${PIPESTATUS[0]} in
        0) result="done" ;;
        124 | 137) result="stopped at its limit" failed=1 ;;
        *) result="FAILED" failed=1 ;;
    esac
    summary+=$(printf '\n%-10s %7d %5d  %s' "$part" $((SECONDS - start)) $(($(rows) - before)) "$result")
done
echo "$summary" | tee "$log/summary.txt"
exit "$failed"
