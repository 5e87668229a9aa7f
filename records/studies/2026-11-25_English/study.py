"""GPT-2 tokens of English, a small model, a CPU: which script needs how many tokens to one loss?

    python records/studies/2026-11-25_English/study.py make             # the copies, into SANDBOX
    python records/studies/2026-11-25_English/study.py search NAME...   # rates: search.tsv, search/
    python records/studies/2026-11-25_English/study.py final NAME...    # seeds 0, 1, 2: final/
    python records/studies/2026-11-25_English/study.py table            # tokens to the common loss

NAME is a row of SCRIPTS; without one, all. A copy of each script gets the track "english": rows
inserted into its TRACKS, its PRESETS and whatever tables its row names; nothing else is changed.
The search is 2026-11-24_LaptopLadder/tune.py's, of fewer and shorter runs. What was run is kept.
"""
import itertools
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent
REPO = Path(os.environ.get("REPO", HERE.parents[2]))
SANDBOX = Path(os.environ.get("SANDBOX", REPO / "records" / "scratch" / "english"))
RECORDS, CORPUS = REPO / "records", REPO.parent / "shared" / "corpus"
sys.path[:0] = map(str, (SANDBOX, RECORDS, RECORDS / "studies" / "2026-11-24_LaptopLadder"))
SEEDS, NUM_TRIALS = (0, 1, 2), 6
# The track has no target: the loss to reach is the mean final one of the baseline.
TRACK = ('Track("data/english/openweb_train_*.bin", "data/english/openweb_val_*.bin",\n'
         '                     65_536, 50_257, 50_256, False, 0.0, "study.py make")')
SIZES = dict(batch_size=2, sequence_length=1024, micro_batch=2, num_layers=4, num_heads=2,
             model_dim=128, window_start=64, window_end=256, log_every=20)
# preset: sizes. tables: rows of more tables, as Python text. rates: the two groups that the search
# scales, as published. corners: of the schedule, shares of the run, as published. steps: of a trial
# and of a final run, with validations every so many (0: only at the end).
ENTRY = dict(preset=SIZES, tables={}, steps={"search": (120, 0), "final": (288, 32)},
             rates=({"embed_lr": 0.6, "head_lr": 0.008, "scalar_lr": 0.04}, {"muon_lr": 0.05}),
             corners=dict(cooldown_steps=600 / 1530, momentum_warmup_steps=300 / 1530))
BASELINE, NGRAM = "2024-12-04_ValueEmbed", "2026-11-22_NGramEmbed"
SCRIPTS = {
    BASELINE: dict(ENTRY, script=f"records/{BASELINE}/train_gpt.py"),
    NGRAM: dict(ENTRY, script=f"records/{NGRAM}/train_gpt.py", preset=SIZES | dict(sample_tokens=0),
                rates=(ENTRY["rates"][0] | dict(ngram_lr=0.6), {"muon_lr": 0.05})),
    # 2026-11-25_Stages, at about the same mean tokens a step.
    "new": dict(
        script="records/2026-11-25_Stages/train_gpt.py", steps={"search": (120, 0), "final": (288, 16)},
        preset=dict(batch_size=1, sequence_length=1024, micro_batch=3, val_length=2048, num_heads=2,
                    model_dim=128, final_window=384, adam_every=1, log_every=20, sample_tokens=0),
        rates=({"head_lr": 0.008, "value_lr": 0.6, "ngram_lr": 0.6, "scalar_lr": 0.04},
               {"muon_lr": 0.023}),
        corners=dict(extension_steps=40 / 1530, momentum_warmup_steps=300 / 1530,
                     momentum_cooldown_steps=50 / 1530),
        tables=dict(LAYERS="""(
        #     attention  value  skip  attends  backout
        Layer("paired",  0,     None, None,    False),
        Layer("short",   1,     None, None,    False),
        Layer("long",    None,  None, None,    True),
        Layer("long",    2,     0,    2,       False))""", STAGES="""(
        #     until     batch  window  document  lr    targets: beginning, end          tied
        Stage(1 / 3,    1,     128,    512,      1.0,  (1, 0.5, 0.25), (1, 0.5, 0),     True),
        Stage(2 / 3,    2,     192,    1024,     1.52, (1, 0.5),       (1, 0),          True),
        Stage(1.0,      3,     256,    1024,     1.73, (1,),           (1,),            False),
        Stage(math.inf, 3,     256,    1024,     1.73, (1,),           (1,),            False))"""),
    ),
}

def make() -> None:
    """The sandbox: data, and a copy of each script with its track; its records/ is this folder."""
    (data := SANDBOX / "data" / "english").mkdir(parents=True, exist_ok=True)
    (SANDBOX / "run.sh").touch()
    links = {data / path.name: path for path in CORPUS.glob("*.bin")} | {SANDBOX / "records": HERE}
    for link, there in links.items():
        link.is_symlink() or link.symlink_to(there)
    for name, row in SCRIPTS.items():
        text = (REPO / row["script"]).read_text()
        preset = ", ".join(f"{key}={value!r}" for key, value in row["preset"].items())
        tables = row["tables"] | dict(TRACKS=TRACK, PRESETS=f"dict({preset})")
        for table, inserted in tables.items():
            before, line, after = text.partition(f"\n{table} = {{\n")
            assert line, f"{row['script']} has no line '{table} = {{'"
            text = f'{before}{line}    "english": {inserted},\n{after}'
        (SANDBOX / f"{name}.py").write_text(text)

def run(name: str, factors: tuple[float, ...], kind: str, seed: int) -> float:
    """A run of kind "search" or "final": its final validation loss; its log goes to kind/name/."""
    row, (steps, every) = SCRIPTS[name], SCRIPTS[name]["steps"][kind]
    flags = {key: f"{rate * factor:.6g}" for group, factor in zip(row["rates"], factors)
             for key, rate in group.items()}
    flags |= {key: round(share * steps) for key, share in row["corners"].items()}
    flags |= dict(track="english", seed=seed, num_steps=steps, val_every=every, dtype="bfloat16",
                  compile="on", entry=f"{kind}/{name}")
    command = [sys.executable, f"{name}.py", *(f"--{key}={value}" for key, value in flags.items())]
    # One core. glibc keeps freed memory, for to map the logits anew costs a third of a step.
    kept = ":".join(f"glibc.malloc.{key}" for key in (
        "mmap_threshold=8589934592", "trim_threshold=17179869184", "hugetlb=1"))
    env = dict(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1", GLIBC_TUNABLES=kept)
    done = subprocess.run(command, cwd=SANDBOX, stdout=subprocess.PIPE, text=True, check=True,
                          env=os.environ | env)
    loss = re.findall(r"val_loss:(\S+)", done.stdout)[-1]
    print(name, kind, "seed", seed, "factors", *factors, "loss", loss, flush=True)
    return float(loss)

def trials(name: str) -> dict[tuple[float, ...], float]:
    """Loss by factors, of search.tsv."""
    path = HERE / "search.tsv"
    rows = map(str.split, path.read_text().splitlines() if path.exists() else ())
    return {(float(a), float(b)): float(loss) for who, a, b, loss in rows if who == name}

def trial(name: str, factors: tuple[float, ...]) -> float:
    """What tune.py's search asks: the loss with these factors."""
    factors = tuple(float(f"{factor:.4g}") for factor in factors)
    if factors not in trials(name):
        loss = run(name, factors, "search", 0)
        with open(HERE / "search.tsv", "a") as file:
            print(name, *factors, loss, sep="\t", file=file)
    return trials(name)[factors]

def curves(name: str) -> dict[int, list[tuple[int, float]]]:
    """By seed, (tokens, validation loss) of the final runs that are whole."""
    found = {}
    for log in (HERE / "final" / name).glob("*.txt"):
        for done in filter(lambda done: done.complete, import_module("compare").read_log(str(log))):
            script = import_module(name)  # how many tokens came before a step
            tokens = getattr(script, "tokens_before", lambda step, hp: step * hp.step_tokens)
            hp = script.Hyperparameters(**done.hyperparameters)
            found[hp.seed] = [(tokens(step, hp), loss) for step, loss, _ in done.curve]
    return dict(sorted(found.items()))

def table() -> None:
    """Tokens until the baseline's mean final loss, linear between validations (inf: it is not met);
    their ratio to the baseline's whole run."""
    runs = {name: found for name in SCRIPTS if (found := curves(name))}
    target, whole = mean(c[-1][1] for c in runs[BASELINE].values()), runs[BASELINE][0][-1][0]
    print(f"target {target:.4f}, mean final loss of {BASELINE} after {whole:,} tokens\n")
    print("| script | tokens of a run | final losses | mean ± sd | tokens to the target |"
          " mean ± sd | ratio |")
    print("|---" * 7 + "|")
    for name, by_seed in runs.items():
        losses = [curve[-1][1] for curve in by_seed.values()]
        tokens = [next((x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
                        for (x0, y0), (x1, y1) in zip(curve, curve[1:]) if y1 <= target), math.inf)
                  for curve in by_seed.values()]
        cells = [name, f"{next(iter(by_seed.values()))[-1][0]:,}"]
        for values, form in (losses, ".4f"), (tokens, ",.0f"):
            spread = stdev(values) if 1 < len(values) and max(values) < math.inf else math.nan
            cells += [", ".join(format(x, form) for x in values),
                      f"{mean(values):{form}} ± {spread:{form}}"]
        print("|", " | ".join([*cells, f"{mean(tokens) / whole:.3f}"]), "|")

def search(names: list[str]) -> None:
    """tune.py's search, with this study's rates and runs."""
    tune = import_module("tune")
    tune.NUM_TRIALS, tune.trial = NUM_TRIALS, trial
    tune.ENTRIES = {name: (row["rates"],) for name, row in SCRIPTS.items()}
    for name in names:
        tune.search(name)

def final(names: list[str]) -> None:
    """Seed by seed, the scripts in turn, with the factors of the best trial."""
    for seed, name in itertools.product(SEEDS, names):
        if seed not in curves(name):
            run(name, min((losses := trials(name)), key=losses.get), "final", seed)

if __name__ == "__main__":
    command, names = sys.argv[1], sys.argv[2:] or list(SCRIPTS)
    dict(make=make, table=table).get(command, lambda: globals()[command](names))()
