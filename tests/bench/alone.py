"""Loading time and peak memory, each side in its own processes."""

import json
import resource
import statistics
import time

import torch

from .common import cases, clock, head, isolated, row
from .sides import LOADERS, SIDES


def alone(args):
    """Print the seconds to have every weight in memory, and the peak memory over some steps."""
    names = "tinyti loads in s", "diffusers", "ratio", "tinyti GiB", "diffusers", "ratio"
    head("pixels", "batch", "vectors", *names)
    for case, sides in cases(args):
        turns = []
        for _ in range(args.rounds):
            turns.append([isolated(process, side=k, block=args.block, **own) for k, own in zip(SIDES, sides)])
        (a, m), (b, n) = (map(statistics.median, zip(*found)) for found in zip(*turns))
        row(*case, a, b, b / a, m, n, n / m)


def process(side, block, **case):
    """Measure one side of `alone`, and print its seconds and GiB as JSON."""
    began = time.perf_counter()
    parts = LOADERS[side](case["weights"])
    for p in [p for part in parts for p in part.parameters()]:
        p.sum().item()  # reads every weight, because a memory-mapped file is read only when used
    seconds = time.perf_counter() - began
    del parts, p
    clock(SIDES[side](**case).step, block, case["device"])
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if case["device"].startswith("cuda") else peak
    print(json.dumps([seconds, peak / 2**30]))
