#!/usr/bin/env bash
# Everything that wants a GPU in one call of 9 minutes, or only the parts that are named:
#     load_tests/gpu/run.sh [PART ...]
# $OUT (default: a new folder of the temporary directory) gets two files, renewed after every step and while one
# runs: all.tgz with every log and figure so far, and summary.txt, which is also the end of the output.
# LIMIT is the time of the whole call in seconds (540), PACK_EVERY that between two archives while a step runs
# (15); SHAPE another model than llama-3.1-8b. CHORUS_CUDA_LEVERS and other settings of the server hold here too.
set -u
cd "$(dirname "$0")/../.." || exit
checks=(smoke tests alone)
benchmarks=(ceilings engine mixed sampling profile kernels attention swap ranks engine-small levers sweep kernel-ranks)
wanted=("$@") chosen=() failed=()
for name in "${wanted[@]}"; do
    case " ${checks[*]} " in *" $name "*) continue ;; esac
    case " ${benchmarks[*]} " in *" $name "*) chosen+=("$name") ;; *)
        echo "no such part: $name (there are ${checks[*]} ${benchmarks[*]})"
        exit 2
        ;;
    esac
done

limit=${LIMIT:-540} every=${PACK_EVERY:-15}
out=${OUT:-$(mktemp -d)} work=$(mktemp -d)
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONFAULTHANDLER=1 TRITON_INTERPRET=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G '.whl/*.whl' >/dev/null; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit
    PYTHONPATH="$PYTHONPATH:$site"
fi
python3 -m load_tests.gpu.packages || exit

# summary: what is known so far: the steps, the tests that failed, then the tables of each part
summary() {
    local name
    cat "$work/steps.txt"
    grep -hE '^=+ .*(passed|failed|error).* in [0-9.]+' "$work"/{smoke,tests,alone}.log 2>/dev/null
    grep -hE '^(FAILED|ERROR) |(FAILED|ERROR) +(\[|tests/)|crashed while' "$work"/{smoke,tests,alone}.log 2>/dev/null |
        cut -c1-200 | head -n 20
    [ -f "$work/parts.txt" ] || return 0
    awk '!seen[$1]++ { print $1 }' "$work/parts.txt" | while read -r name; do
        echo "--- $(awk -v name="$name" '$1 == name' "$work/parts.txt" | tail -n 1)"
        [ ! -f "$work/$name.txt" ] || cut -c1-150 "$work/$name.txt"
    done
}
pack() {
    summary >"$work/summary.txt"
    cp "$work/summary.txt" "$out/summary.txt"
    tar czf "$out/all.tgz.part" -C "$work" .
    mv "$out/all.tgz.part" "$out/all.tgz"
}
note() {
    echo "$1" | tee -a "$work/steps.txt"
    pack
}
# step NAME SECONDS COMMAND...: runs to its own log, within its own time and what is left of the call's
step() {
    local name=$1 seconds=$2 status began=$SECONDS packed=$SECONDS left=$((limit - SECONDS)) pid
    shift 2
    [ "$seconds" -le "$left" ] || seconds=$left
    if [ "$seconds" -lt 10 ]; then
        failed+=("$name (no time)")
        note "$name: not begun, no time left"
        return 1
    fi
    timeout -k 5 "$seconds" "$@" >>"$work/$name.log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        [ $((SECONDS - packed)) -lt "$every" ] || { pack; packed=$SECONDS; } # what a killed call leaves
    done
    wait "$pid"
    status=$?
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
    note "$name: exit $status after $((SECONDS - began)) s"
    return "$status"
}
# wants NAME: whether it is to run; everything is where nothing is named
wants() { [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]]; }
# measure SECONDS PART...: in one process, and in another one with what is left where that died
measure() {
    local seconds=$1 status
    shift
    for _ in 1 2 3; do
        step benchmarks "$seconds" python3 -m load_tests.gpu.benchmarks --out "$work" \
            --shape "${SHAPE:-llama-3.1-8b}" --seconds $((limit - SECONDS - 20)) "$@"
        status=$?
        case $status in 0 | 3) return ;; esac
        tail -n 40 "$work/benchmarks.log"
        [ $((limit - SECONDS)) -gt 40 ] || return
    done
}

# The project's own options ask for plugins that the machine may lack.
pytest=(env OMP_NUM_THREADS=2 python3 -m pytest -v -p no:cacheprovider -o addopts= -o filterwarnings=default -o timeout=60
    --durations=5 --continue-on-collection-errors)
workers=()
python3 -c 'import xdist' 2>/dev/null && workers=(-n 6) # most of the time is compilation

: >"$work/steps.txt"
[ ${#wanted[@]} -gt 0 ] || measure 25 ceilings
if wants smoke && ! step smoke 90 "${pytest[@]}" -m smoke tests/gpu; then
    tail -n 60 "$work/smoke.log"
    echo "stopped: nothing else is worth the card's time"
    exit 1
fi
! wants tests || step tests 110 "${pytest[@]}" "${workers[@]}" -m 'not smoke and not alone and not extra' tests/gpu
! wants alone || step alone 30 "${pytest[@]}" -m alone tests/gpu
[ ${#wanted[@]} -gt 0 ] && [ ${#chosen[@]} -eq 0 ] || measure "$limit" "${chosen[@]}"

note "failed: ${failed[*]:-nothing}"
cat "$out/summary.txt"
[ ${#failed[@]} -eq 0 ]
