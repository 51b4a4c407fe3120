"""Counting the bytes of tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors alive during `function`, above those alive before it (torch's own accounting)."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results: Any = profiler.profiler
    alive = peak = 0
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
