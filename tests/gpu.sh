#!/usr/bin/env bash
# Every check and measurement that needs a GPU, in three goes of under 10 minutes; logs go to $OUT (default: gpu_logs/).
#
#   bash tests/gpu.sh CORPUS            CORPUS: a folder with GPT-2 tokens, *_train_*.bin and *_val_*.bin
#   bash tests/gpu.sh CORPUS entries    the four historical entries at full size: ms a step, memory, loss
#   bash tests/gpu.sh CORPUS ab         ValueEmbed and train_gpt.py in turn, 65,536 tokens a step: loss at equal tokens
#
# It takes the Python it finds (PYTHON=...) and installs nothing. The corpus stands in for FineWeb under its names, so
# the losses compare runs of this script with each other only.
set -euo pipefail
corpus=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath "${OUT:-gpu_logs}")
python=${PYTHON:-python3}
mkdir -p "$out"
[[ -e data/fineweb10B ]] && { echo "error: data/fineweb10B exists; move it away, this script writes there" >&2; exit 2; }
trap 'rm -rf data/fineweb10B' EXIT
"$python" - "$corpus" <<'PY'
import sys
from pathlib import Path
import numpy as np
from data.shards import write_shard
from train_gpt import ROOT, TRACKS, open_shard
folder = Path(sys.argv[1])
for number, path in enumerate(sorted(folder.glob("*_train_*.bin")), 1):
    write_shard(ROOT / f"data/fineweb10B/fineweb_train_{number:06d}.bin", open_shard(path))
val = np.concatenate([open_shard(path) for path in sorted(folder.glob("*_val_*.bin"))])
write_shard(ROOT / "data/fineweb10B/fineweb_val_000000.bin", np.resize(val, TRACKS["fineweb"].val_tokens + 1))
PY
nvidia-smi | tee "$out/nvidia-smi.txt"
if [[ "${2:-}" == entries ]]; then
    for entry in 2024-12-04_ValueEmbed 2024-11-03_UntieEmbed 2024-10-14_ModernArch 2024-06-06_AdamW; do
        timeout 140 "$python" "records/$entry/train_gpt.py" --num_steps 50 --warmup_steps 5 --cooldown_steps 15 \
            --val_every 0 --log_every 5 2>&1 | tee "$out/$entry.txt" || true
    done
    cp records/scratch/*.txt "$out"/
    exit
fi
if [[ "${2:-}" == ab ]]; then
    for script in records/2024-12-04_ValueEmbed/train_gpt.py train_gpt.py; do
        timeout 280 "$python" "$script" --track fineweb --batch_size 1 --num_steps 300 --cooldown_steps 120 \
            --val_every 150 --log_every 10 2>&1 | tee "$out/ab_$(basename "$(dirname "$script")").txt" || true
    done
    cp records/scratch/*.txt "$out"/
    exit
fi
"$python" -m pytest -q tests/test_cuda.py 2>&1 | tee "$out/test_cuda.txt" || true
# 100 micro-batches of 65,536 tokens, the published model: ms a micro-batch, MFU, peak memory
timeout 280 "$python" train_gpt.py --track fineweb --batch_size 1 --num_steps 100 --cooldown_steps 40 --val_every 0 \
    --log_every 5 --profile 2>&1 | tee "$out/fineweb_100_steps.txt" || true
timeout 120 "$python" train_gpt.py --track laptop --sample_tokens 0 2>&1 | tee "$out/laptop_on_gpu.txt" || true
cp records/scratch/*.txt "$out"/
