"""Logs made for the tests of tools/compare, after the description of the public formats."""
import json

from tools import compare

SEPARATOR = "=" * 100
CODE = f'''"""A script that contains what a reader could take for metrics or separators.
step:7/7 val_loss:9.9999 train_time:1ms step_avg:1.00ms
"""
import torch
{"#" * 40}
{"-" * 79}
print('=' * 100)
    {SEPARATOR}
{"=" * 99}
'''
TORCH = "2.6.0.dev20241203+cu124"
H100 = "NVIDIA H100 80GB HBM3"
# Losses and training times (ms) of five runs of a baseline and of a faster candidate.
LOSSES = [3.2771, 3.2781, 3.2775, 3.2779, 3.2768]
OLD_TIMES = [2000, 2004, 2008, 1996, 2001]
NEW_TIMES = [1900, 1905, 1898, 1903, 1901]


def smi(number=1, gpu=H100, torch=TORCH):
    """The environment section with nvidia-smi's table, one row for each GPU."""
    rows = "".join(f"|   {i}  {gpu}          On  |   00000000:19:00.0 Off |                 0 |\n"
                   f"| N/A   30C    P0         117W /  700W |       7MiB /  81559MiB |      0% |\n"
                   for i in range(number))
    return (f"Running Python 3.12.7 (main, Oct 16 2024, 04:37:19) [Clang 18.1.8 ]\n"
            f"Running PyTorch {torch} compiled for CUDA 12.4\n+{'-' * 89}+\n{rows}")


def running(number=1, gpu=H100, torch="2.7.1+cu128"):
    """The environment section as one line."""
    return f"Running PyTorch {torch} on {gpu} with world_size {number}\n"


def facts(**values):
    """The environment section of this project: a line and a JSON object."""
    return f"{running()}{json.dumps(values, indent=1)}\n"


def metrics(final=3.2775, steps=20, time_ms=2000.0, restart=False, seconds=False, digits=4,
            died_at=None, extra="", tokens=None):
    """Metric lines as the public scripts print them: validations every 5 steps, 0.1 per step above
    the final loss.

    restart: the first 10 steps are not timed. died_at: the step after which the log ends, without
    its validation. tokens: tokens of a step, counted in each line.
    """
    lines = []
    for step in range(steps + 1):
        timed_steps = step - 10 if restart and step >= 10 else step
        ms = time_ms / (steps - 10 if restart else steps) * timed_steps
        counted = step - 10 if restart else step
        average = f"{ms / counted:.2f}" if counted > 0 else "nan"
        time = f"{ms / 1000:.3f}s" if seconds else f"{ms:.0f}ms"
        end = f" train_time:{time} step_avg:{average}ms{extra}"
        end += "" if tokens is None else f" tokens:{step * tokens}"
        if died_at is not None and step >= died_at:
            break
        if step % 5 == 0:
            loss = final + (steps - step) * 0.1
            lines.append(f"step:{step}/{steps} val_loss:{loss:.{digits}f}{end}")
        if step < steps:
            lines.append(f"step:{step + 1}/{steps}{end}")
    return "\n".join(lines) + "\n"


def log(code=CODE, environment=None, body=None, between=()):
    """A whole log in the main layout."""
    sections = (code, smi() if environment is None else environment, *between)
    return "".join(f"{section}{SEPARATOR}\n" for section in sections) + (body or metrics())


def write(folder, texts, name="{}.txt"):
    """Writes logs into a folder; returns the folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name.replace("{}", str(i))).write_bytes(data)
    return str(folder)


def write_runs(folder, losses, times, name="{}.txt", **more):
    """Writes the logs of several runs of one script, whose code names the folder."""
    more = {"code": f"{CODE}# {folder.name}\n", **more}
    return write(folder, [log(**more, body=metrics(loss, time_ms=ms))
                          for loss, ms in zip(losses, times, strict=True)], name)


def write_seeds(folder, losses, seeds, **more):
    """Writes the logs of runs that name their seeds; returns the folder's path."""
    for seed, loss in zip(seeds, losses, strict=True):
        environment = facts(hyperparameters={"seed": seed, "num_steps": 20}, **more)
        write(folder, [log(environment=environment, body=metrics(loss))], name=f"{seed}.txt")
    return str(folder)


def write_entries(root):
    """Two entries. The second has an ablation of two groups, and a baseline by the first's script.
    A study lies beside them. Returns the root's path."""
    old = "records/2030-01-01_Old/train_gpt.py"
    new = "records/2030-02-02_New/train_gpt.py"

    def logs(folder, losses, script, **settings):
        for seed, loss in enumerate(losses):
            hyperparameters = {"track": "laptop", "seed": seed, **settings}
            environment = facts(hyperparameters=hyperparameters, target=3.28, script=script)
            text = log(code=f"# {script}\n", environment=environment, body=metrics(loss))
            write(root / folder, [text], name=f"{seed}.txt")

    logs("2030-02-02_New", LOSSES, new, ngrams=6, muon_lr=0.1)
    logs("2030-02-02_New/ablation", [3.4], new, ngrams=1, muon_lr=0.1)
    logs("2030-02-02_New/ablation/more", [3.5], new, ngrams=1, muon_lr=0.2)
    logs("2030-02-02_New/baseline", [loss + 0.001 for loss in LOSSES], old)
    logs("studies/2030-03-03_Study", [3.2] * 6, "other.py")
    return str(root)


def llm_c(steps, last=()):
    """Lines as llm.c prints them: a validation every 250 steps."""
    lines = [f"s:{s} {'trl' if s % 250 else 'tel'}:{4 - s / 5000:.4f}" for s in range(steps)]
    return "\n".join([*lines, *last, ""])


# Name -> (log, world_size, torch) for each public layout.
LAYOUTS = {
    "main": (log(), 1, TORCH),
    "running line": (log(environment=running(8)), 8, "2.7.1+cu128"),
    "old running line": (log(environment="Running PyTorch 2.5.1\n"), None, "2.5.1"),
    "data loader lines": (log(between=("Training DataLoader: tokens: 100\n",)), 1, TORCH),
    "leading separator": (f"{SEPARATOR}\n{log()}", 1, TORCH),
    "leading separator, data loader": (
        f"{SEPARATOR}\n" + log(between=("Training DataLoader: x\n",)), 1, TORCH),
    "code and metrics": (f"{CODE}{SEPARATOR}\n{metrics()}", None, None),
    "metrics alone": (metrics(), None, None),
    "lines after": (f"{log()}peak memory allocated: 38 MiB reserved: 40 MiB\n", 1, TORCH),
    "separator and lines after": (f"{log()}{SEPARATOR}\nthe end\n", 1, TORCH),
    "separator in the code": (
        log(code=f"{CODE}{SEPARATOR}\nx = 1\nstep:9/9 val_loss:1.0\n"), 1, TORCH),
    "windows line ends": (log().replace("\n", "\r\n"), 1, TORCH),
}
# Metric lines in all public forms; each ends at 3.2775 after 2,000 ms.
FORMS = {
    "six digits": metrics(digits=6),
    "seconds": metrics(seconds=True),
    "restarts": metrics(restart=True),
    "extra after": metrics(extra=" ema_beta:0 ref_step:2375"),
    "extra before": metrics().replace(" val_loss", " lr:0.1 val_avg_loss:9 val_loss"),
    "tokens": metrics(tokens=100),
    "target reached": metrics() + "target 3.28: reached at step 20 after 2.0 s\n",
    "probe": metrics() + "tailavg step:2720 tau:25 lambda:0.25 val_loss:2.0\n",
}


def main(*words):
    """Runs a command of tools.compare in this process; returns its exit code."""
    return compare.main([str(word) for word in words])
