#!/usr/bin/env bash
# All checks and measurements that need a real GPU, in one go.
#
#   bash tests/gpu.sh CORPUS               tests, profile and losses of train_gpt.py
#   bash tests/gpu.sh CORPUS turns OTHER   step times of the script OTHER and of train_gpt.py, three
#                                          runs each, in turn; both are compiled first
#   bash tests/gpu.sh CORPUS published     the four scripts of records/published at full size
#   bash tests/gpu.sh CORPUS ideas A,B,...  what the ideas A, B, ... of records/studies/
#                                          2026-11-30_Fidelity gain on the full-size model in 13 M
#                                          tokens, one run of each and two of the script without
#   SIMULATE=1 bash tests/gpu.sh ...       the same runs on the simulated GPU: do they run at all?
#
# CORPUS is a folder with GPT-2 tokens, *_train_*.bin and *_val_*.bin, which stands in for FineWeb
# under its names. The Python source of this machine stands in for the laptop track's corpus. So the
# losses compare runs of this script with each other only. Results are in $OUT (default: gpu_logs/):
# summary.txt, and logs.tar.gz with everything else. The script uses the Python that it finds
# (PYTHON=...) and installs nothing. On one H200 with 16 cores the first command took 5.3 minutes
# without its last run, which took one minute elsewhere (records/studies/2026-11-28_H200); compiling
# alone varied from 3 to 4.3 minutes.
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 2
}

[[ -d ${1:-} ]] ||
    die "'${1:-}' is not a folder; usage: bash tests/gpu.sh CORPUS [turns OTHER|published|ideas A,B]"
corpus=$(realpath "$1")
what=${2:-checks}
if [[ $what == turns ]]; then
    [[ -f ${3:-} ]] || die "'${3:-}' is not a file; expected a script to compare with train_gpt.py"
    other=$(realpath "$3")
fi
if [[ $what == ideas ]]; then
    ideas=${3:-}
    [[ -n $ideas ]] || die "ideas needs names from the study's ideas.tsv, with commas between"
    [[ -z ${SIMULATE:-} ]] || die "ideas can't be simulated, because a simulation has no losses"
fi
mkdir -p "${OUT:-gpu_logs}"
out=$(realpath "${OUT:-gpu_logs}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
logs=$(mktemp -d)
entry=gpu_$$ # the runs write their logs into folders of records/ that begin with it
failed=

for data in data/fineweb10B data/laptop; do
    [[ ! -e $data ]] || die "$data exists; move it away, because this script writes there"
done

clean_up() {
    rm -rf data/fineweb10B data/laptop
    cp records/"$entry"*/*.txt "$logs" 2>/dev/null || true
    rm -rf records/"$entry"*
    gzip -9 "$logs"/*.trace.json 2>/dev/null || true
    find "$logs" -size +15M -print -delete # larger files do not come back from the device machine
    tar -czf "$out/logs.tar.gz" -C "$logs" .
    rm -rf "$logs"
}
trap clean_up EXIT
exec > >(tee "$out/summary.txt") 2>&1

"$python" - "$corpus" <<'PY'
import sys
import sysconfig
from pathlib import Path

import numpy as np

from data.shards import open_shard, write_shard
from train_gpt import ROOT, TRACKS

folder = Path(sys.argv[1])
fineweb = ROOT / "data/fineweb10B"
for number, path in enumerate(sorted(folder.glob("*_train_*.bin")), 1):
    write_shard(fineweb / f"fineweb_train_{number:06d}.bin", open_shard(path))
val = np.concatenate([open_shard(path) for path in sorted(folder.glob("*_val_*.bin"))])
val = np.resize(val, TRACKS["fineweb"].val_tokens + 1)  # repeated if it is too short
write_shard(fineweb / "fineweb_val_000000.bin", val)

laptop = ROOT / "data/laptop"
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
tokens = np.concatenate([np.array([256, *path.read_bytes()], "<u2") for path in files])
size = TRACKS["laptop"].val_tokens + 1
write_shard(laptop / "laptop_val_000000.bin", tokens[:size])
write_shard(laptop / "laptop_train_000001.bin", tokens[size:])
PY

run() { # seconds, name, script (or "-m MODULE ARGUMENT"), flags: one run, or its simulation
    local limit=$1 name=$2 script=$3
    shift 3
    echo "== $name: $script $*"
    if [[ -n ${SIMULATE:-} ]]; then
        "$python" -m tools.simulate "$script" --gpus 1 "$@" || failed=1
        return
    fi
    # $script is split into words on purpose.
    timeout "$limit" "$python" $script "$@" > "$logs/$name.txt" 2>&1 || {
        echo "exit code $?"
        failed=1
    }
    grep -E "compil|step_avg|tokens_per_second|^error|Error" "$logs/$name.txt" | tail -n 5 || true
}

# The batch of one of 8 GPUs: 16,384, 32,768 and 49,152 tokens a step in the three sizes of stages.
one_of_eight="--track fineweb --batch_size 1 --val_every 0 --log_every 5 --entry $entry"
hundred_steps="$one_of_eight --num_steps 100 --extension 0.1"

compile_together() { # what is not timed: it fills the compiler's caches for the runs below
    local started=$SECONDS pids
    (timeout 220 "$python" -m pytest -q --show-capture=no tests/runs/test_cuda.py ||
        echo "exit code $?") > "$logs/test_cuda.txt" 2>&1 &
    pids=$! # a bare wait would also wait for the tee above
    run 270 today_compiles train_gpt.py $one_of_eight --num_steps 8 --extension 0.125 \
        > "$logs/1.out" 2>&1 &
    pids+=" $!"
    run 200 ValueEmbed_compiles records/published/2024-12-04_ValueEmbed/train_gpt.py \
        --track fineweb --batch_size 1 --num_steps 4 --cooldown_steps 2 --val_every 0 \
        --entry "$entry" > "$logs/2.out" 2>&1 &
    pids+=" $!"
    (for resume in "" "--resume=latest"; do # the second run repeats the last steps of the first
        run 100 "laptop$resume" train_gpt.py --track laptop --num_steps 100 --save_every 40 \
            --log_every 1 --entry "${entry}_laptop" $resume
    done) > "$logs/3.out" 2>&1 &
    wait $pids $!
    cat "$logs"/test_cuda.txt "$logs"/[123].out
    ! grep -q "exit code" "$logs"/test_cuda.txt "$logs"/[123].out || failed=1
    echo "== compiled after $((SECONDS - started)) s"
}

[[ -n ${SIMULATE:-} ]] || nvidia-smi
case $what in
checks)
    if [[ -n ${SIMULATE:-} ]]; then
        "$python" -m tools.simulate --tests || failed=1
        run 0 today train_gpt.py $hundred_steps
    else
        compile_together
        # Times, peak memory and kernels of each stage
        run 120 today "-m tools.simulate.trace $logs" $hundred_steps
    fi
    # Losses at equal tokens, 13.1 M: ValueEmbed has 65,536 tokens a step, today's 32,768 to 98,304.
    compared="--track fineweb --val_every 100 --log_every 10 --entry $entry"
    run 120 losses_today train_gpt.py $compared --num_steps 200 --extension 0.025 --batch_size 2
    run 120 losses_ValueEmbed records/published/2024-12-04_ValueEmbed/train_gpt.py $compared \
        --num_steps 200 --cooldown_steps 80 --batch_size 1
    ;;
turns)
    # Only flags that older scripts have, too
    pids=
    if [[ -z ${SIMULATE:-} ]]; then
        for script in "$other" train_gpt.py; do
            # 20 steps reach each stage.
            run 400 "compiles_${script//\//_}" "$script" $one_of_eight --num_steps 20 &
            pids+=" $!"
        done
        wait $pids
    fi
    for turn in 1 2 3; do
        for script in "$other" train_gpt.py; do
            run 100 "${script//\//_}_$turn" "$script" $one_of_eight --num_steps 100
        done
    done
    ;;
published)
    for path in records/published/*/; do
        name=$(basename "$path")
        batch=64 # sequences of 1,024 tokens: 65,536 tokens a step
        [[ $name != *ValueEmbed ]] || batch=1 # a sequence of 65,536 tokens
        run 145 "$name" "${path}train_gpt.py" --track fineweb --batch_size $batch \
            --num_steps 60 --warmup_steps 5 --cooldown_steps 15 --val_every 0 --log_every 5
    done
    ;;
ideas)
    # Never run on a GPU. What is not finished after IDEAS_SECONDS is left out.
    timeout "${IDEAS_SECONDS:-500}" "$python" records/studies/2026-11-30_Fidelity/study.py run \
        --tracks fineweb --seeds 1 --only "$ideas" --out "$logs" || failed=1
    grep -H "val_loss" "$logs"/fineweb/*/seed*.txt || failed=1
    ;;
*) die "'$what' is unknown; expected turns, published, ideas, or nothing" ;;
esac
if [[ -n $failed ]]; then
    echo "FAILED: something above"
    exit 1
fi
