#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under 8 minutes: tests/gpu, the kernels' times, the engine's.
# Logs go to $OUT (default: a new folder of the temporary directory), the tables to the end of the output.
# Needs python3 with torch, triton and pytest; wheels in .whl/ of the checkout are installed first.
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

failed=()
# step NAME SECONDS COMMAND...: runs to its own log, within its own time
step() {
    local name=$1 seconds=$2 began=$SECONDS status
    shift 2
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
    echo "$name: exit $status after $((SECONDS - began)) s"
}
has() { python3 -c "import $1" 2>/dev/null; }

python3 -c 'import torch, triton
print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' || exit
# The project's own options ask for plugins that a lent machine may lack.
pytest=(python3 -m pytest -q -o addopts= -o filterwarnings=default --durations=5)
has xdist && pytest+=(-n 8) # most of the time is compilation
step tests 200 "${pytest[@]}" tests/gpu
step kernels 120 python3 -m load_tests.gpu.kernels --json "$out/kernels.json"
step attention 40 python3 -m load_tests.gpu.attention
[ ! -f load_tests/gpu/engine.py ] || step engine 110 python3 -m load_tests.gpu.engine

grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c1-200 | head -20
for name in tests kernels attention engine; do
    [ ! -f "$out/$name.log" ] || { echo "--- $name"; tail -n "$([ "$name" = kernels ] && echo 75 || echo 12)" "$out/$name.log"; }
done
echo "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
