"""Run one rank of a training script on simulated GPUs, and record what it does.

    python -m tools.simulate.node REQUEST

REQUEST is JSON. __main__.py starts this in a process of its own, on the runtime of fakecudart.cpp.
The record holds what the rank compiles, allocates, sends and waits for. These are real: the script
from its first line to its last, dynamo with its guards, inductor's code, Triton and ptxas for the
card, autograd, the allocations of the generated code, and the order of the collectives. No kernel
runs and no number is computed: tensors are FakeTensors, and the process group is torch's fake one.
"""
import ast
import collections
import concurrent.futures
import contextvars
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import weakref
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
import torch.distributed as dist
import triton
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction, MockTensor

from tools.simulate import stages
from tools.simulate.model import CARDS, Card
from tools.simulate.script import (
    SCRIPT_FILES,
    Tee,
    explain,
    fake_process_group,
    load,
    load_copy,
    place,
)

# Functions of the script whose calls are the phases of a record. Older scripts have write_sample.
PHASES = ("warm_up", "training_step", "validate", "write_sample", "save_checkpoint")
HEAVY = 6 * 10**8  # bytes; instructions are counted for kernels that move more


# --- Triton without a driver ----------------------------------------------------------------------

KERNELS: dict[tuple, dict] = {}  # (name, hash) -> what is known about a compiled kernel
CUBINS: dict[tuple, bytes] = {}
HEAVY_KERNELS: set[str] = set()  # hashes of their source
COMPILING: list[concurrent.futures.Future] = []
CUOBJDUMP = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def cuobjdump(flag: str, cubin: bytes) -> str:
    """What CUDA's cuobjdump prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True).stdout


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack, which holds spilled registers)."""
    text = cuobjdump("--dump-resource-usage", cubin)
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    return int(registers[1]) if registers else -1, int(stack[1]) if stack else -1


def count_instructions(cubin: bytes) -> tuple[list[int], int]:
    """Machine instructions: (those of each loop, all). A loop ends in a branch backwards."""
    text = cuobjdump("-sass", cubin)
    work, loops = [], []  # addresses of instructions; (first, last) of each loop
    for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text):
        address, code = int(match[1], 16), match[2]
        if "NOP" not in code:
            work.append(address)
        branch = re.search(r"BRA(?:\.\w+)?\s.*?0x([0-9a-f]+)", code)
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    counts = [sum(first <= address <= last for address in work) for first, last in loops]
    return counts, len(work)


class Utils:
    """Triton's questions to the driver, about the card and about a kernel."""
    def __init__(self, card: Card):
        self.card = card

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": self.card.shared, "max_num_regs": 65_536, "warpSize": 32,
                "multiprocessor_count": self.card.multiprocessors,
                "sm_clock_rate": int(self.card.clock / 1e3),
                "mem_clock_rate": 2_619_000, "mem_bus_width": 5120}

    def load_binary(self, name, kernel, shared, device):
        registers, stack = resource_usage(kernel)
        threads = 65_536 // max(registers, 1) // 32 * 32  # that have enough registers
        return 1, 1, registers, stack // 4, min(1024, threads)


def fake_triton(card: Card) -> None:
    """Replace Triton's driver. Each kernel that is compiled is noted in KERNELS."""
    major, minor = card.capability

    class Driver:
        utils = Utils(card)
        launcher_cls = lambda self, src, metadata: (lambda *args, **kwargs: None)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 10 * major + minor, 32))
        get_current_device = staticmethod(lambda: 0)
        set_current_device = staticmethod(lambda device: None)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_device_capability = staticmethod(lambda device=None: card.capability)
        get_device_interface = staticmethod(lambda: torch.cuda)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_benchmarker = staticmethod(lambda: (lambda function, **kwargs: 1.0))
        is_active = staticmethod(lambda: True)
        map_python_to_cpp_type = staticmethod(lambda kind: "int")
        assemble_tensormap_to_arg = staticmethod(lambda *args: None)

    triton.runtime.driver.set_active(Driver())
    triton.runtime.driver._default = triton.runtime.driver._active
    import torch._inductor.runtime.triton_helpers as helpers
    helpers.set_driver_to_gpu = lambda: None
    original = CompiledKernel._init_handles

    def init_handles(self):
        if self.module is not None:
            return original(self)
        fact = dict(name=self.name, code=short_hash(self.src.fn.src), error="",
                    shared=self.metadata.shared, warps=self.metadata.num_warps)
        try:
            original(self)
            fact |= dict(registers=self.n_regs, spilled=4 * self.n_spills)
        except Exception as error:
            registers, stack = resource_usage(self.kernel)
            message = f"{type(error).__name__}: {error}"
            fact |= dict(registers=registers, spilled=stack, error=message)
            raise
        finally:
            fact["constants"] = {}
            for key, value in self.src.constants.items():
                if isinstance(value, (int, bool)):
                    name = self.src.fn.arg_names[key[0]] if isinstance(key, tuple) else key
                    fact["constants"][name] = value
            fact["wgmma"] = self.asm["ptx"].count("wgmma.mma_async") if "ptx" in self.asm else 0
            fact["products"] = self.asm["ttir"].count("tt.dot") if "ttir" in self.asm else 0
            KERNELS.setdefault((self.name, self.hash), fact)
            CUBINS.setdefault((self.name, self.hash), self.kernel)
    CompiledKernel._init_handles = init_handles
    compile_or_launch = JITFunction.run

    def start(self, *args, grid, warmup, **kwargs):
        """A kernel that the script starts itself, not in a compiled graph: compiled and noted."""
        note_launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs})

        def mock(value):
            is_tensor = isinstance(value, torch.Tensor)
            return MockTensor(value.dtype, list(value.shape)) if is_tensor else value
        kernel = compile_or_launch(self, *map(mock, args), grid=grid, warmup=True,
                                   **{name: mock(value) for name, value in kwargs.items()})
        kernel._init_handles()
        return kernel
    JITFunction.run = start


# --- What a rank does -----------------------------------------------------------------------------

class Ledger:
    """What a rank did in the present phase.

    events: kernels, collectives and waits for collectives, in order. syncs: where the host waited
    for the GPU. live and peak: bytes that tensors hold; peak_tensors: what they were at the peak.
    """
    def __init__(self):
        self.live = self.peak = self.collectives = 0
        self.sizes, self.where = {}, {}
        self.peak_tensors, self.peak_seen = [], 0
        self.reset()

    def reset(self) -> None:
        self.events, self.syncs, self.peak = [], [], self.live
        self.peak_tensors, self.peak_seen = [], 0

    def track(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage as long as it lives."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage._cdata in self.sizes:
            return
        key, size = storage._cdata, (storage.nbytes() + 511) // 512 * 512
        self.sizes[key] = size
        self.where[key] = f"{str(tensor.dtype)[6:]}{list(tensor.shape)} {caller()}"
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            if self.live > 1.02 * self.peak_seen:  # not at each small step upwards
                self.peak_seen = self.live
                table = collections.Counter()
                for other, other_size in self.sizes.items():
                    table[self.where[other]] += other_size
                self.peak_tensors = table.most_common(8)
        weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)
        self.where.pop(key, None)


LEDGER = Ledger()
GRAPHS: list[str] = []         # the compiled graphs that run now, the innermost last
TRUTH = [False]  # the result of a comparison of fake numbers


def caller() -> str:
    """Where the script is now: a compiled graph, else a line, else "autograd"."""
    if GRAPHS:
        return GRAPHS[-1]
    frame = sys._getframe(1)
    while frame:
        if frame.f_code.co_filename in SCRIPT_FILES:
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


def num_bytes(tensor: torch.Tensor) -> int:
    """The size of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def note_collective(name: str, tensors: list[torch.Tensor]) -> None:
    """Add a collective to the ledger. The script waits for it, unless `noted` says otherwise."""
    LEDGER.events.append(dict(
        kind="collective", name=name, where=caller(), number=LEDGER.collectives, blocking=True,
        moved=max(map(num_bytes, tensors), default=0),
        tensors=[[list(t.shape), str(t.dtype)] for t in tensors]))
    LEDGER.collectives += 1


# Operations that start no kernel.
VIEWS = set("""view _unsafe_view transpose t t_ permute slice select split split_with_sizes expand
    unsqueeze squeeze alias detach as_strided unbind chunk reshape unfold diagonal empty empty_like
    empty_strided new_empty lift_fresh set_ _reshape_alias new_empty_strided is_pinned record_stream
    resize_ _local_scalar_dense""".split())


class Watcher(TorchDispatchMode):
    """Sees every operation outside generated kernels."""
    @classmethod
    def is_infra_mode(cls):
        return True

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # FlexAttention that is not compiled
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        cuda = [t for t in tensors if t.device.type == "cuda"]
        if name == "_local_scalar_dense":
            return self.number(func, tensors[0], args, kwargs)
        if cuda and name in ("nonzero", "masked_select", "_unique2", "unique_consecutive"):
            LEDGER.syncs.append(f"{name} in {caller()}")
        out = func(*args, **kwargs)
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name in ("_to_copy", "copy_", "_copy_from") and tensors:
            self.copied(name, tensors, outs, args, kwargs)
        for tensor in outs:
            LEDGER.track(tensor)
        if "c10d" in func._schema.name:
            note_collective(name, tensors)
        elif not (name in VIEWS or func._schema.name.startswith("prim")) and (
                cuda or any(t.device.type == "cuda" for t in outs)):
            self.kernel(func, name, args, kwargs, tensors, cuda, out, outs)
        return out

    @staticmethod
    def number(func, tensor, args, kwargs):
        """The result of .item(). The host waits if the number is on the GPU."""
        if tensor.device.type == "cuda":
            LEDGER.syncs.append(f"item in {caller()}")
        if not isinstance(tensor, FakeTensor):
            return func(*args, **kwargs)
        if getattr(tensor, "constant", None) is not None:
            return tensor.constant.item()
        # Zero is a finite loss, and it means that no signal has come.
        if tensor.dtype.is_floating_point:
            return 0.0
        return TRUTH[0] if tensor.dtype is torch.bool else 0

    @staticmethod
    def copied(name, tensors, outs, args, kwargs) -> None:
        source = tensors[-1] if name == "copy_" else tensors[0]
        target = tensors[0] if name == "copy_" else outs[0]
        if source.device.type == target.device.type:
            return
        third = args[2] if name == "copy_" and len(args) > 2 else False
        if not kwargs.get("non_blocking", third):
            # The host waits, also for one number: "gpu_tensor[0] = 3" waited 7 to 67 ms on an H200.
            direction = "from" if source.device.type == "cuda" else "to"
            LEDGER.syncs.append(f"copy of {num_bytes(target)} bytes {direction} the GPU in "
                                f"{caller()}")

    @staticmethod
    def kernel(func, name, args, kwargs, tensors, cuda, out, outs) -> None:
        def place(t):
            return t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape)
        read = {place(t): t for t in cuda}
        written = [t for t in outs if t.device.type == "cuda" and place(t) not in read]
        moved = sum(map(num_bytes, read.values())) + sum(map(num_bytes, written))
        if name.endswith("_") and not name.endswith(("zero_", "fill_", "copy_")) and tensors:
            several = name.startswith("_foreach_")  # a list of tensors, changed in place
            moved += sum(map(num_bytes, args[0] if several else tensors[:1]))
        if name in ("embedding", "index", "gather", "index_select") and outs:
            moved = 2 * sum(map(num_bytes, outs))
        flops = 0
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        # An operation of torch.library.custom_op: what it starts is not seen.
        registered = func.namespace not in ("aten", "prims")
        LEDGER.events.append(dict(kind="aten", name=name, where=caller(), moved=moved,
                                  flops=flops, tensors=[], registered=registered))


def watch_synchronization() -> None:
    """Note the calls that wait for the GPU without an operation on a tensor."""
    def noted_wait(name, function):
        def call(*args, **kwargs):
            LEDGER.syncs.append(f"{name} in {caller()}")
            return function(*args, **kwargs)
        return call
    torch.cuda.synchronize = noted_wait("torch.cuda.synchronize", torch.cuda.synchronize)
    torch.cuda.Stream.synchronize = noted_wait("Stream.synchronize", torch.cuda.Stream.synchronize)


def watch_collectives() -> None:
    """Note which collectives are asynchronous, and where the script waits for them."""
    for name in ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor",
                 "all_gather_single", "reduce_scatter", "reduce_scatter_tensor",
                 "reduce_scatter_single", "all_to_all_single", "all_to_all"):
        if hasattr(dist, name):
            setattr(dist, name, noted(getattr(dist, name)))
    # It pickles its objects, which FakeTensors can't carry: the call is noted, and each rank keeps
    # its own objects.
    dist.broadcast_object_list = lambda *args, **kwargs: note_collective("broadcast_object", [])


class Handle:
    """The handle of an asynchronous collective; it notes who waits for it."""
    def __init__(self, work, number: int):
        self.work, self.number = work, number

    def wait(self, *args):
        LEDGER.events.append(dict(kind="wait", of=self.number))
        return self.work.wait(*args)

    def __getattr__(self, name):
        return getattr(self.work, name)


def noted(collective):
    """A collective that marks its events as asynchronous if it returns a handle."""
    def call(*args, **kwargs):
        before = LEDGER.collectives
        work = collective(*args, **kwargs)
        if work is None or LEDGER.collectives == before:
            return work
        for event in LEDGER.events[-(LEDGER.collectives - before):]:
            event["blocking"] = False
        return Handle(work, LEDGER.collectives - 1)
    return call


# --- Inductor without a GPU -----------------------------------------------------------------------

def short_hash(source: str) -> str:
    """12 hexadecimal digits that tell kernels apart."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def iterations(source: str) -> int:
    """The number of elements that a generated kernel goes over; 0 if its source does not say."""
    found = re.findall(r"^\s+[xyr]\d?_?numel = (\d+)$", source, re.M)
    return math.prod(map(int, found)) if found else 0


def note_launch(function: JITFunction, arguments: dict) -> None:
    """Add the launch of a Triton kernel to the ledger."""
    code, elements = short_hash(function.src), iterations(function.src)
    moved, counted = 0, []  # bytes; elements of each argument that are read or written
    # A tensor descriptor has the tensor as its base.
    tensors = {name: getattr(value, "base", value) for name, value in arguments.items()}
    tensors = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    for name, t in tensors.items():
        accesses = function.src.count(f"({name} + ") * elements or t.numel()
        counted.append(min(t.numel(), accesses))
        if t.device.type == "cuda":
            times = 2 if name.startswith("in_out") else 1
            moved += times * counted[-1] * t.element_size()
    if moved > HEAVY:
        HEAVY_KERNELS.add(code)
    LEDGER.events.append(dict(
        kind="triton", name=function.__name__, code=code, elements=elements, where=caller(),
        moved=moved, flops=0, tensors=[list(t.shape) for t in tensors.values()], counted=counted))


def fake_inductor() -> None:
    """Let inductor generate and compile kernels, and note each launch instead of running it."""
    import torch._inductor.runtime.triton_heuristics as heuristics
    import torch._inductor.utils as utils
    from torch._dynamo.convert_frame import CatchErrorsWrapper
    from torch._inductor.runtime.benchmarking import benchmarker
    inductor_config.compile_threads = 1
    inductor_config.fx_graph_cache = inductor_config.autotune_local_cache = False
    inductor_config.force_disable_caches = True
    inductor_config.use_static_triton_launcher = False
    torch._functorch.config.enable_autograd_cache = False
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda")
    guards._empty_strided_cpu = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype)
    guards._reinterpret_tensor = lambda t, size, stride, offset=0: torch.as_strided(
        t, size, stride, t.storage_offset() + offset)
    guards.assert_alignment = lambda *args, **kwargs: None
    utils.copy_misaligned_inputs = lambda *args, **kwargs: ([], [])
    compile_fx.copy_misaligned_inputs = utils.copy_misaligned_inputs

    parse, lock = ast.parse, threading.RLock()

    def parse_alone(*args, **kwargs):
        """ast.parse raises SystemErrors in Python 3.11 when several threads call it."""
        with lock:
            return parse(*args, **kwargs)
    ast.parse = parse_alone

    precompile_now = heuristics.CachingAutotuner.precompile
    pool = concurrent.futures.ThreadPoolExecutor(2)

    def precompile(self, *args, **kwargs):
        """In a thread: Triton and ptxas take half of the time and do not hold Python's lock."""
        context = contextvars.copy_context()
        self.compiling = pool.submit(context.run, precompile_now, self, *args, **kwargs)
        COMPILING.append(self.compiling)
    heuristics.CachingAutotuner.precompile = precompile

    def run(self, *args, stream=None, benchmark_run=False, **kwargs):
        if not hasattr(self, "compiling"):
            self.precompile()
        self.compiling.result()
        names = [a for a in self.fn.arg_names if a not in self.triton_meta.get("constants", {})]
        note_launch(self.fn, dict(zip(names, args, strict=False)))
    heuristics.CachingAutotuner.run = run
    # Below DistributedDataParallel, dynamo does not leave the modes by itself.
    CatchErrorsWrapper.__call__ = outside(CatchErrorsWrapper.__call__)
    # Nothing can be timed. Inductor's pad_mm asks for the time of a matrix product as it is, and
    # then padded: the later one is said to be faster.
    clock = iter(range(10**9, 0, -1))
    type(benchmarker).benchmark_gpu = lambda self, *args, **kwargs: float(2 ** (next(clock) % 1000))
    original, inner = compile_fx.compile_fx, compile_fx.compile_fx_inner
    number = iter(range(10**9))

    def named(graph, example_inputs, **kwargs):
        direction = "backward" if kwargs.get("is_backward") else "forward"
        label = f"{direction} graph {next(number)}"
        compiled = inner(graph, example_inputs, **kwargs)

        def call(inputs):
            GRAPHS.append(label)
            try:
                return compiled(inputs)
            finally:
                GRAPHS.pop()
        call._boxed_call = True
        return call
    compile_fx.compile_fx = lambda model, inputs, inner_compile=None, **kwargs: original(
        model, inputs, inner_compile=named, **kwargs)


def outside(function):
    """The function without FakeTensors and the Watcher: it works on real tensors."""
    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)
    return call


def apply(self, function, recurse=True):
    """nn.Module._apply without swap_tensors, which refuses FakeTensors with weak references.

    Parameters that two modules share stay shared.
    """
    done = self.__dict__.setdefault("_simulated", {})  # id of a parameter -> (it, its result)
    for module in self.modules() if recurse else [self]:
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in done:
                    with torch.no_grad():
                        new = function(p)
                    done[id(p)] = (p, p if new is p else torch.nn.Parameter(new, p.requires_grad))
                module._parameters[name] = done[id(p)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    del self.__dict__["_simulated"]
    return self


def enter(card: Card, world_size: int, rank: int, compiling: bool) -> None:
    """From here on this process has the card, and is this rank of world_size ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 8), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # nothing connects to it
    fake_triton(card)
    if compiling:
        fake_inductor()
    else:  # the order of the collectives does not depend on it
        torch.compile = lambda function=None, **kwargs: function or (lambda f: f)
        torch.nn.Module.compile = lambda self, *args, **kwargs: None
    if world_size > 1:
        fake_process_group(world_size, rank)
    watch_collectives()
    watch_synchronization()
    torch.get_rng_state = outside(torch.get_rng_state)
    torch.set_rng_state = outside(torch.set_rng_state)
    torch.nn.Module._apply = apply


def start_modes() -> None:
    """FakeTensors for the rest of this process, and the Watcher above them."""
    FakeTensorMode(allow_non_fake_inputs=True).__enter__()
    Watcher().__enter__()


# --- The script itself ----------------------------------------------------------------------------

def compilations() -> int:
    """The number of frames that dynamo has compiled."""
    return torch._dynamo.utils.counters["frames"]["total"]


def watch(module: types.ModuleType, name: str, phases: list[dict]) -> None:
    """Record each call of the script's function as a phase.

    What happens between two calls belongs to the first of them, as "after".
    """
    original = getattr(module, name)

    def call(*args, **kwargs):
        close(phases)
        number = 1 + sum(phase["name"] == name for phase in phases)
        print(f"phase: {name} {number}", flush=True)  # progress() in __main__.py reads it
        start, before = time.time(), compilations()
        try:
            return original(*args, **kwargs)
        finally:
            phases.append(dict(
                name=name, seconds=time.time() - start, compiled=compilations() - before,
                peak=LEDGER.peak, live=LEDGER.live, syncs=list(LEDGER.syncs),
                events=list(LEDGER.events), peak_tensors=LEDGER.peak_tensors,
                tokens=first_tokens(args, kwargs), after=dict(syncs=[], events=[])))
            LEDGER.reset()
    setattr(module, name, call)


def first_tokens(args: tuple, kwargs: dict) -> int:
    """The number of tokens in a micro-batch: of elements in the first tensor of integers."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and not leaf.dtype.is_floating_point and leaf.ndim:
            return leaf.numel()
    return 0


def close(phases: list[dict]) -> None:
    """Add what happened since the last phase to it. Before the first call there is "start"."""
    if not phases:
        phases.append(dict(name="start", seconds=0.0, compiled=0, peak=LEDGER.peak,
                           live=LEDGER.live, syncs=[], events=[],
                           peak_tensors=LEDGER.peak_tensors))
    phases[-1]["after"] = dict(syncs=list(LEDGER.syncs), events=list(LEDGER.events))
    LEDGER.reset()


def shortened(hp, num_steps: int) -> dict:
    """The settings that make hp a run of num_steps steps; only those that the script has."""
    short = dict(num_steps=num_steps, val_every=4, log_every=2, save_every=0, no_weights=True,
                 extension=2 / num_steps, momentum_warmup=3 / num_steps)
    older = dict(cooldown_steps=3, warmup_steps=1, momentum_warmup_steps=3, extension_steps=2,
                 sample_tokens=2)
    fields = {field.name for field in dataclasses.fields(hp)}
    return {name: value for name, value in {**short, **older}.items() if name in fields}


def about(module: types.ModuleType, hp) -> tuple[dict, dict]:
    """(facts about the whole run for the model and the report, the settings that shorten it)."""
    def short_run(num_steps):
        return stages.schedule(module, dataclasses.replace(hp, **shortened(hp, num_steps)))
    real = stages.schedule(module, hp)
    num_steps = stages.steps_of_a_short_run(real, short_run)
    vocab_size = module.TRACKS[hp.track].vocab_size
    described = dict(real=stages.packed(real), short=stages.packed(short_run(num_steps)),
                     batch_size=hp.batch_size, sequence_length=hp.sequence_length,
                     model_dim=hp.model_dim, vocab_size=-(-vocab_size // 128) * 128)
    return described, shortened(hp, num_steps)


def run_script(request: dict) -> dict:
    """Run one rank of the script from its first line to its last. Returns the record."""
    phases, messages, handler = [], [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    for name in ("torch._dynamo", "torch._inductor"):
        logging.getLogger(name).addHandler(handler)
    torch._logging.set_logs(recompiles=True, graph_breaks=True)
    sys.stderr = Tee(sys.stderr)
    described, error = {}, ""
    try:
        script, folder = Path(request["script"]), Path(request["work"])
        probe = load(script, "probe")
        hp = probe.parse_arguments(request["flags"])
        described, short = about(probe, hp)
        tokens = sum(step.tokens for step in stages.unpacked(described["short"]))
        copy = place(script, probe.TRACKS[hp.track], tokens, folder)
        os.chdir(folder)
        enter(CARDS[request["card"]], request["world_size"], request["rank"], request["compile"])
        short_flags = [f"--{name}" if value is True else f"--{name}={value}"
                       for name, value in short.items()]
        code = run_copy(copy, [*request["flags"], *short_flags], phases)
        if code:
            error = sys.stderr.last_line()
    except BaseException as wrong:
        code, error = explain(wrong)
    close(phases)
    return dict(described, code=code, error=error, phases=phases, messages=messages,
                kernels=kernels(), compilations=compilations(), torch=torch.__version__)


def run_copy(copy: Path, flags: list[str], phases: list[dict]) -> int:
    """Run the script's main function, watched. Returns its exit code; raises what it raises."""
    module = load_copy(copy)
    # Older scripts write a sample at the end of a run, with tiktoken.
    sys.modules.setdefault("tiktoken", types.SimpleNamespace(
        get_encoding=lambda name: types.SimpleNamespace(decode=lambda ids: f"{len(ids)} tokens")))
    for name in PHASES:
        if hasattr(module, name):
            watch(module, name, phases)
    # After a mistake, main ends the process at once, because other ranks may still compute.
    os._exit = sys.exit
    start = module.run if hasattr(module, "run") else module.main  # older scripts have a run
    start_modes()
    return start(flags) or 0


def run_tests(request: dict) -> dict:
    """Run the test functions of a file as they are. A comparison of numbers counts as true."""
    project = Path(request["project"])
    enter(CARDS[request["card"]], 1, 0, True)
    fake_process_group(1, 0)
    mark = types.SimpleNamespace(skipif=lambda *args, **kwargs: None)
    sys.modules["pytest"] = types.SimpleNamespace(mark=mark)
    sys.path.insert(0, str(project))
    tests = load(project / request["tests"], "test_cuda")
    SCRIPT_FILES.add(str(project / "train_gpt.py"))
    torch.testing.assert_close = lambda *args, **kwargs: None
    TRUTH[0] = True
    start_modes()
    results = {}
    for name in dir(tests):
        if not name.startswith("test_"):
            continue
        torch._dynamo.reset()
        try:
            getattr(tests, name)()
            results[name] = ""
        except BaseException as wrong:
            results[name] = "".join(traceback.format_exception(wrong))[-3000:]
    return dict(tests=results, kernels=kernels())


def kernels() -> list[dict]:
    """What is known about each compiled kernel; for heavy ones also their instructions."""
    concurrent.futures.wait(COMPILING)
    for key, fact in KERNELS.items():
        if fact["code"] in HEAVY_KERNELS and "tem_" not in fact["name"]:
            fact["instructions"] = count_instructions(CUBINS[key])
    return list(KERNELS.values())


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    result = run_tests(asked) if "tests" in asked else run_script(asked)
    Path(asked["out"]).write_text(json.dumps(result, default=str))
