#!/usr/bin/env bash
# Every check and measurement that needs a real GPU, in one go: 5.3 minutes on an H200 with 16 cores but for the last
# run, which took one more elsewhere (records/studies/2026-11-28_H200); compiling alone varied from 3 to 4.3 minutes.
#
#   bash tests/gpu.sh CORPUS            CORPUS: a folder with GPT-2 tokens, *_train_*.bin and *_val_*.bin
#   bash tests/gpu.sh CORPUS turns      ms a step of the entry before and of train_gpt.py, compiled together, run in turn
#   bash tests/gpu.sh CORPUS entries    the four historical entries at full size: ms a micro-batch, memory, loss
#   SIMULATE=1 bash tests/gpu.sh ...    the same runs on the simulated GPU (./run.sh simulate): do they run at all?
#
# Results come to $OUT (default: gpu_logs/): summary.txt, and logs.tar.gz with all else. It takes the Python it finds
# (PYTHON=...) and installs nothing. The corpus stands in for FineWeb under its names, and the machine's own Python
# source for the laptop track's, so the losses compare runs of this script with each other only.
set -euo pipefail
[[ -d "${1:-}" ]] || { echo "error: '${1:-}' is no folder; expected: bash tests/gpu.sh CORPUS [turns|entries]" >&2; exit 2; }
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
    cp records/"${entry:-none}"*/*.txt "$logs" 2>/dev/null || true
    rm -rf records/"${entry:-none}"*
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
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
tokens = np.concatenate([np.array([256, *path.read_bytes()], "<u2") for path in files])
size = TRACKS["laptop"].val_tokens + 1
write_shard(ROOT / "data/laptop/laptop_val_000000.bin", tokens[:size])
write_shard(ROOT / "data/laptop/laptop_train_000001.bin", tokens[size:])
PY

run() {  # seconds, name, script (or -m and a module), flags: a run, or a simulation of one
    local limit=$1 name=$2 script=$3
    shift 3
    echo "== $name: $script $*"
    if [[ -n "${SIMULATE:-}" ]]; then
        "$python" -m tools.simulate "$script" --gpus 1 "$@" || failed=1
    else
        timeout "$limit" "$python" $script "$@" > "$logs/$name.txt" 2>&1 || { echo "exit code $?"; failed=1; }
        grep -E "compil|step_avg|tokens_per_second|^error|Error" "$logs/$name.txt" | tail -n 5 || true
    fi
}
failed=
[[ -n "${SIMULATE:-}" ]] || nvidia-smi
entry=gpu_$$
today="--track fineweb --batch_size 1 --num_steps 100 --extension_steps 10 --val_every 0 --log_every 5"
today+=" --sample_tokens 0 --entry $entry"
case $what in
checks)
    ab="--track fineweb --val_every 100 --log_every 10 --entry $entry"
    if [[ -n "${SIMULATE:-}" ]]; then
        "$python" -m tools.simulate --tests || failed=1
        run 0 today train_gpt.py $today
    else
        # Together what is not timed: it compiles, on its own cores, what the runs below then find in the caches.
        begun=$SECONDS
        (timeout 220 "$python" -m pytest -q --show-capture=no tests/runs/test_cuda.py || echo "exit code $?") > "$logs/test_cuda.txt" 2>&1 &
        pids=$!  # a bare wait would wait for the tee above, too
        (run 270 today_compiles train_gpt.py $today --num_steps 8 --extension_steps 1) > "$logs/1.out" 2>&1 &
        pids+=" $!"
        (run 200 ValueEmbed_compiles records/2024-12-04_ValueEmbed/train_gpt.py --track fineweb --batch_size 1 \
            --num_steps 4 --cooldown_steps 2 --val_every 0 --entry "$entry") > "$logs/2.out" 2>&1 &
        pids+=" $!"
        (for resume in "" "--resume=latest"; do  # the second run does its last steps again
            run 100 "laptop$resume" train_gpt.py --track laptop --num_steps 100 --save_every 40 --log_every 1 \
                --entry "${entry}_laptop" $resume
        done) > "$logs/3.out" 2>&1 &
        wait $pids $!
        cat "$logs"/test_cuda.txt "$logs"/[123].out
        ! grep -q "exit code" "$logs"/test_cuda.txt "$logs"/[123].out || failed=1
        echo "== compiled after $((SECONDS - begun)) s"
        # What one of 8 GPUs does, 16,384, 32,768 and 49,152 tokens a step: ms, MFU, peak memory, kernels
        run 120 today "-m tools.simulate.trace $logs" $today
    fi
    # Loss at equal tokens, 13.1 M: ValueEmbed's 65,536 a step, today's 32,768 to 98,304
    run 120 ab_today train_gpt.py $ab --num_steps 200 --extension_steps 5 --batch_size 2 \
        --sample_tokens 50
    run 120 ab_ValueEmbed records/2024-12-04_ValueEmbed/train_gpt.py $ab --num_steps 200 --cooldown_steps 80 \
        --batch_size 1 ;;
turns)
    scripts="records/2026-11-28_SampledSoftmax/train_gpt.py train_gpt.py" pids=
    for script in $scripts; do
        [[ -z "${SIMULATE:-}" ]] || continue
        (run 400 "compiles_${script//\//_}" $script $today --num_steps 8 --extension_steps 1) &
        pids+=" $!"
    done
    [[ -z "$pids" ]] || wait $pids
    for turn in 1 2 3; do
        for script in $scripts; do
            run 100 "${script//\//_}_$turn" $script $today
        done
    done ;;
entries)
    for script in 2024-12-04_ValueEmbed 2024-11-03_UntieEmbed 2024-10-14_ModernArch 2024-06-06_AdamW; do
        batch=1
        [[ $script == 2024-12* ]] || batch=64  # sequences of 1,024 tokens: 65,536 tokens a step too
        run 145 "$script" "records/$script/train_gpt.py" --track fineweb --batch_size $batch --num_steps 60 \
            --warmup_steps 5 --cooldown_steps 15 --val_every 0 --log_every 5
    done ;;
*) echo "error: '$what' is unknown; expected turns, entries, or nothing"; exit 2 ;;
esac
[[ -z "$failed" ]] || { echo "FAILED: something above"; exit 1; }
