"""A performance model: how long a step that a simulated rank recorded would take. No torch here.

The time of a kernel is the largest of three: its arithmetic, its memory traffic and its
instructions, each at a fixed share of the card's rate. Kernels run one after the other. Collectives
run one after the other beside the kernels, until the script waits for one. These are predictions,
never measurements.
"""
import collections
import itertools
import math
from typing import NamedTuple

# Constants fitted on records of modded-nanogpt on 8 H100s (PUBLISHED): the share of the data
# sheet's rate that kernels reach, and one time.
MATMUL = 0.690     # of the matrix rate: cuBLAS in bfloat16, and products in Triton kernels
FLEX = 0.318       # of the matrix rate: FlexAttention, forward and backward together
SDPA = 0.45        # of the matrix rate: scaled_dot_product_attention; no fitted script uses it
MEMORY = 0.863     # of the memory bandwidth: any kernel
ISSUE = 0.813      # of one instruction a cycle on each of a multiprocessor's 4 schedulers
LAUNCH = 2.4e-6    # seconds that each kernel takes in addition
# Of twice the matrix rate: torch._scaled_mm (FP8). Not fitted: one H200 reached 0.53 to 0.74 in the
# products of a head (records/studies/2026-11-28_H200).
FP8 = 0.55

# Relative error of a prediction for 8 H100s: the error on two scripts that nothing was fitted on.
ERROR = 0.07
# The fewest tokens a GPU in a step of a fitted record. Below that, the error is unknown.
FITTED_TOKENS = 49_152
# Mean tokens of a document. With it, the windows of ValueEmbed, which grow from 64 to 1,792 in
# steps of 64, show a query 549 keys on average, as they do in 25,000 documents of the web.
DOCUMENT = 1044


class Card(NamedTuple):
    """A GPU, from its data sheet. Rates are per second; link: one way to the GPUs of its node."""
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared: int          # largest shared memory of a block, bytes
    memory: int          # bytes
    flops: float         # bfloat16, dense, accumulated in float32
    bytes: float         # of memory traffic
    clock: float         # highest, Hz
    link: float          # bytes
    link_latency: float  # seconds that each collective takes in addition


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
    """A record of modded-nanogpt on 8 H100s: its published time of a step, and the model's."""
    record: str
    published_ms: float
    predicted_ms: float
    left_out: float | None  # relative error with constants fitted on the other records; None: the
    #                         constants were never fitted on this one


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


class Measured(NamedTuple):
    """What one H200 measured, divided by what this model had predicted, at one size of step."""
    tokens: int               # of a step, on the GPU
    ratios: dict[str, float]  # by part
    between: float            # ms of a step that pass between its kernels, which no part has


# The table of records/studies/2026-11-28_H200/details.md. Collectives were not measured.
MEASURED_CAPABILITY = (9, 0)  # of the cards that it may hold for
MEASURED = [
    Measured(16_384, {"matrix products": 0.92, "attention": 1.66, "head and loss": 0.79,
                      "generated": 1.19, "eager": 1.24}, 3.8),
    Measured(32_768, {"matrix products": 0.92, "attention": 1.28, "head and loss": 0.89,
                      "generated": 1.17, "eager": 1.39}, 2.6),
    Measured(49_152, {"matrix products": 0.93, "attention": 1.12, "head and loss": 1.09,
                      "generated": 1.11, "eager": 1.51}, 1.5),
]


class Shape(NamedTuple):
    """What the model must know of a step."""
    tokens: int            # of a forward pass
    model_dim: int
    vocab_size: int        # padded
    keys: float            # mean number of keys that a query sees
    sampled_logits: int = 0  # logits of a sequence with a sampled softmax; 0: the full softmax


class Prediction(NamedTuple):
    """One step on one rank."""
    ms: dict[str, float]     # by part, without waiting for collectives
    collectives: float       # ms that collectives take
    exposed: float           # ms of it in which the GPU computes nothing
    flops: float             # of matrix products and attention
    sent: int                # bytes handed to collectives
    launches: float          # kernels that the host starts
    # (part, name, ms, launches), the most expensive first
    kernels: list[tuple[str, str, float, float]]

    @property
    def total(self) -> float:
        """ms of the whole step."""
        return sum(self.ms.values()) + self.exposed

    def by_measured_ratios(self, tokens: int) -> float | None:
        """ms of the whole step of this many tokens on a GPU, corrected by MEASURED; None if it has
        fewer tokens than any that was measured."""
        if tokens < MEASURED[0].tokens:
            return None

        def distance(row):
            return abs(math.log(row.tokens / tokens))

        nearest = min(MEASURED, key=distance)
        parts = sum(ms * nearest.ratios[part] for part, ms in self.ms.items())
        return parts + self.exposed + nearest.between


def visible_keys(windows: list[int], sequence_length: int) -> float:
    """Mean number of keys that a query sees through the windows, within its document.

    The lengths of documents are taken to be exponential, so a token's position in its document is
    exponential too.
    """
    total = 0.0
    for window in windows:
        limit = min(window, sequence_length)
        total += DOCUMENT * (1 - math.exp(-limit / DOCUMENT))
    return total / max(len(windows), 1)


def instructions_per_element(kernel: dict) -> float:
    """Instructions of a thread for each element of a generated kernel; 0 if they are unknown."""
    constants, instructions = kernel.get("constants", {}), kernel.get("instructions")
    if not instructions or not kernel["name"].startswith(("triton_poi", "triton_red")):
        return 0.0
    loops, all_instructions = instructions
    tile = math.prod(constants.get(name, 1) for name in ("XBLOCK", "YBLOCK", "R0_BLOCK"))
    return (sum(loops) if loops else all_instructions) * 32 * kernel["warps"] / tile


def instructions(kernels: list[dict]) -> dict[str, float]:
    """Instructions for each element, by the hash of a kernel's source.

    A kernel may have several configurations; the autotuner takes the best.
    """
    found = {}
    for kernel in kernels:
        count = instructions_per_element(kernel)
        if count:
            code = kernel["code"]
            found[code] = min(count, found.get(code, count))
    return found


def bytes_moved(event: dict, shape: Shape) -> float:
    """Bytes that a generated kernel moves. It may read only a part of an argument.

    event["counted"] has the elements of each argument that its source reads or writes.
    """
    moved = event["moved"]
    if "tem" in event["name"]:
        return moved
    tensors = event["tensors"]
    counts = event.get("counted", [math.prod(dims) for dims in tensors])
    for dims, counted in zip(tensors, counts, strict=True):
        elements = math.prod(dims)
        if elements == 3 * shape.tokens * shape.model_dim:  # Q, K and V in one tensor
            share = 2 / 3 if "rms_norm" in event["name"] else 1 / 3  # the norm reads Q and K
            moved -= 2 * max(counted - elements * share, 0)
        elif len(dims) == 2 and dims[1] <= 128 and dims[0] > shape.tokens:
            # a rotary table for longer sequences
            moved -= 4 * max(counted - elements * shape.tokens / dims[0], 0)
    return max(moved, 0)


def as_matrices(dims: list[int]) -> set[tuple[int, tuple[int, int]]]:
    """(batch, (rows, columns)) of a tensor: the dimensions before the last two belong to the rows,
    or are a batch."""
    if len(dims) < 2:
        return set()
    return {(1, (math.prod(dims[:-1]), dims[-1])), (math.prod(dims[:-2]), tuple(dims[-2:]))}


def product_of(left: tuple[int, int], right: tuple[int, int], result: tuple[int, int]) -> int:
    """FLOP of result = left x right, where each may be transposed; 0 if the shapes do not fit."""
    for M, K in (left, left[::-1]):
        for rows, N in (right, right[::-1]):
            if rows == K and result in ((M, N), (N, M)):
                return 2 * M * N * K
    return 0


def product_flops(tensors: list[list[int]]) -> int:
    """FLOP of the product in a kernel with these arguments: the largest product of which all three
    matrices are among them; 0 if there is none."""
    largest = 0
    for i, result in enumerate(tensors):
        others = tensors[:i] + tensors[i + 1:]
        for left, right in itertools.combinations_with_replacement(others, 2):
            for a, b, c in itertools.product(*map(as_matrices, (left, right, result))):
                if a[0] == b[0] == c[0]:
                    largest = max(largest, a[0] * product_of(a[1], b[1], c[1]))
    return largest


def is_flex(event: dict) -> bool:
    """Whether a generated kernel is FlexAttention's."""
    return "flex_attention" in event["name"] and "tem" in event["name"]


def elements_of_q_and_v(event: dict, shape: Shape) -> list[int]:
    """Numbers in Q and in V of a FlexAttention kernel, whose first arguments are Q, K and V. Where
    they lie in one tensor with others, all heads together are as wide as the model."""
    most = shape.tokens * shape.model_dim
    if len(event["tensors"]) < 3:
        return [most, most]
    q, _, v, *_ = event["tensors"]
    return [min(math.prod(q), most), min(math.prod(v), most)]


def codes_with_products(kernels: list[dict]) -> set[str]:
    """The hashes of the sources of Triton kernels that compute a matrix product."""
    return {kernel["code"] for kernel in kernels if kernel.get("products")}


def unknown_work(events: list[dict], kernels: list[dict]) -> set[str]:
    """The names of what is counted by its bytes alone, although it may do more: operations that
    the script has registered, and Triton kernels with products whose FLOP the shapes do not tell.
    FlexAttention's kernels have a rule of their own."""
    codes = codes_with_products(kernels)
    names = {event["name"] for event in events if event.get("registered")}
    for event in events:
        if event["kind"] == "triton" and event["code"] in codes and not is_flex(event):
            if not product_flops(event["tensors"]):
                names.add(event["name"])
    return names


def kernel_time(event: dict, counted: dict[str, float], shape: Shape, card: Card,
                with_product: bool = False) -> tuple[str, float, float]:
    """(part of the step, seconds, FLOP) of one kernel.

    counted: instructions() of all kernels. with_product: it is a Triton kernel with a product.
    """
    name, flops = event["name"], max(event["flops"], 0)
    generated = event["kind"] == "triton"
    moved = bytes_moved(event, shape) if generated else event["moved"]
    part = "generated" if generated else "eager"
    compute = 0.0  # seconds of arithmetic or of instructions
    if generated:
        logit_bytes = 2 * shape.tokens * shape.vocab_size  # in bfloat16
        if moved > 0.95 * logit_bytes or event["elements"] == shape.sampled_logits > 0:
            part = "head and loss"
        issued = event["elements"] * counted.get(event["code"], 0) / 32
        compute = issued / (4 * card.multiprocessors * ISSUE * card.clock)
    if with_product:
        flops = product_flops(event["tensors"])
    if generated and is_flex(event):
        # FlexAttention also computes the block of 128 keys at the end of what a query sees.
        forward_flops = 2 * (shape.keys + 128) * sum(elements_of_q_and_v(event, shape))
        part = "attention"
        flops = (2.5 if "backward" in name else 1) * forward_flops
        compute = flops / (FLEX * card.flops)
    elif not generated and "attention" in name:
        part = "attention"
        flops = flops / 2  # causal: half of what is counted
        compute = flops / (SDPA * card.flops)
    elif flops:
        part = "matrix products"
        rate = 2 * FP8 if name == "_scaled_mm" else MATMUL
        compute = max(compute, flops / (rate * card.flops))
    seconds = max(moved / (MEMORY * card.bytes), compute) + LAUNCH
    return part, seconds, flops


def collective_time(event: dict, world_size: int, card: Card) -> float:
    """Seconds of one collective among the GPUs of a node."""
    times = 2 if "allreduce" in event["name"] else 1  # a reduce-scatter and an all-gather
    return times * (world_size - 1) / world_size * event["moved"] / card.link + card.link_latency


def predict(events: list[dict], kernels: list[dict], shape: Shape, card: Card,
            world_size: int) -> Prediction:
    """A step, from its events in order: kernels, collectives, and waits for collectives."""
    counted = instructions(kernels)
    with_products = codes_with_products(kernels)
    ms, detail, launches = collections.Counter(), collections.Counter(), collections.Counter()
    now = 0.0      # seconds, of the kernels
    network = 0.0  # seconds, when the last collective ends
    collective_seconds = total_flops = sent = 0.0
    ends: dict[int, float] = {}  # when each collective ends
    for event in events:
        if event["kind"] == "wait":
            now = max(now, ends.get(event["of"], 0.0))
        elif event["kind"] == "collective":
            seconds = collective_time(event, world_size, card)
            network = max(now, network) + seconds
            ends[event["number"]] = network
            collective_seconds += seconds
            sent += event["moved"]
            if event["blocking"]:
                now = network
        else:
            part, seconds, flops = kernel_time(event, counted, shape, card,
                                               event.get("code") in with_products)
            now += seconds
            total_flops += flops
            ms[part] += 1e3 * seconds
            detail[part, event["name"]] += 1e3 * seconds
            launches[part, event["name"]] += 1
    exposed = 1e3 * max(now, network) - sum(ms.values())
    expensive = [(*key, value, launches[key]) for key, value in detail.most_common(40)]
    return Prediction(ms=dict(ms), collectives=1e3 * collective_seconds, exposed=exposed,
                      flops=total_flops, sent=int(sent), launches=launches.total(),
                      kernels=expensive)


def mean(predictions: list[tuple[int, Prediction]]) -> Prediction:
    """The mean of predictions, each given with the number of steps that it stands for."""
    ms, detail, launches = collections.Counter(), collections.Counter(), collections.Counter()
    collective_ms = exposed = flops = sent = num_launches = 0.0
    total = sum(times for times, _ in predictions)
    for times, prediction in predictions:
        weight = times / total
        collective_ms += weight * prediction.collectives
        exposed += weight * prediction.exposed
        flops += weight * prediction.flops
        sent += weight * prediction.sent
        num_launches += weight * prediction.launches
        for part, value in prediction.ms.items():
            ms[part] += weight * value
        for part, name, value, count in prediction.kernels:
            detail[part, name] += weight * value
            launches[part, name] += weight * count
    kernels = [(*key, value, launches[key]) for key, value in detail.most_common()]
    return Prediction(ms=dict(ms), collectives=collective_ms, exposed=exposed, flops=flops,
                      sent=round(sent), launches=num_launches, kernels=kernels)


def left_out_error() -> float:
    """Root mean square of the relative errors on scripts left out of the fit."""
    errors = [row.left_out for row in PUBLISHED if row.left_out is not None]
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def utilization(prediction: Prediction, card: Card) -> float:
    """MFU: the FLOP/s of matrix products and attention over a step, as a share of the card's."""
    return prediction.flops / (1e-3 * prediction.total) / card.flops
