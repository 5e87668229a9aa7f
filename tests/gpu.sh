#!/usr/bin/env bash
# The first ten minutes on a real GPU: every check and measurement that needs one, in three goes of under 10 minutes.
#
#   bash tests/gpu.sh CORPUS            CORPUS: a folder with GPT-2 tokens, *_train_*.bin and *_val_*.bin
#   bash tests/gpu.sh CORPUS entries    the four historical entries at full size: ms a micro-batch, memory, loss
#   bash tests/gpu.sh CORPUS ab         ValueEmbed and train_gpt.py in turn, 20 M tokens each: loss at equal tokens
#   SIMULATE=1 bash tests/gpu.sh ...    the same runs on the simulated GPU (./run.sh simulate): do they run at all?
#
# Results come to $OUT (default: gpu_logs/): summary.txt, and logs.tar.gz with all else. It takes the Python it finds
# (PYTHON=...) and installs nothing. The corpus stands in for FineWeb under its names, and the machine's own Python
# source for the laptop track's, so the losses compare runs of this script with each other only.
set -euo pipefail
[[ -d "${1:-}" ]] || { echo "error: '${1:-}' is no folder; expected: bash tests/gpu.sh CORPUS [entries|ab]" >&2; exit 2; }
corpus=$(realpath "$1") what=${2:-checks}
mkdir -p "${OUT:-gpu_logs}"
out=$(realpath "${OUT:-gpu_logs}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
logs=$(mktemp -d)
for data in data/fineweb10B data/laptop; do
    [[ ! -e $data ]] || { echo "error: $data exists; move it away, this script writes there" >&2; exit 2; }
done
finish() {
    rm -rf data/fineweb10B data/laptop
    cp records/scratch/*.txt "$logs" 2>/dev/null || true
    gzip -9 "$logs"/*.trace.json 2>/dev/null || true
    find "$logs" -size +15M -print -delete  # what comes back may have 16 MiB a file
    tar -czf "$out/logs.tar.gz" -C "$logs" .
    rm -rf "$logs"
}
trap finish EXIT
exec > >(tee "$out/summary.txt") 2>&1

"$python" - "$corpus" <<'PY'
import sys
import sysconfig
from pathlib import Path
import numpy as np
from data.shards import write_shard
from train_gpt import ROOT, TRACKS, open_shard
folder = Path(sys.argv[1])
for number, path in enumerate(sorted(folder.glob("*_train_*.bin")), 1):
    write_shard(ROOT / f"data/fineweb10B/fineweb_train_{number:06d}.bin", open_shard(path))
val = np.concatenate([open_shard(path) for path in sorted(folder.glob("*_val_*.bin"))])
write_shard(ROOT / "data/fineweb10B/fineweb_val_000000.bin", np.resize(val, TRACKS["fineweb"].val_tokens + 1))
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))  # another corpus than the track's: torch's has its own size
tokens = np.concatenate([np.array([256, *path.read_bytes()], "<u2") for path in files])
size = TRACKS["laptop"].val_tokens + 1
write_shard(ROOT / "data/laptop/laptop_val_000000.bin", tokens[:size])
write_shard(ROOT / "data/laptop/laptop_train_000001.bin", tokens[size:])
PY

run() {  # seconds, name, script, flags: a run of the script, or of its simulation
    local limit=$1 name=$2 script=$3
    shift 3
    echo "== $name: $script $*"
    if [[ -n "${SIMULATE:-}" ]]; then
        "$python" -m tests.simulate "$script" --gpus 1 "$@" || failed=1
    else
        timeout "$limit" "$python" "$script" "$@" > "$logs/$name.txt" 2>&1 || { echo "exit code $?"; failed=1; }
        grep -E "step_avg|tokens_per_second|^error|Error" "$logs/$name.txt" | tail -n 4 || true
    fi
}
failed=
[[ -n "${SIMULATE:-}" ]] || nvidia-smi
case $what in
checks)
    if [[ -n "${SIMULATE:-}" ]]; then
        "$python" -m tests.simulate --tests || failed=1
    else
        timeout 120 "$python" -m pytest -q tests/test_cuda.py || failed=1
    fi
    # 100 steps of what one of 8 GPUs does: 16,384, 32,768 and 49,152 tokens a step; ms, MFU, peak memory, kernels
    flags="--track fineweb --batch_size 1 --extension_steps 10 --val_every 0 --log_every 5 --sample_tokens 0"
    run 150 fineweb_100_steps train_gpt.py $flags --num_steps 100
    entry=gpu_trace_$$  # the profiler's own time must not be in the run above
    run 90 fineweb_trace train_gpt.py $flags --num_steps 60 --profile --entry "$entry"
    run 60 laptop_on_gpu train_gpt.py --track laptop --sample_tokens 0 --num_steps 100
    if [[ -z "${SIMULATE:-}" ]]; then  # measured beside predicted, with this machine's torch
        CUDA_PYTHON=$python timeout 150 "$python" -m tests.simulate --gpus 1 --json $flags --num_steps 100 \
            > "$logs/simulated.json" || failed=1
        mv records/"$entry"/* "$logs"/ && rmdir records/"$entry" || failed=1
        "$python" -m tests.simulate.calibrate "$logs/simulated.json" "$logs/fineweb_100_steps.txt" "$logs"/*.trace.json ||
            failed=1
    fi ;;
entries)
    for entry in 2024-12-04_ValueEmbed 2024-11-03_UntieEmbed 2024-10-14_ModernArch 2024-06-06_AdamW; do
        batch=1
        [[ $entry == 2024-12* ]] || batch=64  # sequences of 1,024 tokens: 65,536 tokens a step too
        run 145 "$entry" "records/$entry/train_gpt.py" --track fineweb --batch_size $batch --num_steps 60 \
            --warmup_steps 5 --cooldown_steps 15 --val_every 0 --log_every 5
    done ;;
ab)
    flags="--track fineweb --num_steps 300 --val_every 150 --log_every 10"
    run 280 ab_ValueEmbed records/2024-12-04_ValueEmbed/train_gpt.py $flags --batch_size 1 --cooldown_steps 120
    run 280 ab_today train_gpt.py $flags --batch_size 2 --extension_steps 8 ;;  # 32,768 to 98,304 tokens a step
*) echo "error: '$what' is unknown; expected entries, ab, or nothing"; exit 2 ;;
esac
[[ -z "$failed" ]] || { echo "FAILED: something above"; exit 1; }
