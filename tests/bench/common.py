"""Shared by the sections: cases, clocks, tables, and separate processes."""

import itertools
import json
import os
import subprocess
import sys
import time

import torch

from tinyti.programs.miniature import ROOT


def cases(args):
    """Yield each (size, batch, number of vectors) with the arguments of our side and of theirs."""
    shared = {name: getattr(args, name) for name in ("weights", "images", "device")}
    precisions = args.precision[0], args.precision[-1]
    for case in itertools.product(args.size, args.batch, args.vectors):
        both = shared | dict(zip(("size", "batch", "vectors"), case))
        yield case, [both | {"precision": precision} for precision in precisions]


def clock(step, count, device):
    """The mean seconds per step, over `count` steps."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def isolated(function, **arguments):
    """Run a function of this package in a process of its own, and return the JSON that it prints."""
    module, name = function.__module__, function.__name__
    command = [sys.executable, "-c", f"import {module} as m; m.{name}(**{arguments!r})"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(*cells):
    """Print a line of a table."""
    print("|", " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells), "|")


def head(*cells):
    row(*cells)
    row(*["---"] * len(cells))
