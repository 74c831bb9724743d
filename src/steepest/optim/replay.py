"""Steps that are recorded once and replayed, as CUDA graphs are: Python runs at the recording only.

What a step leaves for the next one is therefore written into the memory in which it was found, and what Python alone
knows, such as a count, decides nothing in a step that is recorded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.stages import Stage

WARM_UP = "Take at least one step as usual before it, on the same stream: that makes the state which replays write to."


def recording() -> bool:
    """Whether a CUDA graph is being captured here."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def kept(old: Tensor | None, new: Tensor) -> Tensor:
    """New numbers where the old ones were, so that a replay finds them there.

    Args:
        old: Written to, if it fits; None: there were none.
        new: Any shape; not kept.
    """
    if old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
        return old.copy_(new)
    with torch.inference_mode(False):  # else no later step could write to it
        return new.clone()


def check_recordable(*, warm: bool, waits: bool, frozen_bound: bool, stages: Sequence[Stage], ranks: int) -> None:
    """Refuse to record a step whose replays would not be the steps that they stand for.

    Args:
        warm: Whether a step was taken with the state of now.
        waits: Whether it reads from the device whether gradients are finite.
        frozen_bound: Whether Momo's lower bound is a function of the step.
        stages: Of the optimizer.
        ranks: How many share the step.

    Raises:
        RuntimeError: If so.
    """
    reasons = [
        (not warm, f"No step was taken with this state yet. {WARM_UP}"),
        (waits, "on_nonfinite='raise' waits for the device. Use on_nonfinite='skip', and read diagnostics()."),
        (
            frozen_bound,
            "Momo's lower_bound is a function, which replays would not ask again. Give a number.",
        ),
        (ranks > 1, f"{ranks} ranks share it, which was never tried. Take it as usual."),
    ]
    reasons += [
        (not stage.replays, f"{stage!r} decides anew in each step what to do. Take the steps as usual.")
        for stage in stages
    ]
    for refused, why in reasons:
        if refused:
            raise RuntimeError(f"This step cannot be recorded into a CUDA graph: {why}")
