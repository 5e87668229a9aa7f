#!/usr/bin/env python3
"""Train GPT-2 (124M) to a validation loss of 3.28 on FineWeb in the least time. One file, from a laptop to 8 H100s.

    torchrun --standalone --nproc_per_node=8 train_gpt.py --track fineweb    # a node of 8 GPUs
    python train_gpt.py --track fineweb                                      # one GPU: the same batch, in 8 parts
    python train_gpt.py --track laptop                                       # a CPU: bytes of Python, in minutes
    python train_gpt.py --help                                               # every knob, with its unit

(`./run.sh` does the same and first sets up Python and the data.) A track fixes the data, the validation tokens, the
vocabulary and the target; everything else is yours to change. A run's one log, records/scratch/<run_id>.txt, holds
this source, the environment and the losses.

The system is the ValueEmbed record of 2024-12-04 (published: 3.2751 after 264.6 s on 8 H100s) plus hashed n-gram
embeddings, merged QKV, shared value embeddings and fewer bytes between the ranks. records/2026-11-22_NGramEmbed has its
figures on the laptop track, with logs; on GPUs it has not been measured yet.

Shapes in comments: T tokens of a sequence, D model width, H heads, V vocabulary, L layers, W ranks (world size).
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
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# The repository: data/ and records/ lie there, also for a copy of this script inside records/<entry>/.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "run.sh").exists()), Path(__file__).resolve().parent)

class UserError(Exception):
    """A mistake the user can mend: one line on stderr, exit code 2. All ranks meet the same one, so rank 0 says it."""

class RankError(UserError):
    """A UserError that this rank may be alone with, so that it says it itself."""

def first_line(error: BaseException) -> str:
    """Of what an exception says, or its name where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__

# --- Tracks and hyperparameters ---------------------------------------------------------------------------------------

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
                     50_257, 50_256, False, 3.28, "python -m data.fineweb --shards 9"),
    "laptop": Track("data/laptop/laptop_train_*.bin", "data/laptop/laptop_val_*.bin", 262_144,
                    257, 256, True, 1.10, "python -m data.laptop"),
}

def knob(default, help: str, choices: tuple | None = None, least: float = 0, most: float = 10**12):
    """A field of Hyperparameters: its default, its help text with the unit, its permitted values."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, most=most))

@dataclass(frozen=True)
class Hyperparameters:
    """One run. Each field is a command-line flag; the defaults are those of fineweb, PRESETS has the other tracks'."""
    track: str = knob("fineweb", "which data and target", tuple(TRACKS))
    seed: int = knob(0, "of the initial weights; the order of the data never changes", most=2**63 - 1)
    # work
    num_steps: int = knob(1530, "optimizer steps", least=1)
    batch_size: int = knob(8, "sequences a step, over all ranks; fewer ranks take several one after the other", least=1)
    sequence_length: int = knob(65_536, "tokens a sequence", least=128)
    micro_batch: int = knob(1, "sequences that a rank computes at once, at most; it takes more in parts", least=1)
    # model
    num_layers: int = knob(12, "transformer blocks", least=1, most=1000)
    num_heads: int = knob(6, "attention heads", least=1)
    model_dim: int = knob(768, "width of the residual stream", least=1, most=2**16)
    value_layers: int = knob(2, "so many of the first layers, and of the last ones, share value embeddings")
    ngrams: int = knob(2, "longest n: each token brings embeddings of the 2-, 3-, ... n-grams that end at it", most=64)
    ngram_rows: int = knob(24_571, "rows of each n's table, into which n-grams are hashed", least=1, most=2**31)
    logit_cap: float = knob(30.0, "logits are squashed into (-cap, cap)", least=1e-3)
    window_start: int = knob(64, "tokens a query sees at step 0, itself included", least=64)
    window_end: int = knob(1792, "tokens a query sees at the end, itself included", least=64)
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
    resume: str = knob("", "checkpoint file to continue from; latest: the newest where the log goes, if there is one")
    resume_anyway: bool = knob(False, "continue though script, data or hyperparameters have changed")
    entry: str = knob("", "write the log into records/<entry>/ instead of records/scratch/")
    device: str = knob("auto", "where to run; auto: CUDA if there is a GPU", ("auto", "cuda", "cpu"))
    dtype: str = knob("auto", "of the activations; auto: bfloat16 where it is fast", ("auto", "bfloat16", "float32"))
    compile: str = knob("auto", "torch.compile; auto: where it pays within the run", ("auto", "on", "off"))
    profile: bool = knob(False, "write a Chrome trace of steps 3 to 5 beside the log")
    sample_tokens: int = knob(300, "tokens the model writes at the end of the run; 0: none")

    # Tokens a step, over all ranks, and tokens of the longest forward pass: validation reads pieces of this length.
    step_tokens = property(lambda self: self.batch_size * self.sequence_length)
    forward_tokens = property(lambda self: self.micro_batch * self.sequence_length)

PRESETS = {
    "fineweb": {},
    "laptop": dict(num_steps=390, batch_size=8, sequence_length=256, micro_batch=8, num_layers=3, num_heads=2,
                   model_dim=128, ngrams=6, ngram_rows=65_521, logit_cap=15.0, window_start=128, window_end=128,
                   embed_lr=2.4, ngram_lr=1.5, head_lr=0.012, scalar_lr=0.04, muon_lr=0.045, momentum_warmup_steps=100,
                   cooldown_steps=195, val_every=50, log_every=50),
}
# What a resumed run may choose anew, for no number depends on it (the activations' precision is compared by itself).
MAY_CHANGE = {"val_every", "log_every", "save_every", "keep", "resume", "resume_anyway", "entry", "profile",
              "sample_tokens", "dtype"}

class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage before the one line that matters
        raise UserError(f"{message}; python train_gpt.py --help lists every flag")

def parse_arguments(argv: list[str] | None = None) -> Hyperparameters:
    """Hyperparameters from command-line words (default: sys.argv). Raises UserError on an unknown flag or bad value."""
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--track", choices=tuple(TRACKS), default="fineweb" if torch.cuda.is_available() else "laptop")
    track = first.parse_known_args(argv)[0].track
    parser = _Parser(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
                     epilog=f"Defaults are those of the track {track}.")
    for f in dataclasses.fields(Hyperparameters):
        default = track if f.name == "track" else PRESETS[track].get(f.name, f.default)
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name}", default=default, help=f"{f.metadata['help']} ({default})", **kind)
    return Hyperparameters(**vars(parser.parse_args(argv)))

def check_hyperparameters(hp: Hyperparameters, world_size: int) -> None:
    """Raises UserError, with the flag to change, where hp can't be run on world_size ranks."""
    for f in dataclasses.fields(hp):
        value, low, high = getattr(hp, f.name), f.metadata["least"], f.metadata["most"]
        if f.type in (int, float) and not low <= value <= high:  # nor NaN
            raise UserError(f"--{f.name} is {value}, expected from {low:,} to {high:,}")
    val_tokens, records = TRACKS[hp.track].val_tokens, (ROOT / "records").resolve()
    for wrong, message in (
        (hp.window_end < hp.window_start, f"--window_end is {hp.window_end}, expected at least --window_start"),
        (hp.batch_size % world_size, f"{hp.batch_size} sequences a step can't be divided over {world_size} ranks; use "
         f"--batch_size {world_size * math.ceil(hp.batch_size / world_size)} or another NPROC"),
        (hp.sequence_length % 128, f"--sequence_length is {hp.sequence_length}, expected a multiple of 128"),
        (val_tokens % hp.forward_tokens, f"the {val_tokens:,} validation tokens of track {hp.track} are no multiple of "
         f"--micro_batch {hp.micro_batch} * --sequence_length {hp.sequence_length}; use powers of two"),
        (not (records / hp.entry).resolve().is_relative_to(records),
         f"--entry is {hp.entry!r}, expected the name of a folder below records/"),
        (hp.model_dim % (2 * hp.num_heads), f"--model_dim {hp.model_dim} does not give --num_heads {hp.num_heads} "
         "heads of an even width"),
    ):
        if wrong:
            raise UserError(message)

# --- Schedules: pure functions of the step, so that a resumed run can't differ ----------------------------------------

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
    """Tokens a query sees at step, itself included: grows linearly, rounded down to 64 (record 2024-12-04)."""
    return 64 * int((hp.window_start + step / hp.num_steps * (hp.window_end - hp.window_start)) // 64)

# --- Optimizers: the update mathematics, then the classes that divide the work over the ranks -------------------------

def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix U V^T of each matrix U S V^T, roughly: singular values land in (0.7, 1.2).

    matrices: (..., rows, columns), in the precision to work in: bfloat16 is enough, for the errors contract.
    The quintic iteration's coefficients give the steepest slope at zero (Muon, record 2024-10-14).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices  # the Gram matrix below is then the small one
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).flatten(0, -3)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).view(matrices.shape)

def muon_direction(grad: Tensor, momentum_buffer: Tensor, momentum: float, dtype: torch.dtype) -> Tensor:
    """Where Muon (record 2024-10-14) goes from a stack of matrices with the gradients grad (K, rows, columns).

    Nesterov momentum, then the direction is orthogonalised, so that every singular direction learns at one rate.
    sqrt(max(1, rows / columns)) keeps the change of the output's size alike for tall and wide matrices.
    """
    momentum_buffer.mul_(momentum).add_(grad)
    direction = newton_schulz((grad + momentum * momentum_buffer).to(dtype))
    return direction * max(1.0, grad.size(-2) / grad.size(-1)) ** 0.5

def adam_direction(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, bias1: Tensor, bias2: Tensor, beta1: float,
                   beta2: float, touched_rows: bool = False, eps: float = 1e-8) -> Tensor:
    """Where Adam (arXiv 1412.6980) goes, in float32; updates its moments. bias1, bias2: 1 - beta^t, 0-dim tensors.

    touched_rows: rows whose gradient is zero rest, moments included: an n-gram that did not occur says nothing.
    """
    grad = grad.float()
    weight = (grad != 0).any(-1, keepdim=True).float() if touched_rows else 1.0
    exp_avg.lerp_(grad, (1 - beta1) * weight)
    exp_avg_sq.lerp_(grad.square(), (1 - beta2) * weight)
    return weight * (exp_avg / bias1) / ((exp_avg_sq / bias2).sqrt() + eps)

# torch 2.13 renamed the two collectives and warns on the old names, which are the only ones in 2.11.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

class Bucket:
    """Parameters with one update rule, as one tensor `values` of W * shard_rows rows; each rank owns its rows `mine`.

    A table is its own bucket; matrices of equal shape are stacked (a row is a matrix); scalars are joined end to end.
    The parameters and their gradients become views of `values` and `grads`, which the collectives take as they lie. A
    table with sparse gradients (on one rank of a CPU) has no `grads`. dtype: of what travels between the ranks.
    """
    def __init__(self, kind: str, lr: float, params: list[nn.Parameter], sparse: bool, dtype: torch.dtype, rank: int,
                 world_size: int):
        self.kind, self.lr, self.params, self.dtype, self.world_size = kind, lr, params, dtype, world_size
        row_shape = params[0].shape[-2:] if kind == "muon" else params[0].shape[1:][-1:]
        sizes = [p.numel() for p in params]
        self.rows = sum(sizes) // math.prod(row_shape)
        shard_rows = math.ceil(self.rows / world_size)
        self.mine = slice(rank * shard_rows, (rank + 1) * shard_rows)
        self.values = params[0].new_zeros(world_size * shard_rows, *row_shape)
        self.grads = None if sparse else torch.zeros_like(self.values)
        for i, p in enumerate(params):
            values, grads = (None if whole is None else whole.view(-1)[:sum(sizes)].split(sizes)[i].view_as(p)
                             for whole in (self.values, self.grads))
            p.data, p.grad = values.copy_(p.detach()), grads
        self.state = {name: torch.zeros_like(self.values[self.mine], dtype=torch.float32)
                      for name in (("momentum",) if kind == "muon" else ("exp_avg", "exp_avg_sq"))}
        self.mean = self.sent = self.work = None

    def reduce(self) -> Tensor:
        """Begin to receive this rank's rows of the gradients' mean over the ranks. Collective.

        Returns the sum of this rank's own gradients, which is not finite if one of them is not.
        """
        if self.grads is None:
            self.mean, self.params[0].grad = self.params[0].grad.coalesce(), None
            return self.mean.values().sum(dtype=torch.float32)
        self.mean = self.grads
        if self.world_size > 1:
            self.sent = self.grads.to(self.dtype)
            self.mean = torch.empty_like(self.sent[self.mine])
            self.work = _reduce_scatter(self.mean, self.sent, op=dist.ReduceOp.AVG, async_op=True)
        return self.grads.sum(dtype=torch.float32)

    def collect(self) -> tuple[Tensor, list[Tensor]]:
        """This rank's rows of the mean gradient and of the state; of a sparse table those that occurred."""
        if self.grads is None:
            self.occurred = self.mean.indices()[0]
            return self.mean.values(), [moment[self.occurred] for moment in self.state.values()]
        self.wait()
        return self.mean, list(self.state.values())

    def gather(self, mine: Tensor) -> Tensor:
        """Begin to receive every rank's rows; the result is to be read after wait(). Collective."""
        if self.world_size == 1:
            return mine
        self.sent, whole = mine.contiguous(), mine.new_empty(self.values.shape)  # NCCL takes no transposed matrices
        self.work = _all_gather(whole, self.sent, async_op=True)
        return whole

    def wait(self) -> None:
        """Until what was begun is received."""
        if self.work:
            self.work.wait()
        self.work = self.sent = None

    def move(self, directions: Tensor, state: list[Tensor], lr: float) -> None:
        """Go lr along the gathered directions; they and state are of collect()'s rows. Then the gradients are zero."""
        self.wait()
        if self.grads is None:
            self.values.index_add_(0, self.occurred, directions.to(self.values.dtype), alpha=-lr)
            for moment, part in zip(self.state.values(), state, strict=True):
                moment[self.occurred] = part
        else:
            self.values.add_(directions, alpha=-lr)
            self.grads.zero_()

class Optimizer:
    """Muon for the matrices of the blocks, Adam for all else; each rank holds the state of, and computes, its share.

    Gradients travel by reduce-scatter; where the parameters shall go, by all-gather; every rank then takes the same
    step. While one bucket is computed, the others travel. One rank skips both. Every parameter is in exactly one
    bucket, asserted. The padding rows of a bucket are zeros and stay zeros.
    """
    def __init__(self, model: "GPT", hp: Hyperparameters, dtype: torch.dtype, rank: int = 0, world_size: int = 1):
        self.hp, self.dtype, self.num_updates, self.adam_direction = hp, dtype, 0, adam_direction
        self.gradient_sum = torch.zeros(())  # of this rank's last gradients: not finite if one of them is not
        sparse = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
        groups: dict[tuple, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.ndim < 2:
                key = ("adam", hp.scalar_lr, "scalars", torch.float32)
            elif name.startswith("blocks."):
                key = ("muon", hp.muon_lr, p.shape[-2:], dtype)
            elif name.startswith("ngram"):
                key = ("rows", hp.ngram_lr, name, dtype)
            else:
                key = ("adam", hp.head_lr if name.startswith("head.") else hp.embed_lr, name, dtype)
            groups.setdefault(key, []).append(p)
        groups = dict(sorted(groups.items(), key=lambda group: group[0][0] != "muon"))  # Muon computes longest: first
        self.buckets = [Bucket(kind, lr, params, id(params[0]) in sparse, wire, rank, world_size)
                        for (kind, lr, _, wire), params in groups.items()]
        placed = sorted(id(p) for bucket in self.buckets for p in bucket.params)
        assert placed == sorted(map(id, model.parameters())), "a parameter is in no bucket, or in two"

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> None:
        """One update from the gradients, which are then zero again. Collective: all ranks call it together."""
        self.num_updates += 1
        moves = []
        self.gradient_sum = torch.stack([bucket.reduce() for bucket in self.buckets]).sum()
        for bucket in self.buckets:
            grad, state = bucket.collect()
            direction = self._direction(bucket.kind, grad, state, momentum)
            moves.append((bucket, bucket.gather(direction.to(bucket.dtype)), state))
        for bucket, directions, state in moves:
            bucket.move(directions, state, lr_scale * bucket.lr)

    def _direction(self, kind: str, grad: Tensor, state: list[Tensor], momentum: float) -> Tensor:
        if kind == "muon":
            return muon_direction(grad.float(), *state, momentum, self.dtype)
        betas = self.hp.adam_beta1, self.hp.adam_beta2
        corrections = (torch.tensor(1 - beta ** self.num_updates) for beta in betas)
        return self.adam_direction(grad, *state, *corrections, *betas, kind == "rows")

    def state_dict(self) -> dict:
        """The whole state on every rank, without padding, so that any number of ranks can load it. Collective."""
        buckets = []
        for bucket in self.buckets:
            buckets.append({})
            for name, mine in bucket.state.items():
                whole = bucket.gather(mine)
                bucket.wait()
                buckets[-1][name] = whole[:bucket.rows]
        return {"num_updates": self.num_updates, "buckets": buckets}

    @torch.no_grad()
    def load_state_dict(self, state: dict | None) -> None:
        """Take this rank's share of what any number of ranks' state_dict gave; None: as if never stepped."""
        self.num_updates = state["num_updates"] if state else 0
        for i, bucket in enumerate(self.buckets):
            for name, mine in bucket.state.items():
                mine.zero_()
                if state:
                    whole = state["buckets"][i][name]
                    if whole.shape != (bucket.rows, *mine.shape[1:]):
                        raise ValueError(f"the optimizer's {name} has another shape")
                    share = whole[bucket.mine]
                    mine[:len(share)].copy_(share)

# --- Attention: one definition of what is visible, two kernels --------------------------------------------------------

def document_start(tokens: Tensor, eot_token: int) -> Tensor:
    """Position where each token's document, or its sequence, begins: (S T,), for S sequences (S, T) end to end."""
    position = torch.arange(tokens.numel(), device=tokens.device)
    begins = tokens == eot_token
    begins[:, 0] = True
    return torch.where(begins.flatten(), position, 0).cummax(0).values

def first_visible_key(start: Tensor, window: Tensor) -> Tensor:
    """Position of the earliest key each query sees, (S T,): of its document and of its last `window` tokens.

    start: document_start's. window: 0-dim integer tensor, so that its growth compiles nothing again. So a query sees an
    interval that ends at itself, and its start never moves back from one query to the next.
    """
    return torch.maximum(start, torch.arange(len(start), device=start.device) - window + 1)

def visible(query: Tensor, key: Tensor, first_key: Tensor) -> Tensor:
    """THE mask: may the query at a position see the key at a position? first_key is the query's. Broadcasts; bool."""
    return (first_key <= key) & (key <= query)

def block_mask(first_key: Tensor, block: int = 128) -> BlockMask:
    """FlexAttention's mask from first_visible_key's (T,), T a multiple of block, without looking at T x T positions.

    Since first_key never decreases, the key blocks that a query block sees are an interval too: from the first key of
    its first query to its own block. Those that all of its queries see whole need no mask: from the first key of its
    last query (rounded up) to the block before its own.
    """
    query_block = torch.arange(len(first_key) // block, device=first_key.device)[:, None]
    key_block = query_block.T
    seen = (first_key[::block, None] // block <= key_block) & (key_block <= query_block)
    whole = ((first_key[block - 1::block, None] + block - 1) // block <= key_block) & (key_block < query_block)

    def ordered(dense):  # (blocks, blocks) bool -> how many, and which ones first, as (1, 1, ...) int32
        which = dense.int().argsort(dim=-1, descending=True, stable=True).int()
        return dense.sum(-1, dtype=torch.int32)[None, None], which[None, None].contiguous()

    return BlockMask.from_kv_blocks(*ordered(seen & ~whole), *ordered(whole), BLOCK_SIZE=block, mask_mod=lambda batch,
                                    head, query, key: visible(query, key, first_key[query]))

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

# --- Model ------------------------------------------------------------------------------------------------------------

def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a learned scale."""
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Module):
    """`parts` maps without bias, one float32 (parts, out, in), cast to the activations' precision at use.

    So small updates add up, one product computes all parts, and Muon orthogonalises each. zero: at the start.
    """
    def __init__(self, in_features: int, out_features: int, parts: int = 1, zero: bool = False):
        super().__init__()
        bound = 0.0 if zero else in_features ** -0.5
        self.weight = nn.Parameter(torch.empty(parts, out_features, in_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(0, 1).to(x.dtype))  # (..., parts * out)

def rotary_tables(T: int, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary position embedding (arXiv 2104.09864), each (T, head_dim / 2) float32."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(T, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other by the position's angles. x: (..., T, H, d)."""
    (a, b), cos, sin = x.float().chunk(2, dim=-1), cos[:, None], sin[:, None]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)

class NGramEmbed(nn.Module):
    """The sum of embeddings of the 2-, 3-, ... N-grams that end at each token, from hashed tables that begin at zero.

    What a word's pieces mean together is looked up at once, where the first layers would have to learn to put it
    together (hashed n-grams of bytes: arXiv 2412.09871). A row is shared by all n-grams with its hash. An n-gram that
    would reach back beyond the start of the document, or of the sequence, is cut there.
    """
    def __init__(self, longest: int, rows: int, model_dim: int, sparse: bool):
        super().__init__()
        self.rows = rows
        self.tables = nn.ModuleList(nn.Embedding(rows, model_dim, sparse=sparse) for _ in range(2, longest + 1))
        for table in self.tables:
            nn.init.zeros_(table.weight)

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        """tokens (T,), start: document_start's; (T, D)."""
        age, code, total = torch.arange(len(tokens), device=tokens.device) - start, tokens + 1, 0
        for back, table in enumerate(self.tables, 1):
            code = (code * 1_000_003 + torch.where(age >= back, tokens.roll(back) + 1, 0)) % 2**40
            total = total + table(code % self.rows)
        return total

class Attention(nn.Module):
    """Causal self-attention with QK-norm (arXiv 2010.04245), rotary, and value embeddings mixed into the values."""
    def __init__(self, model_dim: int, num_heads: int, max_window: int, has_value_embed: bool):
        super().__init__()
        self.num_heads, self.max_window = num_heads, max_window
        self.qkv = Linear(model_dim, model_dim, parts=3)
        self.value_mix = nn.Parameter(torch.tensor(0.5)) if has_value_embed else None
        self.proj = Linear(model_dim, model_dim, zero=True)

    def forward(self, x: Tensor, value_embed: Tensor | None, cos: Tensor, sin: Tensor, mask) -> Tensor:
        q, k, v = self.qkv(x).view(1, len(x), 3, self.num_heads, -1).unbind(2)  # (1, T, H, d) each
        if value_embed is not None:
            v = (1 - self.value_mix) * v + self.value_mix * value_embed.view_as(v)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        y = attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, self.max_window)  # (1, H, T, d)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

class MLP(nn.Module):
    """Width 4 D, ReLU squared (arXiv 2109.08668)."""
    def __init__(self, model_dim: int):
        super().__init__()
        self.fc = Linear(model_dim, 4 * model_dim)
        self.proj = Linear(4 * model_dim, model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())

class Block(nn.Module):
    """One layer: mix the normed embedding x0 back in (record 2024-12-04), then attention and MLP on a residual path."""
    def __init__(self, model_dim: int, num_heads: int, max_window: int, has_value_embed: bool):
        super().__init__()
        self.attention = Attention(model_dim, num_heads, max_window, has_value_embed)
        self.mlp = MLP(model_dim)
        self.x0_mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, value_embed: Tensor | None, x0: Tensor, cos: Tensor, sin: Tensor, mask) -> Tensor:
        x = self.x0_mix[0] * x + self.x0_mix[1] * x0
        x = x + self.attention(norm(x), value_embed, cos, sin, mask)
        return x + self.mlp(norm(x))

class Head(nn.Module):
    """Untied output matrix, zero at the start: the first loss is ln V. Logits are softcapped (arXiv 2408.00118)."""
    def __init__(self, model_dim: int, vocab_size: int, logit_cap: float):
        super().__init__()
        self.logit_cap, self.linear = logit_cap, Linear(model_dim, vocab_size, zero=True)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Float32 logits (T, V), or with targets (T,) their mean cross-entropy in nats."""
        logits = self.logit_cap * torch.tanh(self.linear(norm(x)).float() / self.logit_cap)
        return logits if targets is None else F.cross_entropy(logits, targets)

class GPT(nn.Module):
    """The model, for up to max_length tokens at a time: sequences of any number of documents.

    Topology is data: value_table names the value embedding of each layer (None: it has none), and layer L - 1 - i takes
    in the output of layer i with a learned weight (U-net skips). flex: FlexAttention instead of the chunked path;
    sparse: gradients of the n-gram tables. The vocabulary is padded to a multiple of 128, never a target.
    """
    def __init__(self, vocab_size: int, eot_token: int, num_layers: int, num_heads: int, model_dim: int,
                 max_length: int, max_window: int, value_layers: int = 1, ngrams: int = 3, ngram_rows: int = 1021,
                 logit_cap: float = 30.0, flex: bool = False, sparse: bool = False):
        super().__init__()
        self.eot_token, self.flex = eot_token, flex
        padded_vocab_size = 128 * math.ceil(vocab_size / 128)
        self.embed = nn.Embedding(padded_vocab_size, model_dim)
        self.ngram = NGramEmbed(ngrams, ngram_rows, model_dim, sparse) if ngrams > 1 else None
        ends = min(value_layers, num_layers // 2)
        self.value_table = [*range(ends), *[None] * (num_layers - 2 * ends), *range(ends)]
        self.value_embed = nn.Embedding(padded_vocab_size, ends * model_dim) if ends else None
        self.blocks = nn.ModuleList(Block(model_dim, num_heads, max_window, table is not None)
                                    for table in self.value_table)
        self.skip_weights = nn.Parameter(torch.ones(num_layers // 2))
        self.head = Head(model_dim, padded_vocab_size, logit_cap)
        for name, table in zip(("cos", "sin"), rotary_tables(max_length, model_dim // num_heads), strict=True):
            self.register_buffer(f"rotary_{name}", table, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None, window: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (S, T) after tokens (S, T), or without targets float32 logits (S T, V).

        S sequences are computed as one of S T tokens. window: 0-dim tensor, tokens a query sees, at most max_window.
        """
        start = document_start(tokens, self.eot_token)
        first_key = first_visible_key(start, window)
        mask = block_mask(first_key) if self.flex else first_key
        tokens = tokens.flatten()
        cos, sin = self.rotary_cos[:len(tokens)], self.rotary_sin[:len(tokens)]
        x = self.embed(tokens)
        x0 = norm(x if self.ngram is None else x + self.ngram(tokens, start))
        x = x0.view_as(x0)  # were it x0 itself, the first block would be compiled apart from the others
        value_embeds = () if self.value_embed is None else self.value_embed(tokens).split(x.size(-1), dim=-1)
        outputs = []
        for layer, (block, table) in enumerate(zip(self.blocks, self.value_table, strict=True)):
            source = len(self.blocks) - 1 - layer
            if source < layer:
                x = x + self.skip_weights[source] * outputs[source]
            x = block(x, None if table is None else value_embeds[table], x0, cos, sin, mask)
            outputs.append(x)
        return self.head(x, None if targets is None else targets.flatten())

def build_model(hp: Hyperparameters, device: torch.device, dtype: torch.dtype, flex: bool, sparse: bool = False) -> GPT:
    """The model of hp: embeddings in the activations' precision, everything else in float32."""
    track = TRACKS[hp.track]
    torch.manual_seed(hp.seed)
    with device:
        model = GPT(track.vocab_size, track.eot_token, hp.num_layers, hp.num_heads, hp.model_dim, hp.forward_tokens,
                    min(window_size(hp.num_steps, hp), hp.forward_tokens), hp.value_layers, hp.ngrams, hp.ngram_rows,
                    hp.logit_cap, flex, sparse)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.to(dtype)
    return model

# --- Data -------------------------------------------------------------------------------------------------------------

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
    for what, got, wanted in (("magic number", magic, SHARD_MAGIC), ("version", version, SHARD_VERSION),
                              ("number of tokens", count, max(count, 0)),
                              ("size in bytes", size, header_bytes + 2 * max(count, 0))):
        if got != wanted:
            raise UserError(f"{path} is no whole shard: its {what} is {got}, expected {wanted}; {advice}")
    return np.memmap(path, "<u2", "r", header_bytes, (count,)) if count else np.zeros(0, "<u2")

class TokenStream:
    """All shards that match a pattern, in the order of their names, as one stream of tokens that never ends."""
    def __init__(self, pattern: str, vocab_size: int, minimum: int, get_data: str):
        """pattern: a glob below the repository. Raises UserError on a bad shard or fewer tokens than minimum."""
        self.vocab_size, self.get_data, self.paths = vocab_size, get_data, sorted(glob.glob(str(ROOT / pattern)))
        self.shards = [open_shard(path, f"delete it and run: {get_data}") for path in self.paths]
        self.ends = np.cumsum([0, *map(len, self.shards)])  # [0], then where each shard ends
        if not self.paths or len(self) < minimum:
            raise UserError(f"{ROOT / pattern} holds {len(self):,} tokens in {len(self.paths)} shards, expected at "
                            f"least {minimum:,}; run: {get_data}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count of the endless stream, (count,) int64. Raises UserError on an impossible id."""
        parts = []
        while count > 0:
            shard = int(np.searchsorted(self.ends, start % len(self), side="right")) - 1
            part = self.shards[shard][start % len(self) - int(self.ends[shard]):][:count]
            if part.max() >= self.vocab_size:
                raise RankError(f"{self.paths[shard]} holds the token id {part.max()}, expected ids below "
                                f"{self.vocab_size}: another tokenizer's data; run: {self.get_data}")
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
    rank r takes those that are r modulo W. So the position is the step, and a resumed run can't read wrong tokens.
    """
    def __init__(self, stream: TokenStream, hp: Hyperparameters, runtime: "Runtime", step: int = 0):
        self.stream, self.hp, self.runtime, self.step, self.pool = stream, hp, runtime, step, ThreadPoolExecutor(1)
        num_sequences = (len(stream) - 1) // hp.sequence_length
        self.order = np.random.RandomState(0).permutation(num_sequences) if TRACKS[hp.track].shuffled else None
        share = hp.batch_size // runtime.world_size
        self.micro_batch = max(m for m in range(1, min(hp.micro_batch, share) + 1) if share % m == 0)
        self.future = self.pool.submit(self._read, step)

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
        """The micro-batches of the next step, [(tokens (S, T), targets (S, T)), ...] on the device."""
        batch, self.step, device = self.future.result(), self.step + 1, self.runtime.device
        self.future = self.pool.submit(self._read, self.step)
        return [(a.to(device, non_blocking=True), b.to(device, non_blocking=True)) for a, b in batch]

# --- Runtime: ranks, device, precision, signals -----------------------------------------------------------------------

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
    """Join the other ranks, if torchrun (or Slurm with the same variables) started several. Raises UserError."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    check_hyperparameters(hp, world_size)
    if hp.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; use --device cpu, or mend the driver (nvidia-smi)")
    use_cuda = hp.device != "cpu" and torch.cuda.is_available()
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise RankError(f"process {local_rank} of this node has no GPU of its own: there are "
                        f"{torch.cuda.device_count()}; start so many processes (NPROC, --nproc_per_node)")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo", device_id=device if use_cuda else None)
    return Runtime(rank, world_size, device)

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
    """Whether torch.compile saves more than it costs: with Triton always, on a CPU from 500,000 tokens on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 0)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and hp.num_steps * hp.step_tokens >= 500_000

class Watch:
    """What the ranks must agree on after each step: is a number of one of them not finite, shall the run end?

    On a GPU a step's answer is read two steps later, when it has long arrived, so that no step waits for it.
    """
    def __init__(self, runtime: Runtime):
        self.runtime, self.pending, self.checkpoint = runtime, [], ""
        self.signal, self.signalled_at, self.agreed = 0, 0.0, 0  # what this rank was sent; what all ranks heed

    def on_signal(self, number: int, frame=None) -> None:
        """For SIGINT and SIGTERM: end the run after this step; a second one leaves at once."""
        if not self.signal:
            self.signal, self.signalled_at = number, time.monotonic()
            if self.runtime.rank == 0:
                print(f"{signal.Signals(number).name}: the run ends after this step, with a checkpoint; a second one "
                      "ends it at once", file=sys.stderr, flush=True)
        elif time.monotonic() - self.signalled_at > 1.0:  # sooner it is the first, passed on by torchrun
            os._exit(128 + number)

    def post(self, step: int, value: Tensor) -> None:
        """After a step; value: 0-dim, not finite where something in this rank's step was not. Collective."""
        marks = torch.zeros(2, device=self.runtime.device)  # 1 + the rank that is not finite, or 0; then the signal
        marks[0] = ~value.isfinite() * (self.runtime.rank + 1)
        marks[1] = self.signal
        if self.runtime.world_size > 1:
            dist.all_reduce(marks, op=dist.ReduceOp.MAX)
        event = torch.cuda.Event() if self.runtime.cuda else None
        if event:
            marks = torch.empty(2, pin_memory=True).copy_(marks, non_blocking=True)
            event.record()
        self.pending.append((step, marks, event))

    def read(self, everything: bool = False) -> int:
        """The signal that all ranks shall heed now, or 0. Raises UserError where a step's numbers were not finite."""
        while len(self.pending) > (2 if self.runtime.cuda and not everything else 0):
            step, marks, event = self.pending.pop(0)
            if event:
                event.synchronize()
            bad, number = map(int, marks.tolist())
            if bad:
                raise UserError(f"the loss or a gradient is not finite at step {step} on rank {bad - 1}; lower the "
                                f"learning rates; last checkpoint: {self.checkpoint or 'none'}")
            self.agreed = max(self.agreed, number)
        return self.agreed

# --- Log --------------------------------------------------------------------------------------------------------------

SEPARATOR = "=" * 100
NOT_KEPT = 3  # exit code of a run that is whole, but for its log or a checkpoint, which could not be written
PEAK_FLOPS = {  # dense bfloat16 FLOP/s of the makers' data sheets, by what the device's name holds; first match counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}

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
    """The log's second section: versions, one JSON object of everything a reader must know, nvidia-smi's table."""
    name, cuda = device_name(runtime.device), runtime.device.type == "cuda"
    told = {
        "command": sys.argv, "hyperparameters": dataclasses.asdict(hp), **facts,
        "git_commit": _output_of("git", "rev-parse", "HEAD") or None,
        "git_dirty": bool(_output_of("git", "status", "--porcelain")),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "device": name, "device_count": runtime.world_size if cuda else os.cpu_count(),
        "threads": torch.get_num_threads(), "world_size": runtime.world_size, "platform": platform.platform(),
    }
    return "\n".join([f"Running Python {' '.join(sys.version.split())}",
                      f"Running PyTorch {torch.__version__} on {name} with world_size {runtime.world_size}",
                      json.dumps(told, indent=1), *([_output_of("nvidia-smi")] if cuda else [])])

def log_folder(hp: Hyperparameters) -> Path:
    """Where logs and checkpoints go."""
    return ROOT / "records" / (hp.entry or "scratch")

class Log:
    """The log file and the console of rank 0; the other ranks write nothing.

    The file is the script's source, SEPARATOR, the environment, SEPARATOR, then a line each time something is said.
    """
    def __init__(self, hp: Hyperparameters, runtime: Runtime, facts: dict):
        """Raises UserError where the log can't be written, before any work is done."""
        self.path, self.file, self.failed = log_folder(hp) / f"{facts['run_id']}.txt", None, False
        if runtime.rank:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)  # nothing is left to write where a write has failed
        except OSError as error:
            raise UserError(f"can't write the log {self.path}: {error.strerror}; make it a folder that can be "
                            "written, or name another with --entry") from None
        if not self.file.tell():
            self.write(Path(__file__).read_text("utf-8"), SEPARATOR, environment(hp, runtime, facts), SEPARATOR)
        elif not self.path.read_bytes().endswith(b"\n"):  # a resumed run goes on in its own log, which may be cut
            self.write("")

    def write(self, *lines: str) -> None:
        """Into the file alone. What can't be written does not end the run."""
        if self.file:
            try:
                self.file.write("".join(line.removesuffix("\n") + "\n" for line in lines).encode())
            except OSError as error:
                self.fail(f"can't write the log {self.path}: {error.strerror}")

    def fail(self, message: str) -> None:
        """Say on stderr, once a run, that something could not be kept; the exit code will tell, too."""
        if not self.failed:
            print(f"warning: {message}; the run goes on, its exit code will be {NOT_KEPT}", file=sys.stderr, flush=True)
        self.failed = True

    def say(self, *lines: str) -> None:
        """Into the file and onto the console."""
        self.write(*lines)
        if self.file:
            print(*lines, sep="\n", flush=True)

    def begin(self, name: str) -> None:
        """Say on the console alone that something silent goes on; on a terminal the next line covers it."""
        if self.file:
            print(f"{name} ...", end="\r" if sys.stdout.isatty() else "\n", flush=True)

# --- Checkpoints ------------------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """Where the loop is: part of each checkpoint, and of the line that says how a run failed."""
    step: int = 0
    train_time_ms: float = 0.0
    reached: str = ""  # the first validation that met the target
    validated: int = -1  # the last step at which a validation was made

def save_checkpoint(path: Path, run: dict, model: GPT, optimizer: Optimizer, runtime: Runtime, keep: int) -> None:
    """Write all that the rest of the run depends on, atomically; then delete all of the run's but the last keep ones.

    run: progress, run_id, hyperparameters, code_hash and data_fingerprint, which load_checkpoint compares. The loader's
    position is the step. Collective; rank 0 writes, and raises UserError where it can't: then all older ones stay.
    """
    state = {**run, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    if runtime.rank:
        return
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise RankError(f"can't write the checkpoint {path}: {first_line(error)}; free disk space") from None
    for old in sorted(path.parent.glob(f"{run['run_id']}_step*.pt"))[:-keep]:
        old.unlink(missing_ok=True)

def find_checkpoint(hp: Hyperparameters) -> str:
    """The file that --resume names; empty for none."""
    if hp.resume != "latest":
        return hp.resume
    found = [path for path in log_folder(hp).glob("*_step*.pt") if path.is_file()]
    return str(max(found, key=lambda path: path.stat().st_mtime, default=""))

def load_checkpoint(path: str, hp: Hyperparameters, facts: dict) -> dict:
    """What save_checkpoint wrote, on the CPU. Raises UserError unless it belongs to this script, data and command."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # data alone: a file can't run code
        then = {**state["hyperparameters"], **{name: state[name] for name in ("code_hash", "data_fingerprint")}}
        if not {"progress", "model", "optimizer", "random"} <= state.keys():
            raise ValueError("it is no checkpoint")
        if state["run_id"] != Path(state["run_id"]).name or state["activations"] not in ("bfloat16", "float32"):
            raise ValueError(f"its run_id is {state['run_id']}, its activations are {state['activations']}")
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise UserError(f"can't resume from {path}: {first_line(error)}; expected a file that --save_every "
                        "wrote") from None
    now = {**dataclasses.asdict(hp), **facts}
    if hp.dtype not in ("auto", state["activations"]):
        raise UserError(f"can't resume from {path}: its activations are {state['activations']}; use --dtype auto")
    for name in sorted(dataclasses.asdict(hp).keys() - MAY_CHANGE | {"code_hash", "data_fingerprint"}):
        if repr(then.get(name)) != repr(now[name]) and not hp.resume_anyway:  # a tensor could not be compared
            raise UserError(f"can't resume from {path}: its {name} is {then.get(name)}, this run's is {now[name]}; use "
                            "the script, the data and the flags of the first run, or --resume_anyway")
    return state

def restore(path: str, state: dict, model: GPT, optimizer: Optimizer, hp: Hyperparameters) -> Progress:
    """Put load_checkpoint's state into model, optimizer and random numbers. Raises UserError where it does not fit."""
    try:
        shapes, saved = ({name: t.shape for name, t in tensors.items()}
                         for tensors in (model.state_dict(), state["model"]))
        if shapes != saved:
            raise ValueError("its model has another shape")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        progress = Progress(**state["progress"])
        if not (0 <= int(progress.step) <= hp.num_steps and int(progress.validated) <= progress.step
                and progress.step == optimizer.num_updates and progress.train_time_ms >= 0
                and isinstance(progress.reached, str)):
            raise ValueError(f"it stands at step {progress.step}, updated {optimizer.num_updates} times")
    except Exception as error:  # torch raises what the values lead it to
        raise UserError(f"can't resume from {path}: {first_line(error)}; expected a whole checkpoint of this "
                        "model") from None
    return progress

# --- Training ---------------------------------------------------------------------------------------------------------

def compile_parts(model: GPT, optimizer: Optimizer, device: torch.device) -> None:
    """torch.compile each block and the head by itself: one compilation serves all blocks of a kind."""
    for part in [*model.blocks, model.head]:
        part.compile(dynamic=False)
    if device.type == "cuda":  # fuses Adam's ten passes over the embedding tables; the CPU's tables are small
        optimizer.adam_direction = torch.compile(adam_direction, dynamic=False)

def training_step(model: GPT, optimizer: Optimizer, batch: list[tuple[Tensor, Tensor]], step: int,
                  hp: Hyperparameters) -> Tensor:
    """One update by the gradient of the loss over all ranks' micro-batches. Returns this rank's mean loss, 0-dim."""
    mean_loss = torch.zeros((), device=batch[0][0].device)
    for tokens, targets in batch:
        loss = model(tokens, targets, torch.full_like(mean_loss, window_size(step, hp), dtype=torch.int64)) / len(batch)
        loss.backward()
        mean_loss += loss.detach()
    optimizer.step(lr_scale(step, hp), muon_momentum(step, hp))
    return mean_loss

@torch.no_grad()
def validate(model: GPT, stream: TokenStream, step: int, hp: Hyperparameters, runtime: Runtime) -> float:
    """Mean cross-entropy in nats over the track's validation tokens, the sequences dealt to the ranks. Collective."""
    num_sequences = TRACKS[hp.track].val_tokens // hp.forward_tokens
    window = torch.full((), window_size(step, hp), device=runtime.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for index in range(runtime.rank, num_sequences, runtime.world_size):
        loss_sum += model(*(t[None].to(runtime.device) for t in stream.sequence(index, hp.forward_tokens)), window)
    return runtime.mean(loss_sum) * runtime.world_size / num_sequences

def warm_up(model: GPT, optimizer: Optimizer, stream: TokenStream, hp: Hyperparameters, runtime: Runtime) -> None:
    """Compile and load every kernel on random tokens, then put model, optimizer and random state back as they were."""
    random_state, before = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    like = BatchLoader(stream, hp, runtime)  # for the shapes
    batch = [tuple(torch.randint_like(t, TRACKS[hp.track].vocab_size) for t in pair) for pair in like.next()]
    like.pool.shutdown(cancel_futures=True)
    text = torch.randint(TRACKS[hp.track].vocab_size, (1, hp.forward_tokens), device=runtime.device)
    for step in (0, hp.num_steps // 2):
        with torch.no_grad():
            model(text, text, torch.full((), window_size(step, hp), device=runtime.device))
        training_step(model, optimizer, batch, step, hp)
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(None)
    torch.set_rng_state(random_state)
    if runtime.cuda:  # the copies above are no part of what training needs
        torch.cuda.reset_peak_memory_stats()

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
    window = torch.full((), window_size(hp.num_steps, hp), device=device)
    flex, model.flex = model.flex, False  # so short a text needs no kernel of its own
    with torch.compiler.set_stance("force_eager"):
        for i in range(min(hp.sample_tokens, hp.forward_tokens)):
            logits = model(tokens[None, :hp.forward_tokens], None, window)[i, :track.eot_token]
            tokens[i + 1] = torch.multinomial((logits.cpu() / 0.8).softmax(-1), 1, generator=generator)
    model.flex = flex
    return decode(tokens[1:i + 2].tolist())

def metric_line(step: int, hp: Hyperparameters, name: str, value: float, train_time_ms: float) -> str:
    """One line of the public log format, e.g. step:125/1530 val_loss:4.1234 train_time:21345ms step_avg:170.76ms."""
    return (f"step:{step}/{hp.num_steps} {name}:{value:.4f} train_time:{train_time_ms:.0f}ms "
            f"step_avg:{train_time_ms / max(step, 1):.2f}ms")

class Run:
    """One run on this rank. Raises UserError for what the user can mend, before any work is done where that can be."""
    def __init__(self, hp: Hyperparameters, runtime: Runtime):
        track, self.hp, self.runtime, self.progress = TRACKS[hp.track], hp, runtime, Progress()
        self.train_stream = TokenStream(track.train_files, track.vocab_size, hp.step_tokens + 1, track.get_data)
        self.val_stream = TokenStream(track.val_files, track.vocab_size, track.val_tokens + 1, track.get_data)
        self.facts = facts = runtime.agree(self.describe())
        self.checkpoint = runtime.agree(find_checkpoint(hp))
        self.resumed = load_checkpoint(self.checkpoint, hp, facts) if self.checkpoint else {}
        # A run goes on in its log, and in its precision: a busy machine may measure, and choose, another.
        facts |= {name: self.resumed[name] for name in ("run_id", "activations") if self.resumed}
        dtype, cuda = getattr(torch, facts["activations"]), runtime.cuda
        self.model = build_model(hp, runtime.device, dtype, flex=facts["compiled"] and cuda,
                                 sparse=not cuda and runtime.world_size == 1)
        self.optimizer = Optimizer(self.model, hp, dtype, runtime.rank, runtime.world_size)
        self.watch, self.log = Watch(runtime), Log(hp, runtime, facts)

    def describe(self) -> dict:
        """What the log tells beyond the hyperparameters: target, run_id, choices made, hashes."""
        hp, track, device = self.hp, TRACKS[self.hp.track], self.runtime.device
        dtype = str(fast_dtype(device)).removeprefix("torch.") if hp.dtype == "auto" else hp.dtype
        return {"target": track.target, "run_id": f"{hp.track}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
                "activations": dtype,
                "compiled": compile_pays(hp, device) if hp.compile == "auto" else hp.compile == "on",
                "code_hash": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
                "data_fingerprint": f"{self.val_stream.fingerprint(track.val_tokens + 1)}-"
                                    f"{self.train_stream.fingerprint(2**26)}"}

    def save(self) -> None:
        """Write a checkpoint beside the log. Collective. A failure is said, and does not end the run."""
        start = time.perf_counter()
        path = self.log.path.with_name(f"{self.facts['run_id']}_step{self.progress.step:06d}.pt")
        progress, hyperparameters = map(dataclasses.asdict, (self.progress, self.hp))
        run = {"progress": progress, "hyperparameters": hyperparameters, **self.facts}
        try:
            save_checkpoint(path, run, self.model, self.optimizer, self.runtime, self.hp.keep)
        except UserError as error:
            return self.log.fail(str(error))
        self.watch.checkpoint = path
        self.log.say(f"checkpoint {path} in {time.perf_counter() - start:.2f} s (not training time)")

    def prepare(self) -> None:
        """Compile, warm up, restore: all that comes before the clock starts."""
        hp, log, compiled = self.hp, self.log, self.facts["compiled"]
        log.say(f"track {hp.track}, {sum(p.numel() for p in self.model.parameters()):,} parameters, "
                f"{self.facts['activations']}, {self.runtime.world_size} x {device_name(self.runtime.device)}, "
                f"log {log.path}")
        if compiled:
            compile_parts(self.model, self.optimizer, self.runtime.device)
        log.begin("compiling, about a minute the first time" if compiled else "warming up")
        start = time.perf_counter()
        warm_up(self.model, self.optimizer, self.train_stream, hp, self.runtime)
        log.say(f"{'compiled' if compiled else 'warmed up'} in {time.perf_counter() - start:.1f} s (not training time)")
        if self.resumed:
            self.progress = restore(self.checkpoint, self.resumed, self.model, self.optimizer, hp)
            self.watch.checkpoint = self.checkpoint
            log.say(f"resumed from {self.checkpoint} at step {self.progress.step}")
            self.resumed = {}  # twice the model's size, on every rank
        elif hp.resume:
            log.say(f"no checkpoint in {log.path.parent}: the run begins at step 0")

    def loop(self, trace) -> int:
        """Steps progress.step to num_steps, or until a signal, which is returned.

        Validation and checkpoints are not timed.
        """
        hp, progress, log, track = self.hp, self.progress, self.log, TRACKS[self.hp.track]
        loader, first_step = BatchLoader(self.train_stream, hp, self.runtime, progress.step), progress.step
        steps_an_epoch = len(self.train_stream) / hp.step_tokens
        before, started = progress.train_time_ms, self.runtime.seconds()  # ms until here; s, when the clock started
        for step in range(first_step, hp.num_steps + 1):
            progress.step, last, stop = step, step == hp.num_steps, self.watch.read()
            val_due = not stop and progress.validated < step and (last or (hp.val_every and step % hp.val_every == 0))
            save_due = stop or (hp.save_every and step % hp.save_every == 0 and step > first_step)
            if val_due or save_due:
                progress.train_time_ms = before = before + 1000 * (self.runtime.seconds() - started)
                self.watch.read(everything=True)  # what is not finite must not be saved
                if val_due:
                    log.begin(f"validating on {track.val_tokens:,} tokens")
                    val_loss = validate(self.model, self.val_stream, step, hp, self.runtime)
                    log.say(line := metric_line(step, hp, "val_loss", val_loss, before))
                    progress.reached = progress.reached or (line if val_loss <= track.target else "")
                    progress.validated = step
                if save_due:
                    self.save()
                started = self.runtime.seconds()
            if last or stop:
                break
            loss = training_step(self.model, self.optimizer, loader.next(), step, hp)
            self.watch.post(step, loss + self.optimizer.gradient_sum)
            if hp.log_every and (step + 1) % hp.log_every == 0:
                mean = self.runtime.mean(loss)  # waits for the device, so that the time below is this step's
                log.say(metric_line(step + 1, hp, "train_loss", mean, before + 1000 * (time.perf_counter() - started)))
            if step < steps_an_epoch <= step + 1:
                log.say(f"all {len(self.train_stream):,} training tokens are read; the next step begins them again "
                        "(epoch 2)")
            if trace:
                trace.step()
        loader.pool.shutdown(cancel_futures=True)
        return stop

    def report(self) -> None:
        """The last lines of a log: target, speed, memory, a sample."""
        hp, log, runtime, progress = self.hp, self.log, self.runtime, self.progress
        result = f"reached at {progress.reached}" if progress.reached else "missed"
        log.say(f"target {TRACKS[hp.track].target}: {result}")
        per_second = 1000 * hp.num_steps * hp.step_tokens / max(progress.train_time_ms, 1e-3)
        # Forward and backward: 6 FLOPs a weight and token, 12 D a layer and visible key; looking up embeddings is free.
        weights = sum(p.numel() for name, p in self.model.named_parameters() if name.endswith("weight") and p.ndim == 3)
        flops = 6 * weights + 12 * hp.num_layers * hp.model_dim * (hp.window_start + hp.window_end) / 2
        mfu, peak = "", next((p for part, p in PEAK_FLOPS.items() if part in device_name(runtime.device)), None)
        if runtime.cuda:
            memory = torch.cuda.max_memory_allocated(runtime.device)
            mfu = f" mfu:{flops * per_second / peak / runtime.world_size:.1%}" if peak else ""
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        log.say(f"tokens_per_second:{per_second:.0f} peak_memory_per_rank:{memory / 2**20:.0f}MiB{mfu}")
        if hp.sample_tokens and runtime.rank == 0:
            try:
                log.begin("writing a sample")
                text = write_sample(self.model, hp, runtime.device)
            except Exception as error:  # the result stands: no missing vocabulary may spoil it
                text = f"none: {type(error).__name__}: {first_line(error)}"
            log.say("sample:", *("| " + line for line in text.split("\n")))

    def train(self) -> int:
        """The whole run; returns the exit code."""
        log = self.log
        handlers = {number: signal.signal(number, self.watch.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        trace = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
            on_trace_ready=lambda trace: trace.export_chrome_trace(str(log.path.with_suffix(".trace.json"))))
        try:
            self.prepare()
            with trace if self.hp.profile and self.runtime.rank == 0 else nullcontext() as trace:
                stop = self.loop(trace)
            if stop:
                log.say(f"run ended by {signal.Signals(stop).name} at step {self.progress.step}; go on with: --resume "
                        f"{self.watch.checkpoint or 'latest'}")
                return 128 + stop
            self.report()
            return NOT_KEPT if log.failed else 0
        except BaseException as error:
            log.write(f"run failed at step {self.progress.step}: {type(error).__name__}: {error}".rstrip(": "))
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

# --- Main -------------------------------------------------------------------------------------------------------------

def run(argv: list[str] | None = None) -> int:
    """Parse, join the other ranks, train, leave them; returns the exit code. Raises UserError."""
    # Compiled kernels outlive the run here, so that the next one starts at once; /tmp would lose them.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
    hp = parse_arguments(argv)
    runtime = start_runtime(hp)
    try:
        code = Run(hp, runtime).train()
    except (RuntimeError, MemoryError) as error:
        if runtime.world_size > 1 and ("Connection" in str(error) or isinstance(error, dist.DistBackendError)):
            raise RankError(f"rank {runtime.rank} has lost another rank, which ended first; go on with --resume latest "
                            f"({first_line(error)[-120:]})") from None
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        less = (f"--micro_batch {hp.micro_batch // 2}" if hp.micro_batch > 1 else f"--sequence_length "
                f"{hp.sequence_length // 2} --batch_size {2 * hp.batch_size} (the same tokens a step)")
        raise RankError(f"out of memory on {device_name(runtime.device)} with {hp.forward_tokens} tokens at once; use "
                        f"{less}, or a smaller --model_dim") from None
    if dist.is_initialized():
        dist.destroy_process_group()
    return code

def run_as_program(function, *args) -> int:
    """function(*args) as a command: its int result or 0; 2 after a UserError, 130 after Ctrl-C, each said in a line."""
    try:
        return function(*args) or 0
    except UserError as error:
        if isinstance(error, RankError) or os.environ.get("RANK", "0") == "0":
            print("error:", " ".join(str(error).split("\n")), file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # torchrun ends all ranks when the first one fails: let rank 0 speak before
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130

def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_as_program(run, argv)

if __name__ == "__main__":
    sys.exit(main())
