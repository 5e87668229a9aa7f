#!/usr/bin/env python3
"""Train GPT-2 (124M) to a validation loss of 3.28 on FineWeb in the least time, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py --track fineweb    # 8 GPUs
    python train_gpt.py --track fineweb     # one GPU: the same batch, in 8 parts
    python train_gpt.py --track laptop      # a CPU: bytes of Python, in minutes
    python train_gpt.py --help              # every setting, with its unit

`./run.sh` does the same and first sets up Python and data. A track fixes data, vocabulary, target;
all else is yours. A run's log, records/scratch/<run_id>.txt: this source, environment, losses.

The system is the ValueEmbed record of 2024-12-04 (published: 3.2751 after 264.6 s on 8 H100s) plus
hashed n-gram embeddings, merged QKV, shared value embeddings and fewer bytes between the ranks.
records/2026-11-22_NGramEmbed has its figures on the laptop track; no GPU has measured it yet.

Shapes in comments: T tokens of a sequence, D model width, H heads, V vocabulary, L layers, W ranks.
"""
import argparse
import dataclasses
import hashlib
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
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

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

def knob(default, help: str, choices: tuple | None = None, least: float = 0, most: float = 10**12):
    """A field of Hyperparameters: default, help text with the unit, permitted values."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, least=least, most=most))

@dataclass(frozen=True)
class Hyperparameters:
    """One run. Each field is a flag; defaults are fineweb's, PRESETS has the other tracks'."""
    track: str = knob("fineweb", "which data and target", tuple(TRACKS))
    seed: int = knob(0, "of the initial weights; the data's order never changes", most=2**63 - 1)
    # work
    num_steps: int = knob(1530, "optimizer steps", least=1, most=10**6)
    batch_size: int = knob(8, "sequences a step, over all ranks", least=1)
    sequence_length: int = knob(65_536, "tokens a sequence", least=128)
    micro_batch: int = knob(1, "sequences a rank computes at once; more are done in turn", least=1)
    # model
    num_layers: int = knob(12, "transformer blocks", least=1, most=1000)
    num_heads: int = knob(6, "attention heads", least=1)
    model_dim: int = knob(768, "width of the residual stream", least=1, most=2**16)
    value_layers: int = knob(2, "layers at each end that share value embeddings")
    ngrams: int = knob(2, "longest n: a token brings embeddings of its 2- to n-grams", most=64)
    ngram_rows: int = knob(24_571, "rows of each n's table of n-grams", least=1, most=2**31)
    logit_cap: float = knob(30.0, "logits are squashed into (-cap, cap)", least=1e-3)
    window_start: int = knob(64, "tokens a query sees at step 0; rounded down to 64s", least=64)
    window_end: int = knob(1792, "tokens a query sees at the end; rounded down to 64s", least=64)
    # optimizers
    embed_lr: float = knob(0.6, "Adam learning rate of the embedding and the value embeddings")
    ngram_lr: float = knob(0.6, "Adam learning rate of the n-gram embeddings")
    head_lr: float = knob(0.008, "Adam learning rate of the head")
    scalar_lr: float = knob(0.04, "Adam learning rate of the learned scalars")
    adam_beta1: float = knob(0.8, "decay of Adam's first moment, a step", most=0.999999)
    adam_beta2: float = knob(0.95, "decay of Adam's second moment, a step", most=0.999999)
    muon_lr: float = knob(0.05, "Muon learning rate of the matrices of the blocks")
    momentum_start: float = knob(0.85, "Muon's momentum at step 0", most=0.999999)
    momentum_end: float = knob(0.95, "Muon's momentum after its warmup", most=0.999999)
    momentum_warmup_steps: int = knob(300, "steps over which Muon's momentum rises")
    warmup_steps: int = knob(0, "steps over which the learning rates rise from zero")
    cooldown_steps: int = knob(600, "steps over which the learning rates fall to zero at the end")
    # run
    val_every: int = knob(125, "steps between validations; 0: only at the end")
    log_every: int = knob(10, "steps between lines with the training loss; 0: none")
    save_every: int = knob(0, "steps between checkpoints; 0: only when a signal ends the run")
    keep: int = knob(2, "checkpoints of a run that stay, the last ones", least=1)
    resume: str = knob("", "checkpoint to continue from; latest: the newest beside the log, if any")
    resume_anyway: bool = knob(False, "continue though script, data or settings have changed")
    entry: str = knob("", "write the log into records/<entry>/ instead of records/scratch/")
    device: str = knob("auto", "auto: CUDA if there is a GPU", ("auto", "cuda", "cpu"))
    dtype: str = knob("auto", "of the activations; auto: bfloat16 where it is fast",
                      ("auto", "bfloat16", "float32"))
    compile: str = knob("auto", "torch.compile; auto: where it pays", ("auto", "on", "off"))
    profile: bool = knob(False, "write a Chrome trace of steps 3 to 5 beside the log")
    sample_tokens: int = knob(300, "tokens the model writes at the end of the run; 0: none")

    # Tokens of the longest forward pass, also in validation; where logs and checkpoints go.
    forward_tokens = property(lambda self: self.micro_batch * self.sequence_length)
    folder = property(lambda self: ROOT / "records" / (self.entry or "scratch"))

PRESETS = {
    "fineweb": {},
    "laptop": dict(
        num_steps=390, batch_size=8, sequence_length=256, micro_batch=8, num_layers=3, num_heads=2,
        model_dim=128, ngrams=6, ngram_rows=65_521, logit_cap=15.0, window_start=128,
        window_end=128, embed_lr=2.4, ngram_lr=1.5, head_lr=0.012, scalar_lr=0.04, muon_lr=0.045,
        momentum_warmup_steps=100, cooldown_steps=195, val_every=50, log_every=50)}

# --- Schedules: pure functions of the step, so that a resumed run can't differ --------------------

def sequences_before(step: int, hp: Hyperparameters) -> int:
    """The sum of the batch sizes of steps 0 to step - 1: sequences that all ranks have read."""
    return step * hp.batch_size

def tokens_before(step: int, hp: Hyperparameters) -> int:
    """Tokens that steps 0 to step - 1 train on, over all ranks."""
    return sequences_before(step, hp) * hp.sequence_length

def batch_sizes(hp: Hyperparameters) -> dict[int, int]:
    """Each number of sequences that a step takes, with the first step to take so many."""
    return {sequences_before(step + 1, hp) - sequences_before(step, hp): step
            for step in reversed(range(hp.num_steps))}

def lr_scale(step: int, hp: Hyperparameters) -> float:
    """Factor of all learning rates: linear up, flat, linear to 0 (trapezoid, arXiv 2405.18392)."""
    to_go = hp.num_steps - step
    warmup = (step + 1) / hp.warmup_steps if step < hp.warmup_steps else 1.0
    cooldown = to_go / hp.cooldown_steps if to_go < hp.cooldown_steps else 1.0
    return min(warmup, cooldown)

def muon_momentum(step: int, hp: Hyperparameters) -> float:
    """Muon's momentum at step: linear from momentum_start to momentum_end, then flat."""
    done = min(step / hp.momentum_warmup_steps, 1.0) if hp.momentum_warmup_steps else 1.0
    return (1 - done) * hp.momentum_start + done * hp.momentum_end

def window_size(step: int, hp: Hyperparameters) -> int:
    """Tokens a query sees at step: grows linearly, rounded down to 64 (record 2024-12-04)."""
    grown = step / hp.num_steps * (hp.window_end - hp.window_start)
    return 64 * int((hp.window_start + grown) // 64)

class Schedule:
    """What the schedules say at one step; model and optimizer get all of it. What compiled parts
    use is a tensor, for torch.compile would compile anew for each new number."""
    def __init__(self, step: int, hp: Hyperparameters, device: torch.device):
        self.step, self.lr_scale, self.momentum = step, lr_scale(step, hp), muon_momentum(step, hp)
        self.window = torch.full((), window_size(step, hp), device=device)  # 0-dim int64

# --- Attention: one definition of what is visible, two kernels ------------------------------------

def document_start(tokens: Tensor, eot_token: int) -> Tensor:
    """Where each token's document or sequence begins, (S T,), for S sequences (S, T) end to end."""
    position = torch.arange(tokens.numel(), device=tokens.device)
    begins = tokens == eot_token
    begins[:, 0] = True
    return torch.where(begins.flatten(), position, 0).cummax(0).values

def first_visible_key(start: Tensor, window: Tensor) -> Tensor:
    """The earliest key each query sees, (S T,): of its document and its last `window` tokens."""
    return torch.maximum(start, torch.arange(len(start), device=start.device) - window + 1)

def visible(query: Tensor, key: Tensor, first_key: Tensor) -> Tensor:
    """THE mask: may this query see this key? All positions; first_key: the query's. Broadcasts."""
    return (first_key <= key) & (key <= query)

def block_mask(first_key: Tensor, block: int = 128) -> BlockMask:
    """FlexAttention's mask from first_visible_key's (T,), T a multiple of block. first_key never
    decreases, so a query block sees the key blocks from its first query's first key to itself, and
    whole those that begin after its last query's first key."""
    query_block = torch.arange(len(first_key) // block, device=first_key.device)[:, None]
    key_block = query_block.T
    first, last = first_key[::block, None], first_key[block - 1::block, None]
    seen = (first // block <= key_block) & (key_block <= query_block)
    whole = ((last + block - 1) // block <= key_block) & (key_block < query_block)

    def ordered(dense):  # (blocks, blocks) bool -> how many, and which ones first, (1, 1, ...)
        which = dense.int().argsort(dim=-1, descending=True, stable=True).int()
        return dense.sum(-1, dtype=torch.int32)[None, None], which[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *ordered(seen & ~whole), *ordered(whole), BLOCK_SIZE=block,
        mask_mod=lambda batch, head, query, key: visible(query, key, first_key[query]))

def chunked_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor,
                      max_window: int) -> Tensor:
    """Sliding-window attention for CPUs, where FlexAttention has no backward. q, k, v, result: (1,
    H, T, d). A chunk of max_window / 2 queries sees its own keys and those of two chunks before."""
    (_, H, T, d), C = q.shape, max_window // 2
    N = math.ceil(T / C)
    padding = N * C - T
    query = torch.arange(N * C, device=q.device).view(N, C, 1)
    key = torch.arange(-2 * C, C, device=q.device) + query[:, :1]
    # A padded query sees itself: a row of scores without a key would turn the gradients to NaN.
    first_key = torch.cat([first_key, torch.arange(T, N * C, device=q.device)]).view(N, C, 1)

    def with_two_chunks_before(x):  # (1, H, T, d) -> (H, N, 3C, d)
        x = F.pad(x[0], (0, 0, 2 * C, padding)).view(H, N + 2, C, d)
        return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], dim=2)

    q = F.pad(q[0], (0, 0, 0, padding)).view(H, N, C, d) * d ** -0.5
    scores = q @ with_two_chunks_before(k).mT  # (H, N, C, 3C)
    scores = scores.float().masked_fill(~visible(query, key, first_key), -math.inf)
    y = scores.softmax(dim=-1).to(v.dtype) @ with_two_chunks_before(v)
    return y.view(1, H, N * C, d)[:, :, :T]

Mask = BlockMask | Tensor  # for FlexAttention (compiled CUDA); first_visible_key's (T,) elsewhere

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, max_window: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over visible keys. q, k, v, result: (1, H, T, d)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    return chunked_attention(q, k, v, mask, max_window)

# --- Model ----------------------------------------------------------------------------------------

def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension without a learned scale; its eps is that of x's precision."""
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Module):
    """`parts` maps without bias in one product; Muon orthogonalises each. zero: begins at zero.
    weight: (parts, out, in) float32, or small updates would be lost."""
    def __init__(self, in_features: int, out_features: int, parts: int = 1, zero: bool = False):
        super().__init__()
        bound = 0.0 if zero else in_features ** -0.5
        weight = torch.empty(parts, out_features, in_features).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(0, 1).to(x.dtype))  # (..., parts * out)

def rotary_tables(T: int, head_dim: int, base: float = 10_000.0) -> Tensor:
    """cos and sin of rotary positions (arXiv 2104.09864), (2, T, head_dim / 2) float32."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(T, dtype=torch.float32), frequency)
    return torch.stack([angle.cos(), angle.sin()])

def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the two halves of each head by the position's angles. x, result: (..., T, H, d)."""
    (a, b), (cos, sin) = x.float().chunk(2, dim=-1), rotary[:, :, None]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)

class NGramEmbed(nn.Module):
    """The sum of hashed embeddings of the 2- to N-grams that end at each token (arXiv 2412.09871),
    cut where document or sequence begin; zero at first. sparse: gradients of the tables."""
    def __init__(self, hp: Hyperparameters, sparse: bool):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(hp.ngram_rows, hp.model_dim, sparse=sparse)
                                    for _ in range(2, hp.ngrams + 1))
        for table in self.tables:
            nn.init.zeros_(table.weight)

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        """tokens (T,), start: document_start's (T,). Returns (T, D)."""
        position_in_document = torch.arange(len(tokens), device=tokens.device) - start
        code, total = tokens + 1, 0
        for back, table in enumerate(self.tables, 1):
            earlier = torch.where(position_in_document >= back, tokens.roll(back) + 1, 0)
            code = (code * 1_000_003 + earlier) % 2**40
            total = total + table(code % table.num_embeddings)
        return total

class Attention(nn.Module):
    """Causal self-attention with QK-norm (arXiv 2010.04245), rotary and value embeddings."""
    def __init__(self, hp: Hyperparameters, has_value_embed: bool):
        super().__init__()
        self.num_heads = hp.num_heads
        self.max_window = min(window_size(hp.num_steps, hp), hp.forward_tokens)
        self.qkv = Linear(hp.model_dim, hp.model_dim, parts=3)
        self.value_mix = nn.Parameter(torch.tensor(0.5)) if has_value_embed else None
        self.proj = Linear(hp.model_dim, hp.model_dim, zero=True)

    def forward(self, x: Tensor, value_embed: Tensor | None, rotary: Tensor, mask: Mask) -> Tensor:
        """x, value_embed and the result: (T, D)."""
        q, k, v = self.qkv(x).view(1, len(x), 3, self.num_heads, -1).unbind(2)  # (1, T, H, d)
        if value_embed is not None:
            v = (1 - self.value_mix) * v + self.value_mix * value_embed.view_as(v)
        q, k = rotate(norm(q), rotary), rotate(norm(k), rotary)
        y = attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, self.max_window)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

class MLP(nn.Module):
    """Width 4 D, ReLU squared (arXiv 2109.08668)."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.fc = Linear(hp.model_dim, 4 * hp.model_dim)
        self.proj = Linear(4 * hp.model_dim, hp.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())

class Block(nn.Module):
    """One layer: mix an earlier layer's output and the embedding x0 back in (record 2024-12-04),
    then attention, then MLP."""
    def __init__(self, hp: Hyperparameters, has_value_embed: bool, has_skip: bool):
        super().__init__()
        self.attention = Attention(hp, has_value_embed)
        self.mlp = MLP(hp)
        self.x0_mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.skip_mix = nn.Parameter(torch.tensor(1.0)) if has_skip else None

    def forward(self, x: Tensor, x0: Tensor, skip: Tensor | None, value_embed: Tensor | None,
                rotary: Tensor, mask: Mask) -> Tensor:
        if skip is not None:
            x = x + self.skip_mix * skip
        x = self.x0_mix[0] * x + self.x0_mix[1] * x0
        x = x + self.attention(norm(x), value_embed, rotary, mask)
        return x + self.mlp(norm(x))

class GPT(nn.Module):
    """The model of hp, for hp.forward_tokens or fewer at once, with U-net skips.
    flex: FlexAttention; sparse: gradients of the n-gram tables."""
    def __init__(self, hp: Hyperparameters, flex: bool = False, sparse: bool = False):
        super().__init__()
        track, self.flex = TRACKS[hp.track], flex
        self.eot_token, padded_vocab_size = track.eot_token, 128 * math.ceil(track.vocab_size / 128)
        self.embed = nn.Embedding(padded_vocab_size, hp.model_dim)
        self.ngram = NGramEmbed(hp, sparse) if hp.ngrams > 1 else None
        shared = min(hp.value_layers, hp.num_layers // 2)  # the first and the last layers share
        self.value_tables = [*range(shared), *[None] * (hp.num_layers - 2 * shared), *range(shared)]
        width = len(set(self.value_tables) - {None}) * hp.model_dim  # one look-up serves all
        self.value_embed = nn.Embedding(padded_vocab_size, width) if width else None
        self.num_skips = hp.num_layers // 2  # the last layers take in what the first ones put out
        self.blocks = nn.ModuleList(
            Block(hp, table is not None, has_skip=layer >= hp.num_layers - self.num_skips)
            for layer, table in enumerate(self.value_tables))
        self.head = Head(hp, padded_vocab_size)
        rotary = rotary_tables(hp.forward_tokens, hp.model_dim // hp.num_heads)
        self.register_buffer("rotary", rotary, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None, schedule: Schedule) -> Tensor:
        """Mean cross-entropy in nats of targets (S, T) after tokens (S, T), computed as one
        sequence of S T; without targets float32 logits (S T, V)."""
        start = document_start(tokens, self.eot_token)
        first_key = first_visible_key(start, schedule.window)
        mask = block_mask(first_key) if self.flex else first_key
        tokens = tokens.flatten()
        x, rotary = self.embed(tokens), self.rotary[:, :len(tokens)]
        x0 = norm(x if self.ngram is None else x + self.ngram(tokens, start))
        x = x0.view_as(x0)  # another object, or torch.compile would compile block 0 by itself
        values = () if self.value_embed is None else self.value_embed(tokens).split(x.size(-1), -1)
        skips = []
        for block, table in zip(self.blocks, self.value_tables, strict=True):
            skip = None if block.skip_mix is None else skips.pop()
            x = block(x, x0, skip, None if table is None else values[table], rotary, mask)
            if len(skips) < self.num_skips and block.skip_mix is None:
                skips.append(x.view_as(x))  # another object than x, as above
        return self.head(x, None if targets is None else targets.flatten())

def build_model(hp: Hyperparameters, device: torch.device, dtype: torch.dtype, flex: bool,
                sparse: bool = False) -> GPT:
    """The model of hp: embeddings in the activations' precision dtype, all else in float32."""
    torch.manual_seed(hp.seed)
    with device:
        model = GPT(hp, flex, sparse)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.to(dtype)
    return model

# --- Loss -----------------------------------------------------------------------------------------

def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in float32 (arXiv 2408.00118). Written as a sigmoid, for inductor
    reads the logits three times where a softmax follows a tanh."""
    return 2 * cap * torch.sigmoid(2 / cap * logits.float()) - cap

class CappedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy, nats, of targets (T,) under softcap(logits (T, V), cap). The backward is
    one pass over the logits, and nothing else of their size is kept for it."""
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        capped, ctx.cap = softcap(logits, cap), cap
        logsumexp = capped.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, targets, logsumexp)
        return (logsumexp - capped.gather(-1, targets[:, None])).mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, logsumexp = ctx.saved_tensors
        capped = softcap(logits, ctx.cap)
        is_target = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
        error = (capped - logsumexp).exp() - is_target.float()  # softmax - one-hot
        slope = 1 - (capped / ctx.cap).square()
        return (grad / len(targets) * error * slope).to(logits.dtype), None, None

class Head(nn.Module):
    """Untied, zero at the start, so that the first loss is ln V."""
    def __init__(self, hp: Hyperparameters, padded_vocab_size: int):
        super().__init__()
        self.logit_cap = hp.logit_cap
        self.linear = Linear(hp.model_dim, padded_vocab_size, zero=True)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Float32 logits (T, V) of x (T, D); with targets (T,) their mean cross-entropy, nats."""
        logits = self.linear(norm(x))
        if targets is None:
            return softcap(logits, self.logit_cap)
        return CappedCrossEntropy.apply(logits, targets, self.logit_cap)

# --- Optimizers: what updates which parameters, the mathematics, the division over the ranks ------

class Group(NamedTuple):
    """Parameters that are updated alike; a line of optimizer_groups."""
    name: str
    parameters: str            # regular expression that matches their whole names
    rule: str                  # of RULES
    lr: float                  # learning rate; the schedule scales it
    betas: tuple[float, ...]   # decay of the moments, a step
    decay: float               # weight decay, decoupled (arXiv 1711.05101); the rate scales it
    travel_dtype: torch.dtype  # of what goes from rank to rank; Muon computes in it

def optimizer_groups(hp: Hyperparameters, dtype: torch.dtype) -> list[Group]:
    """Every parameter is in exactly one group. Muon is first: while it computes, others travel."""
    betas, matrices = (hp.adam_beta1, hp.adam_beta2), r"(attention\.(qkv|proj)|mlp\.(fc|proj))"
    scalars, tables = r"blocks\..*_mix", r"ngram\.tables\..*"
    return [  # name, parameters, rule, learning rate, betas, weight decay, travels as
        Group("blocks", rf"blocks\.\d+\.{matrices}\.weight", "muon", hp.muon_lr, (), 0.0, dtype),
        Group("scalars", scalars, "adam", hp.scalar_lr, betas, 0.0, torch.float32),
        Group("embeds", r"(value_)?embed\.weight", "adam", hp.embed_lr, betas, 0.0, dtype),
        Group("ngrams", tables, "lazy_adam", hp.ngram_lr, betas, 0.0, dtype),
        Group("head", r"head\.linear\.weight", "adam", hp.head_lr, betas, 0.0, dtype),
    ]

def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each matrix U S V^T (..., rows, columns): singular values land in (0.7, 1.2).
    The dtype is the input's: bfloat16 is enough, for errors contract (Muon, record 2024-10-14)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # the quintic with the steepest slope at zero
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices  # the Gram matrix below is then the small one
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).flatten(0, -3)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).view(matrices.shape)

# An update rule takes its group, the mean gradient, the values, its state, Muon's momentum now and
# 1 - beta^t for each beta (0-dim tensors). It updates the state; values -= lr * what it returns.

def muon_direction(group: Group, grad: Tensor, values: Tensor, momentum_buffer: Tensor,
                   momentum: Tensor) -> Tensor:
    """Muon (record 2024-10-14) for matrices (K, rows, columns): Nesterov momentum, orthogonalised,
    so that all singular directions learn at one rate, scaled so that tall ones move as much."""
    grad = grad.float()
    momentum_buffer.mul_(momentum).add_(grad)
    direction = newton_schulz((grad + momentum * momentum_buffer).to(group.travel_dtype))
    return direction * max(1.0, grad.size(-2) / grad.size(-1)) ** 0.5

def adam_direction(group: Group, grad: Tensor, values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
                   _: Tensor, bias1: Tensor, bias2: Tensor,
                   touched: Tensor | float = 1.0) -> Tensor:
    """Adam (arXiv 1412.6980) in float32. bias1, bias2: 1 - beta^t; touched: 0 in rows that stay."""
    grad, (beta1, beta2) = grad.float(), group.betas
    exp_avg.lerp_(grad, (1 - beta1) * touched)
    exp_avg_sq.lerp_(grad.square(), (1 - beta2) * touched)
    return touched * (exp_avg / bias1) / ((exp_avg_sq / bias2).sqrt() + 1e-8)

def lazy_adam_direction(group: Group, grad: Tensor, *rest: Tensor) -> Tensor:
    """Adam that leaves rows without gradient alone, moments included."""
    touched = (grad != 0).any(-1, keepdim=True).float()
    return adam_direction(group, grad, *rest, touched)

class Rule(NamedTuple):
    """An update rule; its state is float32, of the values' shape."""
    direction: Callable
    state: tuple[str, ...]
    matrices: bool  # it works on stacks of matrices of one shape, not element by element

RULES = {
    "muon": Rule(muon_direction, ("momentum",), True),
    "adam": Rule(adam_direction, ("exp_avg", "exp_avg_sq"), False),
    "lazy_adam": Rule(lazy_adam_direction, ("exp_avg", "exp_avg_sq"), False)}

class Optimizer:
    """All groups' updates. Each rank keeps the state of its rows only (ZeRO-1). Gradients travel by
    reduce-scatter and directions by all-gather while other buckets are computed."""
    def __init__(self, model: GPT, hp: Hyperparameters, dtype: torch.dtype, rank: int = 0,
                 world_size: int = 1):
        """Raises UserError where a parameter is in no group or in two, or a rule is unknown."""
        self.rules, self.num_updates = dict(RULES), 0
        self.gradient_sum = torch.zeros(())  # of this rank: not finite if a gradient is not
        sparse = {id(module.weight) for module in model.modules()
                  if isinstance(module, nn.Embedding) and module.sparse}
        groups = optimizer_groups(hp, dtype)
        members = {group.name: {} for group in groups}
        for name, p in model.named_parameters():
            claims = [group for group in groups if re.fullmatch(group.parameters, name)]
            if len(claims) != 1:
                found = " and ".join(group.name for group in claims) or "none"
                mine = re.sub(r"\d+", r"\\d+", re.escape(name))  # of all layers
                raise UserError(
                    f"the optimizer group of the parameter {name} is {found}; mend the patterns in "
                    f'optimizer_groups, or add a line: Group("mine", r"{mine}", "adam", '
                    "hp.scalar_lr, betas, 0.0, dtype)")
            if claims[0].rule not in RULES:
                raise UserError(f"the optimizer group {claims[0].name} has the rule "
                                f"{claims[0].rule}, expected one of RULES: {', '.join(RULES)}")
            matrices = RULES[claims[0].rule].matrices  # equal matrices, and scalars, share a bucket
            together = p.shape[-2:] if matrices else name if p.ndim > 1 else "scalars"
            members[claims[0].name].setdefault(together, []).append(p)
        self.buckets = [Bucket(group, params, id(params[0]) in sparse, rank, world_size)
                        for group in groups for params in members[group.name].values()]

    @torch.no_grad()
    def step(self, schedule: Schedule) -> None:
        """One update from the gradients, which are then gone. Collective."""
        self.num_updates += 1
        self.gradient_sum = torch.stack([bucket.reduce() for bucket in self.buckets]).sum()
        moves = []
        for bucket in self.buckets:
            group, rule = bucket.group, self.rules[bucket.group.rule]
            grad, values, state = bucket.collect()
            numbers = schedule.momentum, *(1 - beta ** self.num_updates for beta in group.betas)
            direction = rule.direction(group, grad, values, *state, *map(torch.tensor, numbers))
            if group.decay:
                direction = direction + group.decay * values
            moves.append((bucket, bucket.gather(direction.to(group.travel_dtype)), state))
        for bucket, directions, state in moves:
            bucket.apply(directions, state, schedule.lr_scale * bucket.group.lr)

    def state_dict(self) -> dict:
        """The whole state, without padding, so that any number of ranks can load it. Collective."""
        buckets = [{name: bucket.whole(mine) for name, mine in bucket.state.items()}
                   for bucket in self.buckets]
        return {"num_updates": self.num_updates, "buckets": buckets}

    @torch.no_grad()
    def load_state_dict(self, state: dict | None) -> None:
        """Take this rank's rows of any number of ranks' state_dict; None: as if never stepped."""
        self.num_updates = state["num_updates"] if state else 0
        for i, bucket in enumerate(self.buckets):
            for name, mine in bucket.state.items():
                mine.zero_()
                if state:
                    whole = state["buckets"][i][name]
                    if whole.shape != (bucket.rows, *mine.shape[1:]):
                        raise ValueError(f"the optimizer's {name} has another shape")
                    share = whole[bucket.my_rows]
                    mine[:len(share)].copy_(share)

# --- Data -----------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256

def open_shard(path: str | Path, advice: str = "delete it, fetch or build it again") -> np.ndarray:
    """The tokens of a .bin shard as a read-only memory map, (num_tokens,) little-endian uint16,
    after 256 int32 of header: magic, version, num_tokens. Raises UserError if it is not that."""
    header_bytes = 4 * SHARD_HEADER_INTS
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", SHARD_HEADER_INTS)
    except OSError as error:
        raise UserError(f"can't read the shard {path}: {error.strerror}") from None
    magic, version, count = [*header.tolist(), 0, 0, 0][:3]
    for what, got, wanted in (
            ("magic number", magic, SHARD_MAGIC), ("version", version, SHARD_VERSION),
            ("number of tokens", count, max(count, 0)),
            ("size in bytes", size, header_bytes + 2 * max(count, 0))):
        if got != wanted:
            raise UserError(f"{path} is bad: its {what} is {got}, expected {wanted}; {advice}")
    return np.memmap(path, "<u2", "r", header_bytes, (count,)) if count else np.zeros(0, "<u2")

class TokenStream:
    """All shards that match a pattern, in the order of their names, as one endless stream."""
    def __init__(self, pattern: str, vocab_size: int, minimum: int, get_data: str):
        """pattern: a glob below the repository. Raises UserError on bad or too few shards."""
        self.vocab_size, self.get_data = vocab_size, get_data
        self.paths = sorted(ROOT.glob(pattern))
        self.shards = [open_shard(path, f"delete it and run: {get_data}") for path in self.paths]
        self.ends = np.cumsum([0, *map(len, self.shards)])  # [0], then where each shard ends
        if not self.paths or len(self) < minimum:
            raise UserError(f"{ROOT / pattern}: {len(self):,} tokens in {len(self.paths)} shards, "
                            f"expected at least {minimum:,}; run: {get_data}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count, (count,) int64. Raises UserError on an impossible id."""
        parts = []
        while count > 0:
            position = start % len(self)
            shard = int(np.searchsorted(self.ends, position, side="right")) - 1
            part = self.shards[shard][position - int(self.ends[shard]):][:count]
            if part.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]} holds the token id {part.max()}, expected "
                                f"ids below {self.vocab_size}; run: {self.get_data}")
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64)

    def sequence(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """The index-th sequence and its targets, one token further on: two (length,) int64."""
        tokens = torch.from_numpy(self.read(index * length, length + 1))
        return tokens[:-1], tokens[1:]

    def fingerprint(self, count: int) -> str:
        """12 hexadecimal digits that stand for the first count tokens (or all)."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(np.ascontiguousarray(shard[:count]).data)
            count -= min(count, len(shard))
        return digest.hexdigest()[:12]

class BatchLoader:
    """This rank's micro-batches of each step; a thread reads ahead. Rank r takes a step's sequences
    that are r modulo W: neither W nor a resume changes what a step reads."""
    def __init__(self, stream: TokenStream, hp: Hyperparameters, runtime: "Runtime", step: int = 0):
        self.stream, self.hp, self.runtime, self.step = stream, hp, runtime, step
        self.order, num_sequences = None, (len(stream) - 1) // hp.sequence_length
        if TRACKS[hp.track].shuffled:
            self.order = np.random.RandomState(0).permutation(num_sequences)
        self.pool = ThreadPoolExecutor(1)
        self.future = self.pool.submit(self._read, step)

    def _read(self, step: int) -> list[tuple[Tensor, Tensor]]:
        hp, runtime = self.hp, self.runtime
        mine = range(sequences_before(step, hp), sequences_before(step + 1, hp))
        mine = mine[runtime.rank::runtime.world_size]
        size = max(m for m in range(1, min(hp.micro_batch, len(mine)) + 1) if len(mine) % m == 0)
        if self.order is not None:
            mine = [int(self.order[i % len(self.order)]) for i in mine]
        pairs = [self.stream.sequence(i, hp.sequence_length) for i in mine]
        batch = [tuple(map(torch.stack, zip(*pairs[i:i + size], strict=True)))
                 for i in range(0, len(pairs), size)]
        return [(a.pin_memory(), b.pin_memory()) for a, b in batch] if runtime.cuda else batch

    def next(self) -> list[tuple[Tensor, Tensor]]:
        """The next step's micro-batches, [(tokens (S, T), targets (S, T)), ...] on the device."""
        batch, self.step, device = self.future.result(), self.step + 1, self.runtime.device
        self.future = self.pool.submit(self._read, self.step)
        return [tuple(t.to(device, non_blocking=True) for t in pair) for pair in batch]

# --- Training -------------------------------------------------------------------------------------

def compile_parts(model: GPT, optimizer: Optimizer, device: torch.device) -> None:
    """torch.compile each block and the head: one compilation serves all blocks of a kind."""
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks, each with and without gradients
    for part in [*model.blocks, model.head]:
        part.compile(dynamic=False)
    if device.type == "cuda":  # fuses Adam's ten passes over large tables; a CPU's are small
        for name, rule in RULES.items():
            if not rule.matrices:
                compiled = torch.compile(rule.direction, dynamic=False)
                optimizer.rules[name] = rule._replace(direction=compiled)

def training_step(model: GPT, optimizer: Optimizer, batch: list[tuple[Tensor, Tensor]],
                  schedule: Schedule) -> Tensor:
    """One update by the mean gradient over all ranks. Returns this rank's mean loss, 0-dim."""
    mean_loss = torch.zeros((), device=batch[0][0].device)
    for tokens, targets in batch:
        loss = model(tokens, targets, schedule) / len(batch)
        loss.backward()
        mean_loss += loss.detach()
    optimizer.step(schedule)
    return mean_loss

@torch.no_grad()
def validate(model: GPT, stream: TokenStream, step: int, hp: Hyperparameters,
             runtime: "Runtime") -> float:
    """Mean cross-entropy in nats over the track's validation tokens. Collective."""
    schedule = Schedule(step, hp, runtime.device)
    num_sequences = TRACKS[hp.track].val_tokens // hp.forward_tokens
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for index in range(runtime.rank, num_sequences, runtime.world_size):
        sequence = stream.sequence(index, hp.forward_tokens)
        loss_sum += model(*(t[None].to(runtime.device) for t in sequence), schedule)
    return runtime.mean(loss_sum) * runtime.world_size / num_sequences

def warm_up(model: GPT, optimizer: Optimizer, stream: TokenStream, hp: Hyperparameters,
            runtime: "Runtime") -> None:
    """Compile and load every kernel on random tokens, then put everything back as it was."""
    random_state, vocab_size = torch.get_rng_state(), TRACKS[hp.track].vocab_size
    before = [p.detach().clone() for p in model.parameters()]
    text = torch.randint(vocab_size, (1, hp.forward_tokens), device=runtime.device)
    for step in sorted({0, hp.num_steps // 2, *batch_sizes(hp).values()}):
        schedule = Schedule(step, hp, runtime.device)
        loader = BatchLoader(stream, hp, runtime, step)  # for the shapes
        batch = [tuple(torch.randint_like(t, vocab_size) for t in pair) for pair in loader.next()]
        loader.pool.shutdown(cancel_futures=True)
        with torch.no_grad():
            model(text, text, schedule)
        training_step(model, optimizer, batch, schedule)
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(None)
    torch.set_rng_state(random_state)
    if runtime.cuda:  # the copies above are no part of what training needs
        torch.cuda.reset_peak_memory_stats()

def train(hp: Hyperparameters, runtime: "Runtime") -> int:
    """One run on this rank, from its data to its report; the exit code. Raises UserError."""
    track, watch = TRACKS[hp.track], Watch(runtime)
    train_stream, val_stream, record, saved = start_run(hp, runtime)
    progress, compiled = saved["progress"] if saved else Progress(), record["compiled"]
    dtype = getattr(torch, record["activations"])
    model = build_model(hp, runtime.device, dtype, flex=compiled and runtime.cuda,
                        sparse=not runtime.cuda and runtime.world_size == 1)
    optimizer = Optimizer(model, hp, dtype, runtime.rank, runtime.world_size)
    log = Log(hp, runtime, record)
    num_parameters = sum(p.numel() for p in model.parameters())
    with supervised(watch, log, progress), profiler(hp, runtime, log) as profile:
        log.say(f"track {hp.track}, {num_parameters:,} parameters, {record['activations']}, "
                f"{runtime.world_size} x {record['device']}, log {log.path}")
        log.begin("compiling, about a minute the first time" if compiled else "warming up")
        started = time.perf_counter()
        if compiled:
            compile_parts(model, optimizer, runtime.device)
        warm_up(model, optimizer, train_stream, hp, runtime)
        log.say(f"{'compiled' if compiled else 'warmed up'} in {time.perf_counter() - started:.1f} "
                "s (not training time)")
        saved = resume(saved, model, optimizer, watch, hp, log)

        loader, first_step = BatchLoader(train_stream, hp, runtime, progress.step), progress.step
        started = runtime.seconds()  # progress.train_time_ms is the time until then
        for step in range(first_step, hp.num_steps + 1):
            progress.step, last, stop = step, step == hp.num_steps, watch.read()
            val_due = last or (hp.val_every and step % hp.val_every == 0)
            val_due = val_due and not stop and progress.validated < step
            save_due = stop or (hp.save_every and step % hp.save_every == 0 and step > first_step)
            if val_due or save_due:  # neither is training time
                progress.train_time_ms += 1000 * (runtime.seconds() - started)
                watch.read(everything=True)  # what is not finite must not be saved
                if val_due:
                    log.begin(f"validating on {track.val_tokens:,} tokens")
                    val_loss = validate(model, val_stream, step, hp, runtime)
                    log.metric(step, "val_loss", val_loss, progress.train_time_ms)
                    progress.validated = step
                    if val_loss <= track.target and not progress.reached:
                        seconds = progress.train_time_ms / 1000
                        progress.reached = f"reached at step {step} after {seconds:.1f} s"
                if save_due:
                    save_checkpoint(progress, record, model, optimizer, runtime, watch, hp, log)
                started = runtime.seconds()
            if last or stop:
                break
            schedule = Schedule(step, hp, runtime.device)
            loss = training_step(model, optimizer, loader.next(), schedule)
            watch.post(step, loss + optimizer.gradient_sum)
            if hp.log_every and (step + 1) % hp.log_every == 0:
                mean = runtime.mean(loss)  # waits for the device, so that the time is this step's
                now = progress.train_time_ms + 1000 * (time.perf_counter() - started)
                log.metric(step + 1, "train_loss", mean, now)
            if tokens_before(step, hp) < len(train_stream) <= tokens_before(step + 1, hp):
                log.say(f"all {len(train_stream):,} training tokens are read: epoch 2 begins")
            if profile:
                profile.step()
        loader.pool.shutdown(cancel_futures=True)
        return finish(stop, model, progress, watch, hp, runtime, log)

# ==== The reader may stop here: that was the training. What follows is machinery. =================
# --- Buckets: which rank keeps what, and how it travels -------------------------------------------

# torch 2.13 renamed the two collectives and warns on the old names, the only ones in 2.11.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

class Bucket:
    """Parameters of a group as one tensor `values`, of which each rank has my_rows: a table,
    stacked matrices of one shape (a row is a matrix), or scalars. Parameters are views of it, and
    `grads` is what travels. sparse: gradients are sparse (CPU, one rank), and `grads` is None."""
    def __init__(self, group: Group, params: list[nn.Parameter], sparse: bool, rank: int = 0,
                 world_size: int = 1):
        self.group, self.params, self.world_size = group, params, world_size
        rule, shape = RULES[group.rule], params[0].shape
        row_shape = shape[-2:] if rule.matrices else shape[1:][-1:]
        self.rows = sum(p.numel() for p in params) // math.prod(row_shape)
        shard_rows = math.ceil(self.rows / world_size)
        self.my_rows = slice(rank * shard_rows, (rank + 1) * shard_rows)
        self.values = params[0].new_zeros(world_size * shard_rows, *row_shape)
        dtype = group.travel_dtype if world_size > 1 else self.values.dtype
        self.grads = None if sparse else torch.zeros_like(self.values, dtype=dtype)
        for values, p in zip(self.parts(self.values), params, strict=True):
            p.data = values.copy_(p.detach())
        self.state = {name: torch.zeros_like(self.values[self.my_rows], dtype=torch.float32)
                      for name in rule.state}
        self.mean = self.sent = self.work = None  # the mean gradient; what travels until work ends

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Views of a tensor of the values' shape, of the parameters' shapes."""
        sizes = [p.numel() for p in self.params]
        parts = whole.view(-1)[:sum(sizes)].split(sizes)
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]

    def reduce(self) -> Tensor:
        """Start the reduce-scatter: this rank gets its rows of the mean gradient. Collective.
        Takes the parameters' gradients. Returns the sum of this rank's own, which is not finite if
        one of them is not."""
        if self.grads is None:
            self.mean, self.params[0].grad = self.params[0].grad.coalesce(), None
            return self.mean.values().sum(dtype=torch.float32)
        for part, p in zip(self.parts(self.grads), self.params, strict=True):
            part.zero_() if p.grad is None else part.copy_(p.grad)
            p.grad = None
        self.mean = self.grads
        if self.world_size > 1:
            self.mean = torch.empty_like(self.grads[self.my_rows])
            self.work = _reduce_scatter(self.mean, self.grads, op=dist.ReduceOp.AVG, async_op=True)
        return self.grads.sum(dtype=torch.float32)

    def collect(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """My rows of mean gradient, values and state; of a sparse table the touched ones."""
        if self.grads is None:
            self.touched = self.mean.indices()[0]
            state = [part[self.touched] for part in self.state.values()]
            return self.mean.values(), self.values[self.touched], state
        self.wait()
        return self.mean, self.values[self.my_rows], list(self.state.values())

    def gather(self, mine: Tensor) -> Tensor:
        """Start the all-gather of every rank's rows; read the result after wait(). Collective."""
        if self.world_size == 1:
            return mine
        self.sent, whole = mine.contiguous(), mine.new_empty(self.values.shape)  # as NCCL wants it
        self.work = _all_gather(whole, self.sent, async_op=True)
        return whole

    def wait(self) -> None:
        """For the collective under way."""
        if self.work:
            self.work.wait()
        self.work = self.sent = None

    def whole(self, mine: Tensor) -> Tensor:
        """Every rank's rows, without padding. Collective."""
        rows = self.gather(mine)
        self.wait()
        return rows[:self.rows]

    def apply(self, directions: Tensor, state: list[Tensor], lr: float) -> None:
        """values -= lr * directions, of collect()'s rows."""
        self.wait()
        if self.grads is None:
            self.values.index_add_(0, self.touched, directions.to(self.values.dtype), alpha=-lr)
            for whole, part in zip(self.state.values(), state, strict=True):
                whole[self.touched] = part
        else:
            self.values.add_(directions, alpha=-lr)

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
    if hp.device == "cuda" and not num_gpus:
        raise UserError("--device cuda, but torch sees no GPU; use --device cpu or mend the driver")
    on_gpu = hp.device != "cpu" and num_gpus > 0
    if on_gpu and local_rank >= num_gpus:
        raise UserError(f"process {local_rank} of this node has no GPU of its own: there are "
                        f"{num_gpus}; start so many processes (NPROC, --nproc_per_node)")
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size > 1:
        # torchrun ends its node when a rank fails, this ends others. Saves must be shorter.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=5),
                                device_id=device if on_gpu else None)
    return Runtime(rank, world_size, device)

def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matrix products are fast, else float32. A CPU is measured, 20 ms."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        matrices = (torch.ones(512, 512, dtype=t) for t in (torch.bfloat16, torch.float32))
        bf16, fp32 = (min(timeit.repeat(lambda a=a: a.mm(a), number=1, repeat=8)) for a in matrices)
        fast = bf16 < 0.7 * fp32
    return torch.bfloat16 if fast else torch.float32

def lacks_for_compile(device: torch.device) -> str:
    """What torch.compile would miss on this machine at its first use; nothing: ""."""
    cuda = device.type == "cuda"
    variable, *names = ("CC", "gcc", "clang") if cuda else ("CXX", "g++", "clang++")
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
        self.runtime, self.pending, self.checkpoint = runtime, [], ""
        self.signal, self.signalled_at, self.agreed = 0, 0.0, 0  # this rank's; what all heed

    def on_signal(self, number: int, frame=None) -> None:
        """End the run after this step; a second signal leaves at once."""
        if not self.signal:
            self.signal, self.signalled_at = number, time.monotonic()
            if self.runtime.rank == 0:
                print(f"{signal.Signals(number).name}: the run ends after this step, with a "
                      "checkpoint; a second one ends it at once", file=sys.stderr, flush=True)
        elif time.monotonic() - self.signalled_at > 1.0:  # sooner: torchrun's copy of the first
            os._exit(128 + number)

    def post(self, step: int, value: Tensor) -> None:
        """After a step; value: 0-dim, not finite where the step was not. Collective."""
        marks = torch.zeros(2, device=self.runtime.device)  # 1 + a bad rank, or 0; the signal
        marks[0] = ~value.isfinite() * (self.runtime.rank + 1)
        marks[1] = self.signal
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
    """Within, signals end the run after a step, and an error leaves a last line in the log."""
    handlers = {n: signal.signal(n, watch.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException as error:
        log.write(f"run failed at step {progress.step}: {type(error).__name__}: {error}")
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

# --- Log ------------------------------------------------------------------------------------------

SEPARATOR = "=" * 100
NOT_KEPT = 3  # exit code of a run that ended well, but whose log or checkpoint can't be written
PEAK_FLOPS = {  # dense bfloat16 FLOP/s of data sheets, by part of a device's name; first match
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}

def one_line(error: BaseException) -> str:
    """What an exception says, at most 300 characters of it, or its name where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__

def _output_of(*command: str) -> str:
    """What a command prints, or nothing where it can't be run."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
        return done.stdout.strip()
    return ""

def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if model := re.search(r"model name\s*: *(.+?) *$", cpuinfo, re.M):
        return model[1]
    return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()

class Log:
    """The log file and the console of rank 0; other ranks write nothing. The file: the script's
    source, SEPARATOR, the environment, SEPARATOR, then a line each time something is said."""
    def __init__(self, hp: Hyperparameters, runtime: Runtime, record: dict):
        """Raises UserError where the log can't be written, before any work is done."""
        self.hp, self.failed, self.file = hp, False, None
        self.path = hp.folder / f"{record['run_id']}.txt"
        if runtime.rank:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)  # nothing is left where a write fails
        except OSError as error:
            raise UserError(f"can't write the log {self.path}: {error.strerror}; mend that or name "
                            "another folder with --entry") from None
        if not self.file.tell():
            pytorch, cuda = f"Running PyTorch {torch.__version__}", torch.version.cuda
            smi = ["nvidia-smi:", _output_of("nvidia-smi")] if runtime.cuda else []
            self.write(Path(__file__).read_text("utf-8"), SEPARATOR,
                       f"Running Python {' '.join(sys.version.split())}",
                       *([f"{pytorch} compiled for CUDA {cuda}"] if cuda else []),
                       f"{pytorch} on {record['device']} with world_size {runtime.world_size}",
                       json.dumps(record, indent=1), *smi, SEPARATOR)
        elif not self.path.read_bytes().endswith(b"\n"):  # a resumed run's own log, cut by a kill
            self.write("")

    def write(self, *lines: str) -> None:
        """Into the file alone. What can't be written does not end the run."""
        if self.file:
            try:
                self.file.write("".join(line.removesuffix("\n") + "\n" for line in lines).encode())
            except OSError as error:
                self.fail(f"can't write the log {self.path}: {error.strerror}")

    def fail(self, message: str) -> None:
        """Warn on stderr, once a run; its exit code will be NOT_KEPT."""
        if not self.failed:
            print(f"warning: {message}; the run goes on, its exit code will be {NOT_KEPT}",
                  file=sys.stderr, flush=True)
        self.failed = True

    def say(self, *lines: str) -> None:
        """Into the file and onto the console."""
        self.write(*lines)
        if self.file:
            print(*lines, sep="\n", flush=True)

    def metric(self, step: int, name: str, value: float, time_ms: float) -> None:
        """A line of the public format. Its colons are set here: a log holds this source as well."""
        words = {"step": f"{step}/{self.hp.num_steps}", name: f"{value:.4f}",
                 "train_time": f"{time_ms:.0f}ms", "step_avg": f"{time_ms / max(step, 1):.2f}ms"}
        self.say(" ".join(f"{key}:{word}" for key, word in words.items()))

    def begin(self, name: str) -> None:
        """On the console alone: something silent goes on. On a terminal the next line covers it."""
        if self.file:
            print(f"{name} ...", end="\r" if sys.stdout.isatty() else "\n", flush=True)

def profiler(hp: Hyperparameters, runtime: Runtime, log: Log):
    """A context: with --profile, on rank 0, torch's profiler; else None."""
    if not hp.profile or runtime.rank:
        return nullcontext()
    path = str(log.path.with_suffix(".trace.json"))
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(path))

@torch.no_grad()
def write_sample(model: GPT, hp: Hyperparameters, device: torch.device) -> str:
    """Text of sample_tokens tokens, as a document begins, drawn at temperature 0.8."""
    track, generator = TRACKS[hp.track], torch.Generator().manual_seed(0)
    if track.eot_token == 256:
        decode = lambda ids: bytes(ids).decode("utf-8", errors="replace")
    else:
        import tiktoken  # here, for it downloads its vocabulary the first time
        decode = tiktoken.get_encoding("gpt2").decode
    tokens = torch.full((hp.sample_tokens + 1,), track.eot_token, device=device)
    schedule = Schedule(hp.num_steps, hp, device)
    model.flex = False  # the run is over, and so short a text needs no kernel of its own
    with torch.compiler.set_stance("force_eager"):
        for i in range(min(hp.sample_tokens, hp.forward_tokens)):
            logits = model(tokens[None, :hp.forward_tokens], None, schedule)[i, :track.eot_token]
            chances = (logits.cpu() / 0.8).softmax(-1)
            tokens[i + 1] = torch.multinomial(chances, 1, generator=generator)
    return decode(tokens[1:i + 2].tolist())

def finish(stop: int, model: GPT, progress: "Progress", watch: Watch, hp: Hyperparameters,
           runtime: Runtime, log: Log) -> int:
    """The last lines of a log: target, speed, memory, a sample. Returns the exit code."""
    if stop:
        log.say(f"run ended by {signal.Signals(stop).name} at step {progress.step}; go on with: "
                f"--resume {watch.checkpoint or 'latest'}")
        return 128 + stop
    log.say(f"target {TRACKS[hp.track].target}: {progress.reached or 'missed'}")
    per_second = 1000 * tokens_before(hp.num_steps, hp) / max(progress.train_time_ms, 1e-3)
    # Forward and backward, a token: 6 FLOPs a weight, 12 D a layer and visible key; look-ups none.
    weights = sum(p.numel() for name, p in model.named_parameters()
                  if re.fullmatch(r"(blocks|head)\..*weight", name))
    keys = (hp.window_start + hp.window_end) / 2
    flops = (6 * weights + 12 * hp.num_layers * hp.model_dim * keys) * per_second
    name, memory = device_name(runtime.device), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory *= 1 if sys.platform == "darwin" else 1024
    if runtime.cuda:
        memory = torch.cuda.max_memory_allocated(runtime.device)
    peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    mfu = f" mfu:{flops / peak / runtime.world_size:.1%}" if peak else ""
    log.say(f"tokens_per_second:{per_second:.0f} peak_memory_per_rank:{memory / 2**20:.0f}MiB{mfu}")
    if hp.sample_tokens and runtime.rank == 0:
        log.begin("writing a sample")
        try:
            text = write_sample(model, hp, runtime.device)
        except Exception as error:  # the result stands: no missing vocabulary may spoil it
            text = f"none: {type(error).__name__}: {one_line(error)}"
        log.say("sample:", *("| " + line for line in text.split("\n")))
    return NOT_KEPT if log.failed else 0

# --- Checkpoints ----------------------------------------------------------------------------------

# What a resumed run may choose anew, for no number depends on it (dtype is compared by itself).
MAY_CHANGE = {"val_every", "log_every", "save_every", "keep", "resume", "resume_anyway", "entry",
              "profile", "sample_tokens", "dtype"}

@dataclass
class Progress:
    """Where the loop is: part of each checkpoint, and of the line that says how a run failed."""
    step: int = 0
    train_time_ms: float = 0.0
    reached: str = ""  # when the target first was
    validated: int = -1  # the last step at which a validation was made

def save_checkpoint(progress: Progress, record: dict, model: GPT, optimizer: Optimizer,
                    runtime: Runtime, watch: Watch, hp: Hyperparameters, log: Log) -> None:
    """Write all that the rest of the run depends on, atomically; keep the last hp.keep. Collective.
    Where rank 0 can't write, the log says so, the run goes on and all older ones stay."""
    path = hp.folder / f"{record['run_id']}_step{progress.step:06d}.pt"
    start, temporary = time.perf_counter(), path.with_suffix(".tmp")
    state = {**record, "progress": dataclasses.asdict(progress), "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    if runtime.rank:
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
    for old in sorted(hp.folder.glob(f"{record['run_id']}_step*.pt"))[:-hp.keep]:
        old.unlink(missing_ok=True)
    watch.checkpoint = path
    log.say(f"checkpoint {path} in {time.perf_counter() - start:.2f} s (not training time)")

@contextmanager
def resuming(path: str):
    """Makes one line of whatever a broken or foreign checkpoint leads torch to raise."""
    try:
        yield
    except Exception as error:
        raise UserError(f"can't resume from {path}: {one_line(error)}; expected a checkpoint that "
                        "--save_every wrote, of this script, data and command") from None

def load_checkpoint(path: str, hp: Hyperparameters, record: dict) -> dict:
    """What save_checkpoint wrote, on the CPU. Raises all sorts unless it belongs to this run."""
    state = torch.load(path, map_location="cpu", weights_only=True)  # data alone: it can't run code
    if not {"progress", "model", "optimizer", "random"} <= state.keys():
        raise ValueError("it is no checkpoint")
    run_id, activations = state["run_id"], state["activations"]
    if run_id != Path(run_id).name or activations not in ("bfloat16", "float32"):
        raise ValueError(f"its run_id is {run_id}, its activations are {activations}")
    if hp.dtype not in ("auto", activations):
        raise ValueError(f"its activations are {activations}; use --dtype auto")
    then, now = {**state, **state["hyperparameters"]}, {**record, **dataclasses.asdict(hp)}
    for name in sorted({*dataclasses.asdict(hp), "code_hash", "data_fingerprint"} - MAY_CHANGE):
        if repr(then.get(name)) != repr(now[name]) and not hp.resume_anyway:  # a tensor has no ==
            raise ValueError(f"its {name} is {then.get(name)}, here {now[name]} (--resume_anyway)")
    progress = state["progress"] = Progress(**state["progress"])
    updates = state["optimizer"]["num_updates"]
    if not (0 <= int(progress.step) <= hp.num_steps and int(progress.validated) <= progress.step
            and progress.step == updates and progress.train_time_ms >= 0
            and isinstance(progress.reached, str)):
        raise ValueError(f"it stands at step {progress.step}, updated {updates} times")
    return {**state, "path": path}

def start_run(hp: Hyperparameters, runtime: Runtime) -> tuple[TokenStream, TokenStream, dict, dict]:
    """Training and validation tokens, what the log tells of the run, and the checkpoint to resume
    from ({} for none). Collective. Raises UserError where data or checkpoint are unfit."""
    track, device = TRACKS[hp.track], runtime.device
    train_stream, val_stream = (
        TokenStream(files, track.vocab_size, tokens + 1, track.get_data) for files, tokens in (
            (track.train_files, max(batch_sizes(hp)) * hp.sequence_length),
            (track.val_files, track.val_tokens)))
    dtype = str(fast_dtype(device)).removeprefix("torch.") if hp.dtype == "auto" else hp.dtype
    record = runtime.agree({
        "command": sys.argv, "script": os.path.relpath(__file__, ROOT),
        "hyperparameters": dataclasses.asdict(hp), "target": track.target,
        "run_id": f"{hp.track}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}",
        "activations": dtype, "git_commit": _output_of("git", "rev-parse", "HEAD") or None,
        "git_dirty": bool(_output_of("git", "status", "--porcelain")),
        "compiled": compile_pays(hp, device) if hp.compile == "auto" else hp.compile == "on",
        "code_hash": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
        "data_fingerprint": f"{val_stream.fingerprint(track.val_tokens + 1)}-"
                            f"{train_stream.fingerprint(2**26)}",
        "python": platform.python_version(), "platform": platform.platform(),
        "torch": str(torch.__version__), "cuda": torch.version.cuda, "device": device_name(device),
        "device_count": runtime.world_size if runtime.cuda else os.cpu_count(),
        "threads": torch.get_num_threads(), "world_size": runtime.world_size})
    if record["compiled"] and (lacks := lacks_for_compile(device)):
        raise UserError(f"torch.compile needs {lacks}, which is not here; on Debian and Ubuntu: "
                        "apt install build-essential python3-dev, or use --compile off")
    found = [path for path in hp.folder.glob("*_step*.pt") if path.is_file()]
    latest = str(max(found, key=lambda path: path.stat().st_mtime, default=""))
    if not (path := runtime.agree(latest if hp.resume == "latest" else hp.resume)):
        return train_stream, val_stream, record, {}
    with resuming(path):
        saved = load_checkpoint(path, hp, record)
    # A run goes on in its log, and in its precision: a busy machine may measure another.
    record |= {name: saved[name] for name in ("run_id", "activations")}
    return train_stream, val_stream, record, saved

def resume(saved: dict, model: GPT, optimizer: Optimizer, watch: Watch, hp: Hyperparameters,
           log: Log) -> None:
    """Put load_checkpoint's state, if any, in its places. Raises UserError where it doesn't fit."""
    if saved:
        with resuming(saved["path"]):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
        watch.checkpoint = saved["path"]
        log.say(f"resumed from {saved['path']} at step {saved['progress'].step}")
    elif hp.resume:
        log.say(f"no checkpoint in {hp.folder}: the run begins at step 0")

# --- Command line ---------------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage before the line that matters
        raise UserError(f"{message}; python train_gpt.py --help lists every flag")

def parse_arguments(argv: list[str] | None = None) -> Hyperparameters:
    """The run that argv (default: sys.argv) asks for. Raises UserError on a bad flag or value."""
    first = _Parser(add_help=False, allow_abbrev=False)
    default = "fineweb" if torch.cuda.is_available() else "laptop"
    first.add_argument("--track", choices=tuple(TRACKS), default=default)
    track = first.parse_known_args(argv)[0].track
    parser = _Parser(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                     description=__doc__, epilog=f"Defaults are those of the track {track}.")
    for f in dataclasses.fields(Hyperparameters):
        kind = ({"action": "store_true"} if f.type is bool else
                {"type": f.type, "choices": f.metadata["choices"]})
        parser.add_argument(f"--{f.name}", default=f.default,
                            help=f"{f.metadata['help']} (%(default)s)", **kind)
    parser.set_defaults(**{**PRESETS[track], "track": track})
    return Hyperparameters(**vars(parser.parse_args(argv)))

def check_hyperparameters(hp: Hyperparameters, world_size: int) -> None:
    """Raises UserError, with the flag to change, where hp can't be run on world_size ranks."""
    for f in dataclasses.fields(hp):
        value, low, high = getattr(hp, f.name), f.metadata["least"], f.metadata["most"]
        if f.type in (int, float) and not low <= value <= high:  # nor NaN
            raise UserError(f"--{f.name} is {value}, expected from {low:,} to {high:,}")
    steps, uneven = hp.num_steps, [n for n in batch_sizes(hp) if n < 1 or n % world_size]
    val_tokens, records = TRACKS[hp.track].val_tokens, (ROOT / "records").resolve()
    for wrong, message in (
        (hp.window_end < hp.window_start,
         f"--window_end {hp.window_end} is below --window_start {hp.window_start}"),
        (hp.warmup_steps + hp.cooldown_steps > steps, f"--cooldown_steps {hp.cooldown_steps} and "
         f"--warmup_steps {hp.warmup_steps} are more than --num_steps {steps}; use "
         f"--cooldown_steps {steps // 2} --warmup_steps {min(hp.warmup_steps, steps // 2)}"),
        (uneven, f"{min(uneven, default=0)} sequences a step can't be divided over {world_size} "
         f"ranks; use --batch_size {-hp.batch_size // world_size * -world_size} or another NPROC"),
        (hp.sequence_length % 128, f"--sequence_length {hp.sequence_length} is no multiple of 128"),
        (val_tokens % hp.forward_tokens, f"--micro_batch {hp.micro_batch} * --sequence_length "
         f"{hp.sequence_length} must divide {val_tokens:,} validation tokens; use powers of two"),
        (not hp.folder.resolve().is_relative_to(records),
         f"--entry {hp.entry!r} is no folder below records/"),
        (hp.model_dim % (2 * hp.num_heads), f"--model_dim {hp.model_dim} is no multiple of twice "
         f"--num_heads {hp.num_heads}: a head's width must be even"),
    ):
        if wrong:
            raise UserError(message)

def run(argv: list[str] | None = None) -> int:
    """Parse, join the other ranks, train, leave them; the exit code. Raises UserError."""
    # Compiled kernels outlive the run here, so that the next one starts at once; /tmp loses them.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
    hp = parse_arguments(argv)
    runtime = start_runtime(hp)
    try:
        code = train(hp, runtime)
    except (RuntimeError, MemoryError) as error:
        lost = "Connection" in str(error) or isinstance(error, dist.DistBackendError)
        if runtime.world_size > 1 and lost:
            time.sleep(5)  # the one that ended first speaks, and torchrun ends this one
            raise UserError(f"rank {runtime.rank} has lost another rank, which ended first; go on "
                            f"with --resume latest ({one_line(error)[-120:]})") from None
        out_of_memory = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, out_of_memory) and "can't allocate memory" not in str(error):
            raise
        length = hp.sequence_length // 2
        if runtime.cuda:  # bytes, as simulated for the model of fineweb (./run.sh simulate)
            token = 0.5e6 if compile_pays(hp, runtime.device) and hp.compile != "off" else 2.5e6
            memory = torch.cuda.get_device_properties(runtime.device).total_memory
            while length > 1024 and 4e9 + length * token > 0.8 * memory:
                length //= 2
        batch_size = hp.batch_size * hp.sequence_length // length
        less = f"--sequence_length {length} --batch_size {batch_size}"
        less = f"--micro_batch {hp.micro_batch // 2}" if hp.micro_batch > 1 else less
        raise UserError(f"out of memory on {device_name(runtime.device)} with {hp.forward_tokens} "
                        f"tokens at once; use {less}, or a smaller --model_dim") from None
    if dist.is_initialized():
        dist.destroy_process_group()
    return code

def run_as_program(function: Callable, *args) -> int:
    """function(*args) as a command: its int result or 0; 2 after a UserError, 130 after Ctrl-C."""
    try:
        return function(*args) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # torchrun ends all ranks when one fails: rank 0 says what all have met
        print("error:", " ".join(str(error).split("\n")), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130

def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_as_program(run, argv)

if __name__ == "__main__":
    sys.exit(main())
