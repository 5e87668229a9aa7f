"""Let a checkpoint of train_gpt.py write text.

    python -m tools.sample                                        # the newest checkpoint
    python -m tools.sample CHECKPOINT --prompt "def main():" --tokens 300

Checkpoints are saved by `./run.sh --save_every N`, and when a signal stops a run. The model and the
tracks are those of train_gpt.py, so a checkpoint of an edited copy may not fit.
"""
import argparse
import sys

import torch
import torch.nn.functional as F

import train_gpt
from data import UserError, run_as_program, visible
from data.encoders import encode_texts


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
def generate(model: "train_gpt.GPT", tokens: list[int], count: int, temperature: float, seed: int,
             step: int) -> list[int]:
    """Append `count` sampled tokens to `tokens`. step: the checkpoint's, for the schedule. The
    model has no cache of keys, so each token costs a forward pass over the last sequence_length
    tokens."""
    hp = model.hp
    eot_token = train_gpt.TRACKS[hp.track].eot_token
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    schedule = train_gpt.Schedule(step, hp, device)
    tokens = list(tokens)
    for _ in range(count):
        context = torch.tensor([tokens[-hp.sequence_length:]], device=device)
        last = context.size(1) - 1
        # Lengths are padded to a multiple of 128: matrix products of a new size are slow at first.
        # The mask is causal, so the padding changes nothing.
        context = F.pad(context, (0, -context.size(1) % 128))
        logits = model(context, None, schedule)[last, :eot_token]
        probabilities = (logits.cpu() / temperature).softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1, generator=generator).item())
    return tokens


def load_model(path: str) -> tuple["train_gpt.GPT", int]:
    """(the model of a checkpoint, its step). Raises UserError."""
    saved = train_gpt.open_checkpoint(path)
    hp = train_gpt.parse_arguments(["--resume", path])
    device = torch.device("cuda" if hp.use_cuda else "cpu")
    dtype = getattr(torch, saved["info"]["activations"])
    model = train_gpt.build_model(hp, device, dtype, flex=False)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError:  # names each weight that differs
        script = saved["info"].get("script")
        raise UserError(f"the checkpoint {path} is of another model than that of train_gpt.py; its "
                        f"script was {script}") from None
    return model, saved["progress"]["step"]


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sample", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="",
                        help="default: the newest one in records/scratch")
    parser.add_argument("--prompt", default="", help="the beginning of the text")
    parser.add_argument("--tokens", type=int, default=300, help="how many tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.tokens < 0:
        raise UserError(f"--tokens {args.tokens} must be at least 0")
    if not args.temperature > 0:  # NaN is not
        raise UserError(f"--temperature {args.temperature} must be more than 0")
    if not -2**63 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} must fit into 64 bits")
    scratch = train_gpt.ROOT / "records" / "scratch"
    path = args.checkpoint or train_gpt.newest_checkpoint(scratch, track="")
    if not path:
        raise UserError(f"no checkpoint in {scratch}; name one, or train with --save_every")
    print(visible(f"checkpoint: {path}"), file=sys.stderr)
    try:
        model, step = load_model(path)
    except train_gpt.UserError as error:
        raise UserError(str(error)) from None
    eot_token = train_gpt.TRACKS[model.hp.track].eot_token
    tokens = [eot_token, *encode(args.prompt, eot_token)]
    tokens = generate(model, tokens, args.tokens, args.temperature, args.seed, step)
    for line in decode(tokens[1:], eot_token).split("\n"):
        print(visible(line))
    return 0


if __name__ == "__main__":
    sys.exit(run_as_program(main))
