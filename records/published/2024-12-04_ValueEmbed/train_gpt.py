#!/usr/bin/env python3
"""Record of 2024-12-04, ValueEmbed: GPT-2 (124M) to a validation loss of 3.28 on FineWeb.

Published: 3.2751 after 4.41 minutes on 8 H100s, 1,530 steps of 524,288 tokens, 174.1 ms each.

    torchrun --standalone --nproc_per_node=8 train_gpt.py    # a node of 8 GPUs
    python train_gpt.py                                      # one GPU: the same batch, in parts
    python train_gpt.py --track laptop                       # a CPU: bytes of Python, in minutes
    python train_gpt.py --help                               # every knob, with its unit

(`./run.sh --record NAME`, NAME being this folder's, does the same and first sets up Python and the data.) README.md
beside this file has what is new in it, with sources; the next record's file differs from it by its ideas only.

Shapes in comments: B sequences, T tokens a sequence, D model width, H heads, d head width, V vocabulary, L layers.
"""
import argparse
import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.parallel import DistributedDataParallel

# The repository: data/ and records/ lie there.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "run.sh").exists()), Path(__file__).resolve().parent)


class UserError(Exception):
    """A mistake the user can mend: shown as one line on stderr, exit code 2.

    everywhere: all ranks meet the same mistake, so that rank 0 alone needs to say it.
    """

    def __init__(self, message: str, everywhere: bool = True):
        super().__init__(message)
        self.everywhere = everywhere


# ---------------------------------------------------------------------------------------------------------------------
# Tracks and hyperparameters

@dataclass(frozen=True)
class Track:
    """What an entry may not change. Paths are relative to the repository."""
    train_files: str
    val_files: str
    val_tokens: int      # the first so many targets of the validation files, all of them at every validation
    vocab_size: int      # token ids lie below it
    eot_token: int       # stands before each document
    shuffled: bool       # sequences are read in one fixed random order, for neighbours in these files are alike
    target: float        # validation loss to reach, nats a token
    get_data: str        # the command that fetches or builds the data


TRACKS = {
    "fineweb": Track("data/fineweb10B/fineweb_train_*.bin", "data/fineweb10B/fineweb_val_*.bin", 10_485_760,
                     50_257, 50_256, False, 3.28, "python -m data.fineweb --shards {shards}"),
    "laptop": Track("data/laptop/laptop_train_*.bin", "data/laptop/laptop_val_*.bin", 262_144,
                    257, 256, True, 1.10, "python -m data.laptop"),
}


def knob(default, help: str, choices: tuple | None = None):
    """A field of Hyperparameters: its default, its help text with the unit, its permitted values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Hyperparameters:
    """One run. Each field is a command-line flag; the defaults are the record's, PRESETS has the laptop track's."""
    track: str = knob("fineweb", "which data and target", tuple(TRACKS))
    seed: int = knob(0, "of the initial weights; the order of the data never changes")
    # work
    num_steps: int = knob(1530, "optimizer steps")
    batch_size: int = knob(8, "sequences a step, over all ranks; fewer ranks take several parts one after the other")
    sequence_length: int = knob(65_536, "tokens a sequence")
    micro_batch: int = knob(1, "sequences that a rank computes at once, at most")
    # model
    num_layers: int = knob(12, "transformer blocks")
    num_heads: int = knob(6, "attention heads")
    model_dim: int = knob(768, "width of the residual stream")
    logit_cap: float = knob(30.0, "logits are squashed into (-cap, cap)")
    window_start: int = knob(64, "tokens a query sees at step 0, itself included")
    window_end: int = knob(1792, "tokens a query sees at the end, itself included")
    # optimizers
    embed_lr: float = knob(0.6, "Adam learning rate of the embedding and the value embeddings")
    head_lr: float = knob(0.008, "Adam learning rate of the head")
    scalar_lr: float = knob(0.04, "Adam learning rate of the learned scalars")
    muon_lr: float = knob(0.05, "Muon learning rate of the matrices of the blocks")
    momentum_start: float = knob(0.85, "Muon's momentum at step 0")
    momentum_end: float = knob(0.95, "Muon's momentum after its warmup")
    momentum_warmup_steps: int = knob(300, "steps over which Muon's momentum rises")
    adam_beta1: float = knob(0.8, "decay of Adam's first moment, a step")
    adam_beta2: float = knob(0.95, "decay of Adam's second moment, a step")
    warmup_steps: int = knob(0, "steps over which the learning rates rise from zero")
    cooldown_steps: int = knob(600, "steps over which the learning rates fall to zero at the end")
    # run
    val_every: int = knob(125, "steps between validations; 0: only at the end")
    log_every: int = knob(10, "steps between lines with the training loss; 0: none")
    save_every: int = knob(5000, "steps between checkpoints, for looking at: no entry resumes from them; 0: none")
    entry: str = knob("", "write the log into records/<entry>/ instead of records/scratch/")
    device: str = knob("auto", "where to run; auto: CUDA if there is a GPU", ("auto", "cuda", "cpu"))
    dtype: str = knob("auto", "of the activations; auto: bfloat16 where it is fast", ("auto", "bfloat16", "float32"))
    compile: str = knob("auto", "torch.compile; auto: where it pays within the run", ("auto", "on", "off"))

    @property
    def step_tokens(self) -> int:
        """Tokens a step, over all ranks."""
        return self.batch_size * self.sequence_length

    @property
    def forward_tokens(self) -> int:
        """Tokens of the largest forward pass; validation reads the text in pieces of this length."""
        return self.micro_batch * self.sequence_length


PRESETS = {
    "fineweb": {},
    "laptop": dict(batch_size=8, sequence_length=256, micro_batch=8, num_layers=4, model_dim=128, log_every=50,
                   val_every=85, num_steps=850, cooldown_steps=333, num_heads=2, momentum_warmup_steps=167,
                   window_end=191, embed_lr=1.2, head_lr=0.016),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage before the one line that matters
        raise UserError(f"{message}; python {Path(__file__).name} --help lists every flag")


def parse_arguments(argv: list[str] | None = None) -> Hyperparameters:
    """Hyperparameters from command-line words (default: sys.argv). Raises UserError on an unknown flag or bad value."""
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--track", choices=tuple(TRACKS), default="fineweb")
    track = first.parse_known_args(argv)[0].track
    parser = _Parser(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
                     epilog=f"Defaults are those of the track {track}.")
    for f in dataclasses.fields(Hyperparameters):
        default = track if f.name == "track" else PRESETS[track].get(f.name, f.default)
        parser.add_argument(f"--{f.name}", default=default, help=f"{f.metadata['help']} ({default})", type=f.type,
                            choices=f.metadata["choices"])
    return Hyperparameters(**vars(parser.parse_args(argv)))


def check_hyperparameters(hp: Hyperparameters, world_size: int) -> None:
    """Raises UserError, with the flag to change, where hp can't be run on world_size ranks."""
    for f in dataclasses.fields(hp):
        least = 0 if f.name.endswith(("_every", "_steps")) and f.name != "num_steps" else 1
        if f.type is int and f.name != "seed" and getattr(hp, f.name) < least:
            raise UserError(f"--{f.name} is {getattr(hp, f.name)}, expected at least {least}")
    if hp.batch_size % world_size:
        raise UserError(f"{hp.batch_size} sequences a step can't be divided over {world_size} ranks; "
                        f"use --batch_size {world_size * math.ceil(hp.batch_size / world_size)} or another NPROC")
    if TRACKS[hp.track].val_tokens % hp.forward_tokens:
        raise UserError(f"the {TRACKS[hp.track].val_tokens:,} validation tokens of track {hp.track} are no multiple of "
                        f"--micro_batch {hp.micro_batch} * --sequence_length {hp.sequence_length}; use powers of two")
    if hp.model_dim % (2 * hp.num_heads):
        raise UserError(f"--model_dim {hp.model_dim} does not give --num_heads {hp.num_heads} heads of an even width")
    if hp.sequence_length % 128:
        raise UserError(f"--sequence_length is {hp.sequence_length}, expected a multiple of 128 (the attention block)")
    if not 64 <= hp.window_start <= hp.window_end:
        raise UserError(f"--window_start is {hp.window_start}, expected from 64 to --window_end, {hp.window_end}")


# ---------------------------------------------------------------------------------------------------------------------
# Schedules

def lr_scale(step: int, hp: Hyperparameters) -> float:
    """Trapezoid (arXiv 2405.18392): what the learning rates are multiplied by at step; linear up, flat, linear to 0."""
    warmup = (step + 1) / hp.warmup_steps if step < hp.warmup_steps else 1.0
    cooldown = (hp.num_steps - step) / hp.cooldown_steps if hp.num_steps - step < hp.cooldown_steps else 1.0
    return min(warmup, cooldown)


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    """Muon's momentum at step: linear from momentum_start to momentum_end, then flat."""
    done = min(step / hp.momentum_warmup_steps, 1.0) if hp.momentum_warmup_steps else 1.0
    return (1 - done) * hp.momentum_start + done * hp.momentum_end


def window_size(step: int, hp: Hyperparameters) -> int:
    """Tokens a query sees at step, itself included: grows linearly, rounded down to 64."""
    grown = hp.window_start + step / hp.num_steps * (hp.window_end - hp.window_start)
    return 64 * int(grown // 64)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers

def newton_schulz(matrix: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix U V^T of a matrix U S V^T, roughly: singular values land in (0.7, 1.2).

    The quintic iteration's coefficients give the steepest slope at zero. dtype: bfloat16 is enough, for the errors
    contract; float32 where that is faster.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype, copy=True)
    x /= x.norm() + 1e-7
    x = x.T if tall else x  # the Gram matrix below is then the small one
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then the direction is orthogonalised: every singular direction learns at one rate.

    Rank r of W orthogonalises the parameters whose number is r modulo W; the ranks then share the updates.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, dtype: torch.dtype):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            updates = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
            for p, update in list(zip(params, updates, strict=True))[self.rank::self.world_size]:
                update.copy_(self.update(p, group["momentum"]))
            if self.world_size > 1:
                dist.all_reduce(flat)  # a sum of one rank's update and zeros
            for p, update in zip(params, updates, strict=True):
                p.add_(update.type_as(p), alpha=-group["lr"])

    def update(self, p: nn.Parameter, momentum: float) -> Tensor:
        """What p shall move by at a learning rate of -1: as large for the outputs of a tall as of a wide matrix."""
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.mul_(momentum).add_(p.grad)
        direction = p.grad + momentum * buffer
        return max(1, p.size(0) / p.size(1)) ** 0.5 * newton_schulz(direction, self.dtype)


def build_optimizers(model: "GPT", hp: Hyperparameters, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Adam (arXiv 1412.6980) for the tables, the head and the scalars, each at its rate; Muon for blocks' matrices."""
    betas = hp.adam_beta1, hp.adam_beta2
    tables = [*model.embed.parameters(), *model.value_embed.parameters()]
    embed = torch.optim.Adam(tables, lr=hp.embed_lr, betas=betas, fused=True)
    head = torch.optim.Adam(model.head.parameters(), lr=hp.head_lr, betas=betas, fused=True)
    scalars = torch.optim.Adam([p for p in model.parameters() if p.ndim < 2], lr=hp.scalar_lr, betas=betas, fused=True)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    return [embed, head, scalars, Muon(matrices, hp.muon_lr, hp.momentum_start, dtype)]


# ---------------------------------------------------------------------------------------------------------------------
# Attention: one definition of what is visible, two kernels

def first_visible_key(tokens: Tensor, eot_token: int, window: Tensor) -> Tensor:
    """Position of the earliest key each query sees, (S T,): of its sequence, its document and its last `window` tokens.

    tokens: (S, T), S sequences that are computed as one, end to end. window: 0-dim integer tensor, so that its growth
    compiles nothing again. So a query sees an interval that ends at itself, and its start never moves back from one
    query to the next.
    """
    position = torch.arange(tokens.numel(), device=tokens.device)
    begins = tokens == eot_token
    begins[:, 0] = True
    document_start = torch.where(begins.flatten(), position, 0).cummax(0).values
    return torch.maximum(document_start, position - window + 1)


def visible(query: Tensor, key: Tensor, first_key: Tensor) -> Tensor:
    """THE mask: may the query at a position see the key at a position? first_key is the query's. Broadcasts; bool."""
    return (first_key <= key) & (key <= query)


def block_mask(first_key: Tensor, block: int = 128) -> BlockMask:
    """FlexAttention's mask from first_visible_key's (T,), T a multiple of block, without looking at T x T positions.

    Since first_key never decreases, the key blocks that a query block sees are an interval too: from the first key of
    its first query to its own block. Those that all of its queries see whole need no mask: from the first key of its
    last query (rounded up) to the block before its own.
    """
    blocks = torch.arange(len(first_key) // block, device=first_key.device)
    seen_from = first_key[::block] // block
    whole_from = (first_key[block - 1::block] + block - 1) // block
    key_block = blocks[None, :]
    seen = (seen_from[:, None] <= key_block) & (key_block <= blocks[:, None])
    whole = (whole_from[:, None] <= key_block) & (key_block < blocks[:, None])

    def ordered(dense):  # (blocks, blocks) bool -> how many, and which ones first, as (1, 1, ...) int32
        which = dense.int().argsort(dim=-1, descending=True, stable=True).int()
        return dense.sum(-1, dtype=torch.int32)[None, None], which[None, None].contiguous()

    def mask_mod(batch, head, query, key):
        return visible(query, key, first_key[query])

    return BlockMask.from_kv_blocks(*ordered(seen & ~whole), *ordered(whole), BLOCK_SIZE=block, mask_mod=mask_mod)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, max_window: int) -> Tensor:
    """Sliding-window attention by batched matrix products; no window is longer than max_window. q, k, v: (1, H, T, d).

    The queries of a chunk of half a window see the keys of their own chunk and of the two before it: T * 1.5 max_window
    scores instead of T * T. Its reason to be: FlexAttention has no backward on the CPU.
    """
    (_, H, T, d), C = q.shape, max_window // 2
    N = math.ceil(T / C)
    padding = N * C - T
    query = torch.arange(N * C, device=q.device).view(N, C, 1)
    key = torch.arange(-2 * C, C, device=q.device) + query[:, :1]
    # A padded query sees itself: a row of scores without any key would turn the gradients to NaN.
    first_key = torch.cat([first_key, torch.arange(T, N * C, device=q.device)]).view(N, C, 1)

    def with_two_chunks_before(x):  # (1, H, T, d) -> (H, N, 3C, d)
        x = F.pad(x[0], (0, 0, 2 * C, padding)).view(H, N + 2, C, d)
        return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], dim=2)

    q = F.pad(q[0], (0, 0, 0, padding)).view(H, N, C, d) * d ** -0.5
    scores = q @ with_two_chunks_before(k).mT  # (H, N, C, 3C)
    scores = scores.float().masked_fill(~visible(query, key, first_key), -math.inf)
    y = scores.softmax(dim=-1).to(v.dtype) @ with_two_chunks_before(v)
    return y.view(1, H, N * C, d)[:, :, :T]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor, max_window: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over visible keys; q, k, v and the result (1, H, T, d).

    mask: a BlockMask runs FlexAttention (compiled CUDA); first_visible_key's (T,) runs the chunked path (all else).
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    return chunked_attention(q, k, v, mask, max_window)


# ---------------------------------------------------------------------------------------------------------------------
# Model

def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension without a learned scale, computed in float32."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Without bias; torch's default initialisation, or zeros. The float32 weight is cast to x's precision at use."""

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        super().__init__(in_features, out_features, bias=False)
        if zero:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Angles of the rotary position embedding (arXiv 2104.09864): cos and sin, each (T, d / 2), kept for the last T."""

    def __init__(self, head_dim: int, base: float = 10_000.0):
        super().__init__()
        frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.register_buffer("frequency", frequency, persistent=False)
        self.length = None

    def forward(self, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.length != T:
            angle = torch.outer(torch.arange(T, device=device, dtype=torch.float32), self.frequency)
            self.length, self.cos, self.sin = T, angle.cos().bfloat16(), angle.sin().bfloat16()
        return self.cos, self.sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other by the position's angles. x: (B, T, H, d)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    """Self-attention with QK-norm (arXiv 2010.04245), rotary positions, and value embeddings mixed into the values."""

    def __init__(self, model_dim: int, num_heads: int, max_window: int):
        super().__init__()
        self.num_heads, self.max_window = num_heads, max_window
        self.query = Linear(model_dim, model_dim)
        self.key = Linear(model_dim, model_dim)
        self.value = Linear(model_dim, model_dim)
        self.value_mix = nn.Parameter(torch.tensor(0.5))
        self.proj = Linear(model_dim, model_dim, zero=True)

    def forward(self, x: Tensor, value_embed: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask | Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part(x).view(B, T, self.num_heads, -1)
                   for part in (self.query, self.key, self.value))
        v = (1 - self.value_mix) * v + self.value_mix * value_embed.view_as(v)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        y = attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, self.max_window)  # (B, H, T, d)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Width 4 D, ReLU squared (arXiv 2109.08668)."""

    def __init__(self, model_dim: int):
        super().__init__()
        self.fc = Linear(model_dim, 4 * model_dim)
        self.proj = Linear(4 * model_dim, model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    """One layer: mix the embedding x0 in, then attention and MLP on a residual path; the identity at the start."""

    def __init__(self, model_dim: int, num_heads: int, max_window: int):
        super().__init__()
        self.attention = Attention(model_dim, num_heads, max_window)
        self.mlp = MLP(model_dim)
        self.x0_mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, value_embed: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, mask) -> Tensor:
        x = self.x0_mix[0] * x + self.x0_mix[1] * x0
        x = x + self.attention(norm(x), value_embed, cos, sin, mask)
        return x + self.mlp(norm(x))


class Head(nn.Module):
    """From the residual stream to the loss, by a matrix of its own, zero at the start: the first loss is ln V."""

    def __init__(self, model_dim: int, vocab_size: int, logit_cap: float):
        super().__init__()
        self.logit_cap = logit_cap
        self.linear = Linear(model_dim, vocab_size, zero=True)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) after x (B, T, D), over float32 logits (B T, V), softcapped."""
        logits = self.logit_cap * torch.tanh(self.linear(norm(x)).float() / self.logit_cap)  # arXiv 2408.00118
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPT(nn.Module):
    """GPT-2 with rotary positions and RMSNorm, value embeddings, and U-net skips over documents of any length.

    One table holds the value embeddings of all layers, L * D wide. The outputs of the first half of the layers are
    pushed, and popped into the inputs of the second half. flex: FlexAttention in place of the chunked path.
    """

    def __init__(self, track: Track, hp: Hyperparameters, flex: bool):
        super().__init__()
        self.eot_token, self.flex, max_window = track.eot_token, flex, window_size(hp.num_steps, hp)
        vocab_size = 128 * math.ceil(track.vocab_size / 128)  # matrix products like round sizes
        self.embed = nn.Embedding(vocab_size, hp.model_dim)
        self.value_embed = nn.Embedding(vocab_size, hp.num_layers * hp.model_dim)
        self.blocks = nn.ModuleList(Block(hp.model_dim, hp.num_heads, max_window) for _ in range(hp.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(hp.num_layers // 2))
        self.head = Head(hp.model_dim, vocab_size, hp.logit_cap)
        self.rotary = Rotary(hp.model_dim // hp.num_heads)

    def forward(self, tokens: Tensor, targets: Tensor, window: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) after tokens (B, T), computed as one sequence of B T tokens.

        window: 0-dim integer tensor, tokens a query sees.
        """
        first_key = first_visible_key(tokens, self.eot_token, window)
        mask = block_mask(first_key) if self.flex else first_key
        tokens, targets = tokens.view(1, -1), targets.view(1, -1)
        cos, sin = self.rotary(tokens.size(1), tokens.device)
        x0 = norm(self.embed(tokens))  # (1, B T, D)
        x = x0.view_as(x0)  # were it x0 itself, the first block would be compiled apart
        value_embeds, skips = self.value_embed(tokens).chunk(len(self.blocks), dim=-1), []
        for layer, block in enumerate(self.blocks):
            if layer >= len(self.blocks) - len(self.skip_weights):
                x = x + self.skip_weights[len(skips) - 1] * skips.pop()
            x = block(x, value_embeds[layer], x0, cos, sin, mask)
            if layer < len(self.skip_weights):
                skips.append(x)
        return self.head(x, targets)


def build_model(hp: Hyperparameters, device: torch.device, dtype: torch.dtype, flex: bool) -> GPT:
    """The model of hp in dtype, rotary frequencies too; linear layers' matrices stay float32."""
    torch.manual_seed(hp.seed)
    with device:
        model = GPT(TRACKS[hp.track], hp, flex)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, Linear)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in matrices:
            tensor.data = tensor.data.to(dtype)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Data

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def open_shard(path: str | Path, advice: str = "delete it and fetch or build it again") -> np.ndarray:
    """The tokens of a .bin shard as a read-only memory map, (num_tokens,) little-endian uint16.

    A shard is 256 int32 of header ([0] magic, [1] version, [2] number of tokens), then the tokens.
    Raises UserError where the file is missing, unreadable, no shard, or not exactly as long as its header says.
    """
    path, header_bytes = Path(path), 4 * SHARD_HEADER_INTS
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(header_bytes).ljust(header_bytes, b"\0"), dtype="<i4")
    except OSError as error:
        raise UserError(f"can't read the shard {path}: {error.strerror}") from None
    magic, version, count = (int(x) for x in header[:3])
    expected = header_bytes + 2 * max(count, 0)
    for what, got, wanted in (("magic number", magic, SHARD_MAGIC), ("version", version, SHARD_VERSION),
                              ("number of tokens", count, max(count, 0)), ("size in bytes", size, expected)):
        if got != wanted:
            raise UserError(f"{path} is no whole shard: its {what} is {got}, expected {wanted}; {advice}")
    return np.memmap(path, "<u2", "r", header_bytes, (count,)) if count else np.zeros(0, "<u2")


class TokenStream:
    """All shards that match a pattern, in the order of their names, as one stream of tokens that never ends."""

    def __init__(self, pattern: str, vocab_size: int, minimum: int, get_data: str):
        """pattern: a glob below the repository. Raises UserError on a bad shard or fewer tokens than minimum."""
        self.vocab_size, self.get_data, self.paths = vocab_size, get_data, sorted(glob.glob(str(ROOT / pattern)))
        self.shards = [open_shard(path, f"delete it and run: {get_data}") for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)
        if not self.paths or len(self) < minimum:
            raise UserError(f"{ROOT / pattern} holds {len(self):,} tokens in {len(self.paths)} shards, expected at "
                            f"least {minimum:,}; run: {get_data}")

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.paths else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count of the endless stream, (count,) int64. Raises UserError on an impossible id."""
        parts = []
        while count > 0:
            start %= len(self)
            shard = int(np.searchsorted(self.ends, start, side="right"))
            offset = start - (int(self.ends[shard]) - len(self.shards[shard]))
            part = self.shards[shard][offset:offset + count]
            if part.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]} holds the token id {part.max()}, expected ids below "
                                f"{self.vocab_size}: another tokenizer's data; run: {self.get_data}", everywhere=False)
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64)

    def sequence(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """The index-th sequence and its targets, the tokens one further on: two (length,) int64 tensors."""
        tokens = torch.from_numpy(self.read(index * length, length + 1))
        return tokens[:-1], tokens[1:]

    def fingerprint(self, count: int) -> str:
        """12 hexadecimal digits that stand for the first count tokens (all, where there are fewer)."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(np.ascontiguousarray(shard[:count]).data)
            count -= min(count, len(shard))
        return digest.hexdigest()[:12]


class BatchLoader:
    """This rank's micro-batches of each step, the next step's being read by a thread while the present one runs.

    Step s takes sequences s * batch_size to (s + 1) * batch_size of the track's order, whatever the number of ranks:
    rank r takes those that are r modulo W.
    """

    def __init__(self, stream: TokenStream, hp: Hyperparameters, runtime: "Runtime"):
        self.stream, self.hp, self.runtime, self.step, self.pool = stream, hp, runtime, 0, ThreadPoolExecutor(1)
        num_sequences = (len(stream) - 1) // hp.sequence_length
        self.order = np.random.RandomState(0).permutation(num_sequences) if TRACKS[hp.track].shuffled else None
        share = hp.batch_size // runtime.world_size
        self.micro_batch = max(m for m in range(1, min(hp.micro_batch, share) + 1) if share % m == 0)
        self.future = self.pool.submit(self._read, 0)

    def _read(self, step: int) -> list[tuple[Tensor, Tensor]]:
        mine = range(step * self.hp.batch_size, (step + 1) * self.hp.batch_size)
        mine = mine[self.runtime.rank::self.runtime.world_size]
        if self.order is not None:
            mine = [int(self.order[i % len(self.order)]) for i in mine]
        pairs = [self.stream.sequence(i, self.hp.sequence_length) for i in mine]
        batch = [tuple(map(torch.stack, zip(*pairs[i:i + self.micro_batch], strict=True)))
                 for i in range(0, len(pairs), self.micro_batch)]
        return [(a.pin_memory(), b.pin_memory()) for a, b in batch] if self.runtime.device.type == "cuda" else batch

    def next(self) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of the next step, [(tokens (B, T), targets (B, T)), ...] on the device."""
        batch, self.step, device = self.future.result(), self.step + 1, self.runtime.device
        self.future = self.pool.submit(self._read, self.step)
        return [(a.to(device, non_blocking=True), b.to(device, non_blocking=True)) for a, b in batch]


# ---------------------------------------------------------------------------------------------------------------------
# Runtime: ranks, device, precision, timer

@dataclass(frozen=True)
class Runtime:
    """Where this process runs: one of world_size ranks, one device each; what it computes in."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    def mean(self, value: Tensor) -> float:
        """Mean over the ranks of a 0-dim tensor. Collective."""
        if self.world_size > 1:
            dist.all_reduce(value := value.clone(), op=dist.ReduceOp.AVG)
        return value.item()

    def agree(self, value):
        """Rank 0's value, on every rank. Collective."""
        if self.world_size > 1:
            dist.broadcast_object_list(box := [value], src=0, device=self.device)
            return box[0]
        return value


def start_runtime(hp: Hyperparameters) -> Runtime:
    """Join the other ranks, if torchrun (or Slurm with the same variables) started several. Raises UserError."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    check_hyperparameters(hp, world_size)
    if hp.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; use --device cpu, or mend the driver (nvidia-smi)")
    use_cuda = hp.device != "cpu" and torch.cuda.is_available()
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} of this node has no GPU of its own: there are "
                        f"{torch.cuda.device_count()}; start so many processes (NPROC, --nproc_per_node)")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo", device_id=device if use_cuda else None)
    runtime = Runtime(rank, world_size, device)
    dtype = runtime.agree(fast_dtype(device) if hp.dtype == "auto" else getattr(torch, hp.dtype))
    return dataclasses.replace(runtime, dtype=dtype)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matrix products are fast, else float32. A CPU is asked by measuring, about 20 ms."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32

    def seconds(dtype):
        a = torch.ones(512, 512, dtype=dtype)
        times = [time.perf_counter() for _ in range(9) if a.mm(a) is not None]
        return min(after - before for before, after in zip(times, times[1:], strict=False))

    return torch.bfloat16 if seconds(torch.bfloat16) < 0.7 * seconds(torch.float32) else torch.float32


def compile_pays(hp: Hyperparameters, device: torch.device) -> bool:
    """Whether torch.compile saves more than it costs: with Triton always, on a CPU from 2 million tokens on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 0)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and hp.num_steps * hp.step_tokens >= 2_000_000


class Timer:
    """Training time in milliseconds: counts from start on, but for pauses; both ends wait for the device's work."""

    def __init__(self, device: torch.device):
        self.device, self.elapsed_ms, self.started = device, 0.0, None

    def start(self) -> None:
        self._synchronize()
        self.started = time.perf_counter()

    @contextmanager
    def pause(self):
        """A context that is not timed."""
        self._synchronize()
        running, self.elapsed_ms, self.started = self.started is not None, self.now(), None
        yield
        if running:
            self.start()

    def now(self) -> float:
        """Milliseconds so far; does not wait for the device."""
        return self.elapsed_ms + (1000 * (time.perf_counter() - self.started) if self.started else 0.0)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---------------------------------------------------------------------------------------------------------------------
# Log

SEPARATOR = "=" * 100


def _output_of(*command: str) -> str:
    """What a command prints, or nothing where it can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if Path("/proc/cpuinfo").exists() and "model name" in (text := Path("/proc/cpuinfo").read_text()):
        return text.split("model name", 1)[1].split("\n", 1)[0].strip("\t :")
    return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def environment(hp: Hyperparameters, runtime: Runtime, facts: dict) -> str:
    """The log's second section: versions, a JSON object of all a reader must know, nvidia-smi."""
    name, cuda = device_name(runtime.device), runtime.device.type == "cuda"
    pytorch, smi = f"Running PyTorch {torch.__version__}", _output_of("nvidia-smi") if cuda else ""
    told = {
        "command": sys.argv, "hyperparameters": dataclasses.asdict(hp), **facts,
        "git_commit": _output_of("git", "rev-parse", "HEAD") or None,
        "git_dirty": bool(_output_of("git", "status", "--porcelain")),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "device": name, "device_count": runtime.world_size if cuda else os.cpu_count(),
        "threads": torch.get_num_threads(), "world_size": runtime.world_size, "platform": platform.platform(),
    }
    return "\n".join([
        f"Running Python {' '.join(sys.version.split())}",
        *([f"{pytorch} compiled for CUDA {torch.version.cuda}"] if torch.version.cuda else []),
        f"{pytorch} on {name} with world_size {runtime.world_size}",
        json.dumps(told, indent=1), *(["nvidia-smi:", smi] if smi else [])])


class Log:
    """The log file and the console of rank 0; the other ranks write nothing.

    The file is the script's source, SEPARATOR, the environment, SEPARATOR, then a line each time something is said.
    """

    def __init__(self, hp: Hyperparameters, runtime: Runtime, facts: dict):
        """Raises UserError where the log can't be written, before any work is done."""
        self.path, self.file = ROOT / "records" / (hp.entry or "scratch") / f"{facts['run_id']}.txt", None
        if runtime.rank:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "x", encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"can't write the log {self.path}: {error.strerror}; make it a folder that can be "
                            "written, or name another with --entry") from None
        source = Path(__file__).read_text(encoding="utf-8")
        self.write(source, SEPARATOR, environment(hp, runtime, facts), SEPARATOR)

    def write(self, *lines: str) -> None:
        """Into the file alone."""
        if self.file:
            self.file.write("".join(line.removesuffix("\n") + "\n" for line in lines))
            self.file.flush()

    def say(self, *lines: str) -> None:
        """Into the file and onto the console."""
        self.write(*lines)
        if self.file:
            print(*lines, sep="\n", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training

UNTIMED_STEPS = 10  # by the rules of 2024: they compile and load the kernels


def training_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: list[tuple[Tensor, Tensor]],
                  step: int, hp: Hyperparameters, runtime: Runtime) -> Tensor:
    """One update by the gradient of the loss over all ranks' micro-batches. Returns this rank's mean loss, 0-dim.

    model: the GPT, or on several ranks its DistributedDataParallel, which averages the gradients.
    """
    loss_sum = torch.zeros((), device=runtime.device)
    window = torch.full((), window_size(step, hp), device=runtime.device)
    for i, (tokens, targets) in enumerate(batch):
        last = i + 1 == len(batch)  # only then do the ranks exchange gradients
        with nullcontext() if last or runtime.world_size == 1 else model.no_sync():
            loss = model(tokens, targets, window)
            (loss / len(batch)).backward()
        loss_sum += loss.detach()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_scale(step, hp) * group.setdefault("initial_lr", group["lr"])
            if "momentum" in group:
                group["momentum"] = muon_momentum(step, hp)
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss_sum / len(batch)


def validate(model: GPT, stream: TokenStream, step: int, hp: Hyperparameters, runtime: Runtime) -> float:
    """Mean cross-entropy in nats over the track's validation tokens, in pieces dealt to the ranks. Collective."""
    num_pieces = TRACKS[hp.track].val_tokens // hp.forward_tokens
    window = torch.full((), window_size(step, hp), device=runtime.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for index in range(runtime.rank, num_pieces, runtime.world_size):
        tokens, targets = (t.to(runtime.device) for t in stream.sequence(index, hp.forward_tokens))
        # with a graph, as in training: no_grad would compile the model once more
        loss = model(tokens[None], targets[None], window)
        loss_sum += loss.detach()
        del tokens, targets, loss  # and the graph, before the next one
    return runtime.mean(loss_sum) * runtime.world_size / num_pieces


def metric_line(step: int, hp: Hyperparameters, name: str, value: float, time_ms: float) -> str:
    """One line of the public log format: step, loss, training time and its mean over the steps.

    The colons are set here, not in the text: a log holds this source, and a search of it for a
    metric's name with its colon shall find metrics and nothing else.
    """
    average = time_ms / (step - UNTIMED_STEPS) if step > UNTIMED_STEPS else math.nan
    fields = {"step": f"{step}/{hp.num_steps}", name: f"{value:.4f}",
              "train_time": f"{time_ms:.0f}ms", "step_avg": f"{average:.2f}ms"}
    return " ".join(f"{key}:{word}" for key, word in fields.items())


def save_checkpoint(path: Path, model: GPT, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write weights and this rank's optimizer state, atomically. Raises UserError."""
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    try:
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        path.with_suffix(".tmp").unlink(missing_ok=True)
        raise UserError(f"can't write the checkpoint {path}: {error}; free disk space or use --save_every 0",
                        everywhere=False) from None


def train_loop(model: nn.Module, raw_model: GPT, optimizers: list[torch.optim.Optimizer], train_stream: TokenStream,
               val_stream: TokenStream, hp: Hyperparameters, runtime: Runtime, log: Log) -> None:
    """All steps. Validation and checkpoints are not timed. raw_model: model without DistributedDataParallel."""
    timer, loader, reached = Timer(runtime.device), BatchLoader(train_stream, hp, runtime), "missed"
    for step in range(hp.num_steps + 1):
        last = step == hp.num_steps
        if step == UNTIMED_STEPS:
            timer.start()
        if last or (hp.val_every and step % hp.val_every == 0):
            with timer.pause():
                val_loss = validate(raw_model, val_stream, step, hp, runtime)
            log.say(metric_line(step, hp, "val_loss", val_loss, timer.elapsed_ms))
            if reached == "missed" and val_loss <= TRACKS[hp.track].target:
                reached = f"reached at step {step} after {timer.elapsed_ms / 1000:.1f} s"
        if hp.save_every and step and step % hp.save_every == 0 and runtime.rank == 0:
            with timer.pause():
                save_checkpoint(log.path.with_name(f"{log.path.stem}_step{step:06d}.pt"), raw_model, optimizers, step)
        if last:
            break
        loss = training_step(model, optimizers, loader.next(), step, hp, runtime)
        if hp.log_every and (step + 1) % hp.log_every == 0:
            log.say(metric_line(step + 1, hp, "train_loss", runtime.mean(loss), timer.now()))
    loader.pool.shutdown(cancel_futures=True)
    log.say(f"target {TRACKS[hp.track].target}: {reached}")
    if timer.elapsed_ms:
        per_second = 1000 * (hp.num_steps - UNTIMED_STEPS) * hp.step_tokens / timer.elapsed_ms
        if runtime.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(runtime.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        log.say(f"tokens_per_second:{per_second:.0f} peak_memory_per_rank:{memory / 2**20:.0f}MiB")


def train(hp: Hyperparameters, runtime: Runtime) -> None:
    """The whole run. Raises UserError for what the user can mend."""
    track, device = TRACKS[hp.track], runtime.device
    get_data = track.get_data.format(shards=math.ceil(hp.num_steps * hp.step_tokens / 10**8))
    train_stream = TokenStream(track.train_files, track.vocab_size, hp.step_tokens + 1, get_data)
    val_stream = TokenStream(track.val_files, track.vocab_size, track.val_tokens + 1, get_data)
    script = Path(__file__).resolve()
    compiled = compile_pays(hp, device) if hp.compile == "auto" else hp.compile == "on"
    facts = runtime.agree({
        "script": str(script.relative_to(ROOT)), "code_hash": hashlib.sha256(script.read_bytes()).hexdigest()[:12],
        "target": track.target, "run_id": f"{hp.track}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        "activations": str(runtime.dtype).removeprefix("torch."), "compiled": compiled,
        "data_fingerprint": f"{val_stream.fingerprint(track.val_tokens + 1)}-{train_stream.fingerprint(2**26)}"})
    log, flex = Log(hp, runtime, facts), facts["compiled"] and device.type == "cuda"  # it has no backward on a CPU
    raw_model = build_model(hp, device, runtime.dtype, flex)
    optimizers = build_optimizers(raw_model, hp, runtime.dtype)
    if facts["compiled"]:
        # Else DistributedDataParallel has a block's graph cut in two where its bucket is full (25
        # of 28 MB). For nothing: a block is a graph of its own, after which its gradients travel.
        torch._dynamo.config.optimize_ddp = False
        for part in [*raw_model.blocks, raw_model.head]:  # the blocks are alike: one compilation serves them all
            part.compile(dynamic=False)
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(raw_model, device_ids=ids) if runtime.world_size > 1 else raw_model
    log.say(f"track {hp.track}, {sum(p.numel() for p in raw_model.parameters()):,} parameters, {facts['activations']}, "
            f"{runtime.world_size} x {device_name(device)}, log {log.path}")
    if runtime.rank == 0 and facts["compiled"]:
        print(f"compiling in the first {UNTIMED_STEPS} steps, about a minute the first time ...", flush=True)
    try:
        train_loop(model, raw_model, optimizers, train_stream, val_stream, hp, runtime, log)
    except BaseException as error:
        log.write(f"run failed: {type(error).__name__}: {error}".rstrip(": "))
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Main

def run(argv: list[str] | None = None) -> None:
    """Parse, join the other ranks, train, leave them. Raises UserError."""
    # Compiled kernels outlive the run here, so that the next one starts at once; /tmp would lose them.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
    hp = parse_arguments(argv)
    runtime = start_runtime(hp)
    try:
        train(hp, runtime)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        less = (f"--micro_batch {hp.micro_batch // 2}" if hp.micro_batch > 1 else f"--sequence_length "
                f"{hp.sequence_length // 2} --batch_size {2 * hp.batch_size} (the same tokens a step)")
        raise UserError(f"out of memory on {device_name(runtime.device)} with {hp.forward_tokens} tokens at once; use "
                        f"{less}, or a smaller --model_dim", everywhere=False) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def run_as_program(function, *args) -> int:
    """function(*args) as a command: its int result or 0; 2 after a UserError, 130 after Ctrl-C, each said in a line."""
    try:
        return function(*args) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or not error.everywhere:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_as_program(run, argv)


if __name__ == "__main__":
    sys.exit(main())
