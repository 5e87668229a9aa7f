"""Take each protection away, in a copy of the repository, and see that its test fails.

    python -m tests.mutations            # about 3 minutes on 2 cores; exit code 1 if a test does not notice
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN, FETCH, RESUME = "train_gpt.py", "data/fineweb.py", "tests/test_resume.py"
MUTATIONS = [  # protection; file, the code that protects, what stands in its place; the test that must fail
    ("1 atomic checkpoints", TRAIN, "path.with_suffix(\".tmp\")", "path", f"{RESUME} -k "
     "killed_at_twenty"),
    ("1 weights_only", TRAIN, "weights_only=True, mmap", "weights_only=False, mmap", f"{RESUME} -k run_code"),
    ("1 code hash compared", TRAIN, '"activations", "code_hash", "data_fingerprint"}', '"activations"}',
     "tests/test_runs.py -k does_not_belong"),
    ("1 state of all ranks", TRAIN, "name: self.gather(mine)[:self.rows]",
     "name: torch.cat([mine] * self.world_size)[:self.rows]", f"{RESUME} -k another_number"),
    ("2 momentum is restored", TRAIN, "mine[:len(share)].copy_(share)", "pass", "tests/test_runs.py -k bit_for_bit"),
    ("2 the loader's position", TRAIN, "BatchLoader(train_stream, hp, runtime, progress.step)",
     "BatchLoader(train_stream, hp, runtime)", "tests/test_runs.py -k bit_for_bit"),
    ("2 Adam's waiting gradients", TRAIN, "whole = last or step % hp.adam_every == 0", "whole = True",
     f"{RESUME} -k 'all_stages or holds_no'"),
    ("2 the untying", TRAIN, "if schedule.unties:", "if False:", f"{RESUME} -k all_stages"),
    ("2 documents are cut", TRAIN, "min(end - start, cut, missing)", "min(end - start, missing)",
     "tests/test_loader.py -k cut_and_packed"),
    ("3 signals are heeded", TRAIN, "marks[1].fill_(self.signal)", "pass", f"{RESUME} -k 'signals_end and 15'"),
    ("3 all ranks agree", TRAIN, "dist.all_reduce(marks, op=dist.ReduceOp.MAX)", "pass", f"{RESUME} -k to_one_of_two"),
    ("3 second signal", TRAIN, "now - self.signalled_at > soon", "False", f"{RESUME} -k second_signal"),
    ("3 at once before the first step", TRAIN, "if self.saves and not self.signal:", "if not self.signal:",
     f"{RESUME} -k 'while_compiling and 15'"),
    ("3 the dead rank is named", "launch.py", "was killed by signal", "ended with", f"{RESUME} -k dies"),
    ("4 finite loss", TRAIN, "~value.isfinite()", "False", f"{RESUME} -k 'not_finite'"),
    ("4 finite gradients", TRAIN, "self.gradient_sum = torch.stack([bucket.reduce() for bucket in due]).sum()",
     "[bucket.reduce() for bucket in due]",
     f"{RESUME} -k 'the_check_sees'"),
    ("5 full disk", TRAIN, "except (OSError, RuntimeError) as error:  # torch turns",
     "except KeyError as error:  #",
     f"{RESUME} -k 'full_disk'"),
    ("5 log that cannot grow", TRAIN, "except OSError as error:\n                self.fail(",
     "except KeyError as error:\n                self.fail(", f"{RESUME} -k 'cannot_grow'"),
    ("6 size of a shard", TRAIN, "(size - start) / 2]", "found[2]]",
     "tests/test_fuzz.py -k shards"),
    ("6 ids beyond the vocabulary", TRAIN, "if part.max() >= self.track.vocab_size:", "if False:",
     "tests/test_fuzz.py -k shards"),
    ("6 foreign checkpoints", TRAIN, "    except Exception as error:\n        raise UserError(f\"can't resume",
     "    except KeyError as error:\n        raise UserError(f\"can't resume", "tests/test_fuzz.py -k checkpoints"),
    ("6 ranges of flags", TRAIN, "not low <= value <= high:  # nor NaN", "False:",
     "tests/test_fuzz.py -k hyperparameters"),
    ("7 tries again", FETCH, "range(TRIES)", "range(1)", "tests/test_fineweb.py -k 'busy or breaks'"),
    ("7 compares SHA-256", FETCH, 'if sha256 in (None, found) else', 'if True else',
     "tests/test_fineweb.py -k wrong_bytes"),
    ("7 checks before the final name", FETCH, "problem = wrong_content(path, sha256)", 'problem = ""',
     "tests/test_fineweb.py -k bad_content"),
    ("7 shards are counted", "launch.py", "and reads_beyond(module, hp)", "and False",
     "tests/test_launch.py -k shards_are_counted"),
    ("7 and that the last one is read", "launch.py", "len(stream.documents) - 1", "len(stream.documents)",
     "tests/test_launch.py -k to_the_token"),
    ("8 validations are over all words", TRAIN, "words = schedule.words if torch.is_grad_enabled() else 0",
     "words = schedule.words", "tests/test_model.py -k over_all_words"),
    ("8 fair play: the mask", "tests/fair_play.py", "[:position].abs().max() > TOLERANCE", "[:0].numel() > 0",
     "tests/test_fair_play.py -k 'cheats and next'"),
    ("8 fair play: the loss", "tests/fair_play.py", "/ 512 - loss) > TOLERANCE", "/ 512 - loss) > 1e9",
     "tests/test_fair_play.py -k 'cheats and less'"),
    ("8 fair play: the warm-up", "tests/fair_play.py", "if not torch.equal(value, weights[name]):", "if False:",
     "tests/test_fair_play.py -k 'cheats and keeps'"),
]


def survives(file: str, protection: str, replacement: str, test: str) -> bool:
    """Whether the test passes though the protection is gone."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv*", ".cache", "*.bin", "scratch"))
        source = (copy / file).read_text()
        assert source.count(protection) == 1, f"{file} has {source.count(protection)} times: {protection}"
        (copy / file).write_text(source.replace(protection, replacement))
        done = subprocess.run(f"{sys.executable} -m pytest -q -x {test}", shell=True, cwd=copy, capture_output=True,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode in (0, 1) and "no tests ran" not in done.stdout, done.stdout[-2000:]
        return done.returncode == 0


def main() -> int:
    """Prints a line a protection; 1 if a test did not notice that it is gone."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    unnoticed = 0
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda mutation: survives(*mutation[1:]), MUTATIONS)
        for (name, *_, test), alive in zip(MUTATIONS, outcomes, strict=True):
            unnoticed += alive
            print(f"{'NOT NOTICED' if alive else 'noticed':12} {name:32} {test}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
