"""CUDA graphs: a GPU launches all kernels of a function at once; elsewhere the function is just called."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

KEPT = 4  # graphs per function, one for each shape and dtype of its inputs
_thread = threading.local()  # whether this thread calls functions directly

capture_stream = cache(torch.cuda.Stream)  # one per GPU; PyTorch's default belongs to the first to record


@contextmanager
def no_graphs() -> Iterator[None]:
    """Call functions directly in this thread: a graph replays kernels and never calls Python hooks."""
    before = getattr(_thread, "direct", False)
    _thread.direct = True
    try:
        yield
    finally:
        _thread.direct = before


def record_graph(function: Callable) -> Callable:
    """Wrap a function of tensors so that a GPU launches all its kernels together, as one CUDA graph.

    The CPU needs longer to launch the kernels one by one than the GPU needs to compute them.  The first call
    with each shape records a graph, which reads the weight tensors of that moment; the last four graphs are
    kept.  The function returns a tensor or several; the outputs of a graph have no gradient.
    """
    graphs = {}

    def call(*inputs):
        if not inputs[0].is_cuda or getattr(_thread, "direct", False):
            return function(*inputs)
        key = torch.is_autocast_enabled("cuda"), *((x.shape, x.dtype) for x in inputs)
        if key not in graphs:
            if len(graphs) == KEPT:
                graphs.pop(next(iter(graphs)))
            own = [x.clone() for x in inputs]
            function(*own)  # warm-up: libraries choose and load their kernels before we record
            graph, device = torch.cuda.CUDAGraph(), inputs[0].device
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=capture_stream(device)):
                result = function(*own)
            graphs[key] = graph, own, result
        graph, own, result = graphs[key]
        for mine, given in zip(own, inputs):
            mine.copy_(given)
        graph.replay()
        # Copies, because the next call writes into the same memory.
        return result.clone() if torch.is_tensor(result) else tuple(part.clone() for part in result)

    return call
