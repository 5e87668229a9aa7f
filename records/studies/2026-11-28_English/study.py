"""2026-11-25_English once more, with the scripts of three days later: how many tokens to one loss?

    python records/studies/2026-11-28_English/study.py make             # the copies, into SANDBOX
    python records/studies/2026-11-28_English/study.py final [NAME...]  # SEEDS=0,1: final/
    python records/studies/2026-11-28_English/study.py table            # tokens to the common loss
    python records/studies/2026-11-28_English/study.py words            # different ones in a text

Sizes, steps and rates are that study's, and the new scripts have the rates that it found for Stages.
Float32 and not compiled, a core a run: the machine had no fast bfloat16.
"""
import os
import sys
from importlib import util
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
spec = util.spec_from_file_location("study", HERE.parent / "2026-11-25_English" / "study.py")
study = util.module_from_spec(spec)
spec.loader.exec_module(study)

FULL, SAMPLED = "2026-11-28_FusedLoss", "2026-11-28_SampledSoftmax"
LAYERS = """(
        #     attention  value  skip  attends  xsa    mudd   to_head
        Layer("paired",  0,     None, None,    False, False, None),
        Layer("short",   1,     None, None,    True,  False, None),
        Layer("long",    None,  None, None,    True,  False, -0.5),
        Layer("long",    2,     0,    2,       True,  True,  None))"""
STAGES = """(
        #     until     batch  window  document  lr    targets: beginning, end   tied   words
        Stage(1 / 3,    1,     128,    512,      1.0,  (1, 0.5, 0.25), (1, 0.5, 0), True,  10_240),
        Stage(2 / 3,    2,     192,    1024,     1.52, (1, 0.5),       (1, 0),      True,  14_336),
        Stage(0.95,     3,     256,    1024,     1.73, (1,),           (1,),        False, 24_576),
        Stage(1.0,      3,     256,    1024,     1.73, (1,),           (1,),        False, 0),
        Stage(math.inf, 3,     256,    1024,     1.73, (1,),           (1,),        False, 0))"""
# The best of the search there: factors of Adam's rates and of Muon's.
FACTORS = {study.BASELINE: (2.0, 0.5), FULL: (4.0, 1.0), SAMPLED: (4.0, 1.0)}

def words() -> None:
    """How many different words sequences of the two training files have, by the cut of documents."""
    import numpy as np
    for path in sorted(study.CORPUS.glob("openweb_train_*.bin")):
        tokens = np.memmap(path, "<u2", "r", 1024)
        documents = np.split(tokens, np.flatnonzero(tokens == 50_256)[1:])
        for cut, length in ((1024, 1024), (896, 16_384), (2048, 16_384), (2048, 65_536)):
            text = np.concatenate([document[:cut] for document in documents])
            counts = [len(np.unique(text[i:i + length]))
                      for i in range(0, len(text) - length, length)]
            print(f"{path.name}, documents cut at {cut}, {len(counts)} sequences of {length}: "
                  f"{min(counts)} to {max(counts)}, median {median(counts)}")

def main() -> None:
    new = study.SCRIPTS["new"] | dict(steps={"final": (288, 24)})
    new["preset"] = new["preset"] | dict(micro_batch=1)  # for memory; the same sums
    tables = {FULL: dict(LAYERS=LAYERS), SAMPLED: dict(LAYERS=LAYERS, STAGES=STAGES)}
    study.HERE = HERE
    study.SCRIPTS = {study.BASELINE: study.SCRIPTS[study.BASELINE]} | {
        name: new | dict(script=f"records/{name}/train_gpt.py", tables=new["tables"] | more)
        for name, more in tables.items()}
    study.trials = lambda name: {FACTORS[name]: 0.0}
    study.SEEDS = tuple(map(int, os.environ.get("SEEDS", "0,1").split(",")))
    # run() there says bfloat16 and compiled; the last of two flags counts.
    run = study.subprocess.run
    study.subprocess.run = lambda command, **more: run(
        [*command, "--dtype=float32", "--compile=off"], **more)
    command, names = sys.argv[1], sys.argv[2:] or list(study.SCRIPTS)
    steps = dict(make=study.make, table=study.table, words=words, final=lambda: study.final(names))
    steps[command]()

if __name__ == "__main__":
    main()
