"""Small numbers on their way between the host and a device, while both go on working.

A GPU works through a queue. Reading a number off it the usual way waits until the queue is empty, and the
GPU then idles until the host has filled it again. Here a copy is queued like everything else, and the host
waits, when it must, for what was queued before the copy and for nothing behind it. On a CPU, where nothing
is queued, all of this is a plain copy.
"""

import time

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor's copy on `device`, which the host does not wait for."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Mark:
    """A moment in a device's queue; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Return when everything queued before the mark is done."""
        if self._event:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Between two marks of one device, once the device has passed them."""
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event) / 1e3
        return self._time - earlier._time


class Reading:
    """The values a tensor has at this place of the device's queue, on their way to the host."""

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._values.copy_(values, non_blocking=True)
        self.mark = Mark(device)

    def wait(self) -> Tensor:
        """The values, on the CPU."""
        self.mark.wait()
        return self._values
