"""Write a trained model as a folder for Hugging Face's transformers.

    python -m tools.export FILE DIR                      # FILE: records/scratch/<run_id>.pt
    python -m tools.export FILE DIR --push USER/NAME     # and upload it

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

The folder holds the weights, the training script as it is, a short file that makes its model one of
transformers, the tokenizer, and a model card. It needs no file of this repository.
"""
import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from data import UserError, path_argument, run_as_program, say, visible
from data.encoders import load_encoding
from tools.sample import Trained, load_model

END_OF_TEXT = "<|endoftext|>"
MOST_CONTEXT = 16_384  # tokens at once, because of the memory of their logits
LICENSES = {  # of the text that a track trains on
    "fineweb": "FineWeb, [ODC-By 1.0](https://huggingface.co/datasets/HuggingFaceFW/fineweb)",
    "laptop": "the Python source of torch, [BSD-3](https://github.com/pytorch/pytorch)"}


def config_of(trained: Trained) -> dict:
    """config.json. Names that transformers and the evaluation harness know have their meaning."""
    hp = trained.model.hp
    return {
        "model_type": "gpt_speedrun",
        "architectures": ["SpeedrunForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_speedrun.SpeedrunConfig",
                     "AutoModelForCausalLM": "modeling_speedrun.SpeedrunForCausalLM"},
        "vocab_size": trained.model.embed.num_embeddings,  # padded, as the loss counts it
        "hidden_size": hp.model_dim,
        "num_hidden_layers": len(hp.layers),
        "num_attention_heads": hp.num_heads,
        "max_position_embeddings": min(hp.val_length, MOST_CONTEXT),
        **special_ids(trained),
        "use_cache": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "activations": trained.info["activations"],
        "step": trained.progress["step"],
        "hyperparameters": {**dataclasses.asdict(hp), "device": "auto"}}


def special_ids(trained: Trained) -> dict:
    """The end-of-text token begins a document, ends it and pads a batch."""
    return {f"{name}_token_id": trained.eot_token for name in ("bos", "eos", "pad")}


def generation_config_of(trained: Trained) -> dict:
    """generation_config.json: what fills the vocabulary up to a multiple of 128 is not written."""
    unused = range(trained.eot_token + 1, trained.model.embed.num_embeddings)
    return {**special_ids(trained), "use_cache": False, "suppress_tokens": list(unused)}


# --- Tokenizer ------------------------------------------------------------------------------------


def byte_ranks(eot_token: int) -> dict[bytes, int]:
    """The id of each token as bytes: of the laptop track's, else of GPT-2's. Raises UserError if
    GPT-2's vocabulary is not here."""
    if eot_token == 256:
        return {bytes([byte]): byte for byte in range(256)}
    load_encoding("gpt2")
    import tiktoken
    return tiktoken.get_encoding("gpt2")._mergeable_ranks


def byte_characters() -> list[str]:
    """The character by which GPT-2's files write each byte: itself if it is visible."""
    is_visible = [33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174 for byte in range(256)]
    invisible = [byte for byte in range(256) if not is_visible[byte]]
    return [chr(byte if is_visible[byte] else 256 + invisible.index(byte)) for byte in range(256)]


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte-pair encoding merges last to form this one."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        first = pairs.index(min(pairs))
        parts[first:first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def tokenizer_of(ranks: dict[bytes, int], eot_token: int) -> dict:
    """tokenizer.json: byte-pair encoding, with the end-of-text token before each text, because the
    model has seen each document begin so."""
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [[written(part) for part in merge_of(token, ranks)]
              for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    has_merges = bool(merges)
    bytes_to_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                           "use_regex": has_merges}
    start = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    text_a, text_b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{
            "id": eot_token, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True}],
        "pre_tokenizer": bytes_to_characters,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, text_a],
            "pair": [start, text_a, text_b],
            "special_tokens": {END_OF_TEXT: {
                "id": END_OF_TEXT, "ids": [eot_token], "tokens": [END_OF_TEXT]}}},
        "decoder": bytes_to_characters,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {written(token): rank for token, rank in ranks.items()}, "merges": merges}}


def tokenizer_config_of(config: dict) -> dict:
    """tokenizer_config.json."""
    specials = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad", "unk")}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **specials,
            "model_max_length": config["max_position_embeddings"], "padding_side": "left",
            "clean_up_tokenization_spaces": False}


# --- Model card -----------------------------------------------------------------------------------


def card_of(trained: Trained) -> str:
    """README.md, the model card."""
    hp, info, progress = trained.model.hp, trained.info, trained.progress
    step = progress["step"]

    def loss(name):
        return "not computed" if progress.get(name) is None else f"{progress[name]:.4f}"

    status = (f"Measured by this one run on {info['world_size']} x {info['device']}, "
              f"{info['threads']} threads, torch {info['torch']}, {info['activations']}. One run "
              "shows no spread.")
    if hp.val_tokens:
        status += f" The loss is over {hp.val_tokens:,} tokens only, so it is no result."
    if step < hp.num_steps:
        status += " The run was not finished."
    held_out = loss("held_out_loss")
    if progress.get("held_out_tokens"):
        held_out += f" ({progress['held_out_tokens']:,} tokens after the validation's, read once)"
    commit = info.get("git_commit") or "unknown"
    rows = {
        "track": hp.track,
        "validation loss": f"{loss('validation_loss')} nats per token",
        "loss on a held-out slice": held_out,
        "steps": f"{step:,} of {hp.num_steps:,}",
        "training tokens": f"{trained.script.tokens_before(step, hp):,}",
        "training time": f"{progress['train_ms'] / 1000:.1f} s",
        "data fingerprint": info["data_fingerprint"],
        "training text": LICENSES.get(hp.track, "the user's own"),
        "run": info["run_id"],
        "script": f"`train_gpt.py` in this folder, SHA-256 {info['code_hash']}",
        "commit": commit + (" with changes" if info.get("git_dirty") else ""),
        "license of the code": "MIT",
    }
    table = "\n".join(f"| {name} | {visible(text)} |" for name, text in rows.items())
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, speedrun]
---
# {hp.track}, {loss('validation_loss')} after {step:,} steps

A language model of a speedrun of GPT-2 training. Its ideas come from
[modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt).

| | |
|---|---|
{table}

{status}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))
```

Documents begin at the end-of-text token, which the tokenizer puts before each text. The model was
not tuned to follow instructions, and it writes whatever the training text makes probable.
"""


# --- Writing --------------------------------------------------------------------------------------


def write_folder(trained: Trained, folder: Path) -> None:
    """Write all files. Raises UserError if safetensors or the vocabulary is missing."""
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        raise UserError("the package safetensors is not installed; run: pip install safetensors, "
                        "and to load the folder: pip install transformers") from None
    config = config_of(trained)
    tokenizer = tokenizer_of(byte_ranks(trained.eot_token), trained.eot_token)
    texts = {
        "config.json": config,
        "generation_config.json": generation_config_of(trained),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config_of(config)}
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(card_of(trained), encoding="utf-8")
    shutil.copy(trained.script.__file__, folder / "train_gpt.py")
    shutil.copy(Path(__file__).with_name("modeling_speedrun.py"), folder)
    tensors = {**trained.model.state_dict(), **dict(trained.model.named_buffers())}
    weights = {f"model.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def push(folder: Path, name: str) -> str:
    """Upload the folder as the model USER/NAME; a new one is private. Returns its address. Raises
    UserError."""
    try:
        from huggingface_hub import HfApi
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # its network libraries have many classes of errors
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"can't upload {folder} as {name}: {reason}; log in with: hf auth login, "
                        f"then: hf upload {name} {folder}") from None
    return str(url)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=path_argument, help="a finished run's weights, or a "
                                                         "checkpoint")
    parser.add_argument("dir", type=path_argument, help="a folder that does not exist yet")
    parser.add_argument("--push", default="", metavar="USER/NAME",
                        help="upload it to huggingface.co")
    parser.add_argument("--script", default="", help="an edited train_gpt.py, if FILE is of one")
    args = parser.parse_args(argv)
    folder = Path(os.path.abspath(args.dir))
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already; name another folder, or: rm -r {folder}")
    trained = load_model(str(args.file), args.script)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # It gets its name when it is complete.
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / "export"
        unfinished.mkdir()
        write_folder(trained, unfinished)
        os.rename(unfinished, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(visible(f"{trained.description()}: exported to {folder} ({size / 1e6:.1f} MB)"))
    if args.push:
        say(visible(f"uploaded to {push(folder, args.push)}"))
    return 0


if __name__ == "__main__":
    sys.exit(run_as_program(main))
