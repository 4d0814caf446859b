#!/usr/bin/env bash
# The CPU table: Chorus and its peers on models S and M, one server at a time, alternating over the rounds.
#
#     load_tests/peers.sh BENCH OUT     (`make bench` calls it)
#
# BENCH is the folder of the peers' benchmark: run_peers.py, table.py, setup.sh and a README that says what they
# do. OUT gets a new folder with S.jsonl, M.jsonl and table.md. From the environment: PEERS, where setup.sh built
# the peers; MODELS, NAMES (of the servers), WORKLOADS and ROUNDS; TOTALS, such as W1=32,W2=32, for fewer requests.
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: load_tests/peers.sh BENCH OUT" >&2
    exit 2
fi
bench=$1
out=$2/$(date +%Y%m%d-%H%M%S)
export PEERS=${PEERS:-$HOME/.cache/chorus-peers}
models=${MODELS:-S M}
names=${NAMES:-chorus,vllm-base,vllm-lora16,llamacpp-lora16,llamacpp-base}
workloads=${WORKLOADS:-W1,W2,W3,W4,W4b,W5,W6}

if [ ! -f "$bench/run_peers.py" ]; then
    echo "$bench has no run_peers.py: name the folder of the peers' benchmark, as in make bench PEERS_BENCH=FOLDER" >&2
    exit 2
fi
python=$PEERS/hf/bin/python # it has aiohttp, which the load client needs
if [ ! -x "$python" ]; then
    echo "the peers are not built in $PEERS: run $bench/setup.sh first, or set PEERS to where they are" >&2
    exit 2
fi
mkdir -p "$out"
CHORUS=$(cd "$(dirname "$0")/.." && pwd) # whose .venv/bin/chorus is measured
export CHORUS
git -C "$CHORUS" describe --always --dirty >"$out/commit" 2>/dev/null || true

for model in $models; do
    "$python" "$bench/run_peers.py" --model "$model" --peers "$names" --workloads "$workloads" \
        --rounds "${ROUNDS:-3}" ${TOTALS:+--total "$TOTALS"} --out "$out/$model.jsonl"
    "$python" "$bench/table.py" "$out/$model.jsonl" | tee -a "$out/table.md"
done
echo "results: $out"
