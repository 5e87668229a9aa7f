#!/usr/bin/env python3
"""Train GPT-2 to a validation loss of 3.28 on FineWeb in as little time as possible, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py --track fineweb    # 8 GPUs
    python train_gpt.py --track fineweb     # one GPU: the same batches, as micro-batches
    python train_gpt.py --track laptop      # a CPU: bytes of Python source, half a minute
    python train_gpt.py --help              # every setting, with its unit and default

Measured on the laptop track: 16.8 s of training (median) for 170 steps, loss 1.0677 +- 0.0138; five
runs on one core of an AMD EPYC, compiled, bfloat16, torch 2.13. Logs:
records/studies/2026-11-29_PlainCode.
Predicted for the fineweb track: 1.08 minutes (error unknown) on 8 H100s for 1,225 steps, by a
simulator. It was never run there, so neither this time nor the loss of 3.28 is confirmed. Report:
records/candidates/2026-11-30_Pointer. modded-nanogpt's own record is 39.9 seconds.

The task and nearly all ideas come from modded-nanogpt,
https://github.com/KellerJordan/modded-nanogpt. This recipe ports its script of 2026-05-24 to plain
PyTorch and adds newer ideas, of which the largest are a sampled softmax and a pointer. "Record
2025-12-14" in a comment is the folder of that date in modded-nanogpt's records/, and "pull request
360" is one of modded-nanogpt; other ideas are cited by their arXiv number.

`./run.sh` sets up Python and the data, then starts this script. Each run writes a log to
records/scratch/<run_id>.txt: this source, the environment, the losses.

Shapes in comments: S sequences of T tokens; N = S T tokens in all; D model width; H heads of width
d; V vocabulary entries; K prediction targets of a token (the next one, the one after, ..., in some
stages the next one's prefix); W ranks. A function that is called "collective" must be called by all
ranks.
"""
import argparse
import base64
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Until training begins, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings hide our error line
try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}; run ./run.sh once, then: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def find_root() -> Path:
    """The repository: the nearest folder above this file that has run.sh, data/ and records/. So a
    copy of this script in records/ finds it, too. Without one, the working directory."""
    for folder in Path(__file__).resolve().parents:
        if all((folder / name).exists() for name in ("run.sh", "data", "records")):
            return folder
    return Path.cwd()


ROOT = find_root()


class UserError(Exception):
    """A mistake that the user can fix: one line on stderr and exit code 2, no traceback."""


# --- Tracks and settings --------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """A task. A new script may change everything except this. Paths are relative to the
    repository."""
    train_files: str
    val_files: str
    val_tokens: int   # size of a validation, which starts at the first validation file
    vocabulary: str   # file with the text of each token, see read_vocabulary; "": tokens are bytes
    vocab_size: int   # all token ids are smaller
    eot_token: int    # the last token id; stands before each document
    shuffled: bool    # sequences are read in a fixed random order, because neighbors are alike
    target: float     # validation loss to reach, in nats per token
    get_data: str     # the command that downloads or builds the data


TRACKS = {
    "fineweb": Track(
        train_files="data/fineweb10B/fineweb_train_*.bin",
        val_files="data/fineweb10B/fineweb_val_*.bin",
        val_tokens=10_485_760,
        vocabulary="data/gpt2_vocabulary.txt",
        vocab_size=50_257,
        eot_token=50_256,
        shuffled=False,
        target=3.28,
        get_data="python -m data.fineweb --shards 9"),
    "laptop": Track(
        train_files="data/laptop/laptop_train_*.bin",
        val_files="data/laptop/laptop_val_*.bin",
        val_tokens=262_144,
        vocabulary="",
        vocab_size=257,
        eot_token=256,
        shuffled=True,
        target=1.10,
        get_data="python -m data.laptop"),
}


class Layer(NamedTuple):
    """The architecture of one layer. Layers are counted from 0."""
    attention: str | None         # "short" or "long" window, "paired" heads; None: only an MLP
    # A wide head's queries and keys have d dimensions, of which half are rotated by the position. A
    # narrow head's have d / 2, all rotated. Long layers are wide, because their key offset needs
    # the half that is not rotated.
    narrow_qk: bool
    value_table: int | None       # which table of value embeddings (of the token) is added to V
    skip_from: int | None         # earlier layer whose output is added to this layer's input
    attn_input_layer: int | None  # earlier layer whose output attention reads; None: its own input
    xsa: bool                     # learn to remove the token's own value from attention's output
    mudd: bool                    # each token predicts the weights with which the block adds up its
                                  # terms; else they are learned numbers
    head_skip_init: float | None  # initial weight of the layer's output in Readout; None: not added


LAYERS = {
    "fineweb": (
        # Paired heads: record 2026-01-07. Value tables: 2026-02-03. No attention in layer 6:
        # 2025-09-21. Skip: 2025-11-18. Attention input: 2026-03-06. XSA (exclusive self-attention):
        # 2026-04-29. MUDD (multiway dynamic dense connections) and head_skip_init: 2026-04-22.
        # Narrow queries and keys: pull request 349.
        #     attention  narrow  value_table  skip_from  attn_input  xsa    mudd   head_skip_init
        Layer("paired",  True,   None,        None,      None,       False, False, None),  # 0
        Layer("short",   True,   0,           None,      None,       True,  False, None),  # 1
        Layer("paired",  True,   1,           None,      None,       False, False, None),  # 2
        Layer("long",    False,  None,        None,      None,       True,  False, 0.0),  # 3
        Layer("short",   True,   None,        None,      None,       True,  False, None),  # 4
        Layer("paired",  True,   None,        None,      None,       False, False, None),  # 5
        Layer(None,      False,  None,        3,         None,       False, False, None),  # 6
        Layer("short",   True,   None,        None,      None,       True,  False, -0.5),  # 7
        Layer("short",   True,   2,           None,      7,          True,  False, None),  # 8
        Layer("paired",  True,   3,           None,      7,          False, False, 0.0),  # 9
        Layer("long",    False,  4,           None,      7,          True,  True,  None)),  # 10
    "laptop": (
        Layer("long",    False,  0,           None,      None,       False, False, None),
        Layer("paired",  False,  0,           None,      None,       False, False, None)),
}


class Stage(NamedTuple):
    """The settings of one part of the run."""
    until: float           # its end, as a fraction of the steps before the extension; inf: the
                           # extension, the last steps, which keep the lowest learning rate
    batch_multiplier: int  # a step trains on batch_multiplier * batch_size sequences
    window: int            # in a long layer, a token sees this many tokens before it
    max_doc_len: int       # documents are cut to this many tokens; 0: not cut. If any stage cuts
                           # documents, all sequences of the run begin with a document; else the
                           # text is cut into sequences anywhere
    lr_multiplier: float   # of all learning rates, before they decay to lr_floor
    # Multi-token prediction: weights of the losses of the next token, the one after, ..., at the
    # beginning and at the end of the stage, with linear interpolation between.
    mtp_weights: tuple[float, ...]
    mtp_weights_end: tuple[float, ...]
    # Weights of the loss of one more target, the next token's prefix (see prefix_table), at the
    # beginning and at the end of the stage.
    prefix_weights: tuple[float, float]
    tied: bool             # embedding and head are one matrix
    softmax_size: int      # vocabulary entries in the sampled softmax; 0: all of them


STAGES = {
    "fineweb": (
        # Windows: record 2025-09-03. Batches and learning rates: 2025-11-29, 2025-12-22. Documents:
        # 2026-02-10. Multi-token prediction, untying: 2025-12-22. Prefixes: pull request 337 of
        # 2026-07-13. Extension: 2025-09-21. Sampled softmax: pull request 360 of 2026-08-31.
        Stage(until=1 / 3, batch_multiplier=1, window=384, max_doc_len=896, lr_multiplier=1.0,
              mtp_weights=(1, 0.5, 0.25), mtp_weights_end=(1, 0.5, 0), prefix_weights=(0.25, 0.25),
              tied=True, softmax_size=10_240),
        Stage(until=2 / 3, batch_multiplier=2, window=896, max_doc_len=2048, lr_multiplier=1.52,
              mtp_weights=(1, 0.5), mtp_weights_end=(1, 0), prefix_weights=(0.25, 0),
              tied=True, softmax_size=14_336),
        Stage(until=0.927, batch_multiplier=3, window=1408, max_doc_len=2048, lr_multiplier=1.73,
              mtp_weights=(1,), mtp_weights_end=(1,), prefix_weights=(0, 0),
              tied=False, softmax_size=24_576),
        Stage(until=1.0, batch_multiplier=3, window=1408, max_doc_len=2048, lr_multiplier=1.73,
              mtp_weights=(1,), mtp_weights_end=(1,), prefix_weights=(0, 0),
              tied=False, softmax_size=0),
        Stage(until=math.inf, batch_multiplier=3, window=1664, max_doc_len=2048, lr_multiplier=1.73,
              mtp_weights=(1,), mtp_weights_end=(1,), prefix_weights=(0, 0),
              tied=False, softmax_size=0)),
    "laptop": (
        Stage(until=1.0, batch_multiplier=1, window=256, max_doc_len=0, lr_multiplier=1.0,
              mtp_weights=(1,), mtp_weights_end=(1,), prefix_weights=(0, 0),
              tied=False, softmax_size=0),),
}


def setting(default, help: str, choices: tuple | None = None):
    """A field of Hyperparameters, which is also a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Hyperparameters:
    """The settings of one run. Each field is a flag. The defaults are those of the fineweb track;
    PRESETS lists what other tracks change."""
    track: str = setting("fineweb", "the task; default on a CPU: laptop", tuple(TRACKS))
    seed: int = setting(0, "random seed of the weights (the order of the data is fixed)")
    # work
    num_steps: int = setting(1225, "optimizer steps")
    extension: float = setting(10 / 1225, "fraction of the steps that come after the schedule")
    batch_size: int = setting(8, "sequences per step over all ranks; a stage multiplies it")
    sequence_length: int = setting(16_384, "tokens per training sequence")
    micro_batch: int = setting(3, "sequences that a rank computes at once, at most")
    val_length: int = setting(262_144, "tokens per validation sequence")
    # model
    num_heads: int = setting(6, "attention heads")
    model_dim: int = setting(768, "width of the residual stream")
    mlp_dim: int = setting(2816, "width of the MLPs")
    ngrams: int = setting(2, "n-gram embeddings for n from 2 to this")
    ngram_rows: int = setting(251_520, "rows of the hash table of each n")
    attention_scale: float = setting(0.085, "softmax scale of attention in the first stage")
    narrow_scale: float = setting(0.12, "the same for layers with narrow queries and keys")
    final_window: int = setting(2560, "window of the long layers in the last validation, in tokens")
    pointer_window: int = setting(
        8192, "tokens back from which the pointer (see Pointer) can copy; 0: no pointer")
    logit_cap: float = setting(23.0, "softcap: logits z become cap * sigmoid((z + shift) / scale)")
    logit_shift: float = setting(5.0, "softcap: shift")
    logit_scale: float = setting(7.5, "softcap: scale")
    # optimizers
    head_lr: float = setting(0.008, "Adam learning rate of the head and the token embedding")
    value_lr: float = setting(0.6, "Adam learning rate of the value embeddings")
    ngram_lr: float = setting(0.6, "Adam learning rate of the n-gram embeddings")
    ngram_rule: str = setting(
        "adam", "lazy_adam skips rows that did not occur in the batch", ("adam", "lazy_adam"))
    scalar_lr: float = setting(0.04, "Adam learning rate of scalars; see optimizer_groups")
    adam_every: int = setting(2, "steps per Adam update, which sums their gradients")
    adam_decay: float = setting(0.005, "weight decay of Adam's matrices; see optimizer_groups")
    muon_lr: float = setting(0.023, "Muon learning rate of the attention matrices")
    muon_decay: float = setting(1.2, "weight decay of Muon's matrices; see compute_update")
    muon_beta2: float = setting(0.9, "decay of NorMuon's second moment per step")
    momentum_start: float = setting(0.85, "Muon momentum at the first and the last step")
    momentum_end: float = setting(0.95, "Muon momentum in between")
    # modded-nanogpt: 300 and 50 steps of 1,405
    momentum_warmup: float = setting(300 / 1405, "fraction of the steps in which momentum rises")
    momentum_cooldown: float = setting(50 / 1405, "fraction of the steps in which it falls")
    two_momenta_from: float = setting(
        0.4, "fraction of the steps after which Muon has a fast and a slow momentum; 1: never")
    cooldown: float = setting(0.6, "fraction of the schedule in which learning rates decay")
    lr_floor: float = setting(0.15, "learning rates' factor at the end of the schedule")
    average_tail: float = setting(
        0.25, "fraction of the steps, at the end, over which weights are averaged; 0: no averages")
    # run
    val_every: int = setting(125, "steps between validations; 0: only at the end")
    val_tokens: int = setting(
        0, "tokens per validation; 0: all of the track's. With fewer, the run is no result")
    log_every: int = setting(10, "steps between log lines with the training loss")
    save_every: int = setting(0, "steps between checkpoints; 0: only when a signal stops the run")
    no_weights: bool = setting(False, "do not save the finished run's weights in <run_id>.pt")
    resume: str = setting("", "checkpoint to continue from, with its settings; or: latest")
    entry: str = setting("scratch", "folder below records/ for the log and the checkpoints")
    device: str = setting("auto", "auto: CUDA if there is a GPU", ("auto", "cuda", "cpu"))
    dtype: str = setting(
        "auto", "of activations; auto: bfloat16 if the device has instructions for it",
        ("auto", "bfloat16", "float32"))
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", ("auto", "on", "off"))
    profile: bool = setting(False, "write a trace of three training steps beside the log")

    @property
    def layers(self) -> tuple[Layer, ...]:
        return of_track(LAYERS, self.track)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return of_track(STAGES, self.track)

    @property
    def extension_steps(self) -> int:
        return round(self.extension * self.num_steps)

    @property
    def scheduled_steps(self) -> int:
        return self.num_steps - self.extension_steps

    @property
    def num_val_tokens(self) -> int:
        return self.val_tokens or TRACKS[self.track].val_tokens

    @property
    def folder(self) -> Path:
        return ROOT / "records" / self.entry

    @property
    def use_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())


PRESETS = {
    "fineweb": {},
    "laptop": dict(
        num_steps=170, extension=0.0, batch_size=8, sequence_length=256, micro_batch=8,
        val_length=2048, num_heads=2, model_dim=128, mlp_dim=512, ngrams=6, ngram_rows=65_521,
        attention_scale=0.125, final_window=256, pointer_window=0, logit_cap=30.0,
        logit_shift=0.0, head_lr=0.012, value_lr=2.4, ngram_lr=1.5, ngram_rule="lazy_adam",
        adam_every=1, adam_decay=0.0, muon_lr=0.045, muon_decay=0.0, muon_beta2=0.95,
        momentum_warmup=50 / 170, momentum_cooldown=0.0, two_momenta_from=1.0, cooldown=0.5,
        lr_floor=0.0, average_tail=0.0, val_every=85),
}


def of_track(table: dict, track: str):
    """The track's value in LAYERS, STAGES or PRESETS; a track without one uses the laptop's."""
    return table.get(track, table["laptop"])


# --- Schedules: pure functions of the step, so that a resumed run can't differ --------------------


def stage_ends(hp: Hyperparameters) -> list[int]:
    """The step at which each stage ends; the last stage ends at num_steps."""
    ends = [round(stage.until * hp.scheduled_steps) for stage in hp.stages[:-1]]
    return [*ends, hp.num_steps]


def stage_index(step: int, hp: Hyperparameters) -> int:
    """The index in hp.stages of the stage that contains a step; for num_steps, the last one."""
    return min(bisect_right(stage_ends(hp), step), len(hp.stages) - 1)


def sequences_before(step: int, hp: Hyperparameters) -> int:
    """The number of sequences that steps 0 to step - 1 train on, over all ranks."""
    total = 0
    stage_begin = 0
    for stage, stage_end in zip(hp.stages, stage_ends(hp), strict=True):
        steps_in_stage = max(min(step, stage_end) - stage_begin, 0)
        total += steps_in_stage * stage.batch_multiplier * hp.batch_size
        stage_begin = stage_end
    return total


def tokens_before(step: int, hp: Hyperparameters) -> int:
    """The number of tokens that steps 0 to step - 1 train on, over all ranks."""
    return sequences_before(step, hp) * hp.sequence_length


def lr_scale(step: int, hp: Hyperparameters) -> float:
    """The factor of all learning rates: the stage's multiplier, then a linear decay to lr_floor,
    which holds in the extension (trapezoid: arXiv 2405.18392; stages: record 2025-11-29)."""
    remaining = max(hp.scheduled_steps - step, 0) / hp.scheduled_steps
    decay = min(remaining / hp.cooldown, 1.0)  # 1 before the cooldown, 0 at the end of the schedule
    multiplier = hp.stages[stage_index(step, hp)].lr_multiplier
    return decay * multiplier + (1 - decay) * hp.lr_floor


def momentum_schedule(step: int, hp: Hyperparameters) -> float:
    """Muon's momentum: rises from momentum_start to momentum_end, stays, and falls back at the end
    (record 2025-09-30)."""
    warmup_steps = round(hp.momentum_warmup * hp.num_steps)
    cooldown_steps = round(hp.momentum_cooldown * hp.num_steps)
    fraction = 1.0
    if warmup_steps:
        fraction = min(fraction, step / warmup_steps)
    if cooldown_steps:
        fraction = min(fraction, (hp.num_steps - step) / cooldown_steps)
    return (1 - fraction) * hp.momentum_start + fraction * hp.momentum_end


class Momenta(NamedTuple):
    """Muon's momenta at a step; see muon_direction. Floats or 0-dim tensors."""
    nesterov: float     # share of the momentum in what Muon orthogonalizes; gradient: the rest
    fast: float         # decay of the fast momentum
    fast_weight: float  # weight of the fast momentum; the rest is the slow one's


SLOW_DECAY = 0.98  # of Muon's slow momentum


def muon_momenta(step: int, hp: Hyperparameters) -> Momenta:
    """Until two_momenta_from, one momentum, the scheduled one. Then two, a fast and a slow one
    (pull request 340, arXiv 2608.22994): a gradient in their weighted mean is 30 steps old on
    average. The scheduled momentum then only remains as Nesterov's share. The slow one is updated
    from the first step, so that it is complete when it is needed."""
    momentum = momentum_schedule(step, hp)
    if step < hp.two_momenta_from * hp.num_steps:
        return Momenta(nesterov=momentum, fast=momentum, fast_weight=1.0)
    return Momenta(nesterov=momentum, fast=0.85, fast_weight=0.4385)


def average_weight(step: int, hp: Hyperparameters) -> float:
    """How far the averages of the parameters move towards the parameters after a step, from 0 (not
    at all) to 1. They move in every fourth step of the last average_tail of the run, the last step
    included, with a time constant of half that tail. Published: 150 steps and the last 298 of 1,194
    (record 2026-08-30)."""
    every = 4
    tail_steps = round(hp.average_tail * hp.num_steps)
    steps_left = hp.num_steps - (step + 1)
    if steps_left >= tail_steps or steps_left % every:
        return 0.0
    return min(every / (tail_steps / 2), 1.0)


def short_window(window: int) -> int:
    """Positions before its own that a query sees in short and paired layers: half the window,
    rounded down to a multiple of 128, but at least 128 or the whole window. A paired layer has two
    positions per token, so its queries see half as many tokens."""
    return max(window // 256 * 128, min(window, 128))


def rotary_frequencies(index: int, hp: Hyperparameters) -> tuple[Tensor, float]:
    """The rotary frequencies of stage `index`, (d / 4,) radians per position, and the softmax scale
    of attention. A token is one position; for paired heads it is two.

    Half of a wide head's dimensions are not rotated, and the base is 1024 (record 2024-12-17). When
    the window grows, dimensions that rotate fewer than 32 times in it are slowed down (YaRN, arXiv
    2309.00071, record 2025-09-10)."""
    frequencies = 1024 ** -torch.linspace(0, 1, hp.model_dim // hp.num_heads // 4)
    scale = hp.attention_scale
    for before, stage in itertools.pairwise(hp.stages[:index + 1]):
        old, new = before.window, stage.window
        rotations = old * frequencies / (2 * math.pi)
        keep = ((rotations - 1) / 31).clamp(0, 1)  # 1: rotates often enough to keep its frequency
        frequencies = frequencies * (old / new + keep * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


class Schedule:
    """What the model and the optimizer need to know about the step.

    Values that the compiled model uses are tensors: torch.compile would recompile for each
    new Python number. softmax_size is a Python number on purpose, because it sets shapes; each of
    its values is compiled once, in the warm-up."""
    def __init__(self, step: int, hp: Hyperparameters, device: torch.device):
        index = stage_index(step, hp)
        stage = hp.stages[index]
        previous = hp.stages[stage_index(max(step - 1, 0), hp)]
        self.lr_scale = lr_scale(step, hp)
        self.momenta = muon_momenta(step, hp)
        self.average_weight = average_weight(step, hp)
        self.tied = stage.tied
        self.unties = previous.tied and not stage.tied  # the embedding becomes a copy of the head
        self.softmax_size = stage.softmax_size

        # hp.stages is an argument because the cache compares arguments, and STAGES is not in hp.
        tensors = _stage_tensors(index, step == hp.num_steps, hp, hp.stages, device)
        # windows: by kind of mask, 0-dim; frequencies: (d / 4,); attention_scale: 0-dim
        self.windows, self.frequencies, self.attention_scale, weights, weights_end = tensors
        begin, end = [0, *stage_ends(hp)][index:index + 2]
        done = min((step - begin) / max(end - begin, 1), 1.0)
        # Of the next token, the one after, ..., and of the prefix, if has_prefix: (K,)
        self.target_weights = torch.lerp(weights, weights_end, done)
        self.has_prefix = any(stage.prefix_weights)


@functools.lru_cache(maxsize=64)  # without the cache, each step would wait for copies to the GPU
def _stage_tensors(index: int, final: bool, hp: Hyperparameters, stages: tuple[Stage, ...],
                   device: torch.device) -> tuple:
    """Windows by kind of mask (0-dim; record 2025-09-03), rotary frequencies, softmax scale,
    and the weights of the targets at the stage's begin and end. final: the validation after the
    last step, which uses a larger window (record 2025-09-15)."""
    stage = stages[index]
    frequencies, scale = rotary_frequencies(index, hp)
    window = torch.tensor(hp.final_window if final else stage.window, device=device)
    short = torch.tensor(short_window(stage.window), device=device)
    pointer = torch.tensor(hp.pointer_window, device=device)
    windows = {"long": window, "short": short, "paired": short, "pointer": pointer}
    weights, weights_end = stage.mtp_weights, stage.mtp_weights_end
    if any(stage.prefix_weights):
        begin, end = stage.prefix_weights
        weights, weights_end = (*weights, begin), (*weights_end, end)
    weights = torch.tensor(weights, dtype=torch.float32, device=device)
    weights_end = torch.tensor(weights_end, dtype=torch.float32, device=device)
    return windows, frequencies.to(device), torch.tensor(scale, device=device), weights, weights_end


# --- Attention: one definition of the mask for both kernels (which are machinery, further down) ---


def document_start(tokens: Tensor, eot_token: int) -> Tensor:
    """The position at which each token's document begins, (N,), for S sequences (S, T) that are
    concatenated. Each sequence also begins a document."""
    position = torch.arange(tokens.numel(), device=tokens.device)
    is_doc_start = tokens == eot_token
    is_doc_start[:, 0] = True
    return torch.where(is_doc_start.flatten(), position, 0).cummax(0).values


def first_visible_key(start: Tensor, window: Tensor) -> Tensor:
    """The earliest key that each query sees, (N,): in its document, at most `window` positions back
    (so with its own position, a query sees window + 1 keys). start: document_start's result."""
    return torch.maximum(start, torch.arange(len(start), device=start.device) - window)


def visible(query: Tensor, key: Tensor, first_key: Tensor, strict: bool = False) -> Tensor:
    """The mask: whether a query sees a key. All three are positions and broadcast; first_key is the
    query's value of first_visible_key. strict: a query does not see its own position."""
    return (first_key <= key) & ((key < query) if strict else (key <= query))


# BlockMask for FlexAttention (compiled, on CUDA); else first_visible_key's result, (N,).
Mask = BlockMask | Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, max_window: int) -> Tensor:
    """softmax(q k^T) v over the visible keys. q, k: (N, H, e), v and the result: (N, H, d); for
    paired heads, 2 N and H / 2 instead. max_window: an upper bound of the mask's window, which sets
    shapes on a CPU."""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # (H, N, d)
    if isinstance(mask, BlockMask):
        y = flex_attention(q[None], k[None], v[None], block_mask=mask, scale=1.0)[0]
    else:
        y = chunked_attention(q, k, v, mask, max_window)
    return y.transpose(0, 1)


def point(q: Tensor, k: Tensor, sink: Tensor, tokens: Tensor, targets: Tensor, mask: Mask,
          max_window: int) -> tuple[Tensor, Tensor]:
    """Attention weights of each position over the visible earlier ones and a sink. Returns p_copy,
    the sum of the weights of positions whose token is the target, and p_sink, the sink's weight,
    (N,) float32 each.

    q, k: (N, d); sink: the sink's scores, (N,); tokens, targets: (N,); mask: strict, because a
    position's own token is no prediction. Only the target's p_copy is computed, because those of
    all tokens would be (N, V)."""
    if isinstance(mask, BlockMask):
        # Head 0 sees all positions, head 1 only those whose token is the target. We need each
        # head's log-sum-exp, not its output, so the values are a dummy, as narrow as allowed.
        def score_mod(score, batch, head, query, key):
            is_seen = (head == 0) | (tokens[key] == targets[query])
            return torch.where(is_seen, score, -math.inf)

        two_q, two_k = (t.expand(1, 2, *t.shape) for t in (q, k))
        y, aux = flex_attention(two_q, two_k, two_k[..., :16], score_mod, mask, scale=1.0,
                                return_aux=AuxRequest(lse=True))
        # Inductor can't compile the backward pass if the output is not used: so use it, times 0.
        # The log-sum-exps are -inf where a head sees no position.
        log_all, log_target = aux.lse[0] + 0 * y[0, ..., 0]
        log_total = torch.logaddexp(log_all, sink)
        return (log_target - log_total).exp(), (sink - log_total).exp()
    chunks = Chunks(len(q), max_window)  # chunks of queries, each with the keys that it can see
    weights, p_sink = chunked_pointer_weights(q, k, sink, mask, chunks)
    token_of_key = chunks.of_keys(tokens[None, :, None]).mT
    is_target = token_of_key == chunks.of_queries(targets[None, :, None])
    p_copy = (weights * is_target[0]).sum(dim=-1, keepdim=True)
    return chunks.join(p_copy[None]).flatten(), chunks.join(p_sink[None]).flatten()


# --- Vocabulary: which tokens are alike -----------------------------------------------------------


@functools.cache
def read_vocabulary(track: Track) -> tuple[bytes, ...]:
    """The text of each token; b"" for the end-of-text token. A vocabulary file has one token per
    line, in base64. Raises UserError if it is missing or too short."""
    tokens = [bytes([byte]) for byte in range(256)]
    if track.vocabulary:
        try:
            lines = (ROOT / track.vocabulary).read_bytes().split()
            tokens = [base64.b64decode(line, validate=True) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"can't read the vocabulary {ROOT / track.vocabulary}: {error}; run: "
                            f"git checkout {track.vocabulary}") from None
    require(len(tokens) >= track.eot_token, f"the vocabulary {ROOT / track.vocabulary} has "
            f"{len(tokens)} tokens, expected at least {track.eot_token}")
    return *tokens[:track.eot_token], b""


@functools.cache
def prefix_table(vocabulary: tuple[bytes, ...]) -> list[int]:
    """For each token, the longest other token with which its text begins; -1 if there is none. It
    is one more target in the first stages, easier than the token itself (modded-nanogpt pull
    request 337)."""
    id_of = {token: i for i, token in enumerate(vocabulary)}
    prefix_of = []
    for token in vocabulary:
        prefixes = (token[:length] for length in range(len(token) - 1, 0, -1))
        prefix_of.append(next((id_of[p] for p in prefixes if p in id_of), -1))
    return prefix_of


@functools.cache
def token_classes(vocabulary: tuple[bytes, ...]) -> list[int]:
    """For each token, its class: the id of the first token with the same text, if case, accents,
    compatibility forms of characters (Unicode NFKC) and white space at the ends are ignored. Tokens
    without any text left (parts of a character, end-of-text) are alone in their class. NGramEmbed
    uses them (modded-nanogpt pull request 375)."""
    first_of = {}
    classes = []
    for i, token in enumerate(vocabulary):
        try:
            # NFKC unifies forms of characters, NFD separates letters and accents.
            text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", token.decode()))
        except UnicodeDecodeError:  # a part of a character
            text = ""
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")  # Mn: accents
        text = re.sub(r"[ \t\r\n]+", " ", text.lower())
        text = text.strip() or text[:1]  # white space alone stays one blank
        classes.append(first_of.setdefault(text, i) if text else i)
    return classes


# --- Model ----------------------------------------------------------------------------------------

LOG2_E = math.log2(math.e)  # a GPU has one instruction for exp2 and several for exp
GATE_DIMS = 12  # gates read only the first 12 dimensions of their input (record 2025-08-23)


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without learned scale. Its eps is float32's machine epsilon.
    """
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Module):
    """`parts` linear maps without bias, computed as one product; Muon orthogonalizes each of them
    separately.

    The weight is float32, (parts, out, in), or (parts, in, out) if can_transpose and in > out, so
    that Muon only sees tall matrices. It starts at zero or uniform with standard deviation
    0.5 / sqrt(in) (record 2026-01-30)."""
    def __init__(self, in_features: int, out_features: int, parts: int = 1, zero: bool = False,
                 can_transpose: bool = True):
        super().__init__()
        self.transposed = can_transpose and in_features > out_features
        shape = (in_features, out_features) if self.transposed else (out_features, in_features)
        bound = 0.0 if zero else 0.5 * (3 / in_features) ** 0.5
        self.weight = nn.Parameter(torch.empty(parts, *shape).uniform_(-bound, bound))

    def matrix(self) -> Tensor:
        """All maps below each other, (parts * out, in)."""
        weight = self.weight.mT if self.transposed else self.weight
        return weight.flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype))  # (..., parts * out)


def gate(weight: Tensor, x: Tensor) -> Tensor:
    """sigmoid(x weight^T), (N, H), for x (N, GATE_DIMS) and weight (H, GATE_DIMS). Weights of gates
    start at zero, so that gates start at 1/2."""
    return torch.sigmoid(F.linear(x, weight.to(x.dtype)))


class Mudd(nn.Module):
    """A small MLP by which each token x (N, D) predicts its own n weights, (n, N, 1). At
    initialization they are `init` for every token (MUDD, arXiv 2502.12170, record 2026-04-22).

    The parameters are float32. In modded-nanogpt these and the gates' are bfloat16, and the largest
    biases never change, because an Adam update of the learning rate, 0.002, is rounded away."""
    def __init__(self, model_dim: int, init: tuple[float, ...]):
        super().__init__()
        self.fc = nn.Parameter(torch.empty(64, model_dim).uniform_(-1, 1) / model_dim ** 0.5)
        self.proj = nn.Parameter(torch.zeros(len(init), 64))
        # Stored 10 times too large, and multiplied by 0.1 below: so Adam's steps, which do not
        # depend on the scale, move a coefficient by a tenth of the learning rate.
        self.bias = nn.Parameter(10 * torch.tensor(init))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, self.fc.to(x.dtype)))
        weights = 0.1 * (F.linear(hidden, self.proj.to(x.dtype)).float() + self.bias)
        return weights.to(x.dtype).T[..., None]


def weighted_sum(weights: Tensor, activations: list[Tensor]) -> Tensor:
    """The sum of n activations (N, D), weighted by (n, N, 1)."""
    return sum(weight * x for weight, x in zip(weights, activations, strict=True))


def rotary_tables(frequencies: Tensor, N: int) -> Tensor:
    """Cosines and sines for positions 0 to N - 1 (arXiv 2104.09864), (2, N, 1, d / 4), float32."""
    angle = torch.arange(N, device=frequencies.device)[:, None, None] * frequencies
    return torch.stack([angle.cos(), angle.sin()])


def paired_rotary_tables(frequencies: Tensor, N: int, H: int) -> Tensor:
    """The same for paired heads, (2, N, H, d / 4).

    Head h of token t is rotated as position 2 t + (h mod 2), but stands at position
    2 t + (h >= H / 2) in the attention. With 6 heads these differ for heads 1 and 4: their two
    positions are rotated in swapped order. modded-nanogpt does so, too, whether or not on purpose.
    """
    tables = rotary_tables(frequencies, 2 * N)
    return tables.view(2, N, 2, -1).repeat(1, 1, H // 2, 1)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs of each head's dimensions by the angles of their positions: dimensions i and
    i + n for the n frequencies. The others stay. x and the result: (N, H, e); rotary: (2, N, H or
    1, n)."""
    n = rotary.size(-1)
    a, b, fixed = x.float().split([n, n, x.size(-1) - 2 * n], dim=-1)
    cos, sin = rotary
    return torch.cat([a * cos + b * sin, b * cos - a * sin, fixed], dim=-1).to(x.dtype)


class NGramEmbed(nn.Module):
    """The sum of hashed embeddings of the 2- to n-grams that end at each token (bigrams: record
    2026-01-19; longer ones: arXiv 2412.09871). Tables start at zero. sparse: their gradients are
    sparse tensors.

    Each token is first replaced by its class (see token_classes). So "The cat" and "the cat" are
    one n-gram, on purpose, and fewer different n-grams fall into the same row by chance. Where that
    still happens, signs help: the n-gram's hash also chooses one of NUM_SIGNS fixed random vectors
    of +1 and -1 by which the row is multiplied, so n-grams in one row seldom read the same
    embedding (modded-nanogpt pull requests 375 and 299)."""
    # The first two are those of record 2026-01-19.
    MULTIPLIERS = (36_313, 27_191, 51_637, 14_251, 60_649, 22_109)
    NUM_SIGNS = 8192

    def __init__(self, hp: Hyperparameters, sparse: bool):
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(hp.ngram_rows, hp.model_dim, sparse=sparse)
            for _ in range(2, hp.ngrams + 1))
        for table in self.tables:
            nn.init.zeros_(table.weight)
        track = TRACKS[hp.track]
        vocabulary = read_vocabulary(track)
        # Bytes stay classes of their own: on the laptop track, classes made the loss higher.
        classes = token_classes(vocabulary) if track.vocabulary else range(len(vocabulary))
        classes = torch.tensor(classes)
        # Drawn on the CPU, with a seed of their own: the same signs in every run, on every device.
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (self.NUM_SIGNS, hp.model_dim), generator=generator, device="cpu")
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("signs", (2.0 * signs - 1).to(classes.device), persistent=False)

    def forward(self, tokens: Tensor, position_in_document: Tensor) -> Tensor:
        """Both (N,). Returns (N, D). An n-gram that would begin before the document uses the last
        row."""
        classes = self.classes[tokens]
        code = self.MULTIPLIERS[0] * classes
        total = None
        for distance, table in enumerate(self.tables, start=1):
            code = code ^ (self.MULTIPLIERS[distance] * classes.roll(distance))
            last_row = table.num_embeddings - 1
            is_inside = position_in_document >= distance
            row = torch.where(is_inside, code % last_row, last_row)
            embed = table(row) * self.signs[torch.where(is_inside, code % self.NUM_SIGNS, 0)]
            total = embed if total is None else total + embed
        return total


class Attention(nn.Module):
    """Causal self-attention with QK-norm (arXiv 2010.04245), rotary embeddings, gates, and value
    embeddings: further embeddings of the tokens, which are added to V."""
    def __init__(self, hp: Hyperparameters, layer: Layer):
        super().__init__()
        self.num_heads = hp.num_heads
        self.kind = layer.attention
        window = max(stage.window for stage in hp.stages)
        self.max_window = short_window(window)
        if self.kind == "long":
            self.max_window = max(window, hp.final_window)
        # Muon orthogonalizes Q and K in matrices of two adjacent heads (record 2026-04-08; these
        # are not the pairs of paired heads), V and proj as a whole.
        num_matrices = hp.num_heads // 2 if hp.num_heads % 2 == 0 else 1
        qk_dim = hp.model_dim // 2 if layer.narrow_qk else hp.model_dim  # of all heads
        self.qk = Linear(hp.model_dim, qk_dim // num_matrices, parts=2 * num_matrices)
        # The scale begins at attention_scale, so that of narrow layers begins at narrow_scale.
        self.scale_factor = hp.narrow_scale / hp.attention_scale if layer.narrow_qk else 1.0
        self.v = Linear(hp.model_dim, hp.model_dim)
        self.proj = Linear(hp.model_dim, hp.model_dim)
        self.gate = nn.Parameter(torch.zeros(hp.num_heads, GATE_DIMS))
        self.v_lambda = nn.Parameter(torch.tensor(0.5))     # factors of the maps V and proj
        self.proj_lambda = nn.Parameter(torch.tensor(1.0))  # (records 2025-12-10, 2025-12-11)
        self.value_gate = self.xsa_lambdas = None
        if layer.value_table is not None and not layer.mudd:
            self.value_gate = nn.Parameter(torch.zeros(hp.num_heads, GATE_DIMS))
        if layer.xsa:
            self.xsa_lambdas = nn.Parameter(torch.zeros(hp.num_heads))

    def forward(self, x: Tensor, value_embed: Tensor | None, is_doc_start: Tensor, rotary: Tensor,
                scale: Tensor, mask: Mask, value_gates: Tensor | None,
                v_skip: Tensor | None) -> Tensor:
        """x, value_embed and the result: (N, D). is_doc_start: (N,), a document's first token.
        rotary: (2, N, 1, d / 4), for paired heads (2, N, H, d / 4). scale: the softmax scale,
        0-dim. With MUDD, value_gates: gates of the value embeddings, (2, N, 1), one per half of the
        heads; v_skip: what is added to V, (N, D)."""
        N, D = x.shape
        H, d = self.num_heads, D // self.num_heads
        weight = torch.cat([self.qk.matrix(), self.v.matrix()]).to(x.dtype)
        qk_dim = (len(weight) - D) // 2  # of all heads
        q, k, v = F.linear(x, weight).split([qk_dim, qk_dim, D], dim=1)
        q, k, v = (t.view(N, H, -1) for t in (q, k, v))  # (N, H, e), (N, H, e), (N, H, d)

        v = self.v_lambda * v
        if v_skip is not None:
            v = v + v_skip.view_as(v)
        if value_embed is not None:  # gated (record 2025-12-29)
            if value_gates is not None:
                gates = value_gates.squeeze(-1).T.repeat_interleave(H // 2, dim=1)
            else:
                half = GATE_DIMS // 2
                gate_input = torch.cat([x[:, :half], value_embed[:, :half]], dim=-1)
                gates = 2 * gate(self.value_gate, gate_input)
            v = v + gates[..., None] * value_embed.view_as(v)

        q, k = rotate(norm(q), rotary), rotate(norm(k), rotary)
        if self.kind == "paired":
            # Paired heads (record 2026-01-07): heads h and h + H / 2 become one head over 2 N
            # positions, two per token.
            q, k, v = (t.reshape(2 * N, H // 2, -1) for t in (q, k, v))
        if self.kind == "long":
            # Key offset (record 2025-12-14), for which heads must be wide: the half of a key that
            # is not rotated comes from the previous token of the document.
            previous = torch.where(is_doc_start[:, None, None], k, k.roll(1, 0))
            k = torch.cat([k[..., :d // 2], previous[..., d // 2:]], dim=-1)
        y = attention(self.scale_factor * scale * q, k, v, mask, self.max_window)
        y, v = y.reshape(N, H, d), v.reshape(N, H, d)

        if self.xsa_lambdas is not None:  # XSA (arXiv 2603.09078)
            dot = (y * v).sum(-1, keepdim=True)
            along_v = dot / (v * v).sum(-1, keepdim=True).clamp(min=1e-8)
            y = y - torch.tanh(self.xsa_lambdas).to(y.dtype)[:, None] * along_v * v
        y = self.proj_lambda * gate(self.gate, x[:, :GATE_DIMS])[..., None] * y
        return self.proj(y.flatten(1))


class MLP(nn.Module):
    """Two linear maps with ReLU squared (arXiv 2109.08668) between them."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.fc = Linear(hp.model_dim, hp.mlp_dim)
        self.proj = Linear(hp.mlp_dim, hp.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class InputEmbedding(nn.Module):
    """The normed token embedding x0, which every layer with attention adds. Smear (record
    2025-09-18): each token adds a gated part of the previous token's embedding."""
    def __init__(self):
        super().__init__()
        self.smear_gate = nn.Parameter(torch.zeros(1, GATE_DIMS))
        self.smear_lambda = nn.Parameter(torch.tensor(0.0))
        self.ngram_lambda = nn.Parameter(torch.tensor(0.05))  # GPT.body uses it, for layer 0

    def forward(self, embed: Tensor, is_doc_start: Tensor, dtype: torch.dtype) -> Tensor:
        """embed: (N, D), the tokens' rows of the table. Returns x0, (N, D), in dtype."""
        embed = embed.to(dtype)
        previous = torch.where(is_doc_start[:, None], 0, embed.roll(1, 0))
        smear = self.smear_lambda * gate(self.smear_gate, embed[:, :GATE_DIMS])
        return norm(embed + smear * previous)


class Block(nn.Module):
    """A transformer block: a gated skip from an earlier layer, attention, MLP.

    x0 and the n-gram embeddings are added after attention (records 2025-11-18, 2026-02-12); a layer
    without attention adds neither, and layer 0, whose input has the n-grams already, adds only x0.
    With MUDD, each token predicts the block's coefficients, and weighted sums of (layer 0's input,
    attention's input, x) are added to V and to x."""
    def __init__(self, hp: Hyperparameters, layer: Layer):
        super().__init__()
        self.attention = Attention(hp, layer) if layer.attention else None
        self.mlp = MLP(hp)
        # Records 2025-11-18 (more than 1 at initialization) and 2026-02-12 (one for each branch).
        resid = (1.1 ** 0.5, 1.1 ** 0.5)  # of x before attention and before the MLP
        branch = (1.0, 1.0, 0.0, 0.05)    # of attention, MLP, x0, n-grams
        self.resid_lambdas = self.branch_lambdas = self.mudd = None
        if layer.mudd:
            # Value gates start at twice those of other layers, as in modded-nanogpt.
            to_v, to_x, value_gates = (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (2.0, 2.0)
            self.mudd = Mudd(hp.model_dim, (*to_v, *to_x, *value_gates, *resid, *branch))
        else:
            self.resid_lambdas = nn.Parameter(torch.tensor(resid))
            self.branch_lambdas = nn.Parameter(torch.tensor(branch))
        if layer.skip_from is not None:
            self.skip_lambda = nn.Parameter(torch.tensor(-1.5))
            self.skip_gate = nn.Parameter(torch.zeros(1, GATE_DIMS))

    def forward(self, x: Tensor, attn_input: Tensor, x0: Tensor, ngram: Tensor | None,
                h0: Tensor | None, skip: Tensor | None, value_embed: Tensor | None,
                is_doc_start: Tensor, rotary: Tensor | None, scale: Tensor,
                mask: Mask | None) -> Tensor:
        """x, attn_input, x0, ngram, h0, skip, value_embed and the result: (N, D). h0: layer 0's
        input, for MUDD; skip: the earlier layer's output. The last four are Attention's."""
        resid, branch = self.resid_lambdas, self.branch_lambdas  # (2,), (4,)
        value_gates = v_skip = None
        if self.mudd is not None:  # resid and branch are predicted: (2, N, 1), (4, N, 1)
            to_v, to_x, value_gates, resid, branch = self.mudd(x).split([3, 3, 2, 2, 4])
            v_skip = weighted_sum(to_v, [h0, attn_input, x])
            x = x + weighted_sum(to_x, [h0, attn_input, x])
        if skip is not None:
            skip = 2 * gate(self.skip_gate, x0[:, :GATE_DIMS]) * skip
            x = x + torch.sigmoid(self.skip_lambda) * skip
        if self.attention is not None:
            y = self.attention(
                norm(attn_input), value_embed, is_doc_start, rotary, scale, mask,
                value_gates=value_gates, v_skip=v_skip)
            x = resid[0] * x + branch[0] * y + branch[2] * x0
            if ngram is not None:
                x = x + branch[3] * ngram
        return resid[1] * x + branch[1] * self.mlp(norm(x))


class Readout(nn.Module):
    """What the head and the pointer read: the normed output of the last layer.

    Before the norm, a MUDD module adds a weighted sum of earlier activations, with weights that
    each token predicts: the outputs of the layers with head_skip_init, layer 0's input, the first
    value embedding. One weight starts at -0.5, so that this layer's output is partly removed
    ("backout", record 2025-10-04)."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        init = [layer.head_skip_init for layer in hp.layers if layer.head_skip_init is not None]
        self.mudd = None
        if init:
            has_values = any(layer.value_table is not None for layer in hp.layers)
            init += [0.0, 0.0] if has_values else [0.0]
            self.mudd = Mudd(hp.model_dim, tuple(init))

    def forward(self, x: Tensor, sources: list[Tensor]) -> Tensor:
        """x, each of sources and the result: (N, D)."""
        if self.mudd is not None:
            x = x + weighted_sum(self.mudd(x), sources)
        return norm(x)


class Pointer(nn.Module):
    """A pointer to earlier tokens of the document, which predicts that one of them comes next
    (pointer sentinel mixture, arXiv 1609.07843; in this form: modded-nanogpt pull request 379).

    Each position attends with one head, without any encoding of positions, to the earlier positions
    of its document, and predicts their tokens with the attention weights as probabilities. A sink
    is one more thing to attend to, for when there is nothing to copy. How much this prediction
    counts is decided by a logit of the head, the gate: see CappedCrossEntropy."""
    DIM = 128

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        bound = (3 / hp.model_dim) ** 0.5
        shape = (2, self.DIM, hp.model_dim)  # the maps of queries and keys
        self.qk = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.sink = nn.Parameter(torch.randn(self.DIM) * self.DIM ** -0.5)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """state: Readout's (N, D). Returns queries and keys, (N, DIM), and the sink's scores, (N,)
        float32. QK-norm: without it the scores can grow until the pointer learns no more."""
        qk = F.linear(state, self.qk.flatten(0, 1).to(state.dtype))
        q, k = norm(qk.view(len(state), 2, self.DIM)).unbind(1)
        q = self.gain * self.DIM ** -0.5 * q.float()
        return q.to(state.dtype), k, q @ self.sink


class GPT(nn.Module):
    """The model. flex: attention by FlexAttention; sparse: sparse gradients of the n-gram tables.
    """
    def __init__(self, hp: Hyperparameters, flex: bool = False, sparse: bool = False):
        super().__init__()
        self.hp = hp
        self.flex = flex
        self.eot_token = TRACKS[hp.track].eot_token
        # The head's row whose logit decides how much the pointer counts; see CappedCrossEntropy.
        self.gate_row = TRACKS[hp.track].vocab_size if hp.pointer_window else None
        # One more than the vocabulary, for the pointer's gate. Multiples of 128: faster kernels.
        padded_vocab_size = 128 * math.ceil((TRACKS[hp.track].vocab_size + 1) / 128)
        # The order of the modules decides their random initial weights.
        self.head = Head(hp, padded_vocab_size)
        self.readout = Readout(hp)
        self.pointer = Pointer(hp) if hp.pointer_window else None
        self.embed = nn.Embedding(padded_vocab_size, hp.model_dim)
        self.embed.weight.data.copy_(self.head.linear.weight[0])
        num_tables = len({layer.value_table for layer in hp.layers} - {None})
        self.value_embed = None
        if num_tables:  # all tables side by side: one lookup
            self.value_embed = nn.Embedding(padded_vocab_size, num_tables * hp.model_dim)
        self.ngram = NGramEmbed(hp, sparse)
        prefix_of = torch.tensor(prefix_table(read_vocabulary(TRACKS[hp.track])))
        self.register_buffer("prefix_of", prefix_of, persistent=False)
        self.input_embedding = InputEmbedding()
        self.blocks = nn.ModuleList(Block(hp, layer) for layer in hp.layers)
        # Attributes, so that compile_model can put compiled versions in their place.
        self.mask_tensors = mask_tensors
        self.sample_vocabulary = sample_vocabulary

    def masks(self, start: Tensor, schedule: Schedule, flex_pointer: bool = True) -> dict:
        """The mask of each kind of attention, and the pointer's, from document_start's (N,). For
        sampling text, the pointer needs one that is not FlexAttention's."""
        kinds = {layer.attention: None for layer in self.hp.layers if layer.attention}
        if self.pointer is not None:
            kinds["pointer"] = None
        windows = {kind: schedule.windows[kind] for kind in kinds}
        # Of each kind: first_visible_key's result; for FlexAttention also lists of visible blocks.
        masks, lists = self.mask_tensors(start, windows, self.flex)
        for kind, lists_of_kind in lists.items():
            is_pointer = kind == "pointer"
            if flex_pointer or not is_pointer:
                masks[kind] = block_mask(masks[kind], lists_of_kind, strict=is_pointer)
        return {None: None, **masks}  # None: layers without attention

    def forward(self, tokens: Tensor, targets: Tensor | None, schedule: Schedule):
        """tokens, targets: (S, T), targets one token later.

        Returns (objective, loss), both 0-dim. objective is what training minimizes: the loss summed
        over the tokens, not averaged; Muon's and Adam's updates do not depend on the gradient's
        scale. loss is the mean cross-entropy of the next token in nats (in training over
        schedule.softmax_size entries). Without gradients the loss is over the whole vocabulary. If
        targets is None, returns the logarithm of the probability of each vocabulary entry, (N, V)
        float32, for sampling text."""
        start = document_start(tokens, self.eot_token)
        position = torch.arange(len(start), device=start.device) - start  # in the document
        masks = self.masks(start, schedule, flex_pointer=targets is not None)
        single = rotary_tables(schedule.frequencies, len(start))
        paired = paired_rotary_tables(schedule.frequencies, len(start), self.hp.num_heads)
        rotary = {None: None, "short": single, "long": single, "paired": paired}
        tokens = tokens.flatten()
        is_doc_start = position == 0
        table = self.head.linear.weight.squeeze(0) if schedule.tied else self.embed.weight
        values = ()
        if self.value_embed is not None:
            values = self.value_embed(tokens).split(self.hp.model_dim, -1)
        ngram = self.ngram(tokens, position)
        # ngram has the dtype of the activations; see build_model.
        x0 = self.input_embedding(F.embedding(tokens, table), is_doc_start, ngram.dtype)

        target_weights = pieces = None
        if targets is not None:
            target_weights, softmax_size = schedule.target_weights, schedule.softmax_size
            has_prefix = schedule.has_prefix
            if not torch.is_grad_enabled():  # a validation: the next token, the whole vocabulary
                target_weights, softmax_size = torch.ones_like(target_weights[:1]), 0
                has_prefix = False
            # Logits are computed in pieces of a training sequence's length, because the entries of
            # a sampled softmax are chosen for each sequence, whichever rank has it, and because the
            # logits of a validation sequence would not fit. Without either reason there is one.
            in_pieces = softmax_size or not torch.is_grad_enabled()
            length = self.hp.sequence_length if in_pieces else len(tokens)
            num_next = len(target_weights) - 1 if has_prefix else len(target_weights)
            target_pieces = next_targets(targets, num_next).split(length)
            prefixes = [None] * len(target_pieces)
            if has_prefix:
                prefixes = self.prefix_of[targets.flatten()][:, None].split(length)
            pieces = [self.sample_vocabulary(
                          t, self.embed.num_embeddings, softmax_size, self.gate_row, prefix)
                      for t, prefix in zip(target_pieces, prefixes, strict=True)]
        return self.body(x0, values, ngram, tokens, pieces, target_weights, is_doc_start, rotary,
                         schedule.attention_scale, masks,
                         targets=None if targets is None else targets.flatten())

    def body(self, x0: Tensor, values: tuple[Tensor, ...], ngram: Tensor, tokens: Tensor,
             pieces: list | None, target_weights: Tensor | None, is_doc_start: Tensor, rotary: dict,
             scale: Tensor, masks: dict, targets: Tensor | None):
        """The part of forward() after the lookups: the blocks, the pointer, the head, the loss; on
        CUDA it is one compiled graph. x0, ngram and each of values: (N, D). tokens, targets, and
        is_doc_start: (N,). pieces: of sample_vocabulary; target_weights: (K,). rotary and
        masks: by kind of attention. scale: 0-dim."""
        h0 = x = x0 + self.input_embedding.ngram_lambda * ngram
        outputs = []
        for block, layer in zip(self.blocks, self.hp.layers, strict=True):
            # view_as: where blocks are compiled one by one (CPU), a block whose x and attn_input
            # were the same tensor would be compiled once more.
            attn_input = x.view_as(x)
            if layer.attn_input_layer is not None:
                attn_input = outputs[layer.attn_input_layer]
            x = block(
                x, attn_input, x0,
                ngram=None if block is self.blocks[0] else ngram,  # its input has them already
                h0=h0 if layer.mudd else None,
                skip=None if layer.skip_from is None else outputs[layer.skip_from],
                value_embed=None if layer.value_table is None else values[layer.value_table],
                is_doc_start=is_doc_start,
                rotary=rotary[layer.attention],
                scale=scale,
                mask=masks[layer.attention])
            outputs.append(x.view_as(x))

        sources = []  # what the readout adds to x
        for output, layer in zip(outputs, self.hp.layers, strict=True):
            if layer.head_skip_init is not None:
                sources.append(output)
        if sources:
            sources += [h0, *values[:1]]
        state = self.readout(x, sources)
        if targets is None:
            logits = self.head.logits(state)
            if self.pointer is None:
                return logits.log_softmax(dim=-1)
            votes, p_sink = vote_distribution(
                *self.pointer(state), tokens, masks["pointer"], self.hp.pointer_window,
                vocab_size=logits.size(1))
            return log_mixture(logits, votes, p_sink, self.gate_row)

        p_copy = p_sink = torch.zeros_like(state[:, 0], dtype=torch.float32)
        if self.pointer is not None:
            p_copy, p_sink = point(*self.pointer(state), tokens, targets, masks["pointer"],
                                   self.hp.pointer_window)
        objective = loss = 0
        length = len(pieces[0].targets)
        for piece, state_of_piece, copy, sink in zip(
                pieces, state.split(length), p_copy.split(length), p_sink.split(length),
                strict=True):
            piece_objective, piece_loss = self.head(
                piece, target_weights, state_of_piece, copy, sink)
            objective = objective + piece_objective
            loss = loss + piece_loss
        return objective, loss / len(x0)


def build_model(hp: Hyperparameters, device: torch.device, dtype: torch.dtype, flex: bool,
                sparse: bool = False) -> GPT:
    """The model with initial weights from hp.seed. Value and n-gram embeddings have the dtype of
    the activations, dtype; all other weights are float32, until Optimizer rounds matrices, head and
    token embedding to dtype, too, and keeps their exact values elsewhere (see Bucket)."""
    torch.manual_seed(hp.seed)
    with device:
        model = GPT(hp, flex, sparse)
    model.ngram.to(dtype)
    if model.value_embed is not None:
        nn.init.normal_(model.value_embed.to(dtype).weight, std=0.01)
    return model


# --- Loss -----------------------------------------------------------------------------------------


def next_targets(targets: Tensor, K: int) -> Tensor:
    """The K tokens that follow each token, (N, K), from the next ones (S, T); -1 beyond the end."""
    shifted = [F.pad(targets[:, k:], (0, k), value=-1) for k in range(K)]
    return torch.stack(shifted, dim=-1).flatten(0, 1)


def softcap(logits: Tensor, cap: float, shift: float, scale: float) -> Tensor:
    """cap * sigmoid((logits + shift) / scale) in float32 (arXiv 2408.00118, record 2025-12-26)."""
    return cap / (1 + torch.exp2((logits.float() + shift) * (-LOG2_E / scale)))


class Piece(NamedTuple):
    """What the head needs to know about N tokens."""
    entries: Tensor | None  # vocabulary entries of the softmax, (softmax_size,); None: all
    targets: Tensor           # index of each target among them, (N, K); -1: ignored
    gate: Tensor | None       # index of the pointer's gate among them, (1,); None: no pointer


def sample_vocabulary(targets: Tensor, vocab_size: int, softmax_size: int,
                      gate_row: int | None = None, prefixes: Tensor | None = None) -> Piece:
    """The vocabulary entries of a sampled softmax (arXiv 1412.2007, modded-nanogpt pull request
    360; without a correction for the sampling probability): all targets of a piece, (N, K without
    the prefix), and the pointer's gate, filled up to softmax_size with other entries. vocab_size:
    rows of the head, with padding and gate.

    The other entries are taken from one fixed permutation, from an offset given by the sum of the
    targets. So the choice needs neither a random state nor communication, and a resumed run or
    another number of ranks makes the same one.

    prefixes, (N, 1), become further targets, but only where they are among the entries anyway.

    Repeated tokens count once, so nearly all targets fit; one that does not becomes -1. The softmax
    is over the whole vocabulary if softmax_size is 0 or not below vocab_size, or if
    N > 4 * softmax_size, when too many targets would not fit."""
    all_targets = targets if prefixes is None else torch.cat([targets, prefixes], dim=1)
    entry = torch.arange(vocab_size, device=targets.device)
    gate = None if gate_row is None else entry[gate_row:gate_row + 1]
    is_sampled = 0 < softmax_size < vocab_size and len(targets) <= 4 * softmax_size
    if not is_sampled:
        return Piece(None, all_targets, gate)
    # Sort the entries: the gate, the targets, then the others by their place in a permutation. (It
    # is one because 20,011 is prime and does not divide vocab_size.)
    place = (entry + targets.sum()) * 20_011 % vocab_size
    priority = torch.zeros(vocab_size + 1, dtype=torch.int64, device=targets.device)
    priority[targets] = 1  # a target of -1 sets the extra last element, which is not used
    if gate is not None:
        priority[gate] = 2
    entries = (place - vocab_size * priority[:-1]).argsort()[:softmax_size]
    # -1: not in the softmax. The extra last element stays -1, so a target of -1 stays -1.
    index_of = torch.full_like(priority, -1).scatter(0, entries, entry[:softmax_size])
    return Piece(entries, index_of[all_targets], None if gate is None else index_of[gate])


class CappedCrossEntropy(torch.autograd.Function):
    """Output projection, softcap and multi-token cross-entropy in one function.

    The pointer's gate is one more vocabulary entry, c. What the softmax s gives to it,
    alpha = s[c], is shared out by the pointer: to the tokens that it points to, and the sink's part
    back to the other entries, in proportion to s (a pointer sentinel mixture, arXiv 1609.07843):

        p(y) = s[y] + alpha (p_copy(y) + p_sink s[y] / (1 - alpha))

    So p sums to 1 over the vocabulary without c. Without a pointer, alpha is 0. Only the next token
    has this probability; the later ones and the prefix have s itself.

    The forward pass computes the gradients, too, so that the logits (N, V) are read once and then
    freed (arXiv 2410.10989). As the softcap bounds the logits, the softmax needs no search for
    their maximum."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor,
                p_copy: Tensor, p_sink: Tensor, gate: Tensor | None, softcap_args: tuple):
        """x (N, D), weight (V, D), targets (N, K) (-1: ignored), target_weights (K,) (record
        2025-12-22); p_copy of the next token, p_sink: (N, 1) float32; gate: c, (1,), or None.

        Returns (sum_k target_weights[k] CE_k, CE_0), summed over the tokens, in nats. Only the
        first is differentiable."""
        cap, _, scale = softcap_args
        logits = softcap(F.linear(x, weight), *softcap_args)
        shifted_logits = logits - cap  # <= 0
        exp = torch.exp2(LOG2_E * shifted_logits)
        sum_exp = exp.sum(-1, keepdim=True)
        is_valid = targets >= 0
        target = targets.clamp(min=0)

        alpha = torch.zeros_like(sum_exp)
        if gate is not None:
            alpha = exp.index_select(-1, gate) / sum_exp
        not_alpha = (1 - alpha).clamp(min=1e-6)
        softmax = exp.gather(-1, target[:, :1]) / sum_exp  # s[y]
        ratio = softmax / not_alpha
        from_softmax = softmax + alpha * p_sink * ratio
        p = from_softmax + alpha * p_copy

        later_losses = sum_exp.log() - shifted_logits.gather(-1, target[:, 1:])
        losses = torch.cat([-p.log(), later_losses], dim=-1)
        losses = (losses * is_valid).sum(0)  # (K,)
        if any(ctx.needs_input_grad):
            entry = torch.arange(len(weight), dtype=torch.int32, device=x.device)
            weights = is_valid * target_weights  # (N, K)
            # With copied and returned as below, the gradient of -log p by the logits is
            #     (1 + returned) s - (from_softmax / p) one_hot(y) - (copied + returned) one_hot(c).
            # Without a pointer, it is s - one_hot(y), as usual.
            copied = alpha * p_copy / p
            returned = alpha * p_sink * ratio / not_alpha / p
            of_targets = torch.cat([weights[:, :1] * from_softmax / p, weights[:, 1:]], dim=-1)
            of_softmax = weights.sum(-1, keepdim=True) + weights[:, :1] * returned
            grad = of_softmax / sum_exp * exp
            for k in range(len(target_weights)):
                is_target = entry == targets[:, k:k + 1].int()
                grad = grad - of_targets[:, k:k + 1] * is_target
            if gate is not None:
                of_gate = weights[:, :1] * (copied + returned)
                grad = grad - of_gate * (entry == gate.int())
            # Times the softcap's derivative, logits (cap - logits) / (cap scale).
            grad = (grad * logits * shifted_logits * (-1 / (cap * scale))).to(x.dtype)
            grad_p = -weights[:, :1] * alpha / p
            ctx.save_for_backward(grad @ weight, grad.mT @ x, grad_p, grad_p * ratio)
        loss_next_token = losses[0].clone()  # a view can't be marked
        ctx.mark_non_differentiable(loss_next_token)
        return (losses * target_weights).sum(), loss_next_token

    @staticmethod
    def backward(ctx, grad_objective: Tensor, _):
        grad_x, grad_weight, grad_p_copy, grad_p_sink = (
            grad_objective * grad for grad in ctx.saved_tensors)
        return grad_x, grad_weight, None, None, grad_p_copy, grad_p_sink, None, None


def log_mixture(logits: Tensor, votes: Tensor, p_sink: Tensor, gate_row: int) -> Tensor:
    """log p of CappedCrossEntropy for every vocabulary entry, (N, V) float32; the gate has -inf.
    logits, votes: (N, V), the latter the shares of the pointer's votes; p_sink: (N, 1)."""
    softmax = logits.softmax(dim=-1)
    alpha = softmax[:, gate_row:gate_row + 1]
    not_alpha = (1 - alpha).clamp(min=1e-6)
    p = softmax + alpha * (votes + p_sink * softmax / not_alpha)
    log_p = p.log()
    log_p[:, gate_row] = -math.inf
    return log_p


class Head(nn.Module):
    """Output projection and loss. While Stage.tied, the projection is also the token embedding
    (arXiv 1608.05859, record 2025-12-19)."""
    def __init__(self, hp: Hyperparameters, padded_vocab_size: int):
        super().__init__()
        self.softcap_args = (hp.logit_cap, hp.logit_shift, hp.logit_scale)
        self.linear = Linear(hp.model_dim, padded_vocab_size, can_transpose=False)
        nn.init.normal_(self.linear.weight, std=0.005)

    def logits(self, state: Tensor) -> Tensor:
        """Softcapped logits of Readout's (N, D): (N, V) float32."""
        return softcap(self.linear(state), *self.softcap_args)

    def forward(self, piece: Piece, target_weights: Tensor, state: Tensor, p_copy: Tensor,
                p_sink: Tensor) -> tuple[Tensor, Tensor]:
        """CappedCrossEntropy's pair for a piece of N tokens. state: Readout's (N, D); p_copy,
        p_sink: point()'s (N,)."""
        weight = self.linear.matrix()
        if not torch.is_grad_enabled():
            weight = weight.detach()  # otherwise CappedCrossEntropy would compute its gradient
        if piece.entries is not None:
            weight = weight[piece.entries]
        return CappedCrossEntropy.apply(
            state, weight.to(state.dtype), piece.targets, target_weights, p_copy[:, None],
            p_sink[:, None], piece.gate, self.softcap_args)


# --- Optimizers: which rule updates which parameters, the rules, the optimizer --------------------


class Group(NamedTuple):
    """Parameters that are updated in the same way: one line of optimizer_groups."""
    name: str
    pattern: str               # regular expression that matches the parameters' full names
    rule: str                  # a key of RULES
    lr: float                  # learning rate, before the schedule's factor
    betas: tuple[float, ...]   # decay of the moments per update
    decay: float               # cautious weight decay; see compute_update
    comm_dtype: torch.dtype    # dtype of weights and gradients between ranks; Muon computes in it
    averaged: bool = False     # ends as a blend with its average; see Optimizer.use_averages


def optimizer_groups(hp: Hyperparameters, dtype: torch.dtype) -> list[Group]:
    """The groups; every parameter belongs to exactly one. dtype: of the activations.

    Muon comes first, because its updates take longest to compute and meanwhile other groups
    communicate. Learning rates and betas: records 2025-12-11 (Muon), 2025-12-31, 2026-02-12 (Adam).
    """
    fp32 = torch.float32
    # Weight decay is proportional to the square of the learning rate: the first factor is here, the
    # second in compute_update. 5 and 150 are modded-nanogpt's.
    muon_decay = hp.muon_lr * hp.muon_decay
    value_decay = 5 * hp.adam_decay * hp.value_lr
    ngram_decay = 5 * hp.adam_decay * hp.ngram_lr
    head_decay = 150 * hp.adam_decay * hp.head_lr
    # Muon's learning rate grows with the square root of rows / columns; for the MLP's output matrix
    # it is doubled below, as in modded-nanogpt.
    mlp_lr = (hp.mlp_dim / hp.model_dim) ** 0.5 * hp.muon_lr
    # What several groups share. Adam's second moment has a short or a long memory.
    averaged = hp.average_tail > 0
    muon = dict(rule="muon", betas=(hp.muon_beta2,), decay=muon_decay, comm_dtype=dtype,
                averaged=averaged)
    table = dict(betas=(0.75, 0.95), comm_dtype=dtype)
    short = dict(rule="adam", betas=(0.9, 0.95), decay=0.0, comm_dtype=fp32)
    long = dict(rule="adam", betas=(0.9, 0.99), decay=0.0, comm_dtype=fp32)
    lr = hp.scalar_lr
    gates = {**long, "decay": hp.adam_decay * lr / 5}
    block = r"blocks\.\d+\."
    attn = block + r"attention\."
    return [
        Group("attention", attn + r"(qk|v|proj)\.weight", lr=hp.muon_lr, **muon),
        Group("mlp_in", block + r"mlp\.fc\.weight", lr=mlp_lr, **muon),
        Group("mlp_out", block + r"mlp\.proj\.weight", lr=2 * mlp_lr, **muon),
        Group("resid", block + "resid_lambdas", lr=lr, **short),
        Group("branch", ".*(branch_lambdas|ngram_lambda|xsa_lambdas)", lr=lr / 5, **short),
        Group("scalars", ".*(v|proj|skip|smear)_lambda", lr=lr, **long),
        Group("gates", attn + r"(value_)?gate|pointer\.qk", lr=lr / 5, **gates),  # PR 379: Adam
        Group("pointer", r"pointer\.(sink|gain)", lr=lr / 5, **long),
        Group("mudd", r".*mudd\..*", lr=lr / 20, **long),
        Group("skip_gate", block + "skip_gate", lr=lr / 100, **long),
        Group("smear_gate", r"input_embedding\.smear_gate", lr=lr / 500, **long),
        Group("values", r"value_embed\.weight", "adam", hp.value_lr, decay=value_decay, **table),
        Group("ngrams", r"ngram\..*", hp.ngram_rule, hp.ngram_lr, decay=ngram_decay, **table),
        Group("head", r"(head\.linear|embed)\.weight", "adam", hp.head_lr, betas=(0.5, 0.95),
              decay=head_decay, comm_dtype=dtype, averaged=averaged),
    ]


POLAR_EXPRESS = (  # coefficients a, b, c of each iteration (arXiv 2505.16932, record 2025-09-29)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximately U V^T of each matrix U S V^T (..., rows, columns), by five Newton-Schulz-like
    iterations in the dtype of the input. bfloat16 is precise enough, because the iteration
    contracts errors (Muon, record 2024-10-14)."""
    is_wide = matrices.size(-1) > matrices.size(-2)
    x = matrices.mT if is_wide else matrices  # x^T x is then the smaller of the two Gram matrices
    x = (x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)).flatten(0, -3)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x.mT, x)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a)
    return (x.mT if is_wide else x).view(matrices.shape)


def muon_direction(group: Group, grad: Tensor, fast_momentum: Tensor, slow_momentum: Tensor,
                   second_moment: Tensor, momenta: Momenta, _: Tensor) -> Tensor:
    """Muon (record 2024-10-14) for grad (matrices, rows, columns): Nesterov momentum,
    orthogonalized. The momentum is a weighted mean of two moving averages of the gradient; see
    muon_momenta.

    NorMuon (arXiv 2510.05491, record 2025-10-24): then each row is divided by its root mean square
    over time, from second_moment (matrices, rows, 1), and each matrix is scaled back to its norm.
    """
    grad = grad.float()
    fast_momentum.add_((1 - momenta.fast) * (grad - fast_momentum))
    slow_momentum.add_((1 - SLOW_DECAY) * (grad - slow_momentum))
    momentum = momenta.fast_weight * fast_momentum + (1 - momenta.fast_weight) * slow_momentum
    direction = grad + momenta.nesterov * (momentum - grad)
    direction = orthogonalize(direction.to(group.comm_dtype)).float()
    second_moment.lerp_(direction.square().mean(-1, keepdim=True), 1 - group.betas[0])
    normalized = direction * second_moment.clamp(min=1e-10).rsqrt()
    norm_before = direction.norm(dim=(-2, -1), keepdim=True)
    norm_after = normalized.norm(dim=(-2, -1), keepdim=True)
    return normalized * (norm_before / norm_after.clamp(min=1e-10))


def adam_direction(group: Group, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, _: Momenta,
                   bias1: Tensor, bias2: Tensor) -> Tensor:
    """Adam (arXiv 1412.6980) in float32. bias1, bias2: 1 - beta^t. With the rule lazy_adam, rows
    without a gradient are skipped, their moments included."""
    beta1, beta2 = group.betas
    grad = grad.float()
    active_rows = 1.0
    if group.rule == "lazy_adam":
        active_rows = (grad != 0).any(-1, keepdim=True).float()
    exp_avg.lerp_(grad, (1 - beta1) * active_rows)
    exp_avg_sq.lerp_(grad.square(), (1 - beta2) * active_rows)
    # eps is added before the bias correction, as in modded-nanogpt.
    return active_rows * (exp_avg / bias1) * bias2.sqrt() / (exp_avg_sq.sqrt() + 1e-10)


class Rule(NamedTuple):
    """An update rule. direction(group, grad, *state, momenta, *bias_corrections) updates the state
    in place and returns the direction to step against. momenta are Muon's, bias_corrections are 1 -
    beta^t of each of the group's betas; all are 0-dim tensors. The state is float32."""
    direction: Callable
    state: tuple[str, ...]      # state tensors of the parameter's shape
    row_state: tuple[str, ...]  # state tensors with one number per row of a matrix
    is_matrix_rule: bool        # works on stacks of equal matrices
    every_step: bool            # updates in every step, else in every adam_every-th


RULES = {
    "muon": Rule(muon_direction, ("fast_momentum", "slow_momentum"), ("second_moment",), True,
                 every_step=True),
    "adam": Rule(adam_direction, ("exp_avg", "exp_avg_sq"), (), False, every_step=False),
    "lazy_adam": Rule(adam_direction, ("exp_avg", "exp_avg_sq"), (), False, every_step=False),
}


def compute_update(direction: Callable, group: Group, grad: Tensor, values: Tensor,
                   state: list[Tensor], lr: Tensor, lr_scale: Tensor,
                   momenta: Momenta, *bias_corrections: Tensor) -> Tensor:
    """The update to subtract from values, in their dtype, once the caller has multiplied it by
    lr_scale. (lr_scale is an argument, too, because weight decay has it squared.)

    grad, values, state: this rank's rows of a bucket, (matrices, rows, columns) for Muon, (rows,
    columns) of a table, or (numbers,). lr: 0-dim or one number per row. The other numbers: 0-dim.

    Cautious weight decay (arXiv 2510.12402, records 2025-11-10, 2025-12-18) decays a weight only
    where the update shrinks it anyway. The decay is multiplied by lr_scale here, and again when the
    update is applied, so it falls with the square of the schedule."""
    update = direction(group, grad, *state, momenta, *bias_corrections)
    if group.decay:
        product = update * values
        # Muon also decays a weight whose update is zero, as in modded-nanogpt. (With two momenta,
        # record 2026-08-30 decays where the slow momentum has the sign of the weight.)
        shrinks = product >= 0 if group.rule == "muon" else product > 0
        update = update + group.decay * lr_scale * values * shrinks
    return (lr * update).to(values.dtype)


class Optimizer:
    """Muon and Adam with optimizer state sharded over the ranks (ZeRO-1, arXiv 1910.02054).

    Parameters that are updated alike are concatenated into buckets. A bucket's gradients are
    reduce-scattered, each rank updates its rows, and the new weights are all-gathered, while other
    buckets are computed. Adam updates in every adam_every-th step with the summed
    gradients (record 2025-09-30)."""
    def __init__(self, model: GPT, hp: Hyperparameters, dtype: torch.dtype, rank: int = 0,
                 world_size: int = 1):
        """dtype: of the activations. Raises UserError if a parameter is in no group or in two."""
        self.adam_every = hp.adam_every
        self.num_updates = 0   # calls of step()
        self.num_averages = 0  # calls of update_averages() since the last use_averages()
        self.update_fns = dict.fromkeys(RULES, compute_update)  # compile_model compiles them
        is_sparse = {id(module.weight) for module in model.modules()
                     if isinstance(module, nn.Embedding) and module.sparse}
        groups = optimizer_groups(hp, dtype)
        bucket_members = {}
        for name, p in model.named_parameters():
            group = group_of(name, groups)
            if RULES[group.rule].is_matrix_rule:
                layout = (p.dim(), *p.shape[-2:])  # matrices of equal shape are stacked
            elif name.endswith(".weight"):
                layout = name          # a table has a bucket of its own
            else:
                layout = "small"       # all else is concatenated
            key = (group.rule, group.betas, group.decay, group.comm_dtype, group.averaged, layout)
            bucket_members.setdefault(key, []).append((p, group))

        def position_of_first_group(members):
            return min(groups.index(group) for _, group in members)

        self.buckets = []
        for members in sorted(bucket_members.values(), key=position_of_first_group):
            params = [p for p, _ in members]
            self.buckets.append(Bucket(
                params, [group for _, group in members], sparse=id(params[0]) in is_sparse,
                rank=rank, world_size=world_size))
        bucket_of = {id(p): bucket for bucket in self.buckets for p in bucket.params}
        self.head = bucket_of[id(model.head.linear.weight)]
        self.embed = bucket_of[id(model.embed.weight)]

    def untie(self) -> None:
        """Make the embedding a copy of the head, with its moments (record 2025-12-22)."""
        self.embed.values.copy_(self.head.values)
        for name, state in self.embed.state.items():
            state.copy_(self.head.state[name])

    @torch.no_grad()
    def step(self, schedule: Schedule) -> None:
        """Update the weights and clear the gradients, except those that Adam sums up for its next
        update. Collective."""
        self.num_updates += 1
        # Muon updates in each step, Adam in each adam_every-th. While tied, embed has no gradient.
        adam_is_due = self.num_updates % self.adam_every == 0
        due = [bucket for bucket in self.buckets
               if (adam_is_due or RULES[bucket.group.rule].every_step)
               and any(p.grad is not None for p in bucket.params)]
        for bucket in due:
            bucket.reduce_scatter_grads()
        lr_scale = torch.tensor(schedule.lr_scale)
        momenta = Momenta(*map(torch.tensor, schedule.momenta))
        for bucket in due:
            group = bucket.group
            rule = RULES[group.rule]
            grad, values, state = bucket.local_grad_and_state()
            t = self.num_updates // (1 if rule.every_step else self.adam_every)
            bias_corrections = [torch.tensor(1 - beta ** t) for beta in group.betas]
            update = self.update_fns[group.rule](
                rule.direction, group, grad, values, state, bucket.lr, lr_scale, momenta,
                *bias_corrections)
            bucket.start_update(update, state, schedule.lr_scale)
        for bucket in due:
            bucket.wait()
        if schedule.average_weight:
            self.update_averages(schedule.average_weight)

    def update_averages(self, weight: float) -> None:
        """Move the exponential moving averages of the weights by `weight` towards the weights; the
        first time, copy them. Each rank has the averages of its rows, in float32, in a state tensor
        that Bucket creates."""
        for bucket in self.buckets:
            if bucket.group.averaged:
                bucket.state["average"].lerp_(bucket.local, weight if self.num_averages else 1.0)
        self.num_averages += 1

    def use_averages(self) -> None:
        """For the last validation: replace each weight by half itself and half its moving average,
        which is less noisy, but lags behind. Then scale each bucket (head, embedding, matrices of
        one shape) back to the Frobenius norm that it had, because the blend is smaller. Without
        averages, or when they were used already, this does nothing. Collective.

        Averages and norms: record 2026-08-30. A blend of equal parts: pull request 380."""
        if not self.num_averages:
            return
        self.num_averages = 0
        averaged = [bucket for bucket in self.buckets if bucket.group.averaged]
        for bucket in averaged:
            blend = torch.lerp(bucket.local, bucket.state["average"], 0.5)
            squares = torch.stack([bucket.local.square().sum(), blend.square().sum()])
            squares_of_ranks = bucket.all_gather(squares[None])  # (W, 2)
            bucket.wait()
            before, after = squares_of_ranks.sum(0)
            bucket.local.copy_(blend * (before / after.clamp(min=1e-30)).sqrt())
            bucket.all_gather_values()
        for bucket in averaged:
            bucket.wait()

    def state_dict(self) -> dict:
        """The state of all ranks, which any number of ranks can load. Collective."""
        return {"num_updates": self.num_updates, "num_averages": self.num_averages,
                "buckets": [bucket.full_state() for bucket in self.buckets]}

    def load_state_dict(self, state: dict | None) -> None:
        """Load this rank's rows of a state_dict; None: reset. Raises ValueError for other shapes.
        """
        self.num_updates = state["num_updates"] if state else 0
        self.num_averages = state["num_averages"] if state else 0
        for i, bucket in enumerate(self.buckets):
            bucket.load(state["buckets"][i] if state else None)


# --- Data -----------------------------------------------------------------------------------------


class BatchLoader:
    """This rank's micro-batches of each step; a thread reads ahead. Rank r reads the sequences of a
    step whose index in the step is r modulo W, so the batches depend neither on W nor on a resume.
    """
    def __init__(self, stream: "TokenStream", hp: Hyperparameters, runtime: "Runtime",
                 step: int = 0):
        self.stream = stream
        self.hp = hp
        self.runtime = runtime
        self.step = step
        num_sequences = (len(stream) - 1) // hp.sequence_length
        if TRACKS[hp.track].shuffled:
            self.order = np.random.RandomState(0).permutation(num_sequences)
        else:
            self.order = np.arange(num_sequences)
        self.first_docs = None
        if any(stage.max_doc_len for stage in hp.stages):
            self.first_docs = first_doc_of_sequences(stream, hp)
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.future = self.pool.submit(self._read, step)

    def epoch(self, step: int) -> int:
        """How often all training tokens have been read before a step."""
        index = sequences_before(step, self.hp)
        if self.first_docs is not None:
            num_documents = len(self.stream.documents) - 1  # the last element is an end
            return int(self.first_docs[index]) // num_documents  # counted on through all epochs
        return index // len(self.order)

    def _sequence(self, index: int, max_doc_len: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of the run's sequence `index`, (T,) each."""
        if self.first_docs is not None:
            first_doc = int(self.first_docs[index])
            max_doc_len = max_doc_len or len(self.stream)
            return self.stream.packed(first_doc, self.hp.sequence_length, max_doc_len)
        index = int(self.order[index % len(self.order)])
        return self.stream.sequence(index, self.hp.sequence_length)

    def _read(self, step: int) -> list[tuple[Tensor, Tensor]]:
        hp = self.hp
        of_step = range(sequences_before(step, hp), sequences_before(step + 1, hp))
        local = of_step[self.runtime.rank::self.runtime.world_size]
        max_doc_len = hp.stages[stage_index(step, hp)].max_doc_len
        pairs = [self._sequence(index, max_doc_len) for index in local]
        size = max(min(hp.micro_batch, len(local)), 1)
        while len(local) % size:
            size -= 1
        batch = []
        for i in range(0, len(pairs), size):
            tokens = torch.stack([tokens for tokens, _ in pairs[i:i + size]])
            targets = torch.stack([targets for _, targets in pairs[i:i + size]])
            if self.runtime.cuda:
                tokens, targets = tokens.pin_memory(), targets.pin_memory()
            batch.append((tokens, targets))
        return batch

    def next(self) -> list[tuple[Tensor, Tensor]]:
        """The next step's micro-batches, [(tokens (S, T), targets (S, T)), ...], on the device."""
        batch = self.future.result()
        self.step += 1
        self.future = self.pool.submit(self._read, self.step)
        device = self.runtime.device
        return [(tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True))
                for tokens, targets in batch]

    def close(self) -> None:
        """Stop reading ahead."""
        self.pool.shutdown(cancel_futures=True)


# --- Training -------------------------------------------------------------------------------------


def training_step(model: GPT, optimizer: Optimizer, batch: list, schedule: Schedule) -> Tensor:
    """Forward and backward pass of each micro-batch, then the optimizer's step. Returns this rank's
    mean loss, 0-dim."""
    mean_loss = torch.zeros((), device=batch[0][0].device)
    for tokens, targets in batch:
        objective, loss = model(tokens, targets, schedule)
        # Divided by 8 whatever W is: the gradients of the ranks are summed, and modded-nanogpt's
        # are the mean of 8 ranks'. Only the optimizers' epsilons depend on this factor.
        (objective / 8).backward()
        mean_loss += loss / len(batch)
    optimizer.step(schedule)
    return mean_loss


@torch.no_grad()
def validate(model: GPT, stream: "TokenStream", schedule: Schedule, hp: Hyperparameters,
             runtime: "Runtime", sequences: range | None = None) -> float:
    """The mean cross-entropy in nats over the validation tokens, or over other sequences of
    val_length tokens of the stream. Collective."""
    if sequences is None:
        sequences = range(hp.num_val_tokens // hp.val_length)
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for index in sequences[runtime.rank::runtime.world_size]:
        tokens, targets = stream.sequence(index, hp.val_length)
        _, loss = model(tokens[None].to(runtime.device), targets[None].to(runtime.device), schedule)
        loss_sum += loss
    (total,) = runtime.sum(loss_sum)
    return total / len(sequences)


def held_out_sequences(stream: "TokenStream", hp: Hyperparameters) -> range:
    """The sequences after those of the validation, as many again or as many as there are. They are
    read once, after the last validation, and nothing is decided by their loss. With --val_tokens
    there are none."""
    if hp.val_tokens:
        return range(0)
    first = hp.num_val_tokens // hp.val_length
    whole = (len(stream) - 1) // hp.val_length
    return range(first, min(2 * first, whole))


def train(hp: Hyperparameters, runtime: "Runtime") -> int:
    """Train one model. Returns the exit code: 0, or 128 + n after signal n. Raises UserError."""
    track = TRACKS[hp.track]
    device = runtime.device
    min_tokens = hp.batch_size * hp.sequence_length + 1
    train_stream = TokenStream(track.train_files, track, min_tokens)
    val_stream = TokenStream(track.val_files, track, min_tokens=hp.num_val_tokens + 1)
    dtype = activation_dtype(hp, device)
    compiled, why_not_compiled = choose_compilation(hp, runtime)
    info = run_info(hp, runtime, train_stream, val_stream, dtype, compiled)
    start_log(hp, runtime, info)
    if why_not_compiled and runtime.rank == 0:
        log.warning(f"warning: the model is not compiled, which is much slower: {why_not_compiled}")
    if hp.num_val_tokens < track.val_tokens:
        log.info(f"validations read {hp.num_val_tokens:,} of the track's {track.val_tokens:,} "
                 "tokens (--val_tokens), so this run is no result")

    flex = compiled and runtime.cuda
    sparse = hp.ngram_rule == "lazy_adam" and not runtime.cuda and runtime.world_size == 1
    model = build_model(hp, device, dtype, flex, sparse)
    optimizer = Optimizer(model, hp, dtype, runtime.rank, runtime.world_size)
    compile_and_warm_up(model, optimizer, train_stream, hp, runtime, compiled)
    progress = load_checkpoint(model, optimizer, hp, info)  # without --resume, of a new run
    first_step = progress.step
    loader = BatchLoader(train_stream, hp, runtime, first_step)

    no_bar = True if runtime.rank else None  # None: a progress bar on a terminal only
    with (StopSignal() as stop, profiler(hp, runtime, info) as profile,
          tqdm(total=hp.num_steps, initial=first_step, leave=False, disable=no_bar) as bar):
        started = runtime.seconds()
        for step in range(first_step, hp.num_steps + 1):
            schedule = Schedule(step, hp, device)
            if schedule.unties:
                optimizer.untie()
            is_last = step == hp.num_steps
            if is_last:
                optimizer.use_averages()
            # Checkpoints don't hold the gradients that Adam sums up between its updates.
            # (save_every is a multiple of adam_every.)
            can_save = is_last or step % hp.adam_every == 0
            stops = can_save and stop.agreed
            val_due = is_last or (hp.val_every and step % hp.val_every == 0)
            if stops or step <= progress.validated_step:  # not twice; step 0 counts as validated
                val_due = False
            save_due = stops or (hp.save_every and step % hp.save_every == 0 and step > first_step)
            if val_due or save_due:  # neither counts as training time
                progress.step = step
                progress.train_ms += 1000 * (runtime.seconds() - started)
                if val_due:
                    val_loss = validate(model, val_stream, schedule, hp, runtime)
                    log_metric("val_loss", val_loss, step, hp, progress.train_ms)
                    if hp.num_val_tokens == track.val_tokens:
                        progress.note_target(val_loss, track.target)
                    progress.validated_step = step
                    progress.validation_loss = val_loss
                    held_out = held_out_sequences(val_stream, hp)
                    if is_last and held_out:
                        progress.held_out_tokens = len(held_out) * hp.val_length
                        progress.held_out_loss = validate(
                            model, val_stream, schedule, hp, runtime, held_out)
                if save_due:
                    save_checkpoint(progress, model, optimizer, hp, runtime, info)
                started = runtime.seconds()
            if is_last or stops:
                break

            loss = training_step(model, optimizer, loader.next(), schedule)
            bar.update()
            if profile:
                profile.step()
            if (step + 1) % hp.log_every == 0:
                # The sums wait for the device, so that perf_counter is exact; the host waits for it
                # only here. They also tell all ranks whether one got a signal, and which.
                loss_sum, *signals = runtime.sum(loss, stop.number > 0, stop.number)
                train_ms = progress.train_ms + 1000 * (time.perf_counter() - started)
                log_metric("train_loss", loss_sum / runtime.world_size, step + 1, hp, train_ms)
                if not math.isfinite(loss_sum):
                    raise UserError(f"the loss is not finite at step {step + 1}; use lower "
                                    "learning rates (they can also be given with --resume)")
                stop.agree(*signals)
            if loader.epoch(step + 1) > loader.epoch(step) and step + 1 < hp.num_steps:
                log.info(f"all {len(train_stream):,} training tokens were used; "
                         f"epoch {loader.epoch(step + 1) + 1} begins")
    loader.close()
    return finish(model, progress, stop, hp, runtime, info)


# ==== You may stop reading here: this was the training. What follows is machinery. ================

# --- Attention kernels: FlexAttention's block mask; windows in chunks for CPUs --------------------


def block_lists(first_key: Tensor, block: int = 128) -> list[Tensor]:
    """The lists of blocks that FlexAttention's BlockMask wants, from first_visible_key's (N,),
    where N is a multiple of block.

    For each query block: the partially and the fully visible key blocks; for each key block: the
    query blocks that see it partially and fully. As first_key never decreases, each list is a
    contiguous range, which can be written down instead of evaluating and sorting the mask. Returns
    counts (1, 1, n) and indices (1, 1, n, n) of each of the four."""
    num_blocks = len(first_key) // block
    slot = torch.arange(num_blocks, device=first_key.device)  # position in a row of indices
    row = slot[:, None]                                       # the block that the row belongs to
    # Query block `row` sees key blocks first..row, and those of first_full..row - 1 fully.
    first = first_key[::block, None] // block
    first_full = torch.minimum((first_key[block - 1::block, None] + block - 1) // block, row)
    # Key block `row` is seen by query blocks row..last, and by those of row + 1..last_full fully.
    last = (first.T <= row).sum(1, keepdim=True) - 1
    last_full = (first_full.T <= row).sum(1, keepdim=True) - 1
    num_partial = first_full - first
    counts_and_indices = [
        # key blocks of a query block: partially, fully visible
        (num_partial + 1, torch.where(slot < num_partial, first + slot, row)),
        (row - first_full, first_full + slot),
        # query blocks of a key block: partially, fully
        (last - last_full + 1, torch.where(slot == 0, row, last_full + slot)),
        (last_full - row, row + 1 + slot),
    ]
    lists = []
    for count, indices in counts_and_indices:
        indices = indices.clamp(max=num_blocks - 1)  # entries beyond count are not read
        lists += [count[:, 0].int()[None, None], indices.int()[None, None]]
    return lists


def mask_tensors(start: Tensor, windows: dict[str, Tensor],
                 flex: bool) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """first_visible_key and, with flex, block_lists for each kind of mask. start: (N,); windows:
    0-dim."""
    first_keys, lists = {}, {}
    for kind, window in windows.items():
        start_of_kind = start
        if kind == "paired":  # two positions per token
            start_of_kind = (2 * start).repeat_interleave(2)
        first_keys[kind] = first_visible_key(start_of_kind, window)
        if flex:
            lists[kind] = block_lists(first_keys[kind])
    return first_keys, lists


def block_mask(first_key: Tensor, lists: list[Tensor], strict: bool = False) -> BlockMask:
    """The mask for FlexAttention, from first_visible_key's (N,) and its block_lists. (Where strict
    takes away a query's own position, its block is listed as partially visible in any case.)"""
    def mask_mod(batch, head, query, key):
        return visible(query, key, first_key[query], strict)

    seq_lengths = (len(first_key), len(first_key))
    return BlockMask(seq_lengths, *lists, BLOCK_SIZE=(128, 128), mask_mod=mask_mod)


class Chunks:
    """Sliding-window attention for CPUs, where FlexAttention has no backward pass.

    The queries of a chunk of window / 2 positions see keys of their own chunk and of the two
    before. scaled_dot_product_attention with a mask (T, T) for each sequence does not replace it:
    it is faster for long layers in training, but slower for paired heads, and several times slower
    in validations of 2,048 tokens (records/studies/2026-11-29_PlainCode)."""
    def __init__(self, N: int, window: int):
        self.N = N
        self.size = math.ceil(window / 2)
        self.num_chunks = math.ceil(N / self.size)
        self.padding = self.num_chunks * self.size - N

    def of_queries(self, x: Tensor) -> Tensor:
        """(H, N, d) -> (H, num_chunks, size, d)."""
        x = F.pad(x, (0, 0, 0, self.padding))
        return x.view(len(x), self.num_chunks, self.size, -1)

    def of_keys(self, x: Tensor) -> Tensor:
        """(H, N, d) -> (H, num_chunks, 3 size, d): each chunk and the two before it."""
        x = F.pad(x, (0, 0, 2 * self.size, self.padding))
        x = x.view(len(x), self.num_chunks + 2, self.size, -1)
        return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], dim=2)

    def scores(self, q: Tensor, k: Tensor, first_key: Tensor, strict: bool = False) -> Tensor:
        """q k^T of (H, N, d) each, (H, num_chunks, size, 3 size) float32; -inf where the key is not
        visible."""
        query = torch.arange(self.num_chunks * self.size, device=q.device)
        query = query.view(self.num_chunks, self.size, 1)
        key = query[:, :1] + torch.arange(-2 * self.size, self.size, device=q.device)
        # A padded query sees itself: a softmax without any key would turn gradients into NaN.
        padded = torch.arange(self.N, self.N + self.padding, device=q.device)
        first_key = torch.cat([first_key, padded]).view(self.num_chunks, self.size, 1)
        scores = (self.of_queries(q) @ self.of_keys(k).mT).float()
        return scores.masked_fill(~visible(query, key, first_key, strict), -math.inf)

    def join(self, x: Tensor) -> Tensor:
        """(H, num_chunks, size, d) -> (H, N, d)."""
        return x.flatten(1, 2)[:, :self.N]


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, window: int) -> Tensor:
    """softmax(q k^T) v over the visible keys. q, k, v and the result: (H, N, d)."""
    chunks = Chunks(q.size(1), window)
    weights = chunks.scores(q, k, first_key).softmax(dim=-1).to(v.dtype)
    return chunks.join(weights @ chunks.of_keys(v))


def chunked_pointer_weights(q: Tensor, k: Tensor, sink: Tensor, first_key: Tensor,
                            chunks: Chunks) -> tuple[Tensor, Tensor]:
    """The pointer's softmax over the keys, (num_chunks, size, 3 size), and its weight of the sink,
    (num_chunks, size, 1). q, k: (N, d); sink: the sink's scores, (N,)."""
    scores = chunks.scores(q[None], k[None], first_key, strict=True)
    sink = chunks.of_queries(sink[None, :, None])
    weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[0]
    return weights[..., :-1], weights[..., -1:]


def vote_distribution(q: Tensor, k: Tensor, sink: Tensor, tokens: Tensor, first_key: Tensor,
                      max_window: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """What point() computes for the targets, for all V vocabulary entries: the shares of the votes,
    (N, V), and of the sink, (N, 1)."""
    chunks = Chunks(len(q), max_window)
    weights, p_sink = chunked_pointer_weights(q, k, sink, first_key, chunks)
    token_of_key = chunks.of_keys(tokens[None, :, None]).mT[0].expand(weights.shape)
    votes = weights.new_zeros(*weights.shape[:2], vocab_size)
    votes = votes.scatter_add(-1, token_of_key, weights)
    return chunks.join(votes[None])[0], chunks.join(p_sink[None])[0]


# --- Shards of tokens -----------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def open_shard(path: Path, get_data: str) -> np.ndarray:
    """The tokens of a .bin file as a read-only memory map, (num_tokens,) uint16. The file begins
    with 256 little-endian uint32: magic number, version, number of tokens, zeros. Raises UserError
    if it is damaged; get_data is the command that the message names."""
    header_bytes = 4 * SHARD_HEADER_INTS
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, "<u4", SHARD_HEADER_INTS)
    except OSError as error:
        raise UserError(f"can't read the shard {path}: {error.strerror}") from None
    found = header[:3].tolist()
    expected = [SHARD_MAGIC, SHARD_VERSION, (size - header_bytes) / 2]
    if found != expected:
        raise UserError(f"{path} is damaged: its magic number, version and number of tokens are "
                        f"{found}, expected {expected}; delete it and run: {get_data}")
    return np.memmap(path, "<u2", mode="r", offset=header_bytes, shape=(found[2],))


class TokenStream:
    """All shards that match a pattern, in the order of their names, as one endless stream of
    tokens."""
    def __init__(self, pattern: str, track: Track, min_tokens: int):
        """pattern: a glob below the repository. Raises UserError for damaged or missing shards, and
        for fewer than min_tokens."""
        self.track = track
        self.paths = sorted(ROOT.glob(pattern))
        # Few shards are open at a time, because the system limits a process's open files.
        self.shard = functools.lru_cache(maxsize=8)(self._open)
        sizes = [len(self._open(index)) for index in range(len(self.paths))]
        self.ends = np.cumsum([0, *sizes])  # 0, then the end of each shard
        if len(self) < min_tokens:
            raise UserError(f"{ROOT / pattern}: found {len(self.paths)} shards with {len(self):,} "
                            f"tokens, expected at least {min_tokens:,}; run: {track.get_data}")

    def _open(self, index: int) -> np.ndarray:
        return open_shard(self.paths[index], self.track.get_data)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count, (count,) int64. Raises UserError for an impossible token.
        """
        parts = []
        while count:
            start %= len(self)
            index = bisect_right(self.ends, start) - 1
            part = self.shard(index)[start - self.ends[index]:][:count].astype(np.int64)
            if part.max() >= self.track.vocab_size:
                raise UserError(
                    f"{self.paths[index]} holds the token {part.max()}, expected tokens below "
                    f"{self.track.vocab_size}; delete it and run: {self.track.get_data}")
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def sequence(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """The index-th sequence and its targets, which are one token later: both (length,) int64.
        """
        tokens = torch.from_numpy(self.read(index * length, length + 1))
        return tokens[:-1], tokens[1:]

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """The position of each document's first token, then the end of the last document. Raises
        UserError if there is no document."""
        starts = [np.flatnonzero(self.shard(index) == self.track.eot_token) + self.ends[index]
                  for index in range(len(self.paths))]
        if not any(len(s) for s in starts):
            raise UserError(f"{self.paths[0]} has no token {self.track.eot_token}, which stands "
                            f"before each document; run: {self.track.get_data}")
        return np.concatenate([*starts, self.ends[-1:]])

    def packed(self, document: int, length: int, max_doc_len: int) -> tuple[Tensor, Tensor]:
        """Like sequence(), made of the documents from `document` on, each cut to max_doc_len tokens
        (record 2025-09-03). After the last document it goes on with the first."""
        num_documents = len(self.documents) - 1
        parts = []
        missing = length + 1
        while missing:
            index = document % num_documents
            start, end = self.documents[index:index + 2].tolist()
            parts.append(self.read(start, min(end - start, max_doc_len, missing)))
            document += 1
            missing -= len(parts[-1])
        tokens = torch.from_numpy(np.concatenate(parts))
        return tokens[:-1], tokens[1:]

    def fingerprint(self, count: int) -> str:
        """12 hexadecimal digits of a hash of the first `count` tokens, or of all if there are
        fewer."""
        digest = hashlib.sha256()
        for index in range(bisect_left(self.ends, count, hi=len(self.paths))):
            digest.update(self.shard(index)[:count - self.ends[index]])
        return digest.hexdigest()[:12]

    def fingerprint_of_shards(self) -> str:
        """The same of the number of tokens of each shard and of its first and last 1,024 tokens.
        The number of all tokens determines the order in which a shuffled track is read."""
        digest = hashlib.sha256()
        for index in range(len(self.paths)):
            shard = self.shard(index)
            digest.update(f"{len(shard)} ".encode())
            digest.update(shard[:1024])
            digest.update(shard[-1024:])
        return digest.hexdigest()[:12]


def first_doc_of_sequences(stream: TokenStream, hp: Hyperparameters) -> np.ndarray:
    """The document with which each sequence of the run begins; one more for the end of the run.

    What is left of a sequence's last document is dropped (record 2025-07-12). When all documents
    have been read, the first one follows; document numbers go on counting."""
    lengths = np.diff(stream.documents)
    num_documents = len(lengths)
    first_docs = []
    document = 0
    stage_begin = 0
    for stage, stage_end in zip(hp.stages, stage_ends(hp), strict=True):
        if stage.max_doc_len:
            lengths_in_stage = np.minimum(lengths, stage.max_doc_len)
        else:
            lengths_in_stage = lengths
        ends = lengths_in_stage.cumsum().tolist()  # of each document, if all are put in a row
        for _ in range(sequences_before(stage_begin, hp), sequences_before(stage_end, hp)):
            first_docs.append(document)
            epoch, index = divmod(document, num_documents)
            start = ends[index - 1] if index else 0
            more_epochs, last_target = divmod(start + hp.sequence_length, ends[-1])
            last_document = bisect_right(ends, last_target)
            document = (epoch + more_epochs) * num_documents + last_document + 1
        stage_begin = stage_end
    return np.array([*first_docs, document])


# --- Buckets: how parameters and optimizer state are sharded over the ranks -----------------------

# torch 2.13 has renamed these two functions and warns about the old names, which 2.11 needs.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def group_of(name: str, groups: list[Group]) -> Group:
    """The group of a parameter. Raises UserError if it is in no group or in two, or has no rule."""
    matches = [group for group in groups if re.fullmatch(group.pattern, name)]
    found = " and ".join(group.name for group in matches) or "none"
    require(len(matches) == 1, f"optimizer_groups: the parameter {name} must match the pattern of "
                               f"exactly one group; its groups: {found}")
    rule = matches[0].rule
    require(rule in RULES, f"optimizer_groups: the group {found} has the rule {rule!r}, which is "
                           f"not in the table RULES: {', '.join(RULES)}")
    return matches[0]


class Bucket:
    """Parameters stored in one contiguous tensor, `values`, that is sharded by rows over the ranks.

    A row is one matrix (Muon), one row of an embedding table, or one number. All members share
    rule, betas, decay, comm_dtype and averaged; their learning rates may differ. grad_buffer is
    what the reduce-scatter sends; it is None if the parameter's own gradient can be sent, or is
    sparse. state has this rank's rows of all that a checkpoint holds besides the values.

    values have comm_dtype, and so have the gradients, also while micro-batches and Adam's steps add
    up. Where the model was built with float32 parameters and comm_dtype is bfloat16, values are
    rounded, and each rank has the exact float32 values of its rows, which it updates (record
    2026-01-04). They begin as the rounded initial values. local is this rank's rows of the exact
    values, or a view of its rows of values if these are not rounded."""
    def __init__(self, params: list[nn.Parameter], groups: list[Group], sparse: bool, rank: int = 0,
                 world_size: int = 1):
        self.group = groups[0]
        self.params = params
        self.sparse = sparse
        self.world_size = world_size
        rule = RULES[self.group.rule]
        if rule.is_matrix_rule:
            row_shape = params[0].shape[-2:]
        elif len(params) == 1:
            row_shape = params[0].shape[-1:]
        else:
            row_shape = ()
        rows = [p.numel() // math.prod(row_shape) for p in params]
        self.num_rows = sum(rows)
        rows_per_rank = math.ceil(self.num_rows / world_size)
        self.shard = slice(rank * rows_per_rank, (rank + 1) * rows_per_rank)  # this rank's rows

        num_padded = world_size * rows_per_rank
        dtype = self.group.comm_dtype
        self.values = params[0].new_zeros(num_padded, *row_shape, dtype=dtype)
        self.is_rounded = params[0].dtype != dtype
        for view, p in zip(self.views(self.values), params, strict=True):
            p.data = view.copy_(p.detach())
        no_copy = len(params) == 1 and num_padded == self.num_rows
        self.grad_buffer = None if no_copy else torch.zeros_like(self.values)
        self.grad = None   # the sum over the ranks
        self.pending = []  # collectives that were started: (handle, the tensor that is sent)

        local = self.values[self.shard]
        self.state = {}
        for name in rule.state:
            self.state[name] = torch.zeros_like(local, dtype=torch.float32)
        for name in rule.row_state:
            self.state[name] = torch.zeros_like(local[..., :1], dtype=torch.float32)
        self.rule_state = list(self.state.values())
        if self.group.averaged:
            self.state["average"] = torch.zeros_like(local, dtype=torch.float32)
        self.local = local
        if self.is_rounded:
            self.local = self.state["exact_values"] = local.float()
        self.lr = torch.tensor(groups[0].lr, device=local.device)
        if any(group.lr != groups[0].lr for group in groups):  # one learning rate per row
            lr_of_rows = [torch.full((n,), g.lr) for n, g in zip(rows, groups, strict=True)]
            padding = num_padded - self.num_rows
            lr = F.pad(torch.cat(lr_of_rows), (0, padding)).to(local.device)
            self.lr = lr[self.shard].view(-1, *[1] * len(row_shape))

    def views(self, tensor: Tensor) -> list[Tensor]:
        """Views of a tensor of values' shape, one in the shape of each parameter."""
        sizes = [p.numel() for p in self.params]
        parts = tensor.view(-1)[:sum(sizes)].split(sizes)
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]

    def reduce_scatter_grads(self) -> None:
        """Take the parameters' gradients (at least one has one) and start to sum them over the
        ranks; each rank receives its rows. Collective."""
        if self.grad_buffer is None:
            full_grad, self.params[0].grad = self.params[0].grad, None
        else:
            full_grad = self.grad_buffer
            views, grads = [], []
            for view, p in zip(self.views(full_grad), self.params, strict=True):
                if p.grad is None:
                    view.zero_()
                else:
                    views.append(view)
                    grads.append(p.grad)
                p.grad = None
            torch._foreach_copy_(views, grads)  # few launches for many small parameters
        if self.sparse:
            self.grad = full_grad.coalesce()
            return
        self.grad = full_grad = full_grad.view_as(self.values)
        if self.world_size > 1:
            self.grad = torch.empty_like(full_grad[self.shard])
            handle = _reduce_scatter(self.grad, full_grad, op=dist.ReduceOp.SUM, async_op=True)
            self.pending.append((handle, full_grad))

    def local_grad_and_state(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """This rank's rows of gradient, values and state; for sparse gradients, the active rows."""
        if self.sparse:
            self.active_rows = self.grad.indices()[0]
            active_state = [full[self.active_rows] for full in self.rule_state]
            return self.grad.values(), self.local[self.active_rows], active_state
        self.wait()
        return self.grad, self.local, self.rule_state

    def all_gather(self, local: Tensor) -> Tensor:
        """Start to gather all ranks' rows; the result is complete after wait(). Collective."""
        if self.world_size == 1:
            return local
        local = local.contiguous()  # NCCL requires it
        full = local.new_empty(self.world_size * len(local), *local.shape[1:])
        self.pending.append((_all_gather(full, local, async_op=True), local))
        return full

    def all_gather_values(self) -> None:
        """Copy local to values, where it is rounded, and start to gather all ranks' rows.
        Collective."""
        rows = self.values[self.shard]
        if self.is_rounded:
            rows.copy_(self.local)
        if self.world_size > 1:
            self.pending.append((_all_gather(self.values, rows, async_op=True), rows))

    def wait(self) -> None:
        """Wait for the collectives that were started."""
        for handle, _ in self.pending:
            handle.wait()
        self.pending.clear()

    def start_update(self, update: Tensor, state: list[Tensor], lr_scale: float) -> None:
        """Subtract lr_scale * update from the rows of local_grad_and_state(), and start to gather
        all ranks' values. state: that of these rows. Collective."""
        if self.sparse:
            self.local.index_add_(0, self.active_rows, update, alpha=-lr_scale)
            for full, active in zip(self.rule_state, state, strict=True):
                full[self.active_rows] = active
        else:
            self.local.add_(update, alpha=-lr_scale)
        self.all_gather_values()

    def full_state(self) -> dict[str, Tensor]:
        """All ranks' rows of the state, without padding. Collective."""
        full = {name: self.all_gather(local)[:self.num_rows] for name, local in self.state.items()}
        self.wait()
        return full

    def load(self, full_state: dict[str, Tensor] | None) -> None:
        """Load this rank's rows of a full_state; None: zeros. Exact values that it does not have
        are the values, which must be loaded before. Raises ValueError for other shapes."""
        for name, local in self.state.items():
            local.zero_()
            if name == "exact_values" and name not in (full_state or {}):
                local.copy_(self.values[self.shard])
            elif full_state:
                expected = (self.num_rows, *local.shape[1:])
                if full_state[name].shape != expected:
                    raise ValueError(f"the optimizer state {name} has the shape "
                                     f"{tuple(full_state[name].shape)}, expected {expected}")
                rows = full_state[name][self.shard]
                local[:len(rows)].copy_(rows)


# --- Ranks, devices, signals ----------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """This process: its rank, the number of ranks, its device."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def sum(self, *values: Tensor | float) -> list[float]:
        """The sum over the ranks of each 0-dim value. Waits for the device. Collective."""
        values = [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values]
        total = torch.stack(values)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def broadcast_object(self, value):
        """Rank 0's value, on every rank. Collective."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        self.sum(0)

    def seconds(self) -> float:
        """Wall-clock time, after the device has finished its work."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def environment_ranks() -> tuple[int, int, int]:
    """(rank, local rank, number of ranks) from torchrun's or Slurm's environment variables; (0, 0,
    1) without WORLD_SIZE. Raises UserError if they are incomplete."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 0, 1
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        is_valid = bool(value) if name == "MASTER_ADDR" else value.isdecimal()
        require(is_valid, f"the environment variable {name} is '{value}', but several processes "
                          "need it; start them with torchrun, or unset WORLD_SIZE")
    rank, local_rank, world_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    require(local_rank <= rank < world_size,
            f"the environment variables RANK={rank}, LOCAL_RANK={local_rank} and "
            f"WORLD_SIZE={world_size} contradict each other; start the processes with torchrun, or "
            "unset WORLD_SIZE")
    return rank, local_rank, world_size


def start_runtime(hp: Hyperparameters) -> Runtime:
    """Join the other ranks, if torchrun or Slurm started several. Raises UserError."""
    rank, local_rank, world_size = environment_ranks()
    check_hyperparameters(hp, world_size)
    if hp.use_cuda:
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= num_gpus:
            raise UserError(f"process {local_rank} of this node has no GPU: torch sees {num_gpus}; "
                            "start one process per GPU (--nproc_per_node), or use --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        set_threads()
    if world_size > 1:
        join_ranks(hp, device)
    return Runtime(rank, world_size, device)


JOIN_SECONDS = 60  # in which all ranks have to come


def join_ranks(hp: Hyperparameters, device: torch.device) -> None:
    """Create the process group. Raises UserError if the ranks can't connect. If not all of them
    come in time, the process ends with one line: torch itself would wait for ten minutes."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    failure = f"the {os.environ['WORLD_SIZE']} ranks did not find each other at {address}"
    advice = "start them all within a minute, with torchrun, or unset WORLD_SIZE"

    def give_up():
        if os.environ["LOCAL_RANK"] != "0":  # rank 0 reports it, and torchrun ends the others
            time.sleep(3)
        log.error(f"error: {failure} within {JOIN_SECONDS} seconds; {advice}")
        os._exit(2)

    watchdog = threading.Timer(JOIN_SECONDS, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # torch would repeat it for a minute
        # This timeout ends other nodes if a rank fails. Compiling on one node must take less.
        backend = dict(backend="nccl", device_id=device) if hp.use_cuda else dict(backend="gloo")
        dist.init_process_group(timeout=timedelta(minutes=10), **backend)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{failure}: {reason}; {advice}") from None
    finally:
        watchdog.cancel()


def set_threads() -> None:
    """One thread for each core that this process may use, at most 8, because the laptop track's
    matrices are small. Processes of one node share the cores. OMP_NUM_THREADS overrides this."""
    if os.environ.get("OMP_NUM_THREADS"):
        return
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun
    processes = int(processes) if processes.isdecimal() else 1
    torch.set_num_threads(min(max(usable_cores() // max(processes, 1), 1), 8))


def usable_cores() -> int:
    """The number of CPU cores that this process may use; Slurm and taskset can limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def activation_dtype(hp: Hyperparameters, device: torch.device) -> torch.dtype:
    """--dtype; for auto, bfloat16 if the device has instructions for it, else float32."""
    if hp.dtype != "auto":
        return getattr(torch, hp.dtype)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


class StopSignal:
    """Inside `with`, the signals of Ctrl-C, of Slurm and spot machines (SIGTERM, SIGUSR1) and of a
    lost connection (SIGHUP) only set `number`. The training loop sums it over the ranks at each log
    line and calls agree(), so that all ranks stop at the same step. A second signal ends the
    process at once."""
    def __init__(self):
        self.number = 0
        self.agreed = 0  # the signal that ends the run, the same on all ranks; 0: none
        self.received_at = 0.0

    def __enter__(self):
        self.previous_handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self.previous_handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def agree(self, num_ranks: float, number_sum: float) -> None:
        """Set `agreed` to the signal that num_ranks ranks received. number_sum: of its number."""
        if num_ranks:
            self.agreed = round(number_sum / num_ranks)

    def receive(self, number, frame) -> None:
        now = time.monotonic()
        if self.number and now - self.received_at > 1:  # torchrun sends the terminal's Ctrl-C again
            os._exit(128 + number)
        if not self.number and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            os.write(2, f"{name}: stopping with a checkpoint at the next log line; a second signal "
                        "ends the run without one\n".encode())
        self.number = number
        self.received_at = now


# --- Compilation ----------------------------------------------------------------------------------


def choose_compilation(hp: Hyperparameters, runtime: Runtime) -> tuple[bool, str]:
    """Whether the model is compiled, the same on all ranks, and why it is not although it should
    be. --compile auto compiles on a GPU that Triton supports. Raises UserError for --compile on if
    the compiler does not work. Collective."""
    device = runtime.device
    if hp.compile == "auto":  # Triton needs compute capability 7.0
        wanted = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    else:
        wanted = hp.compile == "on"
    if not wanted:
        return False, ""
    use_compile_cache()  # torch._dynamo looks for it when it is imported, which is now
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False, "TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set"
    problem = compiler_problem(device)
    (num_problems,) = runtime.sum(bool(problem))
    if not num_problems:
        return True, ""
    problem = problem or "torch.compile does not work on another rank"
    require(hp.compile == "auto", f"{problem}; or use --compile off")
    return False, problem


def compiler_problem(device: torch.device) -> str:
    """Compile a small function. Returns what is wrong with the compiler, or ""."""
    torch._dynamo.config.suppress_errors = False  # it would run what it can't compile uncompiled
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.zeros(64, device=device))
    except Exception as error:  # the compiler, its headers, the path, the disk: it can be anything
        reason = " ".join(str(error).split())[:200]
        return ("torch.compile does not work; it needs a C++ compiler, Python's headers (Debian: "
                "apt install build-essential python3-dev) and a Python environment in a path "
                f"without spaces and quotes. It says: {type(error).__name__}: {reason}")
    return ""


def use_compile_cache() -> None:
    """Choose the folder for compiled kernels, so that the next run starts sooner: that of
    TORCHINDUCTOR_CACHE_DIR, else one in the repository. If it can't be used, a new temporary one.
    """
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folder = Path(given) if given else ROOT / ".cache" / "inductor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        # torch calls the compiler with unquoted paths.
        problem = "has a space or a quote" if re.search(r"[\s'\"]", str(folder)) else ""
    except OSError as error:
        problem = error.strerror
    if problem:
        temporary = tempfile.mkdtemp(prefix="inductor-")
        log.warning(f"compiled kernels are kept in {temporary}, because {folder}: {problem}")
        folder = temporary
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def compile_model(model: GPT, optimizer: Optimizer, device: torch.device) -> None:
    """Replace parts of the model and of the optimizer by compiled ones.

    CUDA: the InputEmbedding and GPT.body are one graph each, which cuts launch overhead and fuses
    the sums of gradients. CPU: each block is a graph of its own, and blocks of the same kind share
    one, because one graph for the model takes too long to build."""
    torch._dynamo.config.recompile_limit = 128  # kinds of blocks, batch sizes, with, without grad
    compile = functools.partial(torch.compile, dynamic=False)
    if device.type != "cuda":
        for module in model.modules():
            if isinstance(module, (Block, InputEmbedding, Readout, Pointer, Head)):
                module.compile(dynamic=False)
        return
    # Not part of the body's graph, where every layer would compute x0 anew from the embedding.
    model.input_embedding.compile(dynamic=False)
    model.body = compile(model.body)
    # These fuse Adam's ten passes over large tables, and the many small kernels of the lists. In
    # the body's graph, Inductor would compute the lists anew for each logit.
    optimizer.update_fns = {name: compile(compute_update) for name in RULES}
    model.mask_tensors = compile(mask_tensors)
    model.sample_vocabulary = compile(sample_vocabulary)


def warm_up(model: GPT, optimizer: Optimizer, stream: TokenStream, hp: Hyperparameters,
            runtime: Runtime) -> None:
    """Compile and load every kernel on a batch of zeros for each stage, then restore weights and
    optimizer, so that training starts from the same state as without a warm-up."""
    weights = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    text = torch.zeros(1, hp.val_length, dtype=torch.int64, device=runtime.device)
    for stage_begin in sorted({0, *stage_ends(hp)} - {hp.num_steps}):
        schedule = Schedule(stage_begin, hp, runtime.device)
        loader = BatchLoader(stream, hp, runtime, stage_begin)
        batch = [(torch.zeros_like(tokens), torch.zeros_like(targets))
                 for tokens, targets in loader.next()]
        loader.close()
        for _ in range(hp.adam_every):
            training_step(model, optimizer, batch, schedule)
        with torch.no_grad():
            model(text, text.clone(), schedule)  # a clone: the compiler would see one tensor twice
    optimizer.update_averages(1.0)
    optimizer.use_averages()
    model.load_state_dict(weights)
    optimizer.load_state_dict(None)


def compile_and_warm_up(model: GPT, optimizer: Optimizer, stream: TokenStream, hp: Hyperparameters,
                        runtime: Runtime, compiled: bool) -> None:
    """Compile, if asked for, and warm up."""
    started = runtime.seconds()
    if compiled:
        log.info("compiling (the first time this takes minutes) ...")
        compile_model(model, optimizer, runtime.device)
    warm_up(model, optimizer, stream, hp, runtime)
    what = "compiled and warmed up" if compiled else "warmed up"
    log.info(f"{what} in {runtime.seconds() - started:.1f} s (not training time)")


# --- Log ------------------------------------------------------------------------------------------

SEPARATOR = "=" * 100
log = logging.getLogger("train_gpt")


class ConsoleHandler(logging.Handler):
    """Warnings and errors go to stderr, other lines to stdout, above tqdm's progress bar."""
    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except OSError:  # a console that is gone, or a full disk, must not end the run
            pass


def prepare_console() -> None:
    """A console that is not UTF-8 shows characters that it lacks as escapes. One that was closed
    before the start (`>&-`) is replaced by the null device."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def output_of(*command: str) -> str:
    """What a command prints; empty if it can't be run."""
    if not shutil.which(command[0]):
        return ""
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace",
                            cwd=ROOT)
    return result.stdout.strip()


def git_state() -> tuple[str | None, bool]:
    """The commit of this repository and whether files differ from it; (None, False) if ROOT is a
    folder inside another repository, or in none."""
    top = output_of("git", "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != ROOT.resolve():
        return None, False
    commit = output_of("git", "rev-parse", "--verify", "HEAD")
    return commit or None, bool(output_of("git", "status", "--porcelain"))


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = output_of("cat", "/proc/cpuinfo") or output_of("sysctl", "machdep.cpu.brand_string")
    name = re.search(r"(?:model name|brand_string)\s*: *(.+?) *$", cpu_info, re.MULTILINE)
    return name[1] if name else platform.machine()


def source_of_script() -> str:
    """The text of this script; lines end with "\\n", whatever they end with in the file."""
    return Path(__file__).read_text("utf-8")


def run_info(hp: Hyperparameters, runtime: Runtime, train_stream: TokenStream,
             val_stream: TokenStream, dtype: torch.dtype, compiled: bool) -> dict:
    """What the log and the checkpoints say about the run, the same on all ranks. Collective."""
    track = TRACKS[hp.track]
    fingerprint = "-".join([val_stream.fingerprint(track.val_tokens + 1),
                            train_stream.fingerprint(2 ** 26),
                            train_stream.fingerprint_of_shards()])
    run_id = f"{hp.track}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"
    if hp.resume not in ("", "latest"):
        saved = open_checkpoint(hp.resume)["info"]
        run_id = Path(str(saved.get("run_id"))).name  # the same log
        require(saved.get("data_fingerprint") == fingerprint,
                f"the run of the checkpoint {hp.resume} read other data: fingerprint "
                f"{saved.get('data_fingerprint')} and {saved.get('train_tokens')} training tokens, "
                f"now {fingerprint} and {len(train_stream)}; restore its shards in "
                f"{ROOT / 'data'}, or start a new run")
    commit, dirty = git_state()
    return runtime.broadcast_object({
        "run_id": run_id,
        "command": sys.argv,
        "script": os.path.relpath(__file__, ROOT),
        "code_hash": hashlib.sha256(source_of_script().encode()).hexdigest()[:12],
        "git_commit": commit,
        "git_dirty": dirty,
        "hyperparameters": dataclasses.asdict(hp),
        "target": track.target,
        "stage_tokens": [stage.batch_multiplier * hp.batch_size * hp.sequence_length
                         for stage in hp.stages],
        "data_fingerprint": fingerprint,
        "train_tokens": len(train_stream),
        "activations": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "world_size": runtime.world_size,
        "device": device_name(runtime.device),
        "device_count": runtime.world_size if runtime.cuda else usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform()})


def start_log(hp: Hyperparameters, runtime: Runtime, info: dict) -> None:
    """Rank 0 logs to the console and to <run_id>.txt. A new file begins with this script and the
    environment, each followed by SEPARATOR. Raises UserError if the file can't be written."""
    if runtime.rank:
        return
    log.setLevel(logging.INFO)
    path = hp.folder / f"{info['run_id']}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write the log {path}: {error.strerror}; choose another folder with "
                        "--entry") from None
    if path.stat().st_size == 0:
        pytorch = f"Running PyTorch {torch.__version__}"
        header = [source_of_script().removesuffix("\n"), SEPARATOR,
                  f"Running Python {' '.join(sys.version.split())}"]
        if runtime.cuda:
            header.append(f"{pytorch} compiled for CUDA {torch.version.cuda}")
        header += [f"{pytorch} on {info['device']} with world_size {runtime.world_size}",
                   json.dumps(info, indent=1)]
        if runtime.cuda:
            header += ["nvidia-smi:", output_of("nvidia-smi")]
        handler.stream.write("\n".join([*header, SEPARATOR, ""]))
    elif not path.read_bytes().endswith(b"\n"):  # the run was killed while it wrote a line
        handler.stream.write("\n")
    logging.raiseExceptions = False  # a full disk must not end the run
    log.addHandler(handler)
    log.info(f"track {hp.track}, {hp.num_steps} steps, {info['activations']}, "
             f"{runtime.world_size} x {info['device']}, {info['threads']} threads, log: {path}")


def log_metric(name: str, value: float, step: int, hp: Hyperparameters, train_ms: float) -> None:
    """One line in the format of modded-nanogpt's logs, with the number of training tokens so far.
    """
    # The names and their colons are joined here, so that a search of the log, which holds this
    # source, finds only metrics.
    metrics = {
        "step": f"{step}/{hp.num_steps}",
        name: f"{value:.4f}",
        "train_time": f"{train_ms:.0f}ms",
        "step_avg": f"{train_ms / max(step, 1):.2f}ms",
        "tokens": f"{tokens_before(step, hp)}"}
    log.info(" ".join(f"{name}:{text}" for name, text in metrics.items()))


def profiler(hp: Hyperparameters, runtime: Runtime, info: dict):
    """With --profile, torch's profiler of rank 0's steps 3 to 5; it writes <run_id>.trace.json,
    which https://ui.perfetto.dev shows. Otherwise a null context."""
    if not hp.profile or runtime.rank:
        return nullcontext()
    path = str(hp.folder / f"{info['run_id']}.trace.json")
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(path))


def finish(model: GPT, progress: "Progress", stop: StopSignal, hp: Hyperparameters,
           runtime: Runtime, info: dict) -> int:
    """Log the last lines, and save the weights. Returns the exit code."""
    if stop.agreed:
        command = [sys.executable]
        if runtime.world_size > 1:  # several nodes: see docs/nodes.md
            command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                        f"--nproc_per_node={runtime.world_size}"]
        command += [os.path.relpath(__file__), "--resume", str(checkpoint_path(progress, hp, info))]
        log.info(f"stopped by a signal at step {progress.step}; continue with: "
                 f"{shlex.join(command)}")
        return 128 + stop.agreed
    target = TRACKS[hp.track].target
    if progress.target_ms is not None:
        log.info(f"target {target}: reached at step {progress.target_step} after "
                 f"{progress.target_ms / 1000:.1f} s")
    elif hp.num_val_tokens < TRACKS[hp.track].val_tokens:
        log.info(f"target {target}: not judged, because --val_tokens is {hp.val_tokens}")
    elif target:  # a track of one's own may have none
        log.info(f"target {target}: missed")
    if runtime.cuda:
        peak_bytes = torch.cuda.max_memory_allocated(runtime.device)
    else:  # in KiB on Linux, in bytes on macOS
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes *= 1 if sys.platform == "darwin" else 1024
    tokens_per_second = 1000 * tokens_before(hp.num_steps, hp) / max(progress.train_ms, 1e-3)
    log.info(f"tokens_per_second:{tokens_per_second:.0f} "
             f"peak_memory_per_rank:{peak_bytes / 2 ** 20:.0f}MiB")
    if progress.held_out_loss is not None:
        log.info(f"held_out_loss:{progress.held_out_loss:.4f} of the "
                 f"{progress.held_out_tokens:,} tokens after the validation's")
    if not hp.no_weights:
        save_weights(model, progress, hp, runtime, info)
    return 0


# --- Checkpoints ----------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where the run is; a part of each checkpoint."""
    step: int = 0
    train_ms: float = 0.0           # training time before `step`
    validated_step: int = 0         # step of the last validation; there is none at step 0
    target_step: int | None = None  # when a validation first reached the target
    target_ms: float | None = None
    validation_loss: float | None = None  # the last one
    held_out_loss: float | None = None  # of held_out_sequences, after the last step
    held_out_tokens: int = 0

    def note_target(self, loss: float, target: float) -> None:
        """Note the first validation, at `step`, that reaches the target."""
        if loss <= target and self.target_step is None:
            self.target_step, self.target_ms = self.step, self.train_ms


def checkpoint_path(progress: Progress, hp: Hyperparameters, info: dict) -> Path:
    """Where the checkpoint of a step is saved."""
    return hp.folder / f"{info['run_id']}_step{progress.step:06d}.pt"


def newest_checkpoint(folder: Path, track: str, seed: int | None = None) -> str:
    """The checkpoint with the highest step of the run that was started last; "" if there is none.
    track: only this track's; "": any. seed: only this seed's; None: any."""
    found = []
    for path in folder.glob("*.pt"):
        match = re.fullmatch(r"(.+)-(\d{8}-\d{6}-[0-9a-f]{6})_step(\d+)", path.stem)
        if match and track in ("", match[1]):
            found.append((match[2], int(match[3]), str(path)))
    for _, _, path in sorted(found, reverse=True):
        if seed is None or open_checkpoint(path)["hyperparameters"].get("seed") == seed:
            return path
    return ""


def finite_weights(model: GPT, step: int) -> dict[str, Tensor]:
    """The model's weights. Raises UserError if one is not finite."""
    weights = model.state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"the weights are not finite at step {step}, so they were not saved; use "
                        "lower learning rates, or --resume from an earlier checkpoint")
    return weights


def save(state: dict, path: Path) -> None:
    """Write a file and log its name and size, or a warning if it can't be written."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)  # atomic: no reader ever sees half a file
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        temporary.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:200]
        log.warning(f"warning: can't write {path}: {reason}")
    else:
        log.info(f"saved {path} ({path.stat().st_size / 1e6:.1f} MB)")


def save_weights(model: GPT, progress: Progress, hp: Hyperparameters, runtime: Runtime,
                 info: dict) -> None:
    """Save the finished run's weights, without optimizer state, for tools.sample and tools.export.
    Raises UserError, on all ranks, if a weight is not finite.

    Each weight keeps its dtype, so the file gives the same logits as the run. Rows of the n-gram
    tables that are zero, because no n-gram of the training text led to them, are left out."""
    weights = finite_weights(model, progress.step)
    if runtime.rank:
        return
    for name, weight in weights.items():
        weights[name] = weight.cpu()
        if name.startswith("ngram."):
            rows = weights[name].any(-1).nonzero()[:, 0]
            weights[name] = {"rows": rows, "values": weights[name][rows]}
    save({"info": info, "hyperparameters": dataclasses.asdict(hp),
          "progress": dataclasses.asdict(progress), "model": weights},
         hp.folder / f"{info['run_id']}.pt")


def load_weights(model: GPT, saved: dict) -> None:
    """Load the weights of save_weights or save_checkpoint. Raises RuntimeError if they do not fit.
    """
    weights = dict(saved["model"])
    for name, table in model.named_parameters():
        if isinstance(weights.get(name), dict):
            rows, values = weights[name]["rows"], weights[name]["values"]
            weights[name] = torch.zeros_like(table, device="cpu").index_copy(0, rows, values)
    model.load_state_dict(weights)


def save_checkpoint(progress: Progress, model: GPT, optimizer: Optimizer, hp: Hyperparameters,
                    runtime: Runtime, info: dict) -> None:
    """Save all that the rest of the run depends on; log a warning if the file can't be written.
    Collective. Raises UserError, on all ranks, if a weight is not finite."""
    state = {
        "info": info,
        "hyperparameters": dataclasses.asdict(hp),
        "progress": dataclasses.asdict(progress),
        "model": finite_weights(model, progress.step),
        "optimizer": optimizer.state_dict(),
    }
    if runtime.rank == 0:
        save(state, checkpoint_path(progress, hp, info))
    runtime.barrier()  # torchrun ends all ranks when one ends, so none may end before the save


def open_checkpoint(path: str) -> dict:
    """What save_checkpoint or save_weights saved, memory-mapped on the CPU. Raises UserError if it
    can't be read."""
    try:  # weights_only: a file can't run code
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        is_complete = {"info", "hyperparameters", "progress", "model"} <= state.keys()
    except OSError as error:
        raise UserError(f"can't read the checkpoint {path}: {error.strerror}") from None
    except Exception:  # a damaged file can raise almost anything
        is_complete = False
    require(is_complete, f"{path} is not a checkpoint of train_gpt.py, or it is damaged; "
                         "records/scratch/*.pt are those of your runs")
    return state


def load_checkpoint(model: GPT, optimizer: Optimizer, hp: Hyperparameters, info: dict) -> Progress:
    """Load the checkpoint that --resume names, if any. Logs which settings differ from the
    checkpoint's, and whether the script or the data changed. Raises UserError if it does not fit.
    """
    if not hp.resume:
        return Progress()
    if hp.resume == "latest":
        log.info(f"no checkpoint in {hp.folder}: starting at step 0")
        return Progress()
    saved = open_checkpoint(hp.resume)
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint {hp.resume} does not fit this script and these settings: "
                        f"{reason}") from None
    if progress.step > hp.num_steps:
        raise UserError(f"the checkpoint {hp.resume} is at step {progress.step}, after --num_steps "
                        f"{hp.num_steps}")
    log.info(f"resumed from {hp.resume} at step {progress.step}")
    settings = dataclasses.asdict(hp)
    for name, value in saved["hyperparameters"].items():
        is_shown = name not in ("resume", "dtype")  # dtype: see activations below
        if is_shown and settings.get(name) != value:
            log.info(f"setting changed: {name} was {value}, now {settings.get(name)}")
    for name in ("code_hash", "activations", "compiled", "torch", "device", "world_size"):
        if saved["info"].get(name) != info[name]:
            log.info(f"{name} changed: was {saved['info'].get(name)}, now {info[name]}")
    return progress


# --- Command line ---------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """Reports a wrong flag as one line; argparse would print its usage first."""
    def error(self, message):
        if unknown := re.search(r"unrecognized arguments: --([\w-]+)", message):
            names = [field.name for field in dataclasses.fields(Hyperparameters)]
            similar = difflib.get_close_matches(unknown[1].replace("-", "_"), names, n=1)
            if "layer" in unknown[1]:
                message += " (the table LAYERS in train_gpt.py has one row for each layer)"
            elif similar:
                message += f" (similar: --{similar[0]})"
        raise UserError(f"{message}; `python train_gpt.py --help` lists all flags")


def make_parser() -> argparse.ArgumentParser:
    """One flag for each field of Hyperparameters."""
    parser = ArgumentParser(
        description=__doc__, usage="%(prog)s [flags]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="On a CPU, activations are bfloat16 if it has AVX512-BF16 or AMX, and there is one "
               "thread per core, at most 8; --dtype and OMP_NUM_THREADS override this.")

    def show(value) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value) or "none"

    for field in dataclasses.fields(Hyperparameters):
        help = f"{field.metadata['help']} (default: {show(field.default)}"
        for track, preset in PRESETS.items():
            if field.name in preset:
                help += f"; {track}: {show(preset[field.name])}"
        help += ")"
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=help)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, default=field.default,
                                choices=field.metadata["choices"], help=help)
    return parser


def parse_arguments(argv: list[str] | None = None) -> Hyperparameters:
    """The settings of the run: flags override those of --resume's checkpoint, which override those
    of the track. The default track is laptop on a CPU, fineweb with a GPU. argv: default sys.argv.
    Raises UserError."""
    parser = make_parser()
    parser.set_defaults(track="", seed=None)
    given, _ = parser.parse_known_args(argv)  # the second parse reports unknown flags
    resume = given.resume
    if resume == "latest":
        folder = Hyperparameters(entry=given.entry).folder
        resume = newest_checkpoint(folder, given.track, given.seed) or "latest"
    parser.set_defaults(seed=Hyperparameters.seed)
    if resume in ("", "latest"):
        has_gpu = given.device != "cpu" and torch.cuda.is_available()
        track = given.track or ("fineweb" if has_gpu else "laptop")
        parser.set_defaults(track=track, **of_track(PRESETS, track))
    else:
        require("optimizer" in open_checkpoint(resume),
                f"{resume} holds only the weights of a finished run; --resume needs a "
                "checkpoint, <run_id>_step<N>.pt, which --save_every saves")
        parser.set_defaults(**settings_of_checkpoint(resume))
    args = vars(parser.parse_args(argv))
    return Hyperparameters(**{**args, "resume": resume})


def settings_of_checkpoint(path: str) -> dict:
    """The settings of the run that saved a checkpoint. Settings that its script did not have are
    those of the track. Raises UserError."""
    saved = open_checkpoint(path)
    try:
        dtype = saved["info"]["activations"]
        old = {**saved["hyperparameters"], "dtype": dtype}
        require(old["track"] in TRACKS,
                f"the checkpoint {path} is of the track {old['track']}, which is not in TRACKS of "
                f"{__file__}; use the script that saved it: {saved['info'].get('script')}")
        settings = {"track": old["track"], **of_track(PRESETS, old["track"])}
        for field in dataclasses.fields(Hyperparameters):
            if field.name in old and field.name not in ("resume", "profile"):
                settings[field.name] = field.type(old[field.name])
        return settings
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint {path} has damaged settings: {error!r}") from None


def require(condition: bool, message: str) -> None:
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_hyperparameters(hp: Hyperparameters, world_size: int) -> None:
    """Raises UserError, naming the setting to change, if the run is impossible on world_size ranks.
    """
    require(hp.track in TRACKS, f"--track {hp.track} is not one of {', '.join(TRACKS)}")
    at_least_one = {"num_steps", "batch_size", "sequence_length", "micro_batch", "val_length",
                    "num_heads", "model_dim", "mlp_dim", "adam_every", "log_every"}
    for name, value in dataclasses.asdict(hp).items():
        if isinstance(value, (int, float)) and name != "logit_shift":
            minimum = 1 if name in at_least_one else 0
            is_valid = minimum <= value < math.inf  # NaN is not
            require(is_valid, f"--{name} {value} must be at least {minimum}")
    require(hp.average_tail <= 1, f"--average_tail {hp.average_tail} must be at most 1")
    require(0 < hp.cooldown <= 1, f"--cooldown {hp.cooldown} must be more than 0 and at most 1")
    require(hp.extension_steps < hp.num_steps, f"--extension {hp.extension} leaves no other steps")
    require(0 < hp.logit_cap <= 80, f"--logit_cap {hp.logit_cap} must be above 0 and at most 80")
    require(hp.logit_scale > 0, f"--logit_scale {hp.logit_scale} must be more than 0")
    require(2 <= hp.ngrams <= 6, f"--ngrams {hp.ngrams} must be from 2 to 6")
    require(hp.ngram_rows >= 2, f"--ngram_rows {hp.ngram_rows} must be at least 2")

    batch_sizes = [stage.batch_multiplier * hp.batch_size for stage in hp.stages]
    require(math.gcd(*batch_sizes) % world_size == 0,
            f"{' or '.join(map(str, sorted(set(batch_sizes))))} sequences per step (--batch_size "
            f"{hp.batch_size}) can't be divided over {world_size} ranks")
    require(hp.sequence_length % 128 == 0,
            f"--sequence_length {hp.sequence_length} must be a multiple of 128")
    track_val_tokens = TRACKS[hp.track].val_tokens
    require(hp.val_length % 128 == 0 and track_val_tokens % hp.val_length == 0,
            f"--val_length {hp.val_length} must be a multiple of 128 that divides the "
            f"{track_val_tokens:,} validation tokens, for example a power of two")
    require(hp.val_tokens <= track_val_tokens and hp.val_tokens % hp.val_length == 0,
            f"--val_tokens {hp.val_tokens} must be a multiple of --val_length {hp.val_length}, and "
            f"at most the track's {track_val_tokens}")
    require(hp.save_every % hp.adam_every == 0,
            f"--save_every {hp.save_every} must be a multiple of --adam_every {hp.adam_every}")
    require(hp.model_dim % (4 * hp.num_heads) == 0,
            f"--model_dim {hp.model_dim} must be a multiple of 4 times --num_heads {hp.num_heads}, "
            "because rotary embeddings rotate quarters of each head")
    require(hp.model_dim >= GATE_DIMS, f"--model_dim {hp.model_dim} must be at least {GATE_DIMS}")
    needs_even = any(layer.attention == "paired" or layer.mudd for layer in hp.layers)
    require(hp.num_heads % 2 == 0 or not needs_even,
            f"--num_heads {hp.num_heads} must be even for paired heads and MUDD")
    records = ROOT / "records"
    require(Path(os.path.normpath(hp.folder)).is_relative_to(records),
            f"--entry {hp.entry} must be a folder inside {records}")
    check_tables(hp.layers, hp.stages)


def check_tables(layers: tuple[Layer, ...], stages: tuple[Stage, ...]) -> None:
    """Raises UserError, naming the row, if LAYERS or STAGES is inconsistent."""
    num_tables = len({layer.value_table for layer in layers} - {None})
    for i, layer in enumerate(layers):
        row = f"layer {i} of LAYERS"
        require(layer.attention in ("short", "long", "paired", None),
                f"{row}: attention {layer.attention!r} must be 'short', 'long', 'paired' or None")
        require(not layer.narrow_qk or layer.attention in ("short", "paired"),
                f"{row}: narrow_qk needs short or paired attention; long layers shift the half of "
                "the keys that it takes away")
        if layer.value_table is not None:
            require(layer.attention is not None, f"{row}: value_table needs attention")
            require(layer.value_table in range(num_tables),
                    f"{row}: value_table {layer.value_table}, but tables are numbered 0, 1, ...")
        for name in ("skip_from", "attn_input_layer"):
            source = getattr(layer, name)
            require(source is None or source in range(i),
                    f"{row}: {name} {source} is no earlier layer")
    for i, stage in enumerate(stages):
        row = f"stage {i} of STAGES"
        require(stage.batch_multiplier >= 1, f"{row}: batch_multiplier must be at least 1")
        require(len(stage.mtp_weights) == len(stage.mtp_weights_end),
                f"{row}: mtp_weights and mtp_weights_end must have the same length")
        require(len(stage.prefix_weights) == 2, f"{row}: prefix_weights must have two numbers")
        if i:
            before = stages[i - 1]
            require(stage.until > before.until, f"{row}: until must exceed that of stage {i - 1}")
            require(before.tied or not stage.tied, f"{row}: tied after a stage that is not tied")


def main(argv: list[str] | None = None) -> int:
    """Run the script. Returns the exit code: 0; 2 after a user error; 128 + n after signal n."""
    prepare_console()
    log.propagate = False
    log.setLevel(logging.WARNING)  # rank 0 lowers it in start_log
    log.addHandler(ConsoleHandler())
    try:
        hp = parse_arguments(argv)
        runtime = start_runtime(hp)
        hp = runtime.broadcast_object(hp)  # --resume latest may find other files on another node
        code = train(hp, runtime)
        runtime.barrier()  # until rank 0 has logged its last line
        return code
    except SystemExit as end:  # after --help
        return end.code
    except UserError as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if re.search("MemoryError|out of memory|allocate memory", repr(error)):
            message = ("out of memory; use a smaller --micro_batch, then a smaller --val_length "
                       "and --sequence_length (`./run.sh simulate` predicts a GPU's memory)")
        elif dist.is_initialized() and re.search("DistBackendError|Connection", repr(error)):
            message = "the connection to another rank is lost; see why that rank ended"
        else:
            raise
    finally:
        handlers = log.handlers[:]
        log.handlers.clear()
    # Most mistakes are found by all ranks. Rank 0 reports them, and torchrun then ends the others.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(3)
    log.handlers = handlers
    log.error("error: " + " ".join(message.split()))
    log.handlers = []
    if dist.is_initialized():  # a normal exit could wait for ranks that still compute
        os._exit(2)
    return 2


if __name__ == "__main__":
    exit_code = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the console is gone, which a normal exit would report
        os._exit(exit_code)
    if dist.is_initialized():  # a normal exit destroys the process group, where gloo can abort
        os._exit(exit_code)
    sys.exit(exit_code)
