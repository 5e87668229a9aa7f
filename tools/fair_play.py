"""Is an edited script still a fair entry: a probability model of the next token, judged on the track's own tokens?

    python -m tools.fair_play my_idea.py      # under a minute on a CPU; exit code 0, or 1 with what is wrong

It prints a line for each check: pass; FAIL and why; none where the script does not have what is checked. A script that
can't be imported, or whose model can't be built and run once, is one line with file and line, and exit code 2.

It imports the script and asks its own functions (build_model, GPT.forward, Schedule, validate, warm_up), on bytes and
with a width of 32, once with the LAYERS and STAGES of each of its tracks. So an entry that renames them changes this
file with it. In older entries they take and give less: from build to validated it heeds that. It trains nothing and
needs no data.
"""
import argparse
import copy
import dataclasses
import importlib.util
import inspect
import math
import os
import sys
import traceback
import types
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt as reference

CPU = torch.device("cpu")
FLAGS = ("--device=cpu --dtype=float32 --compile=off --num_steps=8 --extension_steps=2 --batch_size=2 --micro_batch=2 "
         "--sequence_length=256 --val_length=1024 --num_heads=2 --model_dim=32 --ngram_rows=1021 "
         "--window_end=192").split()
# Without --val_length a validation reads micro_batch sequences at once, which some scripts keep apart: here it is one.
FLAGS_WITHOUT_VAL_LENGTH = [*FLAGS, "--sequence_length=512", "--micro_batch=1"]
PUBLIC_TRACKS = {"fineweb", "laptop"}  # no entry may lack them
TOLERANCE = 1e-4  # nats; the same mathematics in another order


class Lacking(Exception):
    """The script does not have what is to be checked."""


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


def told(error: BaseException, path: str) -> str:
    """An exception in one line: its kind, the innermost line of the script that it comes from, what it says."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    what = str(error)
    if isinstance(error, SyntaxError):
        frames, what = [*frames, (error.filename, error.lineno)], error.msg
    lines = [line for file, line in frames if line and file == os.path.abspath(path)]
    at, what = f" at {path}:{lines[-1]}" if lines else "", what.strip().partition("\n")[0]
    return f"{type(error).__name__}{at}{': ' if what else ''}{what}"


@contextmanager
def on_bytes(module, track: str):
    """Within, the laptop track has the layers and stages of a track, its windows, documents and softmax's words fewer in
    proportion. Gives the hyperparameters, with that track's defaults; flags that the script does not have are left out."""
    has = {field.name for field in dataclasses.fields(module.Hyperparameters)}
    flags = FLAGS if "val_length" in has else FLAGS_WITHOUT_VAL_LENGTH
    hp = module.parse_arguments([f"--track={track}", *(f for f in flags if f[2:].partition("=")[0] in has)])
    # another seed for each, for the script may keep what it has made of tables and hyperparameters
    on_laptop = dict(track="laptop", seed=list(module.TRACKS).index(track))
    if not hasattr(module, "STAGES"):
        yield dataclasses.replace(hp, **on_laptop)
        return
    before = module.LAYERS["laptop"], module.STAGES["laptop"]
    shorter = max(1, max(stage.window for stage in hp.stages) // 200)
    fewer = module.TRACKS[track].vocab_size / module.TRACKS["laptop"].vocab_size
    module.LAYERS["laptop"], module.STAGES["laptop"] = hp.layers, tuple(
        stage._replace(window=stage.window // shorter, document=stage.document // shorter,
                       **{"words": int(stage.words / fewer)} if hasattr(stage, "words") else {}) for stage in hp.stages)
    try:
        yield dataclasses.replace(hp, final_window=hp.final_window // shorter, **on_laptop)
    finally:
        module.LAYERS["laptop"], module.STAGES["laptop"] = before


def build(module, hp):
    """A small model with weights away from zero."""
    takes = inspect.signature(module.build_model).parameters
    more = {"dtype": torch.float32, "flex": False}  # AdamW's to UntieEmbed's take neither
    model = module.build_model(hp, CPU, **{name: value for name, value in more.items() if name in takes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator) / math.sqrt(max(p.shape[-1:] or [1])))
    return model


def steps_of(module, hp) -> list[int]:
    """The first step of each stage, and the end of the run; without stages a step between."""
    return sorted({0, *(module.stage_ends(hp) if hasattr(module, "STAGES") else (hp.num_steps // 2, hp.num_steps))})


def at_step(module, model, step: int, hp) -> tuple:
    """What the model takes after tokens and targets: the schedule; in older scripts the window, or nothing."""
    names = list(inspect.signature(model.forward).parameters)[2:]
    if names == ["window"]:
        return (torch.tensor(module.window_size(step, hp)),)
    return (module.Schedule(step, hp, CPU),) if names else ()


def loss_of(model, tokens, targets, *more) -> float:
    """The loss that the model reports of targets (T,) after tokens (T,); more: at_step's."""
    result = model(tokens[None], targets[None], *more)
    return (result[1] if isinstance(result, tuple) else result).item()


def logits_of(module, model, tokens, step: int, hp):
    """Float32 (T, V) of one sequence (T,), as the script computes them at a step. Older scripts' models give none: then
    those that reach F.cross_entropy with other targets than the checks compare, so that they can't have helped."""
    more, (_, targets, *_) = at_step(module, model, step, hp), inspect.signature(model.forward).parameters.values()
    real, caught = F.cross_entropy, []

    def cross_entropy(input, *args, **kwargs):
        caught.append(input.float())
        return real(input, *args, **kwargs)

    with torch.no_grad():
        if targets.annotation not in (torch.Tensor, "Tensor"):  # but Tensor | None
            return model(tokens[None], None, *more).float()
        with mock.patch.object(module, "F", types.SimpleNamespace(**{**vars(F), "cross_entropy": cross_entropy})):
            loss_of(model, tokens, torch.zeros_like(tokens), *more)
    if not caught:
        raise ValueError("forward gives no logits without targets, and none reach F.cross_entropy")
    return torch.cat(caught)


def validated(module, model, stream, step: int, hp) -> float:
    """The loss that the script's validation reports at a step."""
    when = step if "step" in inspect.signature(module.validate).parameters else module.Schedule(step, hp, CPU)
    return module.validate(model, stream, when, hp, module.Runtime(0, 1, CPU))


def no_later_token(module, hp) -> str:
    """No logit depends on later tokens."""
    model, tokens = build(module, hp), RandomStream(256).tokens
    for step in steps_of(module, hp):
        before = logits_of(module, model, tokens, step, hp)
        for position in (1, 77, 128, 255):
            changed = tokens.clone()
            changed[position] = (changed[position] + 1) % 256
            if (logits_of(module, model, changed, step, hp) - before)[:position].abs().max() > TOLERANCE:
                return f"a change of token {position} changes logits before it, at step {step}"
        if (logits_of(module, model, changed, step, hp) - before)[255].abs().max() < TOLERANCE:
            return f"the logits do not depend on the token just read, at step {step}"
    return ""


def no_other_document(module, hp) -> str:
    """No logit depends on another document."""
    model, tokens = build(module, hp), RandomStream(256).tokens
    if not at_step(module, model, 0, hp) and not hasattr(model, "eot_token"):
        raise Lacking("its model has no eot_token: all text is one document")
    changed = tokens.clone()
    changed[140:150] = (changed[140:150] + 1) % 256  # the document that begins at 150 follows
    for step in steps_of(module, hp):
        before, after = (logits_of(module, model, t, step, hp) for t in (tokens, changed))
        if (after - before)[150:].abs().max() > TOLERANCE:
            return f"a change in one document changes logits in the next, at step {step}"
    return ""


def loss_is_the_mean_surprise(module, hp) -> str:
    """The reported loss is the mean of -ln p(next token), with one distribution over the vocabulary for each token."""
    model, stream = build(module, hp), RandomStream(513)
    tokens, targets = stream.tokens[:-1], stream.tokens[1:]
    for step in steps_of(module, hp):
        logits = logits_of(module, model, tokens, step, hp)
        if logits.size(0) != 512 or logits.size(1) < 257:
            return f"logits of shape {tuple(logits.shape)} for 512 tokens of a vocabulary of 257"
        for name, of in (("", targets), (" of other targets", targets.flip(0))):
            with torch.no_grad():
                loss = loss_of(model, tokens, of, *at_step(module, model, step, hp))
            surprise = F.cross_entropy(logits, of, reduction="none").double()
            if abs(surprise.sum().item() / 512 - loss) > TOLERANCE:
                return f"the loss{name} at step {step} is {loss:.5f}, the mean of -ln p(target) {surprise.mean():.5f}"
    return ""


def later_targets_leak_nothing(module, hp) -> str:
    """Training on several next tokens gives no loss a look at them: it is the next one's, whatever their weights."""
    model, stream = build(module, hp), RandomStream(513)
    tokens, targets = stream.tokens[:-1], stream.tokens[1:]
    if not any(hasattr(schedule, "target_weights") for schedule in at_step(module, model, 0, hp)):
        raise Lacking("it has no target_weights")
    for step in steps_of(module, hp):
        of_next = F.cross_entropy(logits_of(module, model, tokens, step, hp), targets, reduction="none").double()
        for weights in (None, (1.0,), (1.0, 3.0), (0.2, 0.5, 0.0, 4.0)):
            (schedule,) = at_step(module, model, step, hp)
            if weights:
                schedule.target_weights = torch.tensor(weights)
            schedule.words = 0  # training may estimate the loss from some words; a validation may not
            for training in (True, False):
                with torch.set_grad_enabled(training):
                    loss = loss_of(model, tokens, targets, schedule)
                if abs(of_next.mean().item() - loss) > TOLERANCE:
                    return (f"{'training' if training else 'validation'} reports {loss:.5f} with the weights "
                            f"{schedule.target_weights.tolist()} at step {step}, -ln p(next) is {of_next.mean():.5f}")
    return ""


def validation_is_the_tracks(module, hp) -> str:
    """Every validation reads the track's tokens, each once, and reports their mean loss."""
    for name in module.TRACKS.keys() & reference.TRACKS.keys():  # another one is its user's own
        track = reference.TRACKS[name]
        for field in dataclasses.fields(track):
            if field.name != "get_data" and getattr(module.TRACKS[name], field.name) != getattr(track, field.name):
                return (f"track {name} has {field.name} {getattr(module.TRACKS[name], field.name)}, not "
                        f"{getattr(track, field.name)}")
    model, track = build(module, hp), module.TRACKS["laptop"]
    for step in steps_of(module, hp):
        stream = RandomStream(2049)
        module.TRACKS["laptop"] = dataclasses.replace(track, val_tokens=2048)
        try:
            loss = validated(module, model, stream, step, hp)
        finally:
            module.TRACKS["laptop"] = track
        position = 1
        for start, end in sorted(stream.read_targets):
            if start != position:
                return f"validation reads target {start} after {position - 1}"
            position = end
        if position != 2049:
            return f"validation ends at target {position - 1} of 2048"
        logits = lambda a, b: logits_of(module, model, stream.tokens[a - 1:b - 1], step, hp)  # noqa: B023
        sums = [F.cross_entropy(logits(a, b), stream.tokens[a:b], reduction="sum")
                for a, b in stream.read_targets]
        if abs(sum(sums).item() / 2048 - loss) > TOLERANCE:
            return f"validation reports {loss:.5f} at step {step}, the mean of -ln p(target) is {sum(sums) / 2048:.5f}"
    return ""


def warm_up_leaks_nothing(module, hp) -> str:
    """The warm-up of the kernels leaves weights, optimizer and random state, and reads no text into the model."""
    if not hasattr(module, "warm_up"):
        raise Lacking("it has no warm_up")
    hp = dataclasses.replace(hp, sequence_length=128, **{"val_length": 128} if hasattr(hp, "val_length") else {})
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


def start(path: str):
    """The script as a module that has built and run the model of each track. Raises reference.UserError if it can't."""
    try:
        if not path.endswith(".py"):
            raise reference.UserError("it is no .py file")
        spec = importlib.util.spec_from_file_location("candidate", os.path.abspath(path))
        module = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for track in module.TRACKS if PUBLIC_TRACKS <= module.TRACKS.keys() else ():  # or check says so
            with on_bytes(module, track) as hp:
                model, tokens = build(module, hp), RandomStream(256).tokens
                logits_of(module, model, tokens, 0, hp)
                loss_of(model, tokens, tokens, *at_step(module, model, 0, hp))
    except (Exception, SystemExit) as error:  # an edited script may raise anything
        raise reference.UserError(f"can't start {path}: {told(error, path)}") from None
    return module


def verdict(function, module, path: str) -> tuple[str, str]:
    """pass, FAIL or none of a check on all tracks, and why."""
    for track in module.TRACKS:
        try:
            with on_bytes(module, track) as hp:
                if wrong := function(module, hp):
                    return "FAIL", wrong
        except Lacking as lack:
            return "none", str(lack)
        except Exception as error:
            return "FAIL", f"it could not be tried ({track}): {told(error, path)}"
    return "pass", ""


def check(path: str, checks=tuple(CHECKS)) -> int:
    """Prints each check of the script and what is wrong; returns the exit code. Raises reference.UserError."""
    module, words = start(path), []
    if lost := PUBLIC_TRACKS - module.TRACKS.keys():  # on which the checks rest
        print(f"FAIL  {validation_is_the_tracks.__doc__} -- it has no track {' and no '.join(sorted(lost))}")
        return 1
    for function in checks:
        word, why = verdict(function, module, path)
        words.append(word)
        print(f"{word}  {function.__doc__}{' -- ' + why if why else ''}")
    return 1 if "FAIL" in words else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    return reference.run_as_program(check, str(parser.parse_args(argv).script))


if __name__ == "__main__":
    sys.exit(main())
