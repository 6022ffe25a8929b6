"""A CUDA graph that is captured has the step, or an error says why not."""

from collections.abc import Iterable

import torch


def check_capture(devices: Iterable[torch.device]) -> None:
    """Refuses a step that the graph which is being captured would not record.

    A capture records a stream of the device that was current. What runs on another device is not
    recorded: it would step the parameters at once, and no replay would.

    Args:
      devices: of the parameters.

    Raises:
      RuntimeError: one of them is another, and its current stream takes no part in the capture.
    """
    for device in devices:
        if device.type != "cuda":
            continue
        current = torch.cuda.current_device()
        if device.index == current or not torch.cuda.is_current_stream_capturing():
            continue
        with torch.cuda.device(device):
            recorded = torch.cuda.is_current_stream_capturing()
        if not recorded:
            raise RuntimeError(
                f"a CUDA graph is being captured on cuda:{current}, and would not record the step of"
                f" parameters on {device}: call torch.cuda.set_device({device.index}) before"
                " torch.cuda.graph makes its stream, or give it a stream of that device. JAX in the"
                " same process changes the current device."
            )
