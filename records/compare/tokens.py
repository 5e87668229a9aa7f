"""Tokens: how many a run has read at a step, also where its batch grows from stage to stage."""
import ast
import math
import re

from .logs import Run, code_of

MOST_TOKENS = 10**12  # a step
MOST_CODE = 2**14     # characters that are parsed: too few to be nested deeper than the parser bears
# What begins at a line's beginning with these words, and the indented lines below.
STAGE, STAGES = (re.compile(rf"^{words}\b.*\n(?:[ \t)}}\]].*\n|\n)*", re.M) for words in ("class Stage", "STAGES"))


def stages_of(run: Run) -> list[tuple[float, int]] | None:
    """(step at its end, tokens a step over all ranks) of each stage, in order; the last one ends at inf. None where the
    log does not tell.

    No log tells the steps at which stages end: they are shares of the run in the embedded script, see stage_rows.
    """
    told, settings = run.facts.get("stage_tokens"), run.hyperparameters
    if isinstance(told, list) and told and told == told[:1] * len(told):
        return [(math.inf, told[0])] if is_size(told[0]) else None
    sizes = [settings.get(name) for name in ("batch_size", "sequence_length")]
    if not all(map(is_size, sizes)):
        return None
    code = code_of(run).decode("utf-8", errors="replace") if run.code_span else ""
    if not re.search(r"\bSTAGES\b", code):
        if told or settings.get("extension_steps"):  # only runs in stages end in an extension
            return None
        ends, tokens = [math.inf], [math.prod(sizes)]
    else:
        try:
            rows = stage_rows(code, run.track)
            scheduled = settings["num_steps"] - settings["extension_steps"]
            ends = [*(round(until * scheduled) for until, _ in rows[:-1]), math.inf]
        except (SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError, MemoryError):
            return None
        tokens = [batch * math.prod(sizes) for _, batch in rows]
    fits = told in (None, tokens) and [0, *ends] == sorted([0, *ends]) and all(map(is_size, tokens))
    return list(zip(ends, tokens, strict=True)) if fits else None


def is_size(value) -> bool:
    """Whether a log's value can be a number of tokens."""
    return type(value) is int and 0 < value <= MOST_TOKENS


def stage_rows(code: str, track: str) -> list[tuple[float, float]]:
    """(until, batch) of each stage of a track in a script's table STAGES: its end as a share of the scheduled steps,
    and how many times batch_size a step has. The script is parsed, not run.

    Raises ValueError, SyntaxError and what else comes of a table that is not as train_gpt.py writes it.
    """
    code = code.replace("\r\n", "\n") + "\n"
    parts = [found for pattern in (STAGE, STAGES) for found in pattern.findall(code)]
    if len(parts) != 2 or sum(map(len, parts)) > MOST_CODE:
        raise ValueError("not one class Stage and one table STAGES")
    match ast.parse("".join(parts)).body:
        case [ast.ClassDef(body=lines), ast.Assign(targets=[ast.Name(id="STAGES")], value=ast.Dict() as table)]:
            names = [line.target.id for line in lines
                     if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
        case _:
            raise ValueError("STAGES is no table")
    tracks = {ast.literal_eval(key): value for key, value in zip(table.keys, table.values, strict=True)}
    match tracks.get(track, tracks["laptop"]):  # as of_track
        case ast.Tuple(elts=rows) if rows:
            return [tuple(number_of(field_of(row, names, name)) for name in ("until", "batch")) for row in rows]
    raise ValueError(f"no stages of {track}")


def field_of(row: ast.expr, names: list[str], name: str) -> ast.expr:
    """What a row Stage(...) of the table has in a field. names: of all fields, in order."""
    match row:
        case ast.Call(func=ast.Name(id="Stage"), args=values, keywords=keywords):
            return {**dict(zip(names, values, strict=False)), **{word.arg: word.value for word in keywords}}[name]
    raise ValueError("a row is no Stage(...)")


def number_of(value: ast.expr) -> float:
    """A number, math.inf, or a quotient of numbers. Raises ValueError where it is something else."""
    match value:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Attribute(value=ast.Name(id="math"), attr="inf"):
            return math.inf
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return number_of(left) / number_of(right)
    raise ValueError("not a number")


def tokens_before(step: int, stages: list[tuple[float, int]]) -> int:
    """Tokens that steps 0 to step - 1 train on, over all ranks; stages: as stages_of tells them."""
    begins = [0, *(end for end, _ in stages)]
    return sum(max(min(step, end) - begin, 0) * tokens
               for begin, (end, tokens) in zip(begins, stages, strict=False))
