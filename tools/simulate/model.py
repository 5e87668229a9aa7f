"""How long a step would take: a model of what a simulated rank recorded, never a measurement.

Each kernel takes the longest of what it computes, moves and issues; kernels run one after the other on the GPU,
collectives one after the other beside them, until the script waits for one. Pure Python: no torch here.
"""
import collections
import math
from typing import NamedTuple

# The constants, fitted on public records on 8 H100s (PUBLISHED): the share of the data sheet's figure that is reached,
# and a time.
MATMUL = 0.690     # of the matrix rate by cuBLAS in bfloat16
FLEX = 0.318       # of the matrix rate by FlexAttention, forward and backward together
SDPA = 0.45        # of the matrix rate by scaled_dot_product_attention; no fitted script has it
MEMORY = 0.863     # of the memory's rate by any kernel
ISSUE = 0.813      # of one instruction a cycle for each of a multiprocessor's 4 schedulers, by the largest kernels
LAUNCH = 2.4e-6    # seconds a kernel takes besides

ERROR = 0.07  # of a prediction for 8 H100s, either way: what was found on two scripts that nothing was fitted on
FITTED_TOKENS = 49_152  # the fewest that a GPU takes in a step of a fitted record; below, the error is unknown
# Mean tokens of a document, such that ValueEmbed's windows, which grow from 64 to 1,792 in steps of 64, show a query
# 549 keys on average, as in 25,000 documents of the web.
DOCUMENT = 1044


class Card(NamedTuple):
    """A GPU, from its data sheet. Rates a second; links: what a GPU sends to the others of its node, one way."""
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared: int          # bytes of shared memory that a block may have
    memory: int          # bytes
    flops: float         # bfloat16, dense, float32 sums
    bytes: float
    clock: float         # Hz, the highest
    link: float          # bytes
    link_latency: float  # seconds a collective takes besides


GIB = 2**30
CARDS = {
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448, 85_045_870_592,
                 989.4e12, 3.35e12, 1.98e9, 427e9, 15e-6),
    "H200": Card("NVIDIA H200", (9, 0), 132, 232_448, 150_110_011_392,
                 989.4e12, 4.8e12, 1.98e9, 427e9, 15e-6),
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912, 84_974_239_744,
                 312e12, 2.039e12, 1.41e9, 285e9, 15e-6),
    "A100-40GB": Card("NVIDIA A100-SXM4-40GB", (8, 0), 108, 166_912, 42_298_834_944,
                      312e12, 1.555e12, 1.41e9, 285e9, 15e-6),
    "L40S": Card("NVIDIA L40S", (8, 9), 142, 101_376, 47_810_936_832,
                 362e12, 0.864e12, 2.52e9, 25e9, 25e-6),
    "RTX4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 101_376, 25_386_352_640,
                    165.2e12, 1.008e12, 2.52e9, 20e9, 25e-6),
    "RTX3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 101_376, 25_438_126_080,
                    71e12, 0.936e12, 1.695e9, 20e9, 25e-6),
}


class Published(NamedTuple):
    """A public record on 8 H100s beside the model. left_out: the relative error with constants fitted on the others;
    None: never fitted on."""
    record: str
    published_ms: float
    predicted_ms: float
    left_out: float | None


PUBLISHED = [
    Published("2024-12-10_MFUTweaks", 157.1, 151.4, -0.043),
    Published("2024-12-17_SparsifyEmbeds", 144.0, 143.8, -0.001),
    Published("2025-01-04_SoftCap", 148.0, 144.7, -0.027),
    Published("2025-01-13_Fp8LmHead", 136.0, 138.6, 0.022),
    Published("2025-01-16_Sub3Min", 129.7, 132.9, 0.030),
    Published("2025-01-26_BatchSize", 99.8, 102.1, 0.028),
    Published("2024-12-04_ValueEmbed", 174.1, 161.2, None),
    Published("2025-05-30_noallreduce", 100.6, 107.4, None),
]


class Shape(NamedTuple):
    """What the model must know of a step."""
    tokens: int     # of a forward pass
    model_dim: int
    vocab_size: int  # padded
    keys: float     # that a query sees, on average; FlexAttention computes the block of 128 around them too
    sampled: int = 0  # logits of a sequence where its softmax does not go over all words


class Prediction(NamedTuple):
    """Of one step on one rank."""
    ms: dict[str, float]     # by part, without what waits for collectives
    collectives: float       # ms they take
    exposed: float           # ms of it in which the GPU computes nothing
    flops: float             # of matrix products and attention
    sent: int                # bytes handed to collectives
    kernels: list[tuple[str, str, float, float]]  # (part, name, ms, launches), dearest first

    @property
    def total(self) -> float:
        """ms of the whole step."""
        return sum(self.ms.values()) + self.exposed


def visible_keys(windows: list[int], sequence_length: int) -> float:
    """Mean number of keys that a query sees through windows, cut where documents begin."""
    def mean(window: int) -> float:  # documents' lengths are exponential, so that a token's place in one is too
        return DOCUMENT * (1 - math.exp(-min(window, sequence_length) / DOCUMENT))
    return sum(map(mean, windows)) / max(len(windows), 1)


def instructions_an_element(kernel: dict) -> float:
    """Instructions that a thread executes for each element, of a generated kernel; 0 where they were not counted."""
    constants, instructions = kernel.get("constants", {}), kernel.get("instructions")
    if not instructions or not kernel["name"].startswith(("triton_poi", "triton_red")):
        return 0.0
    loops, whole = instructions
    tile = math.prod(constants.get(name, 1) for name in ("XBLOCK", "YBLOCK", "R0_BLOCK"))
    return (sum(loops) if loops else whole) * 32 * kernel["warps"] / tile


def instructions(kernels: list[dict]) -> dict[str, float]:
    """An element, by the hash of a kernel's source; of several configurations the autotuner takes the best."""
    found = collections.defaultdict(list)
    for kernel in kernels:
        if count := instructions_an_element(kernel):
            found[kernel["code"]].append(count)
    return {code: min(counts) for code, counts in found.items()}


def bytes_read(event: dict, shape: Shape) -> float:
    """Bytes a generated kernel moves: of those of its arguments (`counted` elements of each), some it reads in part."""
    name, moved = event["name"], event["moved"]
    if "tem" in name:
        return moved
    for dims, counted in zip(event["tensors"], event.get("counted", map(math.prod, event["tensors"])), strict=True):
        if math.prod(dims) == 3 * shape.tokens * shape.model_dim:  # q, k, v in one: who norms reads two, others one
            moved -= 2 * max(counted - math.prod(dims) * (2 / 3 if "rms_norm" in name else 1 / 3), 0)
        elif len(dims) == 2 and dims[1] <= 128 and dims[0] > shape.tokens:  # rotary table for longer sequences
            moved -= 4 * max(counted - math.prod(dims) * shape.tokens / dims[0], 0)
    return max(moved, 0)


def kernel_time(event: dict, counted: dict[str, float], shape: Shape, card: Card) -> tuple[str, float, float]:
    """(part of the step, seconds, FLOP) of one kernel."""
    name, generated, flops = event["name"], event["kind"] == "triton", max(event["flops"], 0)
    moved = bytes_read(event, shape) if generated else event["moved"]
    logits = 2 * shape.tokens * shape.vocab_size  # bytes of them in bfloat16
    seconds, compute, part = moved / (MEMORY * card.bytes), 0.0, "generated" if generated else "eager"
    if generated and (moved > 0.95 * logits or event["elements"] == shape.sampled > 0):
        part = "head and loss"
    if generated:
        issued = event["elements"] * counted.get(event["code"], 0) / 32
        compute = issued / (4 * card.multiprocessors * ISSUE * card.clock)
    flex = 4 * shape.tokens * (shape.keys + 128) * shape.model_dim
    if generated and "flex_attention" in name and "tem" in name:
        part, flops = "attention", (2.5 if "backward" in name else 1) * flex
        compute = flops / (FLEX * card.flops)
    elif not generated and "attention" in name:
        part, flops = "attention", flops / 2  # causal: half of what is counted
        compute = flops / (SDPA * card.flops)
    elif flops:
        part, compute = "matrix products", flops / (MATMUL * card.flops)
    return part, max(seconds, compute) + LAUNCH, flops


def collective_time(event: dict, world_size: int, card: Card) -> float:
    """Seconds of one collective among the GPUs of a node."""
    times = 2 if "allreduce" in event["name"] else 1  # a reduce-scatter and an all-gather
    return times * (world_size - 1) / world_size * event["moved"] / card.link + card.link_latency


def predict(events: list[dict], kernels: list[dict], shape: Shape, card: Card, world_size: int) -> Prediction:
    """A step from its events in order: kernels, collectives, and where the GPU waits for which collective."""
    counted = instructions(kernels)
    ms, detail, launches = collections.Counter(), collections.Counter(), collections.Counter()
    now = network = busy = total_flops = sent = 0.0
    ends: dict[int, float] = {}
    for event in events:
        if event["kind"] == "wait":
            now = max(now, ends.get(event["of"], 0.0))
        elif event["kind"] == "collective":
            seconds = collective_time(event, world_size, card)
            network = max(now, network) + seconds
            busy, sent, ends[event["number"]] = busy + seconds, sent + event["moved"], network
            now = network if event["blocking"] else now
        else:
            part, seconds, flops = kernel_time(event, counted, shape, card)
            now, total_flops = now + seconds, total_flops + flops
            ms[part] += 1e3 * seconds
            key = part, event["name"]
            detail[key] += 1e3 * seconds
            launches[key] += 1
    exposed = 1e3 * max(now, network) - sum(ms.values())
    kernels_by_time = [(*key, value, launches[key]) for key, value in detail.most_common(40)]
    return Prediction(dict(ms), 1e3 * busy, exposed, total_flops, int(sent), kernels_by_time)


def mean(predictions: list[tuple[int, Prediction]]) -> Prediction:
    """Of steps that occur so often, (times, Prediction)."""
    ms, detail, launches, numbers = (collections.Counter() for _ in range(4))
    total = sum(times for times, _ in predictions)
    for times, p in predictions:
        weight = times / total
        numbers.update(collectives=weight * p.collectives, exposed=weight * p.exposed, flops=weight * p.flops,
                       sent=weight * p.sent)
        ms.update({part: weight * value for part, value in p.ms.items()})
        detail.update({(part, name): weight * value for part, name, value, _ in p.kernels})
        launches.update({(part, name): weight * count for part, name, _, count in p.kernels})
    kernels = [(*key, value, launches[key]) for key, value in detail.most_common()]
    return Prediction(dict(ms), numbers["collectives"], numbers["exposed"], numbers["flops"], round(numbers["sent"]),
                      kernels)


def left_out_error() -> float:
    """Root mean square of the relative errors of scripts that the constants were not fitted on."""
    errors = [row.left_out for row in PUBLISHED if row.left_out is not None]
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def utilisation(prediction: Prediction, card: Card) -> float:
    """MFU: FLOP of matrix products and attention, a second of the whole step, of the card's matrix rate."""
    return prediction.flops / (1e-3 * prediction.total) / card.flops
