"""Check that an edited training script still plays fair.

    python -m tools.fair_play my_idea.py      # or ./run.sh fair_play my_idea.py

A fair script is a probability model of the next token: no logit depends on a later token or on
another document, and the loss that it reports is the mean of -ln p over the track's validation
tokens. Each check prints one line: pass, FAIL with the reason, or none if the script has nothing
to check. The exit code is 0 if nothing failed, 1 after a FAIL, and 2 if the script can't be
imported or its model can't be built; then one line names the file and the line.

The checks import the script and call its own functions: parse_arguments, build_model, GPT.forward,
Schedule, validate, Optimizer and warm_up. They run a model of width 32 on random bytes, with the
LAYERS and STAGES of each of the script's tracks. Nothing is trained and no data are needed. A
script that renames one of these functions needs a copy of this file that calls the new name. The
frozen scripts in records/ lack some of them; `build`, `at_step`, `logits_of` and `validated` know
the differences.
"""
import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import math
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt as reference
from data import Stopped, UserError, run_as_program, visible
from tools.names import name_in

CPU = torch.device("cpu")
# Settings of the small run. Those that a script does not have are left out.
SETTINGS = {
    "device": "cpu", "dtype": "float32", "compile": "off", "num_steps": 8, "extension": 0.25,
    "extension_steps": 2, "batch_size": 2, "micro_batch": 2, "sequence_length": 256,
    "val_length": 1024, "num_heads": 2, "model_dim": 32, "ngram_rows": 1021, "window_end": 192}
# A script without --val_length validates on micro_batch sequences at once, and some of these
# scripts treat them as one text. One long sequence avoids that.
SETTINGS_WITHOUT_VAL_LENGTH = {**SETTINGS, "sequence_length": 512, "micro_batch": 1}
PUBLIC_TRACKS = {"fineweb", "laptop"}
TOLERANCE = 1e-4  # nats; the same mathematics in another order of operations
EOT = 256  # end-of-text token of the laptop track, before each document
ENOUGH_TOKENS = 4097


class NothingToCheck(Exception):
    """The script does not have the feature that a check looks at."""


class RandomStream(reference.TokenStream):
    """Random documents in place of a track's files. It notes which targets were read."""

    def __init__(self, length: int):
        tokens = np.random.RandomState(0).randint(256, size=length)
        tokens[::150] = EOT
        self.tokens = torch.from_numpy(tokens)
        self.track = reference.TRACKS["laptop"]
        self.paths = ["random"]
        self.shards = [tokens.astype(np.uint16)]  # of older scripts
        self.shard = self.shards.__getitem__
        self.ends = np.array([0, length])
        self.read_targets: list[tuple[int, int]] = []  # (first, one after the last)

    def sequence(self, index: int, length: int):
        """As TokenStream.sequence."""
        self.read_targets.append((index * length + 1, (index + 1) * length + 1))
        return super().sequence(index, length)


# --- What the checks ask of a script --------------------------------------------------------------

@contextlib.contextmanager
def on_bytes(module: ModuleType, track: str) -> Iterator:
    """Give the laptop track the layers and stages of `track`, and yield small hyperparameters.

    Windows, document lengths and sizes of the sampled softmax shrink in proportion. Scripts may
    cache what they compute from hyperparameters, so each track has its own seed.
    """
    fields = {field.name for field in dataclasses.fields(module.Hyperparameters)}
    settings = SETTINGS if "val_length" in fields else SETTINGS_WITHOUT_VAL_LENGTH
    flags = [f"--{name}={value}" for name, value in settings.items() if name in fields]
    hp = module.parse_arguments([f"--track={track}", *flags])
    hp = dataclasses.replace(hp, track="laptop", seed=list(module.TRACKS).index(track))
    if not hasattr(module, "STAGES"):
        yield hp
        return
    layers = module.LAYERS.get(track, module.LAYERS["laptop"])
    stages = module.STAGES.get(track, module.STAGES["laptop"])
    shrink = max(1, max(stage.window for stage in stages) // 200)
    vocab_shrink = module.TRACKS[track].vocab_size / module.TRACKS["laptop"].vocab_size
    small_stages = [small_stage(stage, shrink, vocab_shrink) for stage in stages]
    with mock.patch.dict(module.LAYERS, laptop=layers), \
            mock.patch.dict(module.STAGES, laptop=tuple(small_stages)):
        shorter = {"final_window": hp.final_window // shrink}
        if hasattr(hp, "pointer_window"):
            shorter["pointer_window"] = min(hp.pointer_window, 64)
        yield dataclasses.replace(hp, **shorter)


def small_stage(stage, shrink: int, vocab_shrink: float):
    """A row of STAGES for short sequences and a small vocabulary."""
    document, softmax_size = name_in(stage, "max_doc_len"), name_in(stage, "softmax_size")
    changed = {"window": stage.window // shrink, document: getattr(stage, document) // shrink}
    if softmax_size is not None:
        changed[softmax_size] = int(getattr(stage, softmax_size) / vocab_shrink)
    return stage._replace(**changed)


def build(module: ModuleType, hp) -> torch.nn.Module:
    """A small model. Noise on all weights, so that those that start at zero have an effect."""
    accepted = inspect.signature(module.build_model).parameters
    arguments = {"dtype": torch.float32, "flex": False}  # scripts before ValueEmbed have neither
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    model = module.build_model(hp, CPU, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            fan_in = p.shape[-1] if p.ndim else 1
            p.add_(0.3 * noise / math.sqrt(max(fan_in, 1)))
    return model


def steps_of(module: ModuleType, hp) -> list[int]:
    """The first step of each stage and the end of the run. Without stages, also the middle."""
    ends = module.stage_ends(hp) if hasattr(module, "STAGES") else [hp.num_steps // 2, hp.num_steps]
    return sorted({0, *ends})


def at_step(module: ModuleType, model, step: int, hp) -> tuple:
    """The arguments of the model after tokens and targets: a Schedule; in older scripts a window
    or nothing."""
    names = list(inspect.signature(model.forward).parameters)[2:]
    if names == ["window"]:
        return (torch.tensor(module.window_size(step, hp)),)
    return (module.Schedule(step, hp, CPU),) if names else ()


def loss_of(model, tokens: torch.Tensor, targets: torch.Tensor, *at) -> float:
    """The loss that the model reports for tokens and targets, both (T,). at: see at_step."""
    result = model(tokens[None], targets[None], *at)
    loss = result[1] if isinstance(result, tuple) else result
    return loss.item()


def logits_of(module: ModuleType, model, tokens: torch.Tensor, step: int, hp) -> torch.Tensor:
    """The float32 logits (T, V) of one sequence (T,) at a step. Newer models return the logarithms
    of probabilities; a probability of zero counts as exp(-1e4).

    Older models return no logits. For them these are the logits that reach F.cross_entropy, with
    all targets zero: the checks compare other targets, so the targets can't have helped.
    """
    at = at_step(module, model, step, hp)
    targets = list(inspect.signature(model.forward).parameters.values())[1]
    with torch.no_grad():
        if targets.annotation not in (torch.Tensor, "Tensor"):  # Tensor | None: None gives logits
            return model(tokens[None], None, *at).float().clamp(min=-1e4)
        caught = []

        def cross_entropy(input, *args, **kwargs):
            caught.append(input.float())
            return F.cross_entropy(input, *args, **kwargs)

        functions = {**vars(module.F), "cross_entropy": cross_entropy}
        with mock.patch.object(module, "F", types.SimpleNamespace(**functions)):
            loss_of(model, tokens, torch.zeros_like(tokens), *at)
    if not caught:
        raise ValueError("forward returns no logits without targets, and calls no F.cross_entropy")
    return torch.cat(caught)


def validated(module: ModuleType, model, stream: RandomStream, step: int, hp) -> float:
    """The loss that the script's validation reports at a step."""
    takes_step = "step" in inspect.signature(module.validate).parameters
    when = step if takes_step else module.Schedule(step, hp, CPU)
    return module.validate(model, stream, when, hp, module.Runtime(0, 1, CPU))


# --- The checks: each returns what is wrong, or "" ------------------------------------------------

def no_later_token(module: ModuleType, hp) -> str:
    """No logit depends on later tokens."""
    model = build(module, hp)
    tokens = RandomStream(256).tokens
    for step in steps_of(module, hp):
        before = logits_of(module, model, tokens, step, hp)
        for position in (1, 77, 128, 255):
            changed = tokens.clone()
            changed[position] = (changed[position] + 1) % 256
            difference = (logits_of(module, model, changed, step, hp) - before).abs()
            if difference[:position].max() > TOLERANCE:
                return f"a change of token {position} changes earlier logits at step {step}"
        if difference[255].max() < TOLERANCE:
            return f"the last logits do not depend on the last token at step {step}"
    return ""


def no_other_document(module: ModuleType, hp) -> str:
    """No logit depends on another document."""
    model = build(module, hp)
    tokens = RandomStream(256).tokens
    if not at_step(module, model, 0, hp) and not hasattr(model, "eot_token"):
        raise NothingToCheck("the model has no eot_token: to it, all text is one document")
    changed = tokens.clone()
    changed[140:150] = (changed[140:150] + 1) % 256  # the next document begins at 150
    for step in steps_of(module, hp):
        before = logits_of(module, model, tokens, step, hp)
        after = logits_of(module, model, changed, step, hp)
        if (after - before)[150:].abs().max() > TOLERANCE:
            return f"a change in one document changes logits of the next at step {step}"
    return ""


def loss_is_the_mean_surprise(module: ModuleType, hp) -> str:
    """The reported loss is the mean of -ln p(next token) under one distribution per position."""
    model = build(module, hp)
    stream = RandomStream(513)
    tokens, targets = stream.tokens[:-1], stream.tokens[1:]
    for step in steps_of(module, hp):
        logits = logits_of(module, model, tokens, step, hp)
        if logits.size(0) != 512 or logits.size(1) < 257:
            return (f"the logits have shape {tuple(logits.shape)}, expected (512, 257 or more) "
                    "for 512 tokens")
        # The other targets show whether the logits depend on the targets.
        for name, some in (("", targets), (" of other targets", targets.flip(0))):
            with torch.no_grad():
                loss = loss_of(model, tokens, some, *at_step(module, model, step, hp))
            surprise = F.cross_entropy(logits, some, reduction="none").double().sum().item() / 512
            if abs(surprise - loss) > TOLERANCE:
                return (f"the loss{name} at step {step} is {loss:.5f}, but the mean of "
                        f"-ln p(target) is {surprise:.5f}")
    return ""


def later_targets_leak_nothing(module: ModuleType, hp) -> str:
    """Multi-token prediction leaves the reported loss alone: it is that of the next token."""
    model = build(module, hp)
    stream = RandomStream(513)
    tokens, targets = stream.tokens[:-1], stream.tokens[1:]
    at = at_step(module, model, 0, hp)
    weights_name = name_in(at[0], "mtp_weights") if at else None
    if weights_name is None:
        raise NothingToCheck("its schedule has no mtp_weights")
    for step in steps_of(module, hp):
        logits = logits_of(module, model, tokens, step, hp)
        surprise = F.cross_entropy(logits, targets, reduction="none").double().mean().item()
        for weights in (None, (1.0,), (1.0, 3.0), (0.2, 0.5, 0.0, 4.0)):
            (schedule,) = at_step(module, model, step, hp)
            if weights is not None:
                setattr(schedule, weights_name, torch.tensor(weights))
            if hasattr(schedule, "has_prefix"):
                schedule.has_prefix = False
            # The full softmax: training may estimate its loss with a sampled softmax.
            setattr(schedule, name_in(schedule, "softmax_size") or "softmax_size", 0)
            for training in (True, False):
                with torch.set_grad_enabled(training):
                    loss = loss_of(model, tokens, targets, schedule)
                if abs(surprise - loss) > TOLERANCE:
                    mode = "training" if training else "validation"
                    used = getattr(schedule, weights_name).tolist()
                    return (f"{mode} at step {step} with mtp_weights {used} reports {loss:.5f}, "
                            f"but the mean of -ln p(next token) is {surprise:.5f}")
    return ""


def validation_is_the_tracks(module: ModuleType, hp) -> str:
    """Every validation reads each of the track's tokens once and reports their mean loss."""
    # Only the tracks that both scripts have: another one is the user's own.
    for name in sorted(module.TRACKS.keys() & reference.TRACKS.keys()):
        wanted = dataclasses.asdict(reference.TRACKS[name])
        del wanted["get_data"], wanted["vocabulary"]  # the latter is no part of the task
        for field, value in wanted.items():
            found = getattr(module.TRACKS[name], field)
            if found != value:
                return f"track {name} has {field} {found}, expected {value}"
    model = build(module, hp)
    short_track = dataclasses.replace(module.TRACKS["laptop"], val_tokens=2048)
    for step in steps_of(module, hp):
        stream = RandomStream(2049)
        with mock.patch.dict(module.TRACKS, laptop=short_track):
            loss = validated(module, model, stream, step, hp)
        position = 1
        for start, end in sorted(stream.read_targets):
            if start != position:
                return f"validation reads target {start} after target {position - 1}"
            position = end
        if position != 2049:
            return f"validation ends at target {position - 1}, expected 2048"
        total = 0.0
        for start, end in stream.read_targets:
            logits = logits_of(module, model, stream.tokens[start - 1:end - 1], step, hp)
            total += F.cross_entropy(logits, stream.tokens[start:end], reduction="sum").item()
        if abs(total / 2048 - loss) > TOLERANCE:
            return (f"validation reports {loss:.5f} at step {step}, but the mean of "
                    f"-ln p(target) is {total / 2048:.5f}")
    return ""


def warm_up_leaks_nothing(module: ModuleType, hp) -> str:
    """The warm-up restores the weights, the optimizer and the random state."""
    if not hasattr(module, "warm_up"):
        raise NothingToCheck("it has no warm_up")
    short = {name: 128 for name in ("sequence_length", "val_length") if hasattr(hp, name)}
    hp = dataclasses.replace(hp, **short)
    model = build(module, hp)
    optimizer = module.Optimizer(model, hp, torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = copy.deepcopy(optimizer.state_dict())
    random_state = torch.get_rng_state()
    stream = RandomStream(ENOUGH_TOKENS)
    module.warm_up(model, optimizer, stream, hp, module.Runtime(0, 1, CPU))
    for name, value in model.state_dict().items():
        if not torch.equal(value, weights[name]):
            return f"it changes {name}"
    if any(p.grad is not None and p.grad.any() for p in model.parameters()):
        return "it leaves gradients"
    after = optimizer.state_dict()
    if after["num_updates"] != before["num_updates"]:
        return "it changes the optimizer's number of updates"
    for old, new in zip(before["buckets"], after["buckets"], strict=True):
        if any(not torch.equal(old[name], new[name]) for name in old):
            return "it changes the optimizer's state"
    if not torch.equal(torch.get_rng_state(), random_state):
        return "it changes the random state"
    return ""


CHECKS = (no_later_token, no_other_document, loss_is_the_mean_surprise, later_targets_leak_nothing,
          validation_is_the_tracks, warm_up_leaks_nothing)


# --- Running them ---------------------------------------------------------------------------------

class Result(NamedTuple):
    """What a check says of a script."""
    check: Callable
    verdict: str  # pass, FAIL, or none: the script has nothing to check
    reason: str   # empty after a pass
    raised: bool = False  # the check did not come to its end

    def line(self) -> str:
        """The result in one line."""
        reason = f" -- {self.reason}" if self.reason else ""
        return f"{self.verdict}  {self.check.__doc__}{reason}"


def describe(error: BaseException, path: str) -> str:
    """An exception in one line: its class, the innermost line of the script, the message."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in frames]
    message = str(error).strip().partition("\n")[0]
    if isinstance(error, SyntaxError):
        places.append((error.filename, error.lineno))
        message = error.msg
    lines = [line for file, line in places if line and file == os.path.abspath(path)]
    where = f" at {path}:{lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {message}"


def load(path: str) -> ModuleType:
    """Import a script, and build and run the model of each track. Raises UserError if the script
    can't."""
    try:
        spec = importlib.util.spec_from_file_location("candidate", os.path.abspath(path))
        if spec is None:
            raise ValueError("it is not a .py file")
        module = importlib.util.module_from_spec(spec)
        sys.modules["candidate"] = module
        spec.loader.exec_module(module)
        if PUBLIC_TRACKS <= module.TRACKS.keys():  # else run_checks reports which one is missing
            for track in module.TRACKS:
                try_out(module, track)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # an edited script may raise anything
        raise UserError(f"can't start {path}: {describe(error, path)}") from error
    return module


def try_out(module: ModuleType, track: str) -> None:
    """Compute logits and a loss once. Raises what the script raises."""
    with on_bytes(module, track) as hp:
        model = build(module, hp)
        tokens = RandomStream(256).tokens
        logits_of(module, model, tokens, 0, hp)
        loss_of(model, tokens, tokens, *at_step(module, model, 0, hp))


def run_check(check: Callable, module: ModuleType) -> Result:
    """One check on all tracks of a loaded script; it stops at the first failure."""
    for track in module.TRACKS:
        try:
            with on_bytes(module, track) as hp:
                wrong = check(module, hp)
        except NothingToCheck as error:
            return Result(check, "none", str(error))
        except Exception as error:
            described = describe(error, getattr(module, "__file__", ""))
            reason = f"the check raised on track {track}: {described}"
            return Result(check, "FAIL", reason, raised=True)
        if wrong:
            return Result(check, "FAIL", wrong)
    return Result(check, "pass", "")


def run_checks(module: ModuleType, checks: tuple[Callable, ...] = CHECKS) -> Iterator[Result]:
    """The results of a loaded script, one after the other."""
    missing = sorted(PUBLIC_TRACKS - module.TRACKS.keys())
    if missing:  # the checks rest on them
        yield Result(validation_is_the_tracks, "FAIL", f"it has no track {', '.join(missing)}")
        return
    for check in checks:
        yield run_check(check, module)


def check_script(argv: list[str] | None) -> int:
    """Print the result of each check; returns 1 if one failed, else 0. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m tools.fair_play", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="path of the script, for example train_gpt.py")
    failed = False
    for result in run_checks(load(parser.parse_args(argv).script)):
        failed = failed or result.verdict == "FAIL"
        print(visible(result.line()), flush=True)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_as_program(check_script, argv)


if __name__ == "__main__":
    sys.exit(main())
