#!/usr/bin/env python3
"""Train a GPT-2 to a validation loss of 3.28 on FineWeb in the least time, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py --track fineweb    # 8 GPUs
    python train_gpt.py --track fineweb     # one GPU: the same batches, in parts
    python train_gpt.py --track laptop      # a CPU: bytes of Python, in a minute
    python train_gpt.py --help              # every setting, with its unit

`./run.sh` does the same and first sets up Python and data. A track fixes data, vocabulary, target;
all else is yours. A run's log, records/scratch/<run_id>.txt: this source, environment, losses.
The recipe is that of the public race of May 2026 in plain PyTorch, with a sampled softmax. An idea
names its source: a record, by its date, or an arXiv id. More: records/2026-11-28_UnmovedBytes.

Shapes in comments: S sequences of T tokens, N = S T tokens at once, D model width, H heads of width
d, V vocabulary, K targets of a token, W ranks.
"""
import argparse
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import timeit
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # until the first step Ctrl-C ends this at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from torch.profiler import record_function
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}; source .venv/bin/activate (./run.sh sets it up)", file=sys.stderr)
    sys.exit(2)

# The repository: data/ and records/ lie there, also for a copy of this script in records/<entry>/.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "run.sh").exists()), Path.cwd())

class UserError(Exception):
    """A mistake the user can mend: one line on stderr and exit code 2, no traceback."""

# --- Tracks and settings --------------------------------------------------------------------------

@dataclass(frozen=True)
class Track:
    """What an entry may not change. Paths are relative to the repository."""
    train_files: str
    val_files: str
    val_tokens: int   # the first so many targets of the validation files, read at every validation
    vocab_size: int   # token ids lie below it
    eot_token: int    # stands before each document
    shuffled: bool    # sequences in one fixed random order: neighbours in these files are alike
    target: float     # validation loss to reach, nats a token
    get_data: str     # the command that fetches or builds the data

TRACKS = {
    "fineweb": Track("data/fineweb10B/fineweb_train_*.bin", "data/fineweb10B/fineweb_val_*.bin",
                     10_485_760, 50_257, 50_256, False, 3.28, "python -m data.fineweb --shards 9"),
    "laptop": Track("data/laptop/laptop_train_*.bin", "data/laptop/laptop_val_*.bin",
                    262_144, 257, 256, True, 1.10, "python -m data.laptop")}

class Layer(NamedTuple):
    """What one layer has. Layers are counted from 0."""
    attention: str | None     # "short" or "long" window, "paired" heads, None: an MLP alone
    value_table: int | None   # table of the value embeddings that its attention adds
    skip_from: int | None     # earlier layer whose output is added to its input
    attends_to: int | None    # earlier layer whose output its attention reads; None: what comes in
    xsa: bool                 # does attention's output lose what points along the own value?
    mudd: bool                # has each token its own weights of what the layer adds up?
    to_head: float | None     # weight at first with which its output goes to the head, too

LAYERS = {
    "fineweb": (  # paired: record 2026-01-07; value tables: 2026-02-03; no attention: 2025-09-21;
        # skip: 2025-11-18; attends: 2026-03-06; XSA: 2026-04-29; MUDD, to_head: 2026-04-22
        #     attention  value  skip  attends  xsa    mudd   to_head
        Layer("paired",  None,  None, None,    False, False, None),
        Layer("short",   0,     None, None,    True,  False, None),
        Layer("paired",  1,     None, None,    False, False, None),
        Layer("long",    None,  None, None,    True,  False, 0.0),
        Layer("short",   None,  None, None,    True,  False, None),
        Layer("paired",  None,  None, None,    False, False, None),
        Layer(None,      None,  3,    None,    False, False, None),
        Layer("short",   None,  None, None,    True,  False, -0.5),
        Layer("short",   2,     None, 7,       True,  False, None),
        Layer("paired",  3,     None, 7,       False, False, 0.0),
        Layer("long",    4,     None, 7,       True,  True,  None)),
    "laptop": (Layer("long", 0, None, None, False, False, None),
               Layer("paired", 0, None, None, False, False, None))}

class Stage(NamedTuple):
    """What holds for a part of the run."""
    until: float     # its end, as a share of the scheduled steps; inf: the extension after them
    batch: int       # a step has so many times batch_size sequences
    window: int      # tokens a query sees in a long layer; elsewhere short_window of it
    document: int    # tokens of a document that are read, its rest is dropped; 0: the text as it is
    lr: float        # factor of all learning rates until they fall to lr_floor
    targets: tuple[float, ...]      # weights of the losses of the 1st, 2nd, ... next token, at the
    targets_end: tuple[float, ...]  # beginning and at the end of the stage
    tied: bool       # are embedding and head one matrix?
    words: int       # so many compete in the training's softmax (2026-08-31, PR 360); 0: all

STAGES = {
    "fineweb": (  # windows: record 2025-09-03; batches, rates: 2025-11-29, 2025-12-22; documents:
        # 2026-02-10; targets, untying: 2025-12-22; extension: 2025-09-21, final_window: 2025-09-15
        #     until     batch  window  document  lr    targets: beginning, end   tied   words
        Stage(1 / 3,    1,     384,    896,      1.0,  (1, 0.5, 0.25), (1, 0.5, 0), True,  10_240),
        Stage(2 / 3,    2,     896,    2048,     1.52, (1, 0.5),       (1, 0),      True,  14_336),
        Stage(0.95,     3,     1408,   2048,     1.73, (1,),           (1,),        False, 24_576),
        Stage(1.0,      3,     1408,   2048,     1.73, (1,),           (1,),        False, 0),
        Stage(math.inf, 3,     1664,   2048,     1.73, (1,),           (1,),        False, 0)),
    "laptop": (Stage(1.0, 1, 256, 0, 1.0, (1,), (1,), False, 0),)}

def knob(default, help: str, choices: tuple | None = None, least: float = 0, most: float = 10**12):
    """A field of Hyperparameters: default, help text with the unit, permitted values."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, least=least, most=most))

@dataclass(frozen=True)
class Hyperparameters:
    """One run. Each field is a flag; defaults are fineweb's, PRESETS has the other tracks'."""
    track: str = knob("fineweb", "which data, target, LAYERS and STAGES", tuple(TRACKS))
    seed: int = knob(0, "of weights and sample; the data's order never changes", most=2**63 - 1)
    # work
    num_steps: int = knob(1405, "optimizer steps", least=1, most=10**6)
    extension_steps: int = knob(40, "so many of them come after the schedule (*)")
    batch_size: int = knob(8, "sequences a step, over all ranks; a stage multiplies it", least=1)
    sequence_length: int = knob(16_384, "tokens a sequence", least=128)
    micro_batch: int = knob(3, "sequences a rank computes at once; more are done in turn", least=1)
    val_length: int = knob(262_144, "tokens of a sequence of the validation", least=128)
    # model
    num_heads: int = knob(6, "attention heads", least=1)
    model_dim: int = knob(768, "width of the residual stream", least=12, most=2**16)
    ngrams: int = knob(2, "longest n: attention layers add 2- to n-gram embeddings", None, 2, 6)
    ngram_rows: int = knob(251_520, "rows of each n's table of n-grams", least=2, most=2**31)
    attention_scale: float = knob(0.1, "factor of the attention's scores at the first window")
    final_window: int = knob(2560, "tokens a query sees in a long layer in the last validation")
    logit_cap: float = knob(23.0, "logits z become cap sigmoid((z + shift)/scale)", None, 1e-3, 80)
    logit_shift: float = knob(5.0, "shift of the logits", least=-10**6)
    logit_scale: float = knob(7.5, "scale of the logits", least=1e-3)
    # optimizers
    head_lr: float = knob(0.008, "Adam learning rate of head and embedding")
    value_lr: float = knob(0.6, "Adam learning rate of the value embeddings")
    ngram_lr: float = knob(0.6, "Adam learning rate of the n-gram embeddings")
    ngram_rule: str = knob("adam", "lazy_adam: rows that did not occur rest", ("adam", "lazy_adam"))
    scalar_lr: float = knob(0.04, "Adam learning rate of scalars; gates: optimizer_groups")
    adam_every: int = knob(2, "Adam steps once in so many steps, Muon in each", least=1, most=100)
    adam_decay: float = knob(0.005, "weight decay of Adam's matrices, see optimizer_groups")
    muon_lr: float = knob(0.023, "Muon learning rate of the matrices of the blocks")
    muon_decay: float = knob(1.2, "weight decay of Muon's matrices, times both rates")
    muon_beta2: float = knob(0.9, "decay of NorMuon's second moment, a step", most=0.999999)
    momentum_start: float = knob(0.85, "Muon's momentum at step 0 and at the end", most=0.999999)
    momentum_end: float = knob(0.95, "Muon's momentum between", most=0.999999)
    momentum_warmup_steps: int = knob(300, "steps over which Muon's momentum rises (*)")
    momentum_cooldown_steps: int = knob(50, "steps over which it falls again at the end (*)")
    cooldown: float = knob(0.6, "share of the schedule in which rates fall", least=1e-6, most=1)
    lr_floor: float = knob(0.15, "factor of the rates at the end of the schedule")
    # run
    val_every: int = knob(125, "steps from validation to validation; 0: one, at the end")
    log_every: int = knob(10, "steps between lines with the training loss; 0: none")
    save_every: int = knob(0, "steps between checkpoints; 0: only when a signal ends the run")
    keep: int = knob(2, "checkpoints of a run that stay, the last ones", least=1)
    resume: str = knob("", "checkpoint to go on from, its settings too; latest: the newest, if any")
    resume_anyway: bool = knob(False, "continue though script, data or settings have changed")
    entry: str = knob("", "write the log into records/<entry>/ instead of records/scratch/")
    device: str = knob("auto", "auto: CUDA if there is a GPU", ("auto", "cuda", "cpu"))
    dtype: str = knob("auto", "of activations; auto: what is fast", ("auto", "bfloat16", "float32"))
    compile: str = knob("auto", "torch.compile; auto: where it pays", ("auto", "on", "off"))
    profile: bool = knob(False, "trace three steps, name the dearest operations; compiles by part")
    sample_tokens: int = knob(300, "tokens the model writes at the end of the run; 0: none")
    prompt: str = knob("", "do not train, write after this by --resume's checkpoint or the latest")

    layers = property(lambda self: of_track(LAYERS, self.track))
    stages = property(lambda self: of_track(STAGES, self.track))
    folder = property(lambda self: ROOT / "records" / (self.entry or "scratch"))

PRESETS = {
    "fineweb": {},
    "laptop": dict(
        num_steps=170, extension_steps=0, batch_size=8, sequence_length=256, micro_batch=8,
        val_length=2048, num_heads=2, model_dim=128, ngrams=6, ngram_rows=65_521,
        attention_scale=0.125, final_window=256, logit_cap=30.0, logit_shift=0.0, head_lr=0.012,
        value_lr=2.4, ngram_lr=1.5, ngram_rule="lazy_adam", adam_every=1, adam_decay=0.0,
        muon_lr=0.045, muon_decay=0.0, muon_beta2=0.95, momentum_warmup_steps=50,
        momentum_cooldown_steps=0, cooldown=0.5, lr_floor=0.0, val_every=85, log_every=34)}

# --- Schedules: pure functions of the step, so that a resumed run can't differ --------------------

def stage_ends(hp: Hyperparameters) -> list[int]:
    """The step at which each stage ends; the last one's is num_steps."""
    scheduled = hp.num_steps - hp.extension_steps
    return [*(round(stage.until * scheduled) for stage in hp.stages[:-1]), hp.num_steps]

def stage_index(step: int, hp: Hyperparameters) -> int:
    """The row of hp.stages that holds at step; at num_steps the last one."""
    return min(bisect_right(stage_ends(hp), step), len(hp.stages) - 1)

def sequences_before(step: int, hp: Hyperparameters) -> int:
    """The sum of the batch sizes of steps 0 to step - 1: sequences that all ranks have read."""
    ends = stage_ends(hp)
    steps = [max(min(step, end) - begin, 0) for begin, end in zip([0, *ends], ends, strict=False)]
    return sum(n * stage.batch * hp.batch_size for n, stage in zip(steps, hp.stages, strict=True))

def tokens_before(step: int, hp: Hyperparameters) -> int:
    """Tokens that steps 0 to step - 1 train on, over all ranks."""
    return sequences_before(step, hp) * hp.sequence_length

def lr_scale(step: int, hp: Hyperparameters) -> float:
    """Factor of all learning rates: the stage's, then linearly down to lr_floor, there flat
    (trapezoid: arXiv 2405.18392; stages: record 2025-11-29)."""
    to_go = max(hp.num_steps - hp.extension_steps - step, 0) / (hp.num_steps - hp.extension_steps)
    flat = min(to_go / hp.cooldown, 1.0)
    return flat * hp.stages[stage_index(step, hp)].lr + (1 - flat) * hp.lr_floor

def muon_momentum(step: int, hp: Hyperparameters) -> float:
    """Muon's momentum: up from momentum_start to momentum_end, flat, and back (2025-09-30)."""
    rise, fall = hp.momentum_warmup_steps, hp.momentum_cooldown_steps
    done = min(step / rise if rise else 1.0, (hp.num_steps - step) / fall if fall else 1.0, 1.0)
    return (1 - done) * hp.momentum_start + done * hp.momentum_end

def short_window(window: int) -> int:
    """Positions a query sees in short and paired layers (there two are a token), half of window."""
    return max(window // 256 * 128, min(window, 128))

def rotary_at(index: int, hp: Hyperparameters) -> tuple[Tensor, float]:
    """Rotary frequencies of a stage, (d / 4,) radians a token, and the factor of the scores. Half
    of a head does not turn, the base is 1024 (2024-12-17). Where the window grows, what turns less
    than 32 times in it is slowed down (YaRN, arXiv 2309.00071, record 2025-09-10)."""
    frequency = 1024 ** -torch.linspace(0, 1, hp.model_dim // hp.num_heads // 4)
    scale = hp.attention_scale
    for before, stage in itertools.pairwise(hp.stages[:index + 1]):
        old, new = before.window, stage.window
        keep = ((old * frequency / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequency = frequency * (old / new + keep * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequency, scale

class Schedule:
    """What the schedules say at one step; model and optimizer get all of it. What compiled parts
    use is a tensor, for torch.compile compiles anew for each new number, as it does for words."""
    def __init__(self, step: int, hp: Hyperparameters, device: torch.device):
        self.step, self.lr_scale, self.momentum = step, lr_scale(step, hp), muon_momentum(step, hp)
        index, ends = stage_index(step, hp), [0, *stage_ends(hp)]
        self.tied, self.words = hp.stages[index].tied, hp.stages[index].words
        self.unties = not self.tied and hp.stages[stage_index(max(step - 1, 0), hp)].tied
        tensors = _stage_tensors(index, step == hp.num_steps, hp, device)
        self.windows, self.frequencies, self.attention_scale, weights, weights_end = tensors
        done = (step - ends[index]) / max(ends[index + 1] - ends[index], 1)
        self.target_weights = torch.lerp(weights, weights_end, min(done, 1.0))  # (K,)

@functools.lru_cache(maxsize=64)  # or each step would wait for them to reach the GPU
def _stage_tensors(index: int, final: bool, hp: Hyperparameters, device: torch.device) -> tuple:
    """Windows by attention (0-dim, record 2025-09-03), frequencies, score factor, weights."""
    stage, (frequency, scale) = hp.stages[index], rotary_at(index, hp)
    short, window = short_window(stage.window), hp.final_window if final else stage.window
    tensor = functools.partial(torch.tensor, device=device)
    weights = [tensor(each, dtype=torch.float32) for each in (stage.targets, stage.targets_end)]
    windows = {"long": tensor(window), "short": tensor(short), "paired": tensor(short)}
    return windows, frequency.to(device), tensor(scale), *weights

# --- Attention: one definition of what is visible, two kernels (both behind the reader's line) ----

def document_start(tokens: Tensor, eot_token: int) -> Tensor:
    """Where each token's document or sequence begins, (N,), for S sequences (S, T) end to end."""
    position = torch.arange(tokens.numel(), device=tokens.device)
    begins = tokens == eot_token
    begins[:, 0] = True
    return torch.where(begins.flatten(), position, 0).cummax(0).values

def first_visible_key(start: Tensor, window: Tensor) -> Tensor:
    """The earliest key each query sees, (N,): of its document and its last `window` positions."""
    return torch.maximum(start, torch.arange(len(start), device=start.device) - window + 1)

def visible(query: Tensor, key: Tensor, first_key: Tensor) -> Tensor:
    """THE mask: may this query see this key? All positions; first_key: the query's. Broadcasts."""
    return (first_key <= key) & (key <= query)

Mask = BlockMask | Tensor  # for FlexAttention (compiled CUDA); first_visible_key's (N,) elsewhere

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, max_window: int) -> Tensor:
    """softmax(q k^T) v over visible keys. q, k, v, result: (N, H, d)."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    y = (flex_attention(q, k, v, block_mask=mask, scale=1.0) if isinstance(mask, BlockMask) else
         chunked_attention(q, k, v, mask, max_window))
    return y[0].transpose(0, 1)

# --- Model ----------------------------------------------------------------------------------------

LOG2_E = math.log2(math.e)  # exp2 is a GPU's own instruction, exp several: they bound a loss' time
GATE_DIMS = 12  # gates read the first so many dimensions of what they look at (record 2025-08-23)

def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension without a learned scale; its eps is float32's epsilon."""
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Module):
    """`parts` maps without bias in one product; Muon orthogonalises each. weight: (parts, out, in),
    or (parts, in, out) where in is larger, so that Muon has tall matrices alone; float32. At first
    zero, or uniform of standard deviation 0.5 / sqrt(in) (record 2026-01-30)."""
    def __init__(self, in_features: int, out_features: int, parts: int = 1, zero: bool = False):
        super().__init__()
        self.transposed = in_features > out_features
        shape = (in_features, out_features) if self.transposed else (out_features, in_features)
        bound = 0.0 if zero else 0.5 * (3 / in_features) ** 0.5
        self.weight = nn.Parameter(torch.empty(parts, *shape).uniform_(-bound, bound))

    def matrix(self) -> Tensor:
        """All maps, (parts * out, in)."""
        return (self.weight.mT if self.transposed else self.weight).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype))  # (..., parts * out)

def gate(weight: Tensor, x: Tensor) -> Tensor:
    """sigmoid(x weight^T), (N, H), of x (N, GATE_DIMS); weight (H, GATE_DIMS) is zero at first."""
    return torch.sigmoid(F.linear(x, weight.to(x.dtype)))

class Mudd(nn.Module):
    """Each token's own weights, (n, N, 1), from x (N, D); at first `start`, n numbers, for all
    (MUDD, arXiv 2502.12170, record 2026-04-22)."""
    def __init__(self, model_dim: int, start: tuple[float, ...]):
        super().__init__()
        self.fc = nn.Parameter(torch.empty(64, model_dim).uniform_(-1, 1) / model_dim ** 0.5)
        self.proj = nn.Parameter(torch.zeros(len(start), 64))
        self.bias = nn.Parameter(10 * torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, self.fc.to(x.dtype)))
        weights = 0.1 * (F.linear(hidden, self.proj.to(x.dtype)).float() + self.bias)
        return weights.to(x.dtype).T[..., None]

def mix(weights: Tensor, streams: list[Tensor]) -> Tensor:
    """The sum of n streams (N, D), weighted by (n, N, 1)."""
    return sum(weight * stream for weight, stream in zip(weights, streams, strict=True))

def rotary_tables(frequencies: Tensor, N: int) -> Tensor:
    """cos and sin of rotary positions 0 to N - 1 (arXiv 2104.09864), (2, N, d / 4) float32."""
    angle = torch.arange(N, device=frequencies.device)[:, None] * frequencies
    return torch.stack([angle.cos(), angle.sin()])

def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the first two quarters of each head by the positions' angles. x, result: (N, H, d)."""
    quarter = x.size(-1) // 4
    a, b, still = x.float().split([quarter, quarter, 2 * quarter], dim=-1)
    cos, sin = rotary[:, :, None]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, still], dim=-1).to(x.dtype)

class NGramEmbed(nn.Module):
    """The sum of hashed embeddings of the 2- to n-grams that end at each token (bigrams: record
    2026-01-19; longer ones: arXiv 2412.09871); zero at first. sparse: gradients of the tables."""
    MULTIPLIERS = (36_313, 27_191, 51_637, 14_251, 60_649, 22_109)  # the first two: the record's

    def __init__(self, hp: Hyperparameters, sparse: bool):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(hp.ngram_rows, hp.model_dim, sparse=sparse)
                                    for _ in range(2, hp.ngrams + 1))
        for table in self.tables:
            nn.init.zeros_(table.weight)

    def forward(self, tokens: Tensor, position_in_document: Tensor) -> Tensor:
        """Both (N,). Returns (N, D). Where the document is too short: the last row."""
        code, rows = self.MULTIPLIERS[0] * tokens, []
        for back, table in enumerate(self.tables, 1):
            code = code ^ (self.MULTIPLIERS[back] * tokens.roll(back))
            last = table.num_embeddings - 1
            rows.append(table(torch.where(position_in_document >= back, code % last, last)))
        return sum(rows[1:], rows[0])

class Attention(nn.Module):
    """Causal self-attention with QK-norm (arXiv 2010.04245), rotary and value embeddings, gates."""
    def __init__(self, hp: Hyperparameters, layer: Layer):
        super().__init__()
        self.num_heads, self.kind = hp.num_heads, layer.attention
        window, long = max(stage.window for stage in hp.stages), self.kind == "long"
        self.max_window = max(window, hp.final_window) if long else short_window(window)
        # A matrix of Q or K is that of two heads (record 2026-04-08); V's and proj's are whole.
        pairs = hp.num_heads // 2 if hp.num_heads % 2 == 0 else 1
        self.qk = Linear(hp.model_dim, hp.model_dim // pairs, parts=2 * pairs)
        self.v, self.proj = (Linear(hp.model_dim, hp.model_dim) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(hp.num_heads, GATE_DIMS))
        self.value_scale = nn.Parameter(torch.tensor(0.5))
        gated = layer.value_table is not None and not layer.mudd
        self.value_gate = nn.Parameter(torch.zeros(hp.num_heads, GATE_DIMS)) if gated else None
        self.xsa_scale = nn.Parameter(torch.zeros(hp.num_heads)) if layer.xsa else None

    def forward(self, x: Tensor, value_embed: Tensor | None, begins: Tensor, rotary: Tensor,
                scale: Tensor, mask: Mask, mudd: tuple[Tensor, Tensor] | None) -> Tensor:
        """x, value_embed, result: (N, D); begins: (N,), is it a document's first token? mudd: gates
        of the value embeddings, (2, N, 1), one for half of the heads; what V gets more, (N, D)."""
        N, H, half, P = len(x), self.num_heads, GATE_DIMS // 2, 1 + (self.kind == "paired")
        # Paired heads (2026-01-07): heads i, i + H / 2 of a token are two positions of one head. To
        # them go the rows of matrix i of Q's or K's: weights are reordered, and no activations.
        qk = self.qk.matrix().view(2, H // P, P, -1, x.size(1)).transpose(1, 2).flatten(0, 3)
        weight = torch.cat([qk, self.v.matrix()]).to(x.dtype)
        q, k, v = F.linear(x, weight).view(N, 3, H, -1).unbind(1)  # (N, H, d)
        v = self.value_scale * v
        if mudd is not None:
            v = v + mudd[1].view_as(v)
        if value_embed is not None:  # record 2025-12-29
            seen = torch.cat([x[:, :half], value_embed[:, :half]], dim=-1)
            gates = (2 * gate(self.value_gate, seen) if mudd is None else
                     mudd[0].squeeze(-1).T.repeat_interleave(H // 2, dim=1))
            v = v + gates[..., None] * value_embed.view_as(v)
        q, k, v = (t.reshape(P * N, H // P, -1) for t in (norm(q), norm(k), v))
        q, k = (rotate(t, rotary) for t in (q, k))
        if self.kind == "long":  # record 2025-12-14: what does not turn comes from the token before
            before = torch.where(begins[:, None, None], k, k.roll(1, 0))
            k = torch.cat([t.chunk(2, dim=-1)[i] for i, t in enumerate((k, before))], dim=-1)
        y = attention(scale * q, k, v, mask, self.max_window)
        y, v = (t.reshape(N, H, -1) for t in (y, v))
        if self.xsa_scale is not None:  # arXiv 2603.09078
            own = (y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True).clamp(min=1e-8)
            y = y - torch.tanh(self.xsa_scale).to(y.dtype)[:, None] * own * v
        return self.proj((y * gate(self.gate, x[:, :GATE_DIMS])[..., None]).flatten(1))

class MLP(nn.Module):
    """Width 4 D, ReLU squared (arXiv 2109.08668)."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.fc = Linear(hp.model_dim, 4 * hp.model_dim)
        self.proj = Linear(4 * hp.model_dim, hp.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())

class Stem(nn.Module):
    """The embedding that all layers see. Smear: a gated part of the token before (2025-09-18)."""
    def __init__(self):
        super().__init__()
        self.smear_gate = nn.Parameter(torch.zeros(1, GATE_DIMS))
        self.smear_scale = nn.Parameter(torch.tensor(0.0))
        self.ngram_scale = nn.Parameter(torch.tensor(0.05))  # of n-grams in the first layer's input

    def forward(self, embed: Tensor, begins: Tensor, dtype: torch.dtype) -> Tensor:
        """Of embed (N, D), float32: x0, (N, D), of dtype, which all layers see."""
        embed = embed.to(dtype)
        before = torch.where(begins[:, None], 0, embed.roll(1, 0))
        smear = self.smear_scale * gate(self.smear_gate, embed[:, :GATE_DIMS])
        return norm(embed + smear * before)

class Block(nn.Module):
    """A skip, attention, MLP; the embedding x0 and the n-grams' come after the attention (records
    2025-11-18, 2026-02-12). MUDD: V and x get h0, the first layer's input, attends_to and x."""
    def __init__(self, hp: Hyperparameters, layer: Layer):
        super().__init__()
        self.attention = Attention(hp, layer) if layer.attention else None
        self.mlp = MLP(hp)
        residual, branch = [1.1 ** 0.5] * 2, [1.0, 1.0, 0.0, 0.05]
        self.residual_scale = self.branch_scale = self.mudd = None
        if layer.mudd:
            self.mudd = Mudd(hp.model_dim, (*[0.0] * 6, 2.0, 2.0, *residual, *branch))
        else:
            self.residual_scale = nn.Parameter(torch.tensor(residual))  # and MLP: 2025-12-29
            self.branch_scale = nn.Parameter(torch.tensor(branch))  # attention, MLP, x0, n-grams
        if layer.skip_from is not None:
            self.skip_scale = nn.Parameter(torch.tensor(-1.5))
            self.skip_gate = nn.Parameter(torch.zeros(1, GATE_DIMS))

    def forward(self, x: Tensor, attends_to: Tensor, x0: Tensor, ngram: Tensor, h0: Tensor | None,
                skip: Tensor | None, value_embed: Tensor | None, begins: Tensor, rotary: Tensor,
                scale: Tensor, mask: Mask | None) -> Tensor:
        """All but the last four, and the result: (N, D)."""
        residual, branch, mudd = self.residual_scale, self.branch_scale, None
        if self.mudd is not None:
            to_v, to_x, gates, residual, branch = self.mudd(x).split([3, 3, 2, 2, 4])
            mudd = gates, mix(to_v, [h0, attends_to, x])
            x = x + mix(to_x, [h0, attends_to, x])
        if skip is not None:
            skip = 2 * gate(self.skip_gate, x0[:, :GATE_DIMS]) * skip
            x = x + torch.sigmoid(self.skip_scale) * skip
        if self.attention is not None:
            y = self.attention(norm(attends_to), value_embed, begins, rotary, scale, mask, mudd)
            x = residual[0] * x + branch[0] * y + branch[2] * x0 + branch[3] * ngram
        return residual[1] * x + branch[1] * self.mlp(norm(x))

class GPT(nn.Module):
    """The model of hp. flex: FlexAttention; sparse: gradients of the n-gram tables."""
    def __init__(self, hp: Hyperparameters, flex: bool = False, sparse: bool = False):
        super().__init__()
        track, self.hp, self.flex = TRACKS[hp.track], hp, flex
        self.block_lists, self.candidates = block_lists, candidates
        self.eot_token, padded_vocab_size = track.eot_token, 128 * math.ceil(track.vocab_size / 128)
        self.head = Head(hp, padded_vocab_size)
        self.embed = nn.Embedding(padded_vocab_size, hp.model_dim)
        self.embed.weight.data.copy_(self.head.linear.weight[0])
        width = hp.model_dim * len({layer.value_table for layer in hp.layers} - {None})
        self.value_embed = nn.Embedding(padded_vocab_size, width) if width else None
        self.ngram, self.stem = NGramEmbed(hp, sparse), Stem()
        self.blocks = nn.ModuleList(Block(hp, layer) for layer in hp.layers)

    def masks(self, start: Tensor, schedule: Schedule) -> dict[str | None, Mask | None]:
        """By kind of attention, from document_start's (N,). Paired heads have 2 N positions."""
        starts, masks = {1: start, 2: (2 * start).repeat_interleave(2)}, {None: None}
        for kind in {layer.attention for layer in self.hp.layers} - {None}:
            first_key = first_visible_key(starts[1 + (kind == "paired")], schedule.windows[kind])
            masks[kind] = block_mask(first_key, self.block_lists) if self.flex else first_key
        return masks

    def forward(self, tokens: Tensor, targets: Tensor | None, schedule: Schedule) -> Tensor | tuple:
        """Of targets (S, T) after tokens (S, T): what is to be minimised, a sum over the tokens;
        and the mean cross-entropy, nats, of schedule.words in training. Else float32 logits."""
        start = document_start(tokens, self.eot_token)
        position = torch.arange(len(start), device=start.device) - start  # in the document
        masks, weights = self.masks(start, schedule), schedule.target_weights
        rotary = rotary_tables(schedule.frequencies, 2 * len(start))
        tokens, begins = tokens.flatten(), position == 0
        table = self.head.linear.weight.squeeze(0) if schedule.tied else self.embed.weight
        values = self.value_embed(tokens).split(self.hp.model_dim, -1) if self.value_embed else ()
        ngram = self.ngram(tokens, position)
        x0 = self.stem(F.embedding(tokens, table), begins, ngram.dtype)
        if targets is not None:  # a validation's: the next token alone, over all words, in pieces
            words = schedule.words if torch.is_grad_enabled() else 0
            weights = weights if torch.is_grad_enabled() else torch.ones_like(weights[:1])
            length = self.hp.sequence_length if words or not torch.is_grad_enabled() else len(start)
            pieces = next_targets(targets, len(weights)).split(length)
            targets = [self.candidates(t, self.embed.num_embeddings, words) for t in pieces]
        return self.body(x0, values, ngram, targets, weights, begins, rotary,
                         schedule.attention_scale, masks)

    def body(self, x0: Tensor, values: tuple[Tensor, ...], ngram: Tensor, targets: list | None,
             weights: Tensor, begins: Tensor, rotary: Tensor, scale: Tensor,
             masks: dict) -> tuple[Tensor, Tensor] | Tensor:
        """forward() from the stem's x0 (N, D) on, with candidates of each piece, weights (K,)."""
        h0, outputs = (x := x0 + self.stem.ngram_scale * ngram), {None: None}
        for i, (block, layer) in enumerate(zip(self.blocks, self.hp.layers, strict=True)):
            # x.view_as: another object, or torch.compile would compile some blocks apart
            x = block(x, x.view_as(x) if layer.attends_to is None else outputs[layer.attends_to],
                      x0, ngram, h0 if layer.mudd else None, outputs[layer.skip_from],
                      None if layer.value_table is None else values[layer.value_table], begins,
                      rotary if layer.attention == "paired" else rotary[:, :len(x)], scale,
                      masks[layer.attention])
            outputs[i] = x.view_as(x)
        sources = [outputs[i] for i, row in enumerate(self.hp.layers) if row.to_head is not None]
        sources = [*sources, h0, *values[:1]] if sources else []
        if targets is None:
            return self.head(x, sources)
        pieces = zip(targets, *(t.split(len(targets[0][1])) for t in (x, *sources)), strict=True)
        losses = [self.head(x, sources, targets, weights) for targets, x, *sources in pieces]
        objective, loss = map(sum, zip(*losses, strict=True))
        return objective, loss / len(x0)

def build_model(hp: Hyperparameters, device: torch.device, dtype: torch.dtype, flex: bool,
                sparse: bool = False) -> GPT:
    """The model of hp: value and n-gram embeddings in dtype, the activations', all else float32."""
    torch.manual_seed(hp.seed)
    with device:
        model = GPT(hp, flex, sparse)
    model.ngram.to(dtype)
    if model.value_embed is not None:
        nn.init.normal_(model.value_embed.to(dtype).weight, std=0.01)
    return model

# --- Loss -----------------------------------------------------------------------------------------

def next_targets(targets: Tensor, K: int) -> Tensor:
    """The K next tokens of each token, (N, K), from the next ones, (S, T); beyond the end: -1."""
    later = [F.pad(targets[:, k:], (0, k), value=-1) for k in range(K)]
    return torch.stack(later, dim=-1).flatten(0, 1)

def softcap(logits: Tensor, cap: float, shift: float, scale: float) -> Tensor:
    """cap * sigmoid((logits + shift) / scale) in float32 (arXiv 2408.00118, record 2025-12-26)."""
    return cap / (1 + torch.exp2((logits.float() + shift) * (-LOG2_E / scale)))

def candidates(targets: Tensor, vocab_size: int, words: int) -> tuple[Tensor | None, Tensor]:
    """The softmax's words in training, (words,): all of targets (N, K), and others, which the sum
    of targets draws (sampled softmax, arXiv 1412.2007, PR 360 of 2026-08-31). And where among them
    each target stands, (N, K); -1 stays -1, as do targets for which there is no room."""
    if not len(targets) <= 4 * words < 4 * vocab_size:  # too few for a long text's targets, or all
        return None, targets
    word = torch.arange(vocab_size, device=targets.device)
    order = (word + targets.sum()) * 20_011 % vocab_size  # a permutation, for that is a prime
    is_target = torch.zeros(vocab_size + 1, dtype=torch.int64, device=targets.device)
    is_target[targets] = 1  # the last one is that of -1
    chosen = (order - vocab_size * is_target[:-1]).argsort()[:words]
    place = torch.full_like(is_target, -1).scatter(0, chosen, word[:words])
    return chosen, place[targets]

class CappedCrossEntropy(torch.autograd.Function):
    """Of logits x weight^T, x (N, D), weight (V, D), under softcap(logits, *cap): cross-entropies
    of targets (N, K) (-1: none), summed with weights (K,) (record 2025-12-22); the first's sum, not
    differentiable. Gradients are made at once: one kernel reads the logits (arXiv 2410.10989)."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cap) -> tuple:
        capped, (most, _, scale) = softcap(F.linear(x, weight), *cap), cap
        below = capped - most  # as exp of it is at most 1, no maximum need be looked for
        total = (exp := torch.exp2(LOG2_E * below)).sum(-1, keepdim=True)  # one for all targets
        losses = ((total.log() - below.gather(-1, targets.clamp(min=0))) * (targets >= 0)).sum(0)
        if any(ctx.needs_input_grad):
            word = torch.arange(len(weight), dtype=torch.int32, device=x.device)
            error = ((targets >= 0) * weights).sum(-1, keepdim=True) / total * exp
            for k in range(len(weights)):  # softmax - one-hot, for each target
                error = error - weights[k] * (word == targets[:, k:k + 1].int())
            gradient = (error * capped * below * (-1 / (most * scale))).to(x.dtype)
            ctx.save_for_backward(gradient @ weight, gradient.mT @ x)
        ctx.mark_non_differentiable(first := losses[0].clone())
        return (losses * weights).sum(), first

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple:
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None

class Head(nn.Module):
    """Logits from the stream and, by MUDD, from earlier ones: layers' with a weight to_head (one
    is taken out again at first: backout, record 2025-10-04), the first layer's input, a value
    table's. The embedding is its copy, or itself (arXiv 1608.05859, record 2025-12-19)."""
    def __init__(self, hp: Hyperparameters, padded_vocab_size: int):
        super().__init__()
        self.cap = (hp.logit_cap, hp.logit_shift, hp.logit_scale)
        self.linear = Linear(hp.model_dim, padded_vocab_size)
        nn.init.normal_(self.linear.weight, std=0.005)
        start = [layer.to_head for layer in hp.layers if layer.to_head is not None]
        tables = any(layer.value_table is not None for layer in hp.layers)
        self.mudd = Mudd(hp.model_dim, (*start, 0.0, *[0.0] * tables)) if start else None

    def forward(self, x: Tensor, sources: list, targets: tuple | None = None, weights=None):
        """Of x, sources (N, D): float32 logits (N, V); of candidates' targets: their losses."""
        if self.mudd is not None:
            x = x + mix(self.mudd(x), sources)
        x, weight = norm(x), self.linear.matrix()
        if targets is None:
            return softcap(F.linear(x, weight.to(x.dtype)), *self.cap)
        weight = weight if torch.is_grad_enabled() else weight.detach()  # or a gradient is made
        chosen, places = targets
        weight = (weight if chosen is None else weight[chosen]).to(x.dtype)
        return CappedCrossEntropy.apply(x, weight, places, weights, self.cap)

# --- Optimizers: what updates which parameters, the mathematics, the division over the ranks ------

class Group(NamedTuple):
    """Parameters that are updated alike; a line of optimizer_groups."""
    name: str
    parameters: str            # regular expression that matches their whole names
    rule: str                  # of RULES
    lr: float                  # learning rate; the schedule scales it
    betas: tuple[float, ...]   # decay of the moments, a step
    decay: float               # cautious weight decay; the rate scales it, and the schedule twice
    travel_dtype: torch.dtype  # of what goes from rank to rank; Muon computes in it

def optimizer_groups(hp: Hyperparameters, dtype: torch.dtype) -> list[Group]:
    """Every parameter is in exactly one group. Muon is first: while it computes, others travel.
    Rates and betas: records 2025-12-11 (Muon), 2025-12-31, 2026-02-12 (Adam)."""
    muon, beta2, shrink = hp.muon_lr, (hp.muon_beta2,), hp.muon_lr * hp.muon_decay
    lr, slow, slower, fp32 = hp.scalar_lr, (0.9, 0.95), (0.9, 0.99), torch.float32
    tables, heads = (0.75, 0.95), (0.5, 0.95)
    attention, block = r"blocks\.\d+\.attention\.", r"blocks\.\d+\."
    return [  # name, parameters, rule, learning rate, betas, weight decay, travels as
        Group("attention", attention + r"(qk|v|proj)\.weight", "muon", muon, beta2, shrink, dtype),
        Group("mlp_in", block + r"mlp\.fc\.weight", "muon", 2 * muon, beta2, shrink, dtype),
        Group("mlp_out", block + r"mlp\.proj\.weight", "muon", 4 * muon, beta2, shrink, dtype),
        Group("residual", block + "residual_scale", "adam", lr, slow, 0.0, fp32),
        Group("branch", ".*(branch|ngram|xsa)_scale", "adam", lr / 5, slow, 0.0, fp32),
        Group("scalars", ".*(value|skip|smear)_scale", "adam", lr, slower, 0.0, fp32),
        Group("gates", attention + "(value_)?gate", "adam", lr / 5, slower, 0.0, fp32),
        Group("mudd", r".*mudd\..*", "adam", lr / 20, slower, 0.0, fp32),
        Group("skip_gate", block + "skip_gate", "adam", lr / 100, slower, 0.0, fp32),
        Group("smear_gate", "stem.smear_gate", "adam", lr / 500, slower, 0.0, fp32),
        Group("values", r"value_embed\.weight", "adam", hp.value_lr, tables,
              5 * hp.adam_decay * hp.value_lr, dtype),
        Group("ngrams", r"ngram\.tables\..*", hp.ngram_rule, hp.ngram_lr, tables,
              5 * hp.adam_decay * hp.ngram_lr, dtype),
        Group("head", r"(head\.linear|embed)\.weight", "adam", hp.head_lr, heads,
              150 * hp.adam_decay * hp.head_lr, dtype)]

POLAR_EXPRESS = (  # a, b, c of each step (arXiv 2505.16932, record 2025-09-29)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def orthogonalise(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T (..., rows, columns), by five steps of Newton-Schulz type.
    The dtype is the input's: bfloat16 is enough, for errors contract (Muon, record 2024-10-14)."""
    wide = matrices.size(-1) > matrices.size(-2)
    x = matrices.mT if wide else matrices  # the Gram matrix below is then the small one
    x = (x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)).flatten(0, -3)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x.mT, x)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a)
    return (x.mT if wide else x).view(matrices.shape)

def muon_direction(group: Group, grad: Tensor, momentum_buffer: Tensor, second_moment: Tensor,
                   momentum: Tensor, _: Tensor) -> Tensor:
    """Muon (record 2024-10-14) for (matrices, rows, columns): Nesterov momentum, orthogonalised.
    NorMuon (arXiv 2510.05491, record 2025-10-24): then each row is divided by its root mean square
    over time, second_moment's (rows, 1), and each matrix brought back to its norm."""
    grad = grad.float()
    momentum_buffer.add_((1 - momentum) * (grad - momentum_buffer))
    direction = grad + momentum * (momentum_buffer - grad)
    direction = orthogonalise(direction.to(group.travel_dtype)).float()
    second_moment.lerp_(direction.square().mean(-1, keepdim=True), 1 - group.betas[0])
    even = direction / second_moment.sqrt().clamp(min=1e-10)
    before, after = (t.norm(dim=(-2, -1), keepdim=True) for t in (direction, even))
    return even * (before / after.clamp(min=1e-10))

def adam_direction(group: Group, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, _: Tensor,
                   bias1: Tensor, bias2: Tensor) -> Tensor:
    """Adam (arXiv 1412.6980) in float32. bias1, bias2: 1 - beta^t. lazy_adam leaves rows without
    gradient alone, moments included."""
    lazy, grad, (beta1, beta2) = group.rule == "lazy_adam", grad.float(), group.betas
    touched = (grad != 0).any(-1, keepdim=True).float() if lazy else 1.0
    exp_avg.lerp_(grad, (1 - beta1) * touched)
    exp_avg_sq.lerp_(grad.square(), (1 - beta2) * touched)
    return touched * (exp_avg / bias1) / ((exp_avg_sq / bias2).sqrt() + 1e-10)

class Rule(NamedTuple):
    """An update rule; its state is float32. direction takes group, summed gradient, state, Muon's
    momentum and 1 - beta^t of each beta (0-dim), updates the state, returns what to go against."""
    direction: Callable
    state: tuple[str, ...]      # of the values' shape
    row_state: tuple[str, ...]  # one number for each row of a matrix
    matrices: bool  # it works on stacks of matrices of one shape, in each step

RULES = {
    "muon": Rule(muon_direction, ("momentum",), ("second_moment",), True),
    "adam": Rule(adam_direction, ("exp_avg", "exp_avg_sq"), (), False),
    "lazy_adam": Rule(adam_direction, ("exp_avg", "exp_avg_sq"), (), False)}

def change(direction: Callable, group: Group, grad: Tensor, values: Tensor, state: list[Tensor],
           lr: Tensor, lr_scale: Tensor, *numbers: Tensor) -> Tensor:
    """lr * (direction + decayed values), in what travels; lr_scale scales it afterwards. Cautious
    weight decay (arXiv 2510.12402, records 2025-11-10, 2025-12-18): only where a step goes to zero
    anyhow. It falls with the square of the schedule."""
    step = direction(group, grad, *state, *numbers)
    if group.decay:
        step = step + group.decay * lr_scale * values * (step * values > 0)
    return (lr * step).to(group.travel_dtype)

class Optimizer:
    """Each rank keeps the state of its rows (ZeRO-1). Gradients are reduce-scattered, rows or steps
    all-gathered, while other buckets are computed. Adam: adam_every steps' sum (2025-09-30)."""
    def __init__(self, model: GPT, hp: Hyperparameters, dtype: torch.dtype, rank: int = 0,
                 world_size: int = 1):
        """Raises UserError where a parameter is in no group or in two, or a rule is unknown."""
        self.changes, self.num_updates = dict.fromkeys(RULES, change), 0
        self.adam_every, self.gradient_sum = hp.adam_every, torch.zeros(())  # for the check
        sparse = {id(module.weight) for module in model.modules()
                  if isinstance(module, nn.Embedding) and module.sparse}
        groups, buckets = optimizer_groups(hp, dtype), {}
        for name, p in model.named_parameters():
            group = group_of(name, groups)
            # Matrices of a shape share a bucket, and all that is small; a table has its own.
            together = (p.shape[-2:] if RULES[group.rule].matrices else
                        name if name.endswith(".weight") else "small")
            key = (group.rule, group.betas, group.decay, group.travel_dtype, together)
            buckets.setdefault(key, []).append((p, group))
        order = sorted(buckets, key=lambda key: min(groups.index(g) for _, g in buckets[key]))
        self.buckets = [Bucket(*zip(*buckets[key], strict=True), id(buckets[key][0][0]) in sparse,
                               rank, world_size) for key in order]
        whose = {id(p): bucket for bucket in self.buckets for p in bucket.params}
        self.head, self.embed = whose[id(model.head.linear.weight)], whose[id(model.embed.weight)]

    def untie(self) -> None:
        """The embedding becomes a copy of the head, moments included (record 2025-12-22)."""
        self.embed.values.copy_(self.head.values)
        for name, mine in self.embed.state.items():
            mine.copy_(self.head.state[name])

    @torch.no_grad()
    def step(self, schedule: Schedule) -> None:
        """One update; gradients are gone but those that Adam keeps for its next. Collective."""
        self.num_updates += 1
        adam_steps = self.num_updates % self.adam_every == 0
        due = [bucket for bucket in self.buckets if any(p.grad is not None for p in bucket.params)
               and (adam_steps or RULES[bucket.group.rule].matrices)]
        self.gradient_sum = torch.stack([bucket.reduce() for bucket in due]).sum()
        moves = []
        for bucket in due:
            group, rule = bucket.group, RULES[bucket.group.rule]
            grad, values, state = bucket.collect()
            updates = self.num_updates // (1 if rule.matrices else self.adam_every)
            numbers = schedule.lr_scale, schedule.momentum, *(1 - b ** updates for b in group.betas)
            step = self.changes[group.rule](rule.direction, group, grad, values, state, bucket.lr,
                                            *map(torch.tensor, numbers))
            moves.append((bucket, bucket.move(step, state, schedule.lr_scale)))
        for bucket, steps in moves:
            bucket.wait()
            if steps is not None:
                bucket.values.add_(steps, alpha=-schedule.lr_scale)

    def state_dict(self) -> dict:
        """The whole state, so that any number of ranks can load it. Collective."""
        return {"num_updates": self.num_updates, "buckets": [b.whole_state() for b in self.buckets]}

    def load_state_dict(self, state: dict | None) -> None:
        """Take this rank's rows of a state_dict; None: as if never stepped. Raises ValueError."""
        self.num_updates = state["num_updates"] if state else 0
        for i, bucket in enumerate(self.buckets):
            bucket.load(state["buckets"][i] if state else None)

# --- Data -----------------------------------------------------------------------------------------

class BatchLoader:
    """This rank's micro-batches of each step; a thread reads ahead. Rank r takes a step's sequences
    that are r modulo W: neither W nor a resume changes what a step reads."""
    def __init__(self, stream: "TokenStream", hp: Hyperparameters, runtime: "Runtime", step=0):
        self.stream, self.hp, self.runtime, self.step = stream, hp, runtime, step
        order = np.random.RandomState(0).permutation if TRACKS[hp.track].shuffled else np.arange
        self.order = order((len(stream) - 1) // hp.sequence_length)
        self.firsts = first_documents(stream, hp) if any(s.document for s in hp.stages) else None
        self.pool = ThreadPoolExecutor(1)
        self.future = self.pool.submit(self._read, step)

    def epoch(self, step: int) -> int:
        """How often all training tokens have been read when a step begins."""
        index = sequences_before(step, self.hp)
        if self.firsts is not None:
            return int(self.firsts[index]) // (len(self.stream.documents) - 1)
        return index // len(self.order)

    def _sequence(self, index: int, cut: int) -> tuple[Tensor, Tensor]:
        if self.firsts is not None:
            first = int(self.firsts[index])
            return self.stream.packed(first, self.hp.sequence_length, cut or len(self.stream))
        index = int(self.order[index % len(self.order)])
        return self.stream.sequence(index, self.hp.sequence_length)

    def _read(self, step: int) -> list[tuple[Tensor, Tensor]]:
        hp, runtime = self.hp, self.runtime
        mine = range(sequences_before(step, hp), sequences_before(step + 1, hp))
        mine = mine[runtime.rank::runtime.world_size]
        size = max(m for m in range(1, min(hp.micro_batch, len(mine)) + 1) if len(mine) % m == 0)
        cut = hp.stages[stage_index(step, hp)].document
        pairs = [self._sequence(index, cut) for index in mine]
        batch = [tuple(map(torch.stack, zip(*pairs[i:i + size], strict=True)))
                 for i in range(0, len(pairs), size)]
        return [(a.pin_memory(), b.pin_memory()) for a, b in batch] if runtime.cuda else batch

    def next(self) -> list[tuple[Tensor, Tensor]]:
        """The next step's micro-batches, [(tokens (S, T), targets (S, T)), ...] on the device."""
        batch, self.step, device = self.future.result(), self.step + 1, self.runtime.device
        self.future = self.pool.submit(self._read, self.step)
        return [tuple(t.to(device, non_blocking=True) for t in pair) for pair in batch]

# --- Training -------------------------------------------------------------------------------------

def training_step(model: GPT, optimizer: Optimizer, batch: list, schedule: Schedule) -> Tensor:
    """One update by the gradient, summed over tokens and ranks. Returns this rank's mean loss."""
    mean_loss = torch.zeros((), device=batch[0][0].device)
    for tokens, targets in batch:
        with record_function("forward"):  # names for --profile
            objective, loss = model(tokens, targets, schedule)
        with record_function("backward"):
            objective.backward()
        mean_loss += loss / len(batch)
    with record_function("optimizer"):
        optimizer.step(schedule)
    return mean_loss

@torch.no_grad()
def validate(model: GPT, stream: "TokenStream", schedule: Schedule, hp: Hyperparameters,
             runtime: "Runtime") -> float:
    """Mean cross-entropy in nats over the track's validation tokens. Collective."""
    num_sequences = TRACKS[hp.track].val_tokens // hp.val_length
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for index in range(runtime.rank, num_sequences, runtime.world_size):
        sequence = stream.sequence(index, hp.val_length)
        loss_sum += model(*(t[None].to(runtime.device) for t in sequence), schedule)[1]
    return runtime.mean(loss_sum) * runtime.world_size / num_sequences

def train(hp: Hyperparameters, runtime: "Runtime") -> int:
    """One run on this rank, from its data to its report; the exit code. Raises UserError."""
    watch = Watch(runtime)
    train_stream, val_stream, record, progress = start_run(hp, runtime)
    compiled, dtype = record["compiled"], getattr(torch, record["activations"])
    sparse = hp.ngram_rule == "lazy_adam" and not runtime.cuda and runtime.world_size == 1
    model = build_model(hp, runtime.device, dtype, compiled and runtime.cuda, sparse)
    optimizer = Optimizer(model, hp, dtype, runtime.rank, runtime.world_size)
    log = Log(hp, runtime, record)
    with supervised(watch, log, progress), profiler(hp, runtime, log) as profile:
        log.introduce(model, record)
        get_ready(model, optimizer, train_stream, hp, runtime, log, compiled)
        load_checkpoint(model, optimizer, watch, log)

        loader, first_step = BatchLoader(train_stream, hp, runtime, progress.step), progress.step
        started = runtime.seconds()  # progress.train_time_ms is the time until then
        watch.saves = True  # from now on a signal ends the run after a step, no longer at once
        for step in range(first_step, hp.num_steps + 1):
            progress.step, last = step, step == hp.num_steps
            schedule = Schedule(step, hp, runtime.device)
            whole = last or step % hp.adam_every == 0  # Adam keeps no gradient: a run may end here
            stop = watch.read() if whole else 0
            if schedule.unties:
                optimizer.untie()
            val_due = (last or (hp.val_every and step % hp.val_every == 0)) and not stop
            val_due = val_due and progress.validated < step and (last or not hp.profile)
            save_due = stop or (whole and step > first_step and hp.save_every and
                                step % hp.save_every < hp.adam_every)
            if val_due or save_due:  # neither is training time
                progress.train_time_ms += 1000 * (runtime.seconds() - started)
                watch.read(everything=True)  # what is not finite must not be saved
                if val_due:
                    log.begin(f"validating on {TRACKS[hp.track].val_tokens:,} tokens")
                    progress.validate(validate(model, val_stream, schedule, hp, runtime), log)
                if save_due:
                    save_checkpoint(progress, record, model, optimizer, watch, log)
                started = runtime.seconds()
            if last or stop:
                break
            loss = training_step(model, optimizer, loader.next(), schedule)
            watch.post(step, loss + optimizer.gradient_sum)
            if hp.log_every and (step + 1) % hp.log_every == 0:
                mean = runtime.mean(loss)  # waits for the device, so that the time is this step's
                now = progress.train_time_ms + 1000 * (time.perf_counter() - started)
                log.metric(step + 1, "train_loss", mean, now)
            if loader.epoch(step + 1) > loader.epoch(step):
                log.say(f"all {len(train_stream):,} training tokens are read: epoch "
                        f"{loader.epoch(step + 1) + 1} begins")
            if profile:
                profile.step()
        loader.pool.shutdown(cancel_futures=True)
        return finish(stop, model, progress, watch, hp, runtime, log)

# ==== The reader may stop here: that was the training. What follows is machinery. =================
# --- Attention's two kernels: FlexAttention's mask, and a window in chunks for CPUs ---------------

def block_lists(first_key: Tensor, block: int = 128) -> list[Tensor]:
    """BlockMask's lists, how many (1, 1, n) and which ones (1, 1, n, n), of first_key (N,), N = n
    block: key blocks that a query block sees in part, as a whole, and the reverse. As first_key
    never decreases, they are ranges: query block i sees first[i] to i, whole[i] to i - 1 as wholes;
    key block i is seen by query blocks i to last[i], as a whole by i + 1 to last_whole[i]."""
    i = (other := torch.arange(len(first_key) // block, device=first_key.device))[:, None]
    first = first_key[::block, None] // block
    whole = torch.minimum((first_key[block - 1::block, None] + block - 1) // block, i)
    last, last_whole = ((begin.T <= i).sum(1, keepdim=True) - 1 for begin in (first, whole))
    lists = ((whole - first + 1, torch.where(other < whole - first, first + other, i)),
             (i - whole, whole + other),
             (last - last_whole + 1, torch.where(other == 0, i, last_whole + other)),
             (last_whole - i, i + 1 + other))
    return [t.int()[None, None] for count, which in lists
            for t in (count[:, 0], which.clamp(max=len(other) - 1))]

def block_mask(first_key: Tensor, lists: Callable = block_lists) -> BlockMask:
    """FlexAttention's mask from first_visible_key's (N,); lists: block_lists, or it compiled."""
    return BlockMask((len(first_key),) * 2, *lists(first_key), BLOCK_SIZE=(128, 128),
                     mask_mod=lambda b, h, query, key: visible(query, key, first_key[query]))

def chunked_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, window: int) -> Tensor:
    """Sliding-window attention for CPUs, where FlexAttention has no backward. q, k, v, result: (1,
    H, N, d). A chunk of window / 2 queries sees its own keys and those of two chunks before."""
    (_, H, N, d), size = q.shape, window // 2
    chunks, padding = math.ceil(N / size), -N % size
    query = torch.arange(chunks * size, device=q.device).view(chunks, size, 1)
    key = torch.arange(-2 * size, size, device=q.device) + query[:, :1]
    # A padded query sees itself: a row of scores without a key would turn the gradients to NaN.
    padded = torch.arange(N, chunks * size, device=q.device)
    first_key = torch.cat([first_key, padded]).view(chunks, size, 1)

    def with_two_chunks_before(x):  # (1, H, N, d) -> (H, chunks, 3 size, d)
        x = F.pad(x[0], (0, 0, 2 * size, padding)).view(H, chunks + 2, size, d)
        return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], dim=2)

    q = F.pad(q[0], (0, 0, 0, padding)).view(H, chunks, size, d)
    scores = q @ with_two_chunks_before(k).mT  # (H, chunks, size, 3 size)
    scores = scores.float().masked_fill(~visible(query, key, first_key), -math.inf)
    y = scores.softmax(dim=-1).to(v.dtype) @ with_two_chunks_before(v)
    return y.view(1, H, chunks * size, d)[:, :, :N]

# --- Shards of tokens ----------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256

def open_shard(path: str | Path, advice: str = "delete it, fetch or build it again") -> np.ndarray:
    """The tokens of a .bin shard as a read-only memory map, (num_tokens,) little-endian uint16,
    after 256 int32 of header: magic, version, num_tokens. Raises UserError if it is not that."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<u4", SHARD_HEADER_INTS)
    except OSError as error:
        raise UserError(f"can't read the shard {path}: {error.strerror}") from None
    start, found = 4 * SHARD_HEADER_INTS, [*header.tolist(), 0, 0, 0][:3]
    wanted = [SHARD_MAGIC, SHARD_VERSION, (size - start) / 2]
    if found != wanted:
        raise UserError(f"{path} is bad: its magic number, version and number of tokens are "
                        f"{found}, expected {wanted} of a file of its size; {advice}")
    return np.memmap(path, "<u2", "r", start, (found[2],))

class TokenStream:
    """All shards that match a pattern, in the order of their names, as one endless stream."""
    def __init__(self, pattern: str, track: Track, minimum: int):
        """pattern: a glob below the repository. Raises UserError on bad or too few shards."""
        self.track, self.paths, advice = track, sorted(ROOT.glob(pattern)), f"run: {track.get_data}"
        self.shards = [open_shard(path, f"delete it and {advice}") for path in self.paths]
        self.ends = np.cumsum([0, *map(len, self.shards)])  # [0], then where each shard ends
        if len(self) < minimum:
            raise UserError(f"{ROOT / pattern}: {len(self):,} tokens in {len(self.paths)} shards, "
                            f"expected at least {minimum:,}; {advice}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count, (count,) int64. Raises UserError on an impossible id."""
        start %= len(self)
        shard = bisect_right(self.ends, start) - 1
        part = self.shards[shard][start - self.ends[shard]:][:count].astype(np.int64)
        if part.max() >= self.track.vocab_size:
            raise UserError(f"{self.paths[shard]} holds the token id {part.max()}, expected "
                            f"ids below {self.track.vocab_size}; run: {self.track.get_data}")
        rest = count - len(part)
        return np.concatenate([part, self.read(start + len(part), rest)]) if rest else part

    def sequence(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """The index-th sequence and its targets, one token further on: two (length,) int64."""
        tokens = torch.from_numpy(self.read(index * length, length + 1))
        return tokens[:-1], tokens[1:]

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """Where each document begins, then where the last one ends. Raises UserError for none."""
        starts = [np.flatnonzero(shard == self.track.eot_token) + end
                  for shard, end in zip(self.shards, self.ends, strict=False)]
        if not any(map(len, starts)):
            raise UserError(f"{self.paths[0]} holds no token {self.track.eot_token}, expected one "
                            f"before each document; run: {self.track.get_data}")
        return np.concatenate([*starts, self.ends[-1:]])

    def packed(self, document: int, length: int, cut: int) -> tuple[Tensor, Tensor]:
        """As sequence(), of documents from that one on, cut (record 2025-09-03); endlessly."""
        documents, parts, missing = self.documents, [], length + 1
        while missing:
            start, end = documents[document % (len(documents) - 1):][:2].tolist()
            parts.append(self.read(start, min(end - start, cut, missing)))
            document, missing = document + 1, missing - len(parts[-1])
        tokens = torch.from_numpy(np.concatenate(parts))
        return tokens[:-1], tokens[1:]

    def fingerprint(self, count: int) -> str:
        """12 hexadecimal digits that stand for the first count tokens (or all)."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard[:count])
            count -= min(count, len(shard))
        return digest.hexdigest()[:12]

def first_documents(stream: TokenStream, hp: Hyperparameters) -> np.ndarray:
    """The document with which each sequence of the run begins, and the one after the run's last.
    What the sequence before had no room for is dropped (record 2025-07-12). All read: once more."""
    lengths, document, firsts = np.diff(stream.documents), 0, []
    for stage, begin, end in zip(hp.stages, [0, *stage_ends(hp)], stage_ends(hp), strict=False):
        totals = np.minimum(lengths, stage.document or 2**62).cumsum().tolist()
        for _ in range(sequences_before(begin, hp), sequences_before(end, hp)):
            firsts.append(document)
            epoch, document = divmod(document, len(lengths))
            reach = hp.sequence_length + (totals[document - 1] if document else 0)
            more, reach = divmod(reach, totals[-1])  # where the last target is
            document = (epoch + more) * len(lengths) + bisect_right(totals, reach) + 1
    return np.array([*firsts, document])

# --- Buckets: which rank keeps what, and how it travels -------------------------------------------

# torch 2.13 renamed the two collectives and warns on the old names, the only ones in 2.11.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

def group_of(name: str, groups: list[Group]) -> Group:
    """The group of a parameter. Raises UserError where it is in none or in two, or has no rule."""
    claims = [group for group in groups if re.fullmatch(group.parameters, name)]
    if len(claims) != 1 or claims[0].rule not in RULES:
        found = " and ".join(f"{group.name} ({group.rule})" for group in claims) or "none"
        mine = re.sub(r"\d+", r"\\d+", re.escape(name))  # of all layers
        raise UserError(f"the optimizer group of the parameter {name} is {found}, expected one with"
                        f" a rule of {', '.join(RULES)}; mend optimizer_groups, or add a line: "
                        f'Group("mine", r"{mine}", "adam", hp.scalar_lr, slow, 0.0, fp32)')
    return claims[0]

class Bucket:
    """Parameters as one tensor `values`, of which each rank has my_rows: a table, stacked matrices
    of one shape (a row is a matrix), or numbers. Their groups may differ in the rate alone.
    `grads` collects what travels; None: the parameter's gradient does, or is sparse (one rank)."""
    def __init__(self, params: list[nn.Parameter], groups: list[Group], sparse: bool,
                 rank: int = 0, world_size: int = 1):
        self.group, self.params, self.world_size = groups[0], params, world_size
        rule, shape = RULES[self.group.rule], params[0].shape
        row_shape = shape[-2:] if rule.matrices else shape[-1:] if len(params) == 1 else ()
        rows = [p.numel() // math.prod(row_shape) for p in params]
        self.rows, shard_rows = sum(rows), math.ceil(sum(rows) / world_size)
        self.my_rows = slice(rank * shard_rows, (rank + 1) * shard_rows)
        self.values = params[0].new_zeros(world_size * shard_rows, *row_shape)
        dtype = self.group.travel_dtype if world_size > 1 else self.values.dtype
        self.sparse, self.exact = sparse, dtype == self.values.dtype
        alone = self.exact and len(params) == 1 and len(self.values) == self.rows
        self.grads = None if alone else torch.zeros_like(self.values, dtype=dtype)
        for values, p in zip(self.parts(self.values), params, strict=True):
            p.data = values.copy_(p.detach())
        mine = self.values[self.my_rows]
        like = dict.fromkeys(rule.state, mine) | dict.fromkeys(rule.row_state, mine[..., :1])
        self.state = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in like.items()}
        lr = [torch.full((n,), group.lr) for n, group in zip(rows, groups, strict=True)]
        lr = F.pad(torch.cat(lr), (0, len(self.values) - self.rows)).to(mine.device)
        lr = lr[self.my_rows].view(-1, *[1] * len(row_shape))
        self.lr = lr if len({group.lr for group in groups}) > 1 else lr.new_tensor(groups[0].lr)
        self.grad, self.under_way = None, []  # the ranks' sum; (collective's handle, what it sends)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Views of a tensor of the values' shape, of the parameters' shapes."""
        sizes = [p.numel() for p in self.params]
        parts = whole.view(-1)[:sum(sizes)].split(sizes)
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]

    def reduce(self) -> Tensor:
        """Start the reduce-scatter: this rank gets its rows of the ranks' sum. Collective. Takes
        the gradients, one at least; returns this rank's sum, not finite if one of them is not."""
        if (whole := self.grads) is None:
            whole, self.params[0].grad = self.params[0].grad, None
        else:
            for part, p in zip(self.parts(whole), self.params, strict=True):
                part.zero_() if p.grad is None else part.copy_(p.grad)
                p.grad = None
        self.grad = whole = whole.coalesce() if self.sparse else whole.view_as(self.values)
        if self.world_size > 1:
            self.grad = torch.empty_like(whole[self.my_rows])
            work = _reduce_scatter(self.grad, whole, op=dist.ReduceOp.SUM, async_op=True)
            self.under_way.append((work, whole))
        return (whole.values() if self.sparse else whole).sum(dtype=torch.float32)

    def collect(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """My rows of gradient, values and state; of a sparse table the touched ones."""
        if self.sparse:
            self.touched, grad = self.grad.indices()[0], self.grad.values()
            return grad, self.values[self.touched], [s[self.touched] for s in self.state.values()]
        self.wait()
        return self.grad, self.values[self.my_rows], list(self.state.values())

    def gather(self, mine: Tensor) -> Tensor:
        """Start the all-gather of every rank's rows; read the result after wait(). Collective."""
        if self.world_size == 1:
            return mine
        sent = mine.contiguous()  # as NCCL wants it
        whole = mine.new_empty(self.world_size * len(mine), *mine.shape[1:])
        self.under_way.append((_all_gather(whole, sent, async_op=True), sent))
        return whole

    def wait(self) -> None:
        """For the collectives under way."""
        while self.under_way:
            self.under_way.pop(0)[0].wait()

    def whole_state(self) -> dict[str, Tensor]:
        """Every rank's rows of the state, without padding. Collective."""
        whole = {name: self.gather(mine)[:self.rows] for name, mine in self.state.items()}
        self.wait()
        return whole

    def load(self, whole: dict[str, Tensor] | None) -> None:
        """Take this rank's rows of a whole_state; None: zeros. Raises ValueError."""
        for name, mine in self.state.items():
            mine.zero_()
            if whole:
                if whole[name].shape != (self.rows, *mine.shape[1:]):
                    raise ValueError(f"the optimizer's {name} has another shape")
                share = whole[name][self.my_rows]
                mine[:len(share)].copy_(share)

    def move(self, steps: Tensor, state: list[Tensor], lr_scale: float) -> Tensor | None:
        """values -= lr_scale * steps, of collect()'s rows, and start their all-gather. Collective.
        Where values are finer than what travels, start that of the steps, which it returns."""
        if not self.exact:
            return self.gather(steps)
        if self.sparse:
            self.values.index_add_(0, self.touched, steps.to(self.values.dtype), alpha=-lr_scale)
            for whole, part in zip(self.state.values(), state, strict=True):
                whole[self.touched] = part
        else:
            mine = self.values[self.my_rows].add_(steps, alpha=-lr_scale)
            if self.world_size > 1:
                self.under_way.append((_all_gather(self.values, mine, async_op=True), mine))

# --- Ranks, devices, signals ----------------------------------------------------------------------

@dataclass(frozen=True)
class Runtime:
    """Where this process runs: one of world_size ranks, one device each."""
    rank: int
    world_size: int
    device: torch.device
    cuda = property(lambda self: self.device.type == "cuda")

    def mean(self, value: Tensor) -> float:
        """Mean over the ranks of a 0-dim tensor. Collective."""
        if self.world_size > 1:
            dist.all_reduce(value := value.clone(), op=dist.ReduceOp.AVG)
        return value.item()

    def agree(self, value):
        """Rank 0's value, on every rank. Collective."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def seconds(self) -> float:
        """The time now, once the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

def start_runtime(hp: Hyperparameters) -> Runtime:
    """Join the other ranks, if torchrun or Slurm started several. Raises UserError."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_hyperparameters(hp, world_size)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device, group = torch.device("cpu"), dict(backend="gloo")
    if hp.device == "cuda" or (hp.device == "auto" and num_gpus):
        if local_rank >= num_gpus:
            raise UserError(f"process {local_rank} of this node has no GPU: torch sees {num_gpus}; "
                            "start one a GPU (NPROC, --nproc_per_node), or use --device cpu")
        device = torch.device("cuda", local_rank)
        group = dict(backend="nccl", device_id=device)
        torch.cuda.set_device(device)
    else:
        choose_threads()
    if world_size > 1:
        # Ends other nodes, too, when a rank fails. Saves, and one node's compiling, must take less.
        dist.init_process_group(timeout=timedelta(minutes=10), **group)
    return Runtime(rank, world_size, device)

def choose_threads() -> None:
    """One thread where more, measured for 30 ms, are not faster. OMP_NUM_THREADS overrides."""
    if "OMP_NUM_THREADS" not in os.environ and (threads := torch.get_num_threads()) > 1:
        rounds, x, many = 20, torch.ones(2**18), 0.0
        torch.set_num_threads(1)
        one = rounds * min(timeit.repeat(lambda: x * x, number=50, repeat=3))
        torch.set_num_threads(threads)
        while rounds and many < one:  # a wait is rare, and long
            many, rounds = many + timeit.timeit(lambda: x * x, number=50), rounds - 1
        torch.set_num_threads(threads if many < one else 1)

def fast_dtype(device: torch.device) -> str:
    """bfloat16 where its matrix products are fast, else float32. A CPU is measured, 20 ms."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        matrices = (torch.ones(512, 512, dtype=t) for t in (torch.bfloat16, torch.float32))
        bf16, fp32 = (min(timeit.repeat(lambda a=a: a.mm(a), number=1, repeat=8)) for a in matrices)
        fast = bf16 < 0.7 * fp32
    return "bfloat16" if fast else "float32"

def lacks_for_compile(device: torch.device) -> str:
    """What torch.compile would miss on this machine at its first use; nothing: ""."""
    variable, *names = ("CC gcc clang" if device.type == "cuda" else "CXX g++ clang++").split()
    if not (os.environ.get(variable) or any(map(shutil.which, names))):
        return f"a compiler ({' or '.join(names)})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"Python's headers ({header})"

def compile_pays(hp: Hyperparameters, device: torch.device) -> bool:
    """Does torch.compile save more than it costs? With Triton always, on a CPU in longer runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 0)
    return not lacks_for_compile(device) and tokens_before(hp.num_steps, hp) >= 500_000

class Watch:
    """One small all-reduce a step: has any rank a signal, or a loss or gradient that is not finite?
    On a GPU its answer is read two steps later, when it has long arrived: no step waits."""
    def __init__(self, runtime: Runtime):
        self.runtime, self.pending, self.checkpoint, self.warn = runtime, [], "", None  # the log's
        self.signal, self.signalled_at, self.agreed = 0, 0.0, 0  # this rank's; what all heed
        self.saves = False  # has the run something to save?

    def on_signal(self, number: int, frame=None) -> None:
        """End the run after this step; before the first one, and by a second signal, at once."""
        name, now = signal.Signals(number).name, time.monotonic()
        soon = 1.0 if self.runtime.world_size > 1 else 0.1  # s; a copy, by torchrun or by shell
        if self.saves and not self.signal:
            self.signal, self.signalled_at = number, now
            self.warn(f"{name}: the run ends after this step or validation, with a checkpoint; a "
                      "second one ends it at once")
        elif not self.saves or now - self.signalled_at > soon:  # and launcher, comes sooner
            self.warn(f"run ended at once by {name}, without a checkpoint")
            os._exit(128 + number)  # an exception would make the compiler print a traceback

    def post(self, step: int, value: Tensor) -> None:
        """After a step; value: 0-dim, not finite where the step was not. Collective."""
        marks = torch.zeros(2, device=self.runtime.device)  # 1 + a bad rank, or 0; the signal
        marks[0] = ~value.isfinite() * (self.runtime.rank + 1)
        marks[1].fill_(self.signal)  # not "=": that copies from the host, and waits for the GPU
        if self.runtime.world_size > 1:
            dist.all_reduce(marks, op=dist.ReduceOp.MAX)
        marks = marks.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        arrived = torch.cuda.current_stream().record_event() if self.runtime.cuda else None
        self.pending.append((step, marks, arrived))

    def read(self, everything: bool = False) -> int:
        """The signal for all ranks, or 0. Raises UserError where a step was not finite."""
        while len(self.pending) > (2 if self.runtime.cuda and not everything else 0):
            step, marks, arrived = self.pending.pop(0)
            if arrived:
                arrived.synchronize()
            bad, number = map(int, marks.tolist())
            if bad:
                raise UserError(f"loss or gradient not finite at step {step} on rank {bad - 1}; "
                                f"lower the rates; last checkpoint: {self.checkpoint or 'none'}")
            self.agreed = max(self.agreed, number)
        return self.agreed

@contextmanager
def supervised(watch: Watch, log: "Log", progress: "Progress"):
    """Within, an error leaves a last line in the log, signals end the run, a terminal shows it."""
    watch.warn = functools.partial(log.write, onto=sys.stderr)
    before = {n: signal.signal(n, watch.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    follower = threading.Thread(target=log.follow, args=(progress,), daemon=True)
    follower.start()
    try:
        yield
    except BaseException as error:
        log.write(f"run failed at step {progress.step}: {type(error).__name__}: {error}")
        raise
    finally:
        log.over.set()
        follower.join()
        for number, handler in before.items():
            signal.signal(number, handler)

# --- Compilation ---------------------------------------------------------------------------------

def compile_parts(model: GPT, optimizer: Optimizer, device: torch.device, compiled=True) -> None:
    """torch.compile: on CUDA the stem, and as one what follows: the host does less, gradients are
    summed in kernels; on a CPU each block, stem and head: one compilation serves all blocks of a
    kind. --profile: attention, MLP, head, if compiled, each alone, with a name in the trace."""
    torch._dynamo.config.recompile_limit = 128  # kinds of blocks, batches; with, without gradients
    cuda = device.type == "cuda"
    compiler = functools.partial(torch.compile, dynamic=False, disable=not compiled)
    for part in model.modules():
        name = {Attention: "attention", MLP: "MLP", Head: "head"}.get(type(part))
        if model.hp.profile and name:
            part.forward = record_function(name)(compiler(part.forward))
        elif isinstance(part, Stem if cuda else (Block, Stem, Head)) and not model.hp.profile:
            part.compile(dynamic=False)  # the stem alone, or each layer would read it in float32
    if cuda and not model.hp.profile:
        model.body = compiler(model.body)
    if cuda:  # fuses Adam's ten passes over large tables; a CPU's are small
        optimizer.changes = {name: compiler(change) for name in RULES}
        model.block_lists = compiler(block_lists)  # few kernels for many; not within body, where
        model.candidates = compiler(candidates)  # Inductor would compute these anew for each logit

def warm_up(model: GPT, optimizer: Optimizer, stream: TokenStream, hp: Hyperparameters,
            runtime: Runtime) -> None:
    """Compile and load every kernel on made-up tokens, then put everything back as it was."""
    before = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    text = torch.zeros(1, hp.val_length, dtype=torch.int64, device=runtime.device)
    for begin in sorted({0, *stage_ends(hp)} - {hp.num_steps}):
        schedule = Schedule(begin, hp, runtime.device)
        loader = BatchLoader(stream, hp, runtime, begin)  # for the shapes
        batch = [tuple(map(torch.zeros_like, pair)) for pair in loader.next()]
        loader.pool.shutdown(cancel_futures=True)
        for _ in range(hp.adam_every):
            training_step(model, optimizer, batch, schedule)
        with torch.no_grad():
            model(text, text.clone(), schedule)  # not one tensor twice: a compiler would see that
    model.load_state_dict(before)
    optimizer.load_state_dict(None)

def get_ready(model: GPT, optimizer: Optimizer, stream: TokenStream, hp: Hyperparameters,
              runtime: Runtime, log: "Log", compiled: bool) -> None:
    """Compile, if that is wanted, and warm up."""
    log.begin("compiling, minutes the first time" if compiled else "warming up")
    started, did = time.perf_counter(), "compiled" if compiled else "warmed up"
    if compiled or hp.profile:
        compile_parts(model, optimizer, runtime.device, compiled)
    warm_up(model, optimizer, stream, hp, runtime)
    log.say(f"{did} in {time.perf_counter() - started:.1f} s (not training time)")

# --- Log ------------------------------------------------------------------------------------------

SEPARATOR, CLEAR = "=" * 100, "\r\x1b[K"  # CLEAR: what a terminal shows of the progress goes
PEAK_FLOPS = {  # dense bfloat16 FLOP/s of data sheets, by part of a device's name; first match
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
NOT_KEPT = 3  # exit code of a run that ended well, but whose log or checkpoint can't be written

def show(text: str, onto) -> None:
    """Onto stdout or stderr, over a terminal's progress. A console that is gone ends no run."""
    with suppress(OSError):
        print(CLEAR * onto.isatty() + text, end="", file=onto, flush=True)

def one_line(error: BaseException) -> str:
    """What an exception says, at most 300 characters of it, or its name where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__

def _output_of(command: str) -> str:
    """What a shell's command prints, or nothing where it can't be run."""
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, shell=True, capture_output=True, text=True,
                              timeout=20, cwd=ROOT).stdout.strip()
    return ""

def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = _output_of("cat /proc/cpuinfo || sysctl machdep.cpu.brand_string")
    found = re.search(r"(?:model name|brand_string)\s*: *(.+?) *$", told, re.M)
    return found[1] if found else platform.machine()

class Log:
    """The log file and the console of rank 0; other ranks write nothing. The file: the script's
    source, SEPARATOR, the environment, SEPARATOR, then a line each time something is said."""
    def __init__(self, hp: Hyperparameters, runtime: Runtime, record: dict):
        """Raises UserError where the log can't be written, before any work is done."""
        self.hp, self.failed, self.file, self.over = hp, False, None, threading.Event()
        self.terminal = sys.stdout.isatty() and not runtime.rank
        self.path, self.doing = hp.folder / f"{record['run_id']}.txt", ""
        if runtime.rank:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)  # nothing is left where a write fails
        except OSError as error:
            raise UserError(f"can't write the log {self.path}: {error.strerror}; mend that or name "
                            "another folder with --entry") from None
        if self.file.tell():  # of the run that is resumed: a kill may have cut its last line
            return None if self.path.read_bytes().endswith(b"\n") else self.write("")
        smi = ["nvidia-smi:", _output_of("nvidia-smi")] if runtime.cuda else []
        pytorch, cuda = f"Running PyTorch {torch.__version__}", torch.version.cuda
        self.write(Path(__file__).read_text("utf-8"), SEPARATOR,
                   f"Running Python {' '.join(sys.version.split())}",
                   *([f"{pytorch} compiled for CUDA {cuda}"] if cuda else []),
                   f"{pytorch} on {record['device']} with world_size {runtime.world_size}",
                   json.dumps(record, indent=1), *smi, SEPARATOR)

    def write(self, *lines: str, onto=None) -> None:
        """Into the file, and onto stdout or stderr. A file that can't grow does not end the run."""
        if self.file:
            text = "".join(line.removesuffix("\n") + "\n" for line in lines)
            try:
                self.file.write(text.encode())
            except OSError as error:
                self.fail(f"can't write the log {self.path}: {error.strerror}")
            if onto:
                self.doing = ""
                show(text, onto)

    def say(self, *lines: str) -> None:
        """Into the file and onto the console."""
        self.write(*lines, onto=sys.stdout)

    def fail(self, text: str) -> None:
        """Warn, once a run; its exit code will be NOT_KEPT."""
        first, self.failed = not self.failed, True
        if first:
            self.write(f"warning: {text}; the run goes on, exit code {NOT_KEPT}", onto=sys.stderr)

    def introduce(self, model: GPT, record: dict) -> None:
        """The first line: what is trained, where, and for how long."""
        hp, parameters = self.hp, sum(p.numel() for p in model.parameters())
        where = "{activations}, {world_size} x {device}, threads {threads}".format(**record)
        self.say(f"track {hp.track}, {hp.num_steps} steps (momentum rises in the first "
                 f"{hp.momentum_warmup_steps}, {hp.extension_steps} come after the schedule), "
                 f"{parameters:,} parameters, {where}, log {self.path}")

    def metric(self, step: int, name: str, value: float, time_ms: float) -> None:
        """A line of the public format. Its colons are set here: a log holds this source as well."""
        words = {"step": f"{step}/{self.hp.num_steps}", name: f"{value:.4f}",
                 "train_time": f"{time_ms:.0f}ms", "step_avg": f"{time_ms / max(step, 1):.2f}ms"}
        self.say(" ".join(f"{key}:{word}" for key, word in words.items()))

    def begin(self, name: str) -> None:
        """On the console alone: something goes on that takes a while."""
        self.since, self.doing = time.monotonic(), name
        if self.file and not self.terminal:
            show(f"{name} ...\n", sys.stdout)

    def follow(self, progress: "Progress") -> None:
        """On a terminal, twice a second, in place until the next line: what goes on."""
        first, total = None, tokens_before(self.hp.num_steps, self.hp)
        while self.terminal and not self.over.wait(0.5):
            now, step = time.monotonic(), progress.step
            text, here = f"step {step}/{self.hp.num_steps}", tokens_before(step, self.hp)
            if doing := self.doing:
                text = f"{doing} ... {int(now - self.since)} s"
            elif here > (first := first or (now, here))[1]:
                left = (now - first[0]) * (total - here) / (here - first[1])
                text += f", {left:.0f} s left"
            show(text, sys.stdout)
        if self.terminal:  # rank 0's
            show("", sys.stdout)

def profiler(hp: Hyperparameters, runtime: Runtime, log: Log):
    """A context: with --profile, on rank 0, torch's profiler of three training steps; else None."""
    def tell(profile):
        """Once it has them."""
        path, device = log.path.with_suffix(".trace.json"), "device" if runtime.cuda else "cpu"
        profile.export_chrome_trace(str(path))
        log.say(f"trace: {path} (open it in https://ui.perfetto.dev); dearest of three steps:",
                profile.key_averages().table(f"self_{device}_time_total", row_limit=10,
                                             max_name_column_width=50))

    steps = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    traced = hp.profile and runtime.rank == 0
    return torch.profiler.profile(schedule=steps, on_trace_ready=tell) if traced else nullcontext()

@torch.no_grad()
def write_sample(model: GPT, hp: Hyperparameters, step: int, device: torch.device) -> str:
    """The prompt, a document's beginning, and sample_tokens tokens more; temperature 0.8."""
    track, generator = TRACKS[hp.track], torch.Generator().manual_seed(hp.seed)
    if track.eot_token == 256:
        encode, decode = str.encode, lambda ids: bytes(ids).decode("utf-8", errors="replace")
    else:
        import tiktoken  # here, for it downloads its vocabulary the first time
        encoding = tiktoken.get_encoding("gpt2")
        encode, decode = encoding.encode_ordinary, encoding.decode
    tokens, schedule = [track.eot_token, *encode(hp.prompt)], Schedule(step, hp, device)
    model.flex = False  # the run is over, and so short a text needs no kernel of its own
    with torch.compiler.set_stance("force_eager"):
        for _ in range(hp.sample_tokens):
            context = torch.tensor([tokens[-hp.sequence_length:]], device=device)
            last = context.size(1) - 1  # few lengths: to prepare a product of a new one takes long
            logits = model(F.pad(context, (0, -context.size(1) % 128)), None, schedule)[last]
            chances = (logits[:track.eot_token].cpu() / 0.8).softmax(-1)
            tokens.append(torch.multinomial(chances, 1, generator=generator).item())
    text = decode(tokens[1:])  # and no code that a terminal would obey
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)

def finish(stop: int, model: GPT, progress: "Progress", watch: Watch, hp: Hyperparameters,
           runtime: Runtime, log: Log) -> int:
    """The last lines of a log: target, speed, memory, a sample. Returns the exit code."""
    if stop:
        ranks = f" -m torch.distributed.run --standalone --nproc_per_node={runtime.world_size}"
        started_by = sys.executable + ranks * (runtime.world_size > 1)  # several nodes: docs/
        command = os.environ.get("STARTED_BY", f"{started_by} {os.path.relpath(__file__)}")
        log.say(f"run ended by {signal.Signals(stop).name} at step {progress.step}; go on with: "
                f"{command} --resume {watch.checkpoint or 'latest'}")
        return 128 + stop
    per_second = 1000 * tokens_before(hp.num_steps, hp) / max(progress.train_time_ms, 1e-3)
    # Forward and backward, a token: 6 FLOPs a weight, 12 D a layer and visible key; look-ups none.
    weights = sum(p.numel() for name, p in model.named_parameters()
                  if re.fullmatch(r"(blocks|head)\..*\.weight", name))
    middle, V = Schedule(hp.num_steps // 2, hp, torch.device("cpu")), model.embed.num_embeddings
    keys = sum(middle.windows[row.attention].item() for row in hp.layers if row.attention)
    weights -= hp.model_dim * (V - min(middle.words or V, V))  # of the words that do not compete
    flops = (6 * weights + 12 * hp.model_dim * keys) * per_second / runtime.world_size
    name, unit = device_name(runtime.device), 1 if sys.platform == "darwin" else 1024
    mfu = next((f" mfu:{flops / p:.1%}" for part, p in PEAK_FLOPS.items() if part in name), "")
    memory = (torch.cuda.max_memory_allocated(runtime.device) if runtime.cuda else
              unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    log.say(f"target {TRACKS[hp.track].target}: {progress.reached or 'missed'}",
            f"tokens_per_second:{per_second:.0f} peak_memory_per_rank:{memory / 2**20:.0f}MiB{mfu}")
    if hp.sample_tokens and runtime.rank == 0:
        log.begin("writing a sample")
        try:
            text = write_sample(model, hp, hp.num_steps, runtime.device)
        except Exception as error:  # the result stands: no missing vocabulary may spoil it
            text = f"none: {type(error).__name__}: {one_line(error)}"
        log.say("sample:", *("| " + line for line in text.split("\n")))
    return NOT_KEPT if log.failed else 0

# --- Checkpoints ----------------------------------------------------------------------------------

# What a resumed run may choose anew: no number depends on it (dtype is compared as activations).
MAY_CHANGE = {"val_every", "log_every", "save_every", "keep", "resume", "resume_anyway", "entry",
              "profile", "sample_tokens", "prompt", "dtype"}

@dataclass
class Progress:
    """Where the loop is: part of each checkpoint, and of the line that says how a run failed."""
    step: int = 0
    train_time_ms: float = 0.0
    reached: str = ""  # when the target first was
    validated: int = 0  # the last step at which a validation was made: none at the beginning

    def validate(self, loss: float, log: Log) -> None:
        """Note a validation at this step, in the log too."""
        log.metric(self.step, "val_loss", loss, self.train_time_ms)
        self.validated = self.step
        if loss <= TRACKS[log.hp.track].target and not self.reached:
            self.reached = f"reached at step {self.step} after {self.train_time_ms / 1000:.1f} s"

def save_checkpoint(progress: Progress, record: dict, model: GPT, optimizer: Optimizer,
                    watch: Watch, log: Log) -> None:
    """Write all that the rest of the run depends on, atomically; keep the last --keep. Collective.
    Where rank 0 can't write, the log says so, the run goes on and all older ones stay."""
    path = log.path.with_name(f"{log.path.stem}_step{progress.step:06d}.pt")
    start, temporary = time.perf_counter(), path.with_suffix(".tmp")
    state = {**record, "progress": dataclasses.asdict(progress), "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    if not log.file:  # not rank 0
        return
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        return log.fail(f"can't write the checkpoint {path}: {one_line(error)}; free disk space")
    saved = path.parent.glob(f"{log.path.stem}_step*.pt")
    for old in sorted(saved, key=os.path.getmtime)[:-log.hp.keep]:
        old.unlink(missing_ok=True)
    watch.checkpoint = path
    log.say(f"checkpoint {path} in {time.perf_counter() - start:.2f} s (not training time)")

@contextmanager
def open_checkpoint(path: str):
    """What save_checkpoint wrote, on the CPU, read when used. What a bad one causes: UserError."""
    try:  # weights_only: data alone, it can't run code
        yield torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"can't resume from {path}: {one_line(error)}; expected a checkpoint of "
                        "this script, data and settings (of others: --resume_anyway)") from None

def load_checkpoint(model: GPT, optimizer: Optimizer, watch: Watch, log: Log) -> None:
    """Put the state that --resume names, if any, in its places. Raises UserError."""
    if log.hp.resume == "latest":
        log.say(f"no checkpoint in {log.hp.folder}: the run begins at step 0")
    elif log.hp.resume:
        with open_checkpoint(log.hp.resume) as saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
            log.say(f"resumed from {log.hp.resume} at step {saved['progress']['step']}")
        watch.checkpoint = log.hp.resume
        runs = {p.name.rpartition("_step")[0] for p in log.path.parent.glob("*_step*.pt")}
        if others := sorted(runs - {log.path.stem}):
            log.say(f"other runs with checkpoints there: {', '.join(others)}")
        if log.file and re.search(rb"^target [\d.]+: [rm]", log.path.read_bytes(), re.M):
            log.say("its log says that this run was finished: now its last steps are done again")

def start_run(hp: Hyperparameters, runtime: Runtime) -> tuple:
    """(training tokens, validation tokens, what the log tells of the run, its Progress).
    Collective. Raises UserError where data, compiler or checkpoint are unfit."""
    track, device = TRACKS[hp.track], runtime.device
    train_stream = TokenStream(track.train_files, track, hp.batch_size * hp.sequence_length + 1)
    val_stream = TokenStream(track.val_files, track, track.val_tokens + 1)
    data = val_stream.fingerprint(track.val_tokens + 1), train_stream.fingerprint(2**26)
    dtype = fast_dtype(device) if hp.dtype == "auto" else hp.dtype
    record = runtime.agree({
        "command": sys.argv, "script": os.path.relpath(__file__, ROOT),
        "hyperparameters": dataclasses.asdict(hp), "world_size": runtime.world_size,
        "stage_tokens": [s.batch * hp.batch_size * hp.sequence_length for s in hp.stages],
        "run_id": f"{hp.track}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}",
        "activations": dtype, "git_commit": _output_of("git rev-parse HEAD") or None,
        "git_dirty": bool(_output_of("git status --porcelain")), "target": track.target,
        "compiled": compile_pays(hp, device) if hp.compile == "auto" else hp.compile == "on",
        "code_hash": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
        "data_fingerprint": "-".join(data), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "platform": platform.platform(),
        "torch": str(torch.__version__), "cuda": torch.version.cuda, "device": device_name(device),
        "device_count": runtime.world_size if runtime.cuda else os.cpu_count()})
    if record["compiled"] and (lacks := lacks_for_compile(device)):
        raise UserError(f"torch.compile needs {lacks}: apt install build-essential python3-dev (on "
                        "Debian and Ubuntu), or use --compile off")
    progress = Progress()
    if hp.resume not in ("", "latest"):
        with open_checkpoint(hp.resume) as saved:
            then, now = ({**run, **run["hyperparameters"]} for run in (saved, record))
            compared = {*record["hyperparameters"], "activations", "code_hash", "data_fingerprint"}
            wrong = [f"its {name} is {then.get(name)}, here {now[name]}"
                     for name in sorted(compared - MAY_CHANGE) if then.get(name) != now[name]]
            if wrong and not hp.resume_anyway:
                raise ValueError("; ".join(wrong))
            progress = Progress(*(f.type(saved["progress"][f.name])
                                  for f in dataclasses.fields(Progress)))
            if not progress.step == saved["optimizer"]["num_updates"] <= hp.num_steps:
                raise ValueError(f"it stands at step {progress.step}")
            if "OMP_NUM_THREADS" not in os.environ:  # a busy machine may have measured others
                torch.set_num_threads(min(saved["threads"], os.cpu_count()))
            record |= {"run_id": Path(saved["run_id"]).name, "threads": torch.get_num_threads()}
    return train_stream, val_stream, record, progress

def write_on(hp: Hyperparameters, runtime: Runtime) -> None:
    """Print what --resume's checkpoint writes after --prompt. Raises UserError."""
    with open_checkpoint(hp.resume) as saved:
        dtype = getattr(torch, saved["activations"])
        model = build_model(hp, runtime.device, dtype, flex=False)
        model.load_state_dict(saved["model"])
        step = saved["progress"]["step"]
    print(write_sample(model, hp, step, runtime.device))

# --- Command line ---------------------------------------------------------------------------------

def of_track(table: dict, track: str):
    """A table's entry for a track; one that has none takes the laptop's."""
    return table.get(track, table["laptop"])

class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage before the line that matters
        flags = [*self._option_string_actions]
        near = [f" (did you mean {flag}?)" for word in re.findall(r"--[\w-]+", message)
                if word not in flags for flag in difflib.get_close_matches(word, flags, 1)]
        raise UserError(f"{message}{''.join(near)}; python train_gpt.py --help lists every flag")

def parse_arguments(argv: list[str] | None = None) -> Hyperparameters:
    """The run that argv (default: sys.argv) asks for: its flags, else the settings of --resume's
    checkpoint, else the track's. Raises UserError on a bad flag, value or checkpoint."""
    parser = _Parser(usage="%(prog)s [flags]", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     argument_default=argparse.SUPPRESS, epilog="In brackets: defaults of the "
                     f"tracks {', '.join(PRESETS)}; (*): in proportion to --num_steps.")
    fields, then = dataclasses.fields(Hyperparameters), {}
    for f in fields:
        each = dict.fromkeys(str(preset.get(f.name, f.default)) for preset in PRESETS.values())
        kind = ({"action": "store_true"} if f.type is bool else
                {"type": f.type, "choices": f.metadata["choices"]})
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} ({', '.join(each)})", **kind)
    given = vars(parser.parse_args(argv))  # the flags that are there
    path = given.get("resume") or ("latest" if given.get("prompt") else "")
    if path == "latest":
        folder = Hyperparameters(entry=given.get("entry", "")).folder
        found = filter(Path.is_file, folder.glob(f"{given.get('track', '*')}-*_step*.pt"))
        path = str(max(found, key=os.path.getmtime, default=path))
    if path not in ("", "latest"):
        with open_checkpoint(path) as saved:  # all but the switches, which are of one start
            settings = {**saved["hyperparameters"], "dtype": saved["activations"]}
            then = vars(parser.parse_args([f"--{f.name}={settings[f.name]}" for f in fields
                                           if f.name in settings and f.type is not bool]))
    track = {**then, **given}.get("track", "fineweb" if torch.cuda.is_available() else "laptop")
    usual = {**{f.name: f.default for f in fields}, **of_track(PRESETS, track)}
    shorter = given.get("num_steps", usual["num_steps"]) / usual["num_steps"]
    for name in ("extension_steps", "momentum_warmup_steps", "momentum_cooldown_steps"):
        usual[name] = round(usual[name] * shorter)
    return Hyperparameters(**{**usual, **then, **given, "track": track, "resume": path})

def check_hyperparameters(hp: Hyperparameters, world_size: int) -> None:
    """Raises UserError, with the flag to change, where hp can't be run on world_size ranks."""
    for f in dataclasses.fields(hp):
        value, low, high = getattr(hp, f.name), f.metadata["least"], f.metadata["most"]
        if f.type in (int, float) and not low <= value <= high:  # nor NaN
            raise UserError(f"--{f.name} is {value}, expected from {low:,} to {high:,}")
    tables = len({layer.value_table for layer in hp.layers} - {None})
    layers = [i for i, layer in enumerate(hp.layers)
              if layer.attention not in ("short", "long", "paired", None)
              or layer.value_table not in (None, *range(tables if layer.attention else 0))
              or not {layer.skip_from, layer.attends_to} <= {None, *range(i)}]
    stages = [i for i, stage in enumerate(hp.stages)
              if stage.batch < 1 or len(stage.targets) != len(stage.targets_end)
              or any(old.until >= stage.until or old.tied < stage.tied for old in hp.stages[:i])]
    batch = math.gcd(*(stage.batch * hp.batch_size for stage in hp.stages))  # in each stage's
    tokens, records = TRACKS[hp.track].val_tokens, (ROOT / "records").resolve()
    for wrong, message in (
        (layers, f"layers {layers} of LAYERS: attention is short, long, paired or None, with it a "
         "value table 0, 1, ...; a layer reads earlier ones"),
        (stages, f"stages {stages} of STAGES: until rises, untied stays, batch >= 1, targets pair"),
        (hp.extension_steps >= hp.num_steps, f"--extension_steps {hp.extension_steps}, expected "
         f"less than --num_steps {hp.num_steps}; use --extension_steps {hp.num_steps // 40}"),
        (batch % world_size, f"{batch} sequences a step can't be divided over {world_size} ranks; "
         f"use --batch_size {-hp.batch_size // world_size * -world_size} or another NPROC"),
        (hp.sequence_length % 128, f"--sequence_length {hp.sequence_length} is no multiple of 128"),
        (tokens % hp.val_length or hp.val_length % 128, f"--val_length {hp.val_length} is no "
         f"multiple of 128 that divides {tokens:,} validation tokens; use a power of two (or, in a "
         f"track of your own, val_tokens {max(tokens // hp.val_length, 1) * hp.val_length:,})"),
        (hp.profile and hp.num_steps < 6, "--profile traces steps 3 to 5: it needs --num_steps 6"),
        (hp.prompt and hp.resume == "latest", f"no checkpoint in {hp.folder}: use --resume FILE"),
        (not hp.folder.resolve().is_relative_to(records), f"--entry {hp.entry!r} leaves records/"),
        (hp.model_dim % (4 * hp.num_heads), f"--model_dim {hp.model_dim} is no multiple of four "
         f"times --num_heads {hp.num_heads}: a quarter of a head's width turns with another one"),
        (hp.num_heads % 2 and any(row.attention == "paired" or row.mudd for row in hp.layers),
         f"--num_heads {hp.num_heads} is odd, expected even, for paired heads or MUDD's gates")):
        if wrong:
            raise UserError(message)

def run(argv: list[str] | None = None) -> int:
    """Parse, join the other ranks, train, leave them; the exit code. Raises UserError."""
    # Compiled kernels outlive the run here, so that the next one starts at once; /tmp loses them.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
    hp = parse_arguments(argv)
    runtime = start_runtime(hp)
    hp = runtime.agree(hp)  # another node may see other files
    try:
        code = (write_on if hp.prompt else train)(hp, runtime)
    except (RuntimeError, MemoryError) as error:
        if runtime.world_size > 1 and re.search("DistBackendError|Connection", repr(error)):
            time.sleep(5)  # the one that ended first speaks, and torchrun ends this one
            raise UserError(f"rank {runtime.rank} has lost another rank, which ended first; go on "
                            f"with --resume latest ({one_line(error)[-120:]})") from None
        if not re.search("MemoryError|allocate memory", repr(error)):
            raise
        less, length = hp.micro_batch // 2, hp.sequence_length
        if runtime.cuda:  # bytes, as simulated for the model of fineweb (./run.sh simulate)
            memory = torch.cuda.get_device_properties(runtime.device).total_memory
            token = 2.5e6 if hp.compile == "off" else 0.5e6
            less = min(less, int((0.8 * memory - 6e9) / (length * token)))
        flags = f"--micro_batch {less}" if less > 0 else (
            f"--micro_batch 1 --sequence_length {length // 2} --batch_size {2 * hp.batch_size} "
            f"--val_length {min(hp.val_length, length)}")
        raise UserError(f"out of memory on {device_name(runtime.device)}; use {flags}, or a "
                        "smaller --model_dim") from None
    if dist.is_initialized():
        dist.destroy_process_group()
    return code

def run_as_program(function: Callable, *args) -> int:
    """function(*args) as a command: its int result or 0; 2 after a UserError, 130 after Ctrl-C."""
    try:
        return function(*args) or 0
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except UserError as error:
        code, message = 2, "error: " + " ".join(str(error).split("\n"))
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # torchrun ends all ranks when one fails: rank 0 says what all have met
    show(f"{message}\n", sys.stderr)
    if dist.is_initialized():  # Python's exit would abort, or wait, where other ranks still compute
        os._exit(code)
    return code

def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_as_program(run, argv)

if __name__ == "__main__":
    sys.exit(main())
