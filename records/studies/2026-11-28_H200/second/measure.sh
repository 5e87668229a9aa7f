set -u
export TIKTOKEN_CACHE_DIR=$PWD/.corpus/tiktoken_cache PYTHONUNBUFFERED=1
python3 - <<'PY'
import numpy as np
from pathlib import Path
from data.shards import write_shard
from train_gpt import ROOT, TRACKS, open_shard
f=Path(".corpus")
for n,p in enumerate(sorted(f.glob("*_train_*.bin")),1): write_shard(ROOT/f"data/fineweb10B/fineweb_train_{n:06d}.bin", open_shard(p))
v=open_shard(next(f.glob("*_val_*.bin")))
write_shard(ROOT/"data/fineweb10B/fineweb_val_000000.bin", np.resize(v, TRACKS["fineweb"].val_tokens+1))
PY
L=/tmp/logs; mkdir -p $L
OLD=records/2026-11-25_Stages/train_gpt.py
base="--track fineweb --batch_size 1 --num_steps 100 --extension_steps 10 --val_every 0 --log_every 5 --sample_tokens 0 --entry gpu2"
nvidia-smi -L; b=$SECONDS
(timeout 220 python3 -m pytest -q --show-capture=no tests/test_cuda.py 2>&1 | tail -40) > $L/test_cuda.txt 2>&1 & p=$!
(timeout 250 python3 train_gpt.py $base --num_steps 8 --extension_steps 1) > $L/compile_new.txt 2>&1 & p+=" $!"
(timeout 250 python3 records/2024-12-04_ValueEmbed/train_gpt.py --track fineweb --batch_size 1 --num_steps 4 --cooldown_steps 2 --val_every 0 --entry gpu2) > $L/compile_VE.txt 2>&1 & p+=" $!"
wait $p
echo "compiled after $((SECONDS-b))"; tail -3 $L/test_cuda.txt; grep -h compiled $L/compile*.txt
mkdir -p $L/tr; timeout 100 python3 -m tests.simulate.trace $L/tr $base > $L/trace_new.txt 2>&1; tail -2 $L/trace_new.txt; echo "t $((SECONDS-b))"
timeout 100 python3 records/2024-12-04_ValueEmbed/train_gpt.py --track fineweb --val_every 100 --log_every 10 --num_steps 200 --cooldown_steps 80 --batch_size 1 --entry gpu2 > $L/ab_ValueEmbed.txt 2>&1; tail -2 $L/ab_ValueEmbed.txt; echo "t $((SECONDS-b))"
timeout 40 python3 .corpus/fp8.py 2>&1 | tee $L/fp8.txt
for i in 1 2; do
 for w in old new; do s=train_gpt.py; [ $w = old ] && s=$OLD
  [ $((SECONDS-b)) -gt 420 ] && continue
  timeout 80 python3 $s $base > $L/${w}_$i.txt 2>&1; echo $w; tail -2 $L/${w}_$i.txt; echo "t $((SECONDS-b))"
 done; done
cp records/gpu2/*.txt $L; gzip -9 $L/tr/*.json; tar czf $OUT/logs.tar.gz -C $L .
