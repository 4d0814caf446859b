#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under 8 minutes, or only the parts that are named:
#     load_tests/gpu/run.sh [tests|kernels|attention|engine-llama|engine-qwen|swap|sweep ...]
# Logs and JSON go to $OUT (default: a new folder of the temporary directory), the tables to the end of the
# output. Needs python3 with torch, triton and pytest; wheels in .whl/ of the checkout are installed first.
set -u
cd "$(dirname "$0")/../.."
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TRITON_INTERPRET=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G '.whl/*.whl' >/dev/null; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit
    PYTHONPATH="$PYTHONPATH:$site"
fi

wanted=("$@") ran=() failed=()
# step NAME SECONDS COMMAND...: runs to its own log, within its own time, where it is wanted
step() {
    local name=$1 seconds=$2 began=$SECONDS status
    shift 2
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $name "* ]] || return 0
    ran+=("$name")
    timeout -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
    echo "$name: exit $status after $((SECONDS - began)) s"
}
# gpu NAME SECONDS MODULE OPTION...: a measurement, whose figures also go to JSON
gpu() {
    local name=$1 seconds=$2 module=$3
    shift 3
    step "$name" "$seconds" python3 -m "load_tests.gpu.$module" --json "$out/$name.json" "$@"
}
has() { python3 -c "import $1" 2>/dev/null; }

python3 -c 'import torch, triton
print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' || exit
# The project's own options ask for plugins that a lent machine may lack.
pytest=(python3 -m pytest -q -o addopts= -o filterwarnings=default --durations=5)
has xdist && pytest+=(-n 8) # most of the time is compilation
# The limits add up to 450 s, which leaves some for what is above.
step tests 135 "${pytest[@]}" tests/gpu
gpu kernels 40 kernels --quick
step attention 25 python3 -m load_tests.gpu.attention
gpu engine-llama 105 engine --shape llama-3.1-8b --seconds 85
gpu engine-qwen 45 engine --shape qwen2.5-0.5b --seconds 28
gpu swap 50 swap --shape llama-3.1-8b --seconds 34
gpu sweep 50 sweep --shape qwen2.5-0.5b --seconds 32

[ ${#ran[@]} -gt 0 ] || { echo "no such part: ${wanted[*]}"; exit 2; }
[ ! -f "$out/tests.log" ] || grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c1-200 | head -20
for name in "${ran[@]}"; do
    echo "--- $name"
    # from the head of the table of figures on, or else the last lines
    sed -n '/median  *low/,$p' "$out/$name.log" | grep . || tail -n "$([ "$name" = kernels ] && echo 18 || echo 12)" "$out/$name.log"
done
echo "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
