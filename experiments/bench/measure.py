"""How the benchmark measures: both sides in turn on the same fresh inputs, peak memory, which
kernels ran, and the highest rates of the machine.

     make() --> inputs --> ours(*inputs), baseline(*inputs), baseline, ours ...
                       --medians, quartiles--> Line --wanted "ratio <= 0.70"--> reached: yes or no
The times of one repeat are paired: other work on the machine slows both sides, and their ratio
stays about the same.

Public: Line, Run, Wrong, CannotRun, interleaved, compare, check, peak_bytes, kernels, ceilings."""

import math
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MIB = 2 ** 20
SIZES = ("test", "quick", "full", "cuda")      # each falls back on the one before it
ATTENTION = ("flash", "fmha", "sdpa", "softmax", "scaled_dot_product", "cudnn")   # in names


class Wrong(AssertionError):
    """The two sides do not compute the same, so their times cannot be compared."""


class CannotRun(RuntimeError):
    """Something that a target needs is missing; the message names it and how to get it."""


# ---------------------------------------------------------------- a measurement
@dataclass
class Line:
    """One measurement. ours and baseline: medians in `unit`; ratio: ours / baseline. roofline: the
    least time, or the highest rate, that this machine allows, in the same unit."""
    what: str
    unit: str
    ours: float
    baseline: float | None = None
    baseline_name: str = ""
    spread: tuple = ()                   # quartiles of the paired ratios
    roofline: float | None = None
    wanted: str = ""                     # "ratio <= 0.70", "ours >= 900", "close >= 0.6"
    repeats: int = 1
    remark: str = ""

    @property
    def ratio(self):
        return self.ours / self.baseline if self.baseline else None

    @property
    def close(self):
        """Share of the roofline that is reached; 1 is the best possible."""
        if not self.roofline or not self.ours:
            return None
        rate = self.unit.endswith("/s") or self.unit == "x real time"
        return self.ours / self.roofline if rate else self.roofline / self.ours

    @property
    def margin(self):
        """How far from the limit: 1 is just reached, above 1 is not; None without a limit."""
        if not self.wanted:
            return None
        name, sign, limit = self.wanted.split()
        value, limit = getattr(self, name), float(limit)
        if value is None or math.isnan(value):
            raise ValueError(f"{self.what}: wanted {self.wanted}, but there is no {name}")
        if sign == "<=":                                      # a limit of 0 is reached by 0 only
            return value / limit if limit else (0.0 if value <= 0 else math.inf)
        return limit / value if value else math.inf

    @property
    def reached(self):
        return None if self.margin is None else self.margin <= 1

    def to_dict(self):
        return vars(self) | {"ratio": self.ratio, "close": self.close, "reached": self.reached}


@dataclass
class Run:
    """Where and how large: what every target is given."""
    device: torch.device
    size: str = "full"                   # of SIZES
    repeats: int = 7
    model: str = "7b"                    # on a GPU
    ceilings: dict = field(default_factory=dict)     # FLOP/s of a dtype's GEMM, bytes/s
    first: dict = field(default_factory=dict)        # {what: {side: seconds of its first call}}

    @property
    def cuda(self):
        return self.device.type == "cuda"

    @property
    def full_cuda(self):
        """Whether the targets' absolute numbers for an H200 apply."""
        return self.size == "cuda"

    def pick(self, **values):
        """The value for this run's size, or for the nearest smaller one that is given."""
        for size in reversed(SIZES[:SIZES.index(self.size) + 1]):
            if size in values:
                return values[size]
        raise ValueError(f"no value for size {self.size}; given {sorted(values)}")

    def wants(self, cpu="", cuda=""):
        """The limit of this column; a GPU's hold at full size only, none at the tests' sizes."""
        if self.size == "test":
            return ""
        return (cuda if self.full_cuda else "") if self.cuda else cpu

    def synchronise(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def roofline_ms(self, flops=0, dtype=torch.float32, n_bytes=0, bandwidth="copy"):
        """ms that so many operations or bytes take at the measured ceilings; None if unknown."""
        seconds = [work / self.ceilings[name] for work, name in
                   ((flops, gemm_name(dtype)), (n_bytes, bandwidth)) if work and
                   name in self.ceilings]
        return max(seconds) * 1e3 if seconds else None

    def autocast(self, dtype):
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


def gemm_name(dtype):
    return f"gemm {str(dtype).removeprefix('torch.')}"


# ---------------------------------------------------------------- time
def seconds_of(run, function, inputs, inner=1):
    """Of one call, the mean of `inner` back to back; on a GPU by CUDA events."""
    if run.cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run.synchronise()
        begin.record()
        for _ in range(inner):
            function(*inputs)
        end.record()
        run.synchronise()
        return begin.elapsed_time(end) / 1e3 / inner
    start = time.perf_counter()
    for _ in range(inner):
        function(*inputs)
    return (time.perf_counter() - start) / inner


def interleaved(run, what, make, sides, repeats=None):
    """{side: seconds of each repeat}.  sides: {name: function}; make() gives the inputs that all
    sides take in a repeat; the order turns from repeat to repeat.  One call each before it, whose
    time stands in run.first: call this before anything else runs the sides.  Short calls on a GPU
    are timed 10 ms at a time: a launch alone would be measured else."""
    inputs, run.first[what], inner = make(), {}, {}
    for name, side in sides.items():
        run.synchronise()
        start = time.perf_counter()
        side(*inputs)
        run.synchronise()
        run.first[what][name] = time.perf_counter() - start
        inner[name] = (max(1, min(1000, math.ceil(0.01 / seconds_of(run, side, inputs))))
                       if run.cuda else 1)
    seconds = {name: [] for name in sides}
    for repeat in range(repeats or run.repeats):
        inputs = make()
        for name in list(sides)[::1 if repeat % 2 else -1]:
            seconds[name].append(seconds_of(run, sides[name], inputs, inner[name]))
    return seconds


def quartiles(ours, baseline):
    """First and third of the paired ratios."""
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    if len(ratios) == 1:
        return (ratios[0], ratios[0])
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return (first, third)


def line_of(what, ours, baseline, scale=1e3, unit="ms", **rest):
    """Two lists of seconds -> Line; rest: the Line's other fields."""
    return Line(what, unit, statistics.median(ours) * scale, statistics.median(baseline) * scale,
                spread=quartiles(ours, baseline), repeats=len(ours), **rest)


def compare(run, what, make, ours, baseline, repeats=None, **rest):
    """Line of two functions of the same inputs, in ms."""
    seconds = interleaved(run, what, make, {"ours": ours, "baseline": baseline}, repeats)
    return line_of(what, seconds["ours"], seconds["baseline"], **rest)


# ---------------------------------------------------------------- the same result
def check(what, ours, theirs, most, relative=False):
    """Largest difference of two tensors or numbers, relative: root mean square of the difference
    over that of theirs (half precision rounds at other places); Wrong when it is above `most`."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    if ours.shape != theirs.shape:
        raise Wrong(f"{what}: shape {tuple(ours.shape)}, the baseline's {tuple(theirs.shape)}")
    difference = ours.double() - theirs.double()
    worst = (difference.abs().max() if not relative else
             difference.square().mean().sqrt() / theirs.double().square().mean().sqrt()).item()
    if not worst <= most:
        raise Wrong(f"{what}: differs from the baseline's by {worst:.2e}, allowed {most:.0e}")
    return worst


def check_equal(what, ours, theirs):
    if ours != theirs:
        raise Wrong(f"{what}: {str(ours)[:200]}, the baseline's {str(theirs)[:200]}")


# ---------------------------------------------------------------- memory, kernels
def traced(run, function, inputs):
    """torch.profiler's events of one call."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * run.cuda
    with profile(activities=activities, profile_memory=not run.cuda, acc_events=True) as prof:
        result = function(*inputs)
        run.synchronise()
    del result
    return prof.profiler.kineto_results.events()


def peak_bytes(run, function, *inputs):
    """Most bytes at once during a call, above what was there before."""
    if run.cuda:
        run.synchronise()
        torch.cuda.reset_peak_memory_stats(run.device)
        before = torch.cuda.memory_allocated(run.device)
        function(*inputs)
        run.synchronise()
        return torch.cuda.max_memory_allocated(run.device) - before
    changes = sorted((event.start_ns(), event.nbytes()) for event in traced(run, function, inputs)
                     if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def kernels(run, function, *inputs):
    """Names of what did the attention: GPU kernels; on a CPU the scaled_dot_product operators."""
    names = {event.name() for event in traced(run, function, inputs)
             if (event.device_type() == DeviceType.CUDA) == run.cuda}
    if run.cuda:
        found = {n for n in names if any(word in n.lower() for word in ATTENTION)}
    else:
        found = {n for n in names if "scaled_dot_product" in n or n in ("aten::bmm",
                                                                        "aten::softmax")}
        found -= {"aten::scaled_dot_product_attention"}
    short = {name.split("<")[0].split("(")[0].removeprefix("void ") for name in found}
    return sorted(name.removeprefix("aten::") for name in short)


# ---------------------------------------------------------------- ceilings
def ceilings(run):
    """What this machine does at most, the fastest of some calls on random data: FLOP/s of a square
    GEMM, bytes/s of a copy (read and written), on a CPU also of a matrix times a vector on one
    thread, which is what decoding is."""
    best, device = {}, run.device
    n = run.pick(test=128, quick=1024, cuda=8192)
    n_bytes = run.pick(test=2 ** 20, quick=2 ** 28, cuda=2 ** 32)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best[gemm_name(dtype)] = 2 * n ** 3 / fastest(run, torch.matmul, (a, b))
    source = torch.randn(n_bytes // 4, device=device)
    best["copy"] = 2 * n_bytes / fastest(run, torch.empty_like(source).copy_, (source,))
    if not run.cuda:
        with threads(1):
            matrix, vector = source.view(-1, 1024), torch.randn(1024)
            best["gemv, 1 thread"] = n_bytes / fastest(run, torch.mv, (matrix, vector))
    return best


def fastest(run, function, inputs, most=5.0):
    """Seconds of the fastest of some calls, of fewer where they together take `most` seconds: bf16
    products are very slow on a CPU that has no instructions for them."""
    seconds = [seconds_of(run, function, inputs)]
    while len(seconds) < run.pick(test=2, quick=5, full=10) and sum(seconds) < most:
        seconds.append(seconds_of(run, function, inputs))
    return min(seconds)


class threads:
    """with threads(1): so many processor threads, and afterwards as many as before."""
    def __init__(self, n):
        self.n = n

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.n)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)
