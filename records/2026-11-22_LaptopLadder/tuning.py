"""4 runs an entry: all learning rates times 1 and 2, then 4 and 8 or 1/2 and 1/4."""
import re, subprocess, sys, os, json
from concurrent.futures import ThreadPoolExecutor
R="/work/main"
RATES={"2024-06-06_AdamW":dict(lr=.0018),"2024-10-14_ModernArch":dict(adam_lr=.0036,muon_lr=.00036),
"2024-11-03_UntieEmbed":dict(embed_lr=.3,head_lr=.002,muon_lr=.02),
"2024-12-04_ValueEmbed":dict(embed_lr=.6,head_lr=.008,scalar_lr=.04,muon_lr=.05)}
STEPS=600
FR={"2024-06-06_AdamW":(2048/9536,256/9536),"2024-10-14_ModernArch":(1450/5100,0),"2024-11-03_UntieEmbed":(1308/4578,0),"2024-12-04_ValueEmbed":(600/1530,0)}
def run(entry,m):
    c,w=FR[entry]
    args=[f"--{k}={v*m:g}" for k,v in RATES[entry].items()]+[f"--num_steps={STEPS}",f"--cooldown_steps={round(c*STEPS)}",f"--warmup_steps={round(w*STEPS)}",
      "--val_every=0","--log_every=100","--compile=on","--track=laptop","--entry=2026-11-22_LaptopLadder/tuning"]
    if "Value" in entry: args.append("--momentum_warmup_steps=118")
    out=subprocess.run([f"{R}/.venv/bin/python",f"records/{entry}/train_gpt.py",*args],cwd=R,capture_output=True,text=True,env={**os.environ,"OMP_NUM_THREADS":"1"})
    f=re.findall(r"val_loss:(\S+) train_time:(\d+)",out.stdout)
    r=dict(entry=entry,mult=m,loss=float(f[-1][0]) if f else None,ms=int(f[-1][1]) if f else None,err=out.stderr[-300:])
    print(json.dumps(r),flush=True); return r["loss"] if f else 99
with ThreadPoolExecutor(2) as pool:
    for e in RATES:
        a,b=pool.map(lambda m:run(e,m),(1,2))
        list(pool.map(lambda m:run(e,m),(4,8) if b<a else (.5,.25)))
