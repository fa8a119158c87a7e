"""Seconds and operations per step, side by side."""

import statistics

import torch
from torch.utils import flop_counter

from .common import cases, clock, head, row
from .sides import DTYPES, SIDES


def step(args):
    """Print the seconds and operations of a step, and its share of the machine's matrix rate."""
    rate = matrix_rate(args.device, args.precision[0])
    print(f"matrix rate: {rate / 1e12:.3g} TFLOP/s\n")
    names = "tinyti s", "diffusers s", "ratio", "ratio of operations", "TFLOP", "of the rate"
    head("pixels", "batch", "vectors", *names)
    for case, sides in cases(args):
        sides = [kind(**own) for kind, own in zip(SIDES.values(), sides)]
        m, n = (operations(side.unrecorded) for side in sides)
        for side in sides:
            side.step()  # a warm-up
        turns = [[clock(side.step, args.block, args.device) for side in sides] for _ in range(args.rounds)]
        a, b = (statistics.median(seconds) for seconds in zip(*turns))
        row(*case, a, b, b / a, n / m, m / 1e12, f"{m / a / rate:.0%}")


def operations(step):
    """Count a step's operations, forward and backward: matrix products, convolutions and attention."""
    count, back = flop_counter.sdpa_flop_count, flop_counter.sdpa_backward_flop_count
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {  # else the CPU's attention is not counted
        attention: lambda q, k, v, *_, **__: count(q, k, v),
        backward: lambda g, q, k, v, *_, **__: back(g, q, k, v),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=known) as counter:
        step()
    return counter.get_total_flops()


def matrix_rate(device, precision, side=2048):
    """Floating-point operations per second of a large matrix product, the best of five."""
    side *= 4 if device.startswith("cuda") else 1
    a = torch.randn(side, side, device=device, dtype=DTYPES[precision])
    clock(lambda: a @ a, 1, device)
    return 2 * side**3 / min(clock(lambda: a @ a, 1, device) for _ in range(5))
