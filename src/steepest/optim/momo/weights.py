"""Notices weights that something else than the optimizer wrote to."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steepest.notices import warn as warn_user
from steepest.optim.momo.arrivals import spaced
from steepest.optim.replay import kept
from steepest.ranks import Team, exchange_device, is_sharded, local, scalar_type, sharded

SAME = 1e-5  # relative; of a sum over all weights, which other shards add up in another order
NEVER = -1.0  # what no sum of absolute values is


@dataclass(frozen=True)
class Expected:
    """Weights that are known by their sum alone.

    Args:
        parameters: Whose.
        total: Sum of their absolute values; `NEVER`: others than these, in any case.
        here: Whether it is that of the parts that this rank keeps, else that of all.
    """

    parameters: list[Tensor]
    total: float
    here: bool

    @property
    def shared(self) -> bool:
        """Whether ranks must add up what they keep to know."""
        return not self.here and self.total != NEVER and bool(sharded(self.parameters))

    def found(self) -> bool:
        """Whether the weights are these; if it is `shared`, all ranks that keep a part take part."""
        found = kept_size(self.parameters) if self.here else total_size(self.parameters)
        return self.total != NEVER and math.isclose(found, self.total, rel_tol=SAME)


class Changes:
    """Compares the weights that a step finds with those that the last one left.

    Within a process by the bits of a few entries of each parameter, so that weights that were swapped out and came back
    the same are no change. As others may be written to without touching these entries, the sum of the absolute values
    of each parameter is kept as well, one pass over the weights, from the first time on that torch's count of writes
    says that somebody wrote. Across a checkpoint or a copy by the sum of the absolute values of all weights.

    A rank looks at what it keeps, and whatever one of them finds counts for all: `here` is its own answer, which ranks
    exchange before a step, and `found` goes on from what they agreed on. Only the sum across a checkpoint is an
    exchange of its own where parameters are sharded.
    """

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []
        self._entries: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._views: dict[Tensor, tuple[int, Tensor]] = {}
        self._written = False  # by somebody else, ever
        self._just_written = False  # since the last step
        self._expected: Expected | None = None
        self._warned = False

    def note(self, parameters: Sequence[Tensor]) -> None:
        """The step is done: from here on, nobody else should write.

        Args:
            parameters: That the step moved.
        """
        self._parameters = list(parameters)
        self._versions = _versions(parameters)
        self._entries = _kept(self._entries, self._packed())
        self._sums = _kept(self._sums, _sizes(parameters)) if self._written else []
        self._expected = None

    def untouched(self) -> bool:
        """Whether weights are those that the last step left; waits for the device only if somebody wrote to them.

        Ranks that keep parts ask together where only the sum of all weights is known, as after loading a state.
        """
        if self._expected is None:
            return _versions(self._parameters) == self._versions or not bool(self._differs())
        found = self._expected.found()
        return _on_all_ranks(found, self._expected.parameters) if self._expected.shared else found

    def renote(self) -> None:
        """The optimizer moved weights outside of a step: they are what is expected now."""
        if self._expected is None:
            self.note(self._parameters)
        elif self._expected.here:
            self._expected = replace(self._expected, total=kept_size(self._expected.parameters))
        else:
            self._expected = replace(self._expected, total=total_size(self._expected.parameters))

    def replaced(self) -> None:
        """Others stand where parameters stood that the last step moved, which is a change of weights."""
        if self._parameters:
            self._expected = Expected(self._parameters, NEVER, here=True)

    def here(self) -> bool | Tensor:
        """Whether this rank finds that somebody else wrote other values to the weights; no other rank is asked.

        Returns:
            True or False on the CPU, else a 0-d boolean on a device, which is not waited for.
        """
        self._just_written = _versions(self._parameters) != self._versions
        self._written = self._written or self._just_written
        if self._expected is None:
            return self._differs()
        return not self._expected.shared and not self._expected.found()

    def found(self, changed: bool | Tensor, *, warn: bool) -> bool | Tensor:
        """Whether somebody else wrote other values to the weights, the same answer on all ranks.

        Args:
            changed: Whether one of the ranks found that `here`.
            warn: Whether to say so, the first time.

        Returns:
            True or False on the CPU, else a 0-d boolean on a device; it is waited for if somebody wrote at all, until
            the first warning.
        """
        if isinstance(changed, Tensor) and changed.device.type == "cpu":
            changed = bool(changed)
        if self._expected is not None and self._expected.shared:
            changed = changed | (not _on_all_ranks(self._expected.found(), self._expected.parameters))
        if isinstance(changed, Tensor) and self._just_written and not self._warned:
            changed = bool(changed)
        if changed is True and warn and not self._warned:
            self._warned = True
            warn_user(
                "Weights were changed since the last step by something else than this optimizer. Momo's model of the "
                "loss starts again from the present loss, now and whenever this happens again. If it happens at every "
                "step, use Momo(bookkeeping='direct')."
            )
        return changed

    def saved(self, parameters: Sequence[Tensor]) -> float:
        """What a checkpoint needs; waits for the device.

        Args:
            parameters: All of the optimizer's; of sharded ones, all ranks that keep a part must call it together.
        """
        expected = self._expected
        if expected is not None and not expected.here:
            return expected.total
        members = self._parameters if expected is None else expected.parameters
        if not members:
            return 0.0
        same = not bool(self._differs()) if expected is None else expected.found()
        if not _on_all_ranks(same, members):
            return NEVER
        return total_size(parameters)

    def load(self, parameters: Sequence[Tensor], total: float) -> None:
        """Expect the weights that `saved` saw; they may still be loaded after this."""
        self.__init__()
        self._expected = Expected(list(parameters), total, here=False)

    def _differs(self) -> bool | Tensor:
        """Whether entries, or sums where they are kept, are others than the last step left."""
        if not self._parameters:
            return False
        pairs = list(zip(self._entries, self._packed(), strict=True))
        if any(then.shape != now.shape or then.dtype != now.dtype for then, now in pairs):
            return True
        if self._sums:
            pairs += zip(self._sums, _sizes(self._parameters), strict=True)
        device = local(self._parameters[:1])[0].device
        apart = torch.stack([(then != now.to(then.device)).any().to(device) for then, now in pairs]).any()
        return bool(apart) if device.type == "cpu" else apart

    def _packed(self) -> list[Tensor]:
        """Entries of all parameters, one tensor for each dtype and device."""
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter, own in zip(self._parameters, local(self._parameters), strict=True):
            alike.setdefault((own.dtype, own.device), []).append(self._view(parameter, own))
        return [torch.cat(own) for own in alike.values()]

    def _view(self, parameter: Tensor, own: Tensor) -> Tensor:
        """Entries of what this rank keeps of a parameter, as a view that is made once."""
        place, view = self._views.get(parameter, (None, None))
        if view is None or place != own.data_ptr():
            view = spaced(own)
            shared = view.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            if shared:
                self._views[parameter] = (own.data_ptr(), view)
        return view

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: entries and counts of writes are of this process' tensors, a sum is not.

        A copy is made by a rank alone, of what it keeps: nobody else is asked.
        """
        expected = self._expected
        if expected is None and self._parameters:
            total = NEVER if bool(self._differs()) else kept_size(self._parameters)
            expected = Expected(self._parameters, total, here=True)
        return {**Changes().__dict__, "_written": self._written, "_expected": expected, "_warned": self._warned}


def _kept(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    return [kept(before, now) for before, now in itertools.zip_longest(old[: len(new)], new)]


def _versions(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Counts of writes: of a shard and of the tensor that it is a part of, as either may be written to."""
    return [(p._version, own._version) for p, own in zip(parameters, local(parameters), strict=True)]


def _sizes(parameters: Sequence[Tensor]) -> list[Tensor]:
    kinds = [(own.detach(), torch.promote_types(own.dtype, torch.float32)) for own in local(parameters)]
    return [torch.linalg.vector_norm(own, ord=1, dtype=dtype) for own, dtype in kinds]


def _on_all_ranks(fine: bool, parameters: Sequence[Tensor]) -> bool:
    """Whether it is so on all ranks that keep a part of some parameters."""
    team = Team.of(sharded(parameters), ())
    return bool(team.every(fine, _where(parameters, team)))


def _where(parameters: Sequence[Tensor], team: Team) -> torch.device:
    """On which device ranks tell each other of some parameters."""
    device = local(parameters[:1])[0].device
    return device if team.size == 1 else exchange_device(device, team)


def _size(own: Tensor) -> Tensor:
    """Sum of absolute values, wide: one of 10^7 numbers in float32 would be off by a percent."""
    return torch.linalg.vector_norm(own.detach(), ord=1, dtype=scalar_type(own.device))


def kept_size(parameters: Sequence[Tensor]) -> float:
    """Sum of the absolute values of all entries that this rank keeps."""
    return math.fsum(float(_size(own)) for own in local(parameters) if own.numel())


def total_size(parameters: Sequence[Tensor]) -> float:
    """Sum of the absolute values of all entries, each counted once however many ranks keep it.

    Args:
        parameters: Of sharded ones, all ranks that keep a part take part.
    """
    parts = sharded(parameters)
    plain = kept_size([parameter for parameter in parameters if not is_sharded(parameter)])
    if not parts:
        return plain
    team = Team.of(parts, ())
    kept: list[float] = []
    for part in parts:
        layout = team.layout("a weight", part)
        copies = layout.boxes.count(layout.boxes[team.own]) * team.size / len(layout.members)
        kept.append(kept_size([part]) / copies)  # so that a copy that differs is found, too
    packed = torch.tensor(kept, dtype=torch.float64, device=_where(parts, team))
    return math.fsum([plain, *team.summed(packed).tolist()])
