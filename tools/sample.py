"""Let a trained model write text.

    python -m tools.sample                                        # the run that was started last
    python -m tools.sample FILE --prompt "def main():" --tokens 300 --samples 4

FILE holds a finished run's weights, records/scratch/<run_id>.pt, or is a checkpoint,
<run_id>_step<N>.pt. The model is that of the script that trained it. If that script was edited
since, --script names a copy of it, which the run's log holds.
"""
import argparse
import hashlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train_gpt
from data import UserError, run_as_program, visible
from data.encoders import encode_texts
from tools import start


class Trained(NamedTuple):
    """A trained model and what its file says about the run."""
    path: str
    script: ModuleType
    model: "train_gpt.GPT"
    info: dict      # of train_gpt.run_info
    progress: dict  # of train_gpt.Progress

    @property
    def eot_token(self) -> int:
        return self.model.eot_token

    @property
    def schedule(self) -> "train_gpt.Schedule":
        """That of the last validation."""
        return self.script.Schedule(
            self.progress["step"], self.model.hp, self.model.embed.weight.device)

    def description(self) -> str:
        """The run, the step and the losses, in one line."""
        losses = [f"{name.replace('_', ' ')} {self.progress[name]:.4f}"
                  for name in ("validation_loss", "held_out_loss")
                  if self.progress.get(name) is not None]
        step = f"step {self.progress['step']} of {self.model.hp.num_steps}"
        return ", ".join([f"run {self.info['run_id']}", step, *losses])


def script_hash(path: str | Path) -> str:
    """The hash of a script as train_gpt.run_info computes it; "" if there is no such file."""
    path = Path(path)
    if not path.is_file():
        return ""
    source = path.read_text("utf-8", errors="replace")  # whatever its line ends
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def load_script(path: str | Path) -> ModuleType:
    """Import an edited copy of train_gpt.py. Raises UserError."""
    try:
        return start.load(Path(path).absolute())
    except UserError:
        raise
    except Exception as error:  # an edited script may raise anything
        raise UserError(f"can't import {path}: {type(error).__name__}: {error}") from None


def script_of(path: str, info: dict, given: str) -> ModuleType:
    """The script that is given, or the one that trained the model, if this repository has it
    unchanged. Raises UserError.

    A file of weights holds no code, and code of a log is not run unless the user has extracted it:
    both could come from a stranger."""
    if given:
        return load_script(given)
    code_hash = info["code_hash"]
    name = info["script"]
    if script_hash(train_gpt.__file__) == code_hash:
        return train_gpt
    script = (train_gpt.ROOT / name).resolve()
    if script.is_relative_to(train_gpt.ROOT.resolve()) and script_hash(script) == code_hash:
        return load_script(script)
    log = Path(path).with_name(f"{info['run_id']}.txt")
    raise UserError(f"{path} was trained by {name}, which was edited since; get that script from "
                    f"the run's log: ./run.sh compare extract {log} -o theirs.py, then add: "
                    "--script theirs.py")


def load_model(path: str, script: str = "") -> Trained:
    """The trained model that a file holds. script: see script_of. Raises UserError."""
    module = train_gpt
    try:
        saved = train_gpt.open_checkpoint(path)
        info = saved["info"]
        module = script_of(path, info, script)
        hp = module.Hyperparameters(**module.settings_of_checkpoint(path))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = module.build_model(hp, device, getattr(torch, info["activations"]), flex=False)
        train_gpt.load_weights(model, saved)
        return Trained(path, module, model, info, saved["progress"])
    except (UserError, train_gpt.UserError) as error:
        raise UserError(str(error)) from None
    except Exception as error:  # another script's sizes and names, or damaged values: anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{path} does not fit {module.__file__}: {reason}") from None


def newest_file(folder: Path) -> str:
    """The weights of the run that was started last, or its last checkpoint if it did not finish; ""
    if there is none."""
    found = []
    for path in folder.glob("*.pt"):
        match = re.fullmatch(r".+-(\d{8}-\d{6}-[0-9a-f]{6})(?:_step(\d+))?", path.stem)
        if match:
            is_finished = match[2] is None
            found.append((match[1], is_finished, int(match[2] or 0), str(path)))
    return max(found)[-1] if found else ""


def encode(text: str, eot_token: int) -> list[int]:
    """The tokens of a text: bytes for the laptop track's vocabulary, else GPT-2's. Raises UserError
    if the text is not UTF-8."""
    try:
        # An argument that is not in the console's encoding contains its bytes as surrogates.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UserError("--prompt is not UTF-8") from None
    (tokens,) = encode_texts("bytes" if eot_token == 256 else "gpt2", [text])
    if isinstance(tokens, str):
        raise UserError(f"tiktoken can't encode --prompt: {tokens}")
    return tokens.tolist()


def decode(tokens: list[int], eot_token: int) -> str:
    """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
    if eot_token == 256:
        return bytes(tokens).decode("utf-8", errors="replace")
    import tiktoken  # encode has loaded the vocabulary
    return tiktoken.get_encoding("gpt2").decode(tokens)


@torch.no_grad()
def generate(trained: Trained, prompt: list[int], count: int, temperature: float, seed: int,
             samples: int) -> list[list[int]]:
    """`samples` texts: the prompt's tokens and `count` sampled ones. They are computed as one
    batch. The model has no cache of keys, so each token costs a forward pass over the last
    sequence_length tokens."""
    model, schedule = trained.model, trained.schedule
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    texts = torch.tensor([prompt] * samples)
    for _ in range(count):
        context = texts[:, -model.hp.sequence_length:]
        last = context.size(1) - 1
        # Lengths are padded to a multiple of 128: matrix products of a new size are slow at first.
        # The mask is causal, so the padding changes nothing.
        context = F.pad(context, (0, -context.size(1) % 128)).to(device)
        logits = model(context, None, schedule).view(*context.shape, -1)[:, last]
        logits = logits[:, :trained.eot_token].cpu()
        probabilities = (logits / temperature).softmax(-1)
        tokens = torch.multinomial(probabilities, 1, generator=generator)
        texts = torch.cat([texts, tokens], dim=1)
    return texts.tolist()


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sample", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="",
                        help="default: that of the run in records/scratch that was started last")
    parser.add_argument("--prompt", default="", help="the beginning of the text")
    parser.add_argument("--tokens", type=int, default=300, help="how many tokens to write")
    parser.add_argument("--samples", type=int, default=1, help="how many texts to write")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--script", default="", help="an edited train_gpt.py, if FILE is of one")
    args = parser.parse_args(argv)
    if args.tokens < 0:
        raise UserError(f"--tokens {args.tokens} must be at least 0")
    if args.samples < 1:
        raise UserError(f"--samples {args.samples} must be at least 1")
    if not args.temperature > 0:  # NaN is not
        raise UserError(f"--temperature {args.temperature} must be more than 0")
    if not -2**63 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} must fit into 64 bits")
    scratch = train_gpt.ROOT / "records" / "scratch"
    path = args.file or newest_file(scratch)
    if not path:
        raise UserError(f"no trained model in {scratch}; name a file, or train one: ./run.sh")
    trained = load_model(path, args.script)
    print(visible(f"{path}: {trained.description()}"), file=sys.stderr)
    prompt = [trained.eot_token, *encode(args.prompt, trained.eot_token)]
    texts = generate(
        trained, prompt, args.tokens, args.temperature, args.seed, args.samples)
    for number, tokens in enumerate(texts, start=1):
        if args.samples > 1:
            print(f"--- {number} of {args.samples}")
        for line in decode(tokens[1:], trained.eot_token).split("\n"):
            print(visible(line))
    return 0


if __name__ == "__main__":
    sys.exit(run_as_program(main))
