"""Is an edited script still a fair entry: a probability model of the next token, judged on the track's own tokens?

    python -m tests.fair_play my_idea.py      # under a minute on a CPU; exit code 0, or 1 with what is wrong

It imports the script and asks its own functions (build_model, GPT.forward, Schedule, validate, warm_up, TRACKS), so
an entry that renames them changes this file with it. It trains nothing and needs no data.
"""
import argparse
import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import train_gpt as reference

CPU = torch.device("cpu")
FLAGS = ("--track=laptop --device=cpu --dtype=float32 --compile=off --num_steps=6 --batch_size=2 --micro_batch=2 "
         "--sequence_length=256 --num_layers=4 --num_heads=2 --model_dim=32 --ngram_rows=1021").split()
TOLERANCE = 1e-4  # nats; the same mathematics in another order


class RandomStream:
    """In place of the files: random documents; keeps what was read."""

    def __init__(self, length: int):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(256, (length,), generator=generator)
        self.tokens[::150] = 256  # documents begin here
        self.read_targets: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def sequence(self, index: int, length: int):
        """As TokenStream.sequence."""
        start = index * length
        self.read_targets.append((start + 1, start + length + 1))
        return self.tokens[start:start + length], self.tokens[start + 1:start + length + 1]


def load(path: str):
    """The script as a module. Raises reference.UserError where it can't be imported."""
    try:
        spec = importlib.util.spec_from_file_location("candidate", path)
        module = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise reference.UserError(f"can't import {path}: {type(error).__name__}: {error}") from None
    return module


def build(module):
    """(hyperparameters, a small model with weights away from zero)."""
    hp = module.parse_arguments(FLAGS)
    model = module.build_model(hp, CPU, torch.float32, flex=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator) / math.sqrt(max(p.shape[-1:] or [1])))
    return hp, model


def logits_of(module, model, tokens, step=6):
    """Float32 (T, V) of one sequence (T,), as the script computes them at a step; at 6 the run ends."""
    with torch.no_grad():
        return model(tokens[None], None, module.Schedule(step, module.parse_arguments(FLAGS), CPU)).float()


def no_later_token(module) -> str:
    """No logit depends on later tokens."""
    _, model = build(module)
    tokens = RandomStream(256).tokens
    before = logits_of(module, model, tokens)
    for position in (1, 77, 128, 255):
        changed = tokens.clone()
        changed[position] = (changed[position] + 1) % 256
        if (logits_of(module, model, changed) - before)[:position].abs().max() > TOLERANCE:
            return f"a change of token {position} changes logits before it"
    if (logits_of(module, model, changed) - before)[255].abs().max() < TOLERANCE:
        return "the logits do not depend on the token just read"
    return ""


def no_other_document(module) -> str:
    """No logit depends on another document."""
    _, model = build(module)
    tokens = RandomStream(256).tokens
    before = logits_of(module, model, tokens)
    changed = tokens.clone()
    changed[140:150] = (changed[140:150] + 1) % 256  # the document that begins at 150 follows
    if (logits_of(module, model, changed) - before)[150:].abs().max() > TOLERANCE:
        return "a change in one document changes logits in the next"
    return ""


def loss_is_the_mean_surprise(module) -> str:
    """The reported loss is the mean of -ln p(next token), with one distribution over the vocabulary for each token."""
    _, model = build(module)
    stream = RandomStream(513)
    tokens, targets = stream.tokens[:-1], stream.tokens[1:]
    logits = logits_of(module, model, tokens)
    if logits.size(0) != 512 or logits.size(1) < 257:
        return f"logits of shape {tuple(logits.shape)} for 512 tokens of a vocabulary of 257"
    schedule = module.Schedule(6, module.parse_arguments(FLAGS), CPU)
    with torch.no_grad():
        told = model(tokens[None], targets[None], schedule).item()
        permuted = model(tokens[None], targets.flip(0)[None], schedule).item()
    for name, loss, of in (("", told, targets), (" of other targets", permuted, targets.flip(0))):
        surprise = F.cross_entropy(logits, of, reduction="none").double()
        if abs(surprise.sum().item() / 512 - loss) > TOLERANCE:
            return f"the loss{name} is {loss:.5f}, the mean of -ln p(target) is {surprise.mean():.5f}"
    return ""


def validation_is_the_tracks(module) -> str:
    """Every validation reads the track's tokens, each once, and reports their mean loss."""
    for name, track in reference.TRACKS.items():
        for field in dataclasses.fields(track):
            if field.name != "get_data" and getattr(module.TRACKS[name], field.name) != getattr(track, field.name):
                return (f"track {name} has {field.name} {getattr(module.TRACKS[name], field.name)}, not "
                        f"{getattr(track, field.name)}")
    hp, model = build(module)
    track, stream = module.TRACKS["laptop"], RandomStream(4097)
    module.TRACKS["laptop"] = dataclasses.replace(track, val_tokens=4096)
    try:
        told = module.validate(model, stream, 3, hp, module.Runtime(0, 1, CPU))
    finally:
        module.TRACKS["laptop"] = track
    position = 1
    for start, end in sorted(stream.read_targets):
        if start != position:
            return f"validation reads target {start} after {position - 1}"
        position = end
    if position != 4097:
        return f"validation ends at target {position - 1} of 4096"
    logits = lambda a, b: logits_of(module, model, stream.tokens[a - 1:b - 1], 3)
    sums = [F.cross_entropy(logits(a, b), stream.tokens[a:b], reduction="sum")
            for a, b in stream.read_targets]
    if abs(sum(sums).item() / 4096 - told) > TOLERANCE:
        return f"validation reports {told:.5f}, the mean of -ln p(target) is {sum(sums) / 4096:.5f}"
    return ""


def warm_up_leaks_nothing(module) -> str:
    """The warm-up of the kernels leaves weights, optimizer and random state, and reads no text into the model."""
    hp, model = build(module)
    optimizer = module.Optimizer(model, hp, torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, random_state = optimizer.state_dict(), torch.get_rng_state()
    module.warm_up(model, optimizer, RandomStream(4097), hp, module.Runtime(0, 1, CPU))
    for name, value in model.state_dict().items():
        if not torch.equal(value, weights[name]):
            return f"it changes {name}"
    after = optimizer.state_dict()
    pairs = zip(state["buckets"], after["buckets"], strict=True)
    if after["num_updates"] != state["num_updates"] or any(not torch.equal(a[n], b[n]) for a, b in pairs for n in a):
        return "it changes the optimizer's state"
    return "" if torch.equal(torch.get_rng_state(), random_state) else "it changes the random state"


CHECKS = [no_later_token, no_other_document, loss_is_the_mean_surprise, validation_is_the_tracks, warm_up_leaks_nothing]


def check(path: str) -> int:
    """Prints each check of the script and what is wrong; returns the exit code. Raises reference.UserError."""
    module, failed = load(path), 0
    for function in CHECKS:
        try:
            wrong = function(module)
        except Exception as error:  # an edited script may raise anything
            wrong = f"it could not be tried: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        failed += bool(wrong)
        print(f"{'FAIL' if wrong else 'pass'}  {function.__doc__}{' -- ' + wrong if wrong else ''}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    return reference.run_as_program(check, str(parser.parse_args(argv).script))


if __name__ == "__main__":
    sys.exit(main())
