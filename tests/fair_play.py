"""Is an edited script still a fair entry: a probability model of the next token, judged on the track's own tokens?

    python -m tests.fair_play my_idea.py      # under a minute on a CPU; exit code 0, or 1 with what is wrong

It imports the script and asks its own functions (build_model, GPT.forward, Schedule, validate, warm_up), on bytes and
with a width of 32, once with the LAYERS and STAGES of each of its tracks. So an entry that renames them changes this
file with it. It trains nothing and needs no data.
"""
import argparse
import copy
import dataclasses
import importlib.util
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt as reference

CPU = torch.device("cpu")
FLAGS = ("--device=cpu --dtype=float32 --compile=off --num_steps=8 --extension_steps=2 --batch_size=2 --micro_batch=2 "
         "--sequence_length=256 --val_length=1024 --num_heads=2 --model_dim=32 --ngram_rows=1021").split()
TOLERANCE = 1e-4  # nats; the same mathematics in another order


class RandomStream(reference.TokenStream):
    """In place of the files: random documents; keeps which targets were read as sequences."""

    def __init__(self, length: int):
        tokens = np.random.RandomState(0).randint(256, size=length)
        tokens[::150] = 256  # documents begin here
        self.tokens, self.track, self.paths = torch.from_numpy(tokens), reference.TRACKS["laptop"], ["random"]
        self.shards, self.ends = [tokens.astype(np.uint16)], np.array([0, length])
        self.read_targets: list[tuple[int, int]] = []

    def sequence(self, index: int, length: int):
        """As TokenStream.sequence."""
        self.read_targets.append((index * length + 1, (index + 1) * length + 1))
        return super().sequence(index, length)


def load(path: str):
    """The script as a module. Raises reference.UserError where it can't be imported."""
    try:
        spec = importlib.util.spec_from_file_location("candidate", path)
        module = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise reference.UserError(f"can't import {path}: {type(error).__name__}: {error}") from None
    return module


@contextmanager
def on_bytes(module, track: str):
    """Within, the laptop track has the layers and stages of a track, its windows and documents shortened in proportion.
    Gives the hyperparameters, with that track's defaults."""
    hp = module.parse_arguments([f"--track={track}", *FLAGS])
    before = module.LAYERS["laptop"], module.STAGES["laptop"]
    shorter = max(1, max(stage.window for stage in hp.stages) // 200)
    module.LAYERS["laptop"], module.STAGES["laptop"] = hp.layers, tuple(
        stage._replace(window=stage.window // shorter, document=stage.document // shorter) for stage in hp.stages)
    try:
        # another seed for each, for the script may keep what it has made of tables and hyperparameters
        yield dataclasses.replace(hp, track="laptop", final_window=hp.final_window // shorter,
                                  seed=list(module.TRACKS).index(track))
    finally:
        module.LAYERS["laptop"], module.STAGES["laptop"] = before


def build(module, hp):
    """A small model with weights away from zero."""
    model = module.build_model(hp, CPU, torch.float32, flex=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator) / math.sqrt(max(p.shape[-1:] or [1])))
    return model


def steps_of(module, hp) -> list[int]:
    """The first step of each stage, and the end of the run."""
    return sorted({0, *module.stage_ends(hp)})


def logits_of(module, model, tokens, step: int):
    """Float32 (T, V) of one sequence (T,), as the script computes them at a step."""
    with torch.no_grad():
        return model(tokens[None], None, module.Schedule(step, model.hp, CPU)).float()


def no_later_token(module, hp) -> str:
    """No logit depends on later tokens."""
    model, tokens = build(module, hp), RandomStream(256).tokens
    for step in steps_of(module, hp):
        before = logits_of(module, model, tokens, step)
        for position in (1, 77, 128, 255):
            changed = tokens.clone()
            changed[position] = (changed[position] + 1) % 256
            if (logits_of(module, model, changed, step) - before)[:position].abs().max() > TOLERANCE:
                return f"a change of token {position} changes logits before it, at step {step}"
        if (logits_of(module, model, changed, step) - before)[255].abs().max() < TOLERANCE:
            return f"the logits do not depend on the token just read, at step {step}"
    return ""


def no_other_document(module, hp) -> str:
    """No logit depends on another document."""
    model, tokens = build(module, hp), RandomStream(256).tokens
    changed = tokens.clone()
    changed[140:150] = (changed[140:150] + 1) % 256  # the document that begins at 150 follows
    for step in steps_of(module, hp):
        before, after = (logits_of(module, model, t, step) for t in (tokens, changed))
        if (after - before)[150:].abs().max() > TOLERANCE:
            return f"a change in one document changes logits in the next, at step {step}"
    return ""


def loss_is_the_mean_surprise(module, hp) -> str:
    """The reported loss is the mean of -ln p(next token), with one distribution over the vocabulary for each token."""
    model, stream = build(module, hp), RandomStream(513)
    tokens, targets = stream.tokens[:-1], stream.tokens[1:]
    for step in steps_of(module, hp):
        logits = logits_of(module, model, tokens, step)
        if logits.size(0) != 512 or logits.size(1) < 257:
            return f"logits of shape {tuple(logits.shape)} for 512 tokens of a vocabulary of 257"
        schedule = module.Schedule(step, hp, CPU)
        for name, of in (("", targets), (" of other targets", targets.flip(0))):
            with torch.no_grad():
                loss = model(tokens[None], of[None], schedule)[1].item()
            surprise = F.cross_entropy(logits, of, reduction="none").double()
            if abs(surprise.sum().item() / 512 - loss) > TOLERANCE:
                return f"the loss{name} at step {step} is {loss:.5f}, the mean of -ln p(target) {surprise.mean():.5f}"
    return ""


def later_targets_leak_nothing(module, hp) -> str:
    """Training on several next tokens gives no loss a look at them: it is the next one's, whatever their weights."""
    model, stream = build(module, hp), RandomStream(513)
    tokens, targets = stream.tokens[:-1], stream.tokens[1:]
    for step in steps_of(module, hp):
        of_next = F.cross_entropy(logits_of(module, model, tokens, step), targets, reduction="none").double()
        for weights in (None, (1.0,), (1.0, 3.0), (0.2, 0.5, 0.0, 4.0)):
            schedule = module.Schedule(step, hp, CPU)
            if weights:
                schedule.target_weights = torch.tensor(weights)
            for training in (True, False):
                with torch.set_grad_enabled(training):
                    loss = model(tokens[None], targets[None], schedule)[1].item()
                if abs(of_next.mean().item() - loss) > TOLERANCE:
                    return (f"{'training' if training else 'validation'} reports {loss:.5f} with the weights "
                            f"{schedule.target_weights.tolist()} at step {step}, -ln p(next) is {of_next.mean():.5f}")
    return ""


def validation_is_the_tracks(module, hp) -> str:
    """Every validation reads the track's tokens, each once, and reports their mean loss."""
    for name, track in reference.TRACKS.items():
        for field in dataclasses.fields(track):
            if field.name != "get_data" and getattr(module.TRACKS[name], field.name) != getattr(track, field.name):
                return (f"track {name} has {field.name} {getattr(module.TRACKS[name], field.name)}, not "
                        f"{getattr(track, field.name)}")
    model, track = build(module, hp), module.TRACKS["laptop"]
    for step in steps_of(module, hp):
        stream = RandomStream(2049)
        module.TRACKS["laptop"] = dataclasses.replace(track, val_tokens=2048)
        try:
            schedule = module.Schedule(step, hp, CPU)
            told = module.validate(model, stream, schedule, hp, module.Runtime(0, 1, CPU))
        finally:
            module.TRACKS["laptop"] = track
        position = 1
        for start, end in sorted(stream.read_targets):
            if start != position:
                return f"validation reads target {start} after {position - 1}"
            position = end
        if position != 2049:
            return f"validation ends at target {position - 1} of 2048"
        logits = lambda a, b: logits_of(module, model, stream.tokens[a - 1:b - 1], step)  # noqa: B023
        sums = [F.cross_entropy(logits(a, b), stream.tokens[a:b], reduction="sum")
                for a, b in stream.read_targets]
        if abs(sum(sums).item() / 2048 - told) > TOLERANCE:
            return f"validation reports {told:.5f} at step {step}, the mean of -ln p(target) is {sum(sums) / 2048:.5f}"
    return ""


def warm_up_leaks_nothing(module, hp) -> str:
    """The warm-up of the kernels leaves weights, optimizer and random state, and reads no text into the model."""
    hp = dataclasses.replace(hp, sequence_length=128, val_length=128)
    model = build(module, hp)
    optimizer = module.Optimizer(model, hp, torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, random_state = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    module.warm_up(model, optimizer, RandomStream(4097), hp, module.Runtime(0, 1, CPU))
    for name, value in model.state_dict().items():
        if not torch.equal(value, weights[name]):
            return f"it changes {name}"
    if any(p.grad is not None and p.grad.any() for p in model.parameters()):
        return "it leaves gradients"
    after = optimizer.state_dict()
    pairs = zip(state["buckets"], after["buckets"], strict=True)
    if after["num_updates"] != state["num_updates"] or any(not torch.equal(a[n], b[n]) for a, b in pairs for n in a):
        return "it changes the optimizer's state"
    return "" if torch.equal(torch.get_rng_state(), random_state) else "it changes the random state"


CHECKS = [no_later_token, no_other_document, loss_is_the_mean_surprise, later_targets_leak_nothing,
          validation_is_the_tracks, warm_up_leaks_nothing]


def check(path: str, checks=tuple(CHECKS)) -> int:
    """Prints each check of the script and what is wrong; returns the exit code. Raises reference.UserError."""
    module, failed = load(path), 0
    for function in checks:
        wrong = ""
        for track in module.TRACKS:
            try:
                with on_bytes(module, track) as hp:
                    wrong = wrong or function(module, hp)
            except Exception as error:  # an edited script may raise anything
                what = str(error).partition(chr(10))[0]
                wrong = wrong or f"it could not be tried ({track}): {type(error).__name__}: {what}"
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
