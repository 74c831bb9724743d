"""Preconditioning by layer inputs, for one optimizer: when to look at inputs, whose moment is whose, what is applied.

Per step: `expect` before the forward pass, `refresh` in the step before anything else, `applied` for the moves, and
`passed` at its end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from steepest.anatomy import InputMoment, InputWatch, PlanRow, Reader, find_readers, given_rows
from steepest.notices import warn
from steepest.optim.applied import Applied
from steepest.optim.refresh import INPUT_MASS, INPUT_MOMENT, INPUT_POWERS, Outcome, ensure_moments, refresh_
from steepest.optim.state import state_dtype
from steepest.ranks import summed, unanimous

INPUT_LEADER = "input_leader"  # 0-d, number of the reader whose moment a reader uses; UNSETTLED until that is known
UNSETTLED = -1.0
MOMENT_KEYS = (INPUT_MOMENT, INPUT_MASS, INPUT_POWERS)
INPUT_SUM, INPUT_SUM_MASS = "input_sum", "input_sum_mass"  # seen since the last step, if a refresh is under way

States = Mapping[Tensor, dict[str, Tensor]]


class MissingInputsError(RuntimeError):
    """A layer has a gradient, but what it was fed was not seen, and the optimizer was told to raise."""


class InputMoments:
    """Keeps the moments of a model's inputs.

    Args:
        options: What to do.
        rows: Of the matrices, as routed.

    Raises:
        ValueError: If no parameter is left to precondition, or none can be hooked.
    """

    def __init__(self, options: InputMoment, rows: Sequence[PlanRow]) -> None:
        self.options = options
        readers = find_readers(rows, options)
        if not readers:
            raise ValueError(
                "InputMoment: no matrix is left to precondition. By default these are the layers that read at least "
                "twice as many features as they write; give structure='full' for all, or leave out precondition=."
            )
        if sharded := [reader.row.name for reader in readers if hasattr(reader.parameter, "device_mesh")]:
            raise ValueError(
                f"InputMoment: {sharded[0]!r} is a sharded DTensor, and moments of inputs are for whole parameters. "
                "Use DistributedDataParallel, or leave out precondition=."
            )
        if options.hooks and not any(reader.feeds for reader in readers):
            raise ValueError(
                f"InputMoment: no module is known that feeds {readers[0].row.name!r} or any other matrix. Pass the "
                "model (or steepest.route(model)) instead of its parameters, or give InputMoment(hooks=False) and call "
                "record_input() in each step that refreshes."
            )
        unseen = [reader for reader in readers if options.hooks and not reader.feeds]
        if unseen and options.missing == "raise":
            warn(
                f"Hooks cannot see the inputs of {', '.join(reader.row.name for reader in unseen)}: "
                f"{unseen[0].unseen}. "
                "Call record_input(parameter, inputs) in each micro-batch of a step that refreshes, or leave them to "
                f"Muon with InputMoment(structure={{{unseen[0].row.name!r}: 'none'}}) or missing='muon'."
            )
        self.watch = InputWatch(readers, options.tokens)
        self.readers = self.watch.readers
        self.steps = 0
        names = ("input_ridge_raised", "input_kept_powers", "input_missing", "input_partial", "input_parted")
        self.counts = dict.fromkeys(names, 0)
        self._numbers = {reader.parameter: number for number, reader in enumerate(readers)}
        self._leaders = [self._first_of(reader.group) for reader in readers]
        self._settled: set[int] = set()  # readers whose leader was told by what they read
        self._ready: dict[int, int] = {}  # leaders that have a moment, and the step that refreshed it last
        self._owed: set[int] = set()  # readers whose turn fell into a step that was not taken
        self.expect()

    def _first_of(self, group: int) -> int:
        return next(number for number, reader in enumerate(self.readers) if reader.group == group)

    def expect(self) -> None:
        """Look at the inputs that the coming step needs, and only at these."""
        groups = max(reader.group for reader in self.readers) + 1
        due = {
            number
            for number, reader in enumerate(self.readers)
            if self.options.due(self.steps, self.options.start(reader.group, groups))
        }
        due |= self._owed if self.options.blend_at(self.steps) > 0 else set()
        comparing = {number for number in due & self._settled if self._leaders[number] != number}
        self.watch.watch(frozenset(due - comparing), frozenset(comparing))

    def passed(self, *, skipped: bool, idle: Callable[[], bool]) -> None:
        """A step is over.

        Args:
            skipped: Whether it was passed over, so that a refresh is still due.
            idle: Tells whether it was one that only makes the state, as distributed checkpoints take it.
        """
        self._owed = {*self.watch.summing, *self.watch.comparing} if skipped else set()
        self.steps += not (self.steps == 0 and idle())
        self.expect()

    def record(self, parameter: Tensor, x: Tensor, weight: Tensor | None) -> None:
        """Inputs that hooks do not see.

        Args:
            parameter: Whose.
            x: (*tokens, n), or (S, *tokens, n) for a stack of S.
            weight: Of the tokens, likewise without n; None: 1.

        Raises:
            ValueError: If the parameter is not preconditioned, or a shape does not fit.
        """
        number = self._numbers.get(parameter)
        if number is None:
            raise ValueError(
                f"record_input: the parameter of shape {tuple(parameter.shape)} is not preconditioned by this "
                "optimizer; opt.plan lists those that are."
            )
        reader = self.readers[number]
        self.watch.give(number, given_rows(reader.layout, reader.row.name, x, weight))

    @property
    def exchanges(self) -> bool:
        """Whether the next refresh sums over ranks."""
        return bool(self.watch.summing)

    def refresh(self, states: States, present: Sequence[Tensor], accept: Tensor | None) -> None:
        """Bring those moments up to date that are due.

        Args:
            states: Of the parameters; written to.
            present: Parameters with a gradient.
            accept: A 0-d boolean; where it is False no moment changes. None means True.

        Raises:
            MissingInputsError: If inputs are missing and the options say "raise".
        """
        self._ensure(states, set(self._leaders))
        for reader in self.readers:  # left there by a checkpoint since the last step
            states[reader.parameter].pop(INPUT_SUM, None)
            states[reader.parameter].pop(INPUT_SUM_MASS, None)
        due = sorted(self.watch.summing)
        if not due:
            return
        self.watch.settle()
        totals, masses, lacking = self._over_ranks(due, present)
        seen = [bool((mass > 0).any()) for mass in masses]
        missing = [n for n, found, lacks in zip(due, seen, lacking, strict=True) if lacks and not found]
        if missing:
            self._miss(missing)
        self._note_partial([n for n, found in zip(due, seen, strict=True) if found and self.watch.unseen(n)])
        self._settle(states, [number for number, found in zip(due, seen, strict=True) if found])
        self._part(states)
        taken = [
            place
            for place, (number, found) in enumerate(zip(due, seen, strict=True))
            if found and self._leaders[number] == number
        ]
        leaders = [due[place] for place in taken]
        self._ensure(states, leaders)
        outcome = refresh_(
            [states[self.readers[number].parameter] for number in leaders],
            [self.readers[number].layout for number in leaders],
            [totals[place] for place in taken],
            [masses[place] for place in taken],
            options=self.options,
            accept=accept,
        )
        self._count(outcome)
        self._ready.update(dict.fromkeys(leaders, self.steps))

    def _ensure(self, states: States, leaders: Iterable[int]) -> None:
        for reader in self.readers:
            if INPUT_LEADER not in states[reader.parameter]:
                states[reader.parameter][INPUT_LEADER] = self._number(reader, UNSETTLED)
        for number in leaders:
            parameter, layout = self.readers[number].parameter, self.readers[number].layout
            ensure_moments(states[parameter], layout, self.options, state_dtype(parameter), parameter.device)
        self._link(states)

    def _link(self, states: States) -> None:
        """Those that use another's moment hold the same tensors: keys of the state do not depend on who shares."""
        for number, (reader, leader) in enumerate(zip(self.readers, self._leaders, strict=True)):
            theirs = states[self.readers[leader].parameter]
            if leader != number and INPUT_MOMENT in theirs:
                states[reader.parameter].update({key: theirs[key] for key in MOMENT_KEYS})

    def _over_ranks(
        self, due: Sequence[int], present: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Over all ranks: sums and masses of each due reader, zeros where nothing was seen, and who lacks inputs.

        Who lacks inputs is exchanged with the rest: what one rank refuses, all do, or the others would wait for it.
        """
        numbers = {self._numbers[p]: p for p in present if p in self._numbers}
        unseen = [number in numbers and number not in self.watch.seen for number in due]
        lacks = [one and bool(cast(Tensor, numbers[n].grad).any()) for n, one in zip(due, unseen, strict=True)]
        own: list[Tensor] = []
        for number in due:
            reader = self.readers[number]
            like = torch.empty(0, dtype=state_dtype(reader.parameter), device=reader.parameter.device)
            sums = self.watch.sums(number)
            if sums is None:
                own += [like.new_zeros(reader.layout.shape), like.new_zeros(reader.layout.mass_shape)]
            else:
                own += [part.to(like.device) for part in sums]
        *both, lacking = summed([*own, own[0].new_tensor(lacks)])
        return both[0::2], both[1::2], lacking.tolist()

    def _miss(self, missing: Sequence[int]) -> None:
        self.counts["input_missing"] += len(missing)
        if self.options.missing == "muon":
            return
        reader = self.readers[missing[0]]
        why = "no call of its module had a backward pass that adds to the gradient; or backward(inputs=...) or "
        why += "autograd.grad with the weights alone stopped at this layer, before what it reads: add the model's "
        why += "inputs, with requires_grad, to what is asked for; or the model runs from a graph compiled without this "
        why += "optimizer, which torch._dynamo.reset() forgets"
        if reader.unseen:
            why = f"hooks cannot see them: {reader.unseen}"
        self.watch.forget()
        raise MissingInputsError(
            f"{reader.row.name!r} has a gradient, but its inputs since the last step are missing ({why}). Call "
            f"opt.record_input(parameter, inputs) before step(), give it InputMoment(structure={{{reader.row.name!r}: "
            "'none'}), or take Muon's step for such layers with InputMoment(missing='muon')."
        )

    def _note_partial(self, partial: Sequence[int]) -> None:
        if partial and not self.counts["input_partial"]:
            warn(
                f"{self.readers[partial[0]].row.name!r} has a gradient from more backward passes than its inputs were "
                "seen in: its weight is also used without calling its module. Only the inputs that were seen count. "
                "Show the others with opt.record_input(parameter, inputs); for a penalty on the weight nothing is "
                "missing. Further ones are counted in diagnostics()['input_partial']."
            )
        self.counts["input_partial"] += len(partial)

    def _settle(self, states: States, seen: Sequence[int]) -> None:
        """At its first refresh a reader joins the first one that read the same tensors, or stands alone."""
        fresh = [number for number in seen if number not in self._settled]
        firsts: dict[tuple[object, ...], int] = {}
        found: list[int] = []
        for number in fresh:
            sighting = self.watch.seen.get(number)
            prints = tuple(sorted(sighting.prints)) if sighting else ()
            found.append(firsts.setdefault((self.readers[number].layout, prints), number) if prints else number)
        agreed = unanimous(found, self.readers[0].parameter.device)
        for number, leader in zip(fresh, agreed, strict=True):
            self._lead(states, number, number if leader is None else leader)
            self._settled.add(number)

    def _lead(self, states: States, number: int, leader: int) -> None:
        state = states[self.readers[number].parameter]
        state[INPUT_LEADER] = self._number(self.readers[number], leader)
        if self._leaders[number] != number or leader != number:  # what it holds is another's, or no longer used
            for key in MOMENT_KEYS:
                state.pop(key, None)
        self._leaders[number] = leader

    def _number(self, reader: Reader, value: float) -> Tensor:
        return torch.tensor(float(value), dtype=state_dtype(reader.parameter), device="cpu")

    def _part(self, states: States) -> None:
        """A reader that no longer reads what its leader reads goes on alone, with a copy of the moment."""
        followers = sorted(self.watch.comparing)
        differ = [int(self._differs(number)) for number in followers]
        for number, same in zip(followers, unanimous(differ, self.readers[0].parameter.device), strict=True):
            if same == 0:
                continue
            leader_number = self._leaders[number]
            leader = states[self.readers[leader_number].parameter]
            self._lead(states, number, number)
            states[self.readers[number].parameter].update({key: leader[key].clone() for key in MOMENT_KEYS})
            self._ready[number] = self._ready[leader_number]
            self.counts["input_parted"] += 1

    def _differs(self, number: int) -> bool:
        own, leader = self.watch.seen.get(number), self.watch.seen.get(self._leaders[number])
        if own is None:  # its layer was not called
            return False
        return leader is None or sorted(own.prints) != sorted(leader.prints)

    def _count(self, outcome: Outcome) -> None:
        self.counts["input_ridge_raised"] += outcome.raised
        self.counts["input_kept_powers"] += outcome.kept

    def applied(self, states: States) -> Applied | None:
        """The powers of this step; None while there are none, or the blend is zero."""
        blend = self.options.blend_at(self.steps)
        powers = {
            id(reader.parameter): (reader, states[self.readers[leader].parameter][INPUT_POWERS])
            for number, (reader, leader) in enumerate(zip(self.readers, self._leaders, strict=True))
            if number in self._settled and leader in self._ready
        }
        return Applied(self.options, powers, blend) if blend > 0 and powers else None

    def complete(self, row: PlanRow) -> PlanRow:
        """The row of the plan with what is kept for it.

        Args:
            row: Of any parameter.
        """
        number = self._numbers.get(row.parameter)
        if number is None:
            return row
        reader = self.readers[number]
        unseen = f"; not seen by hooks: {reader.unseen}" if reader.unseen else ""
        if self._leaders[number] != number:
            return replace(row, inputs=f"as {self.readers[self._leaders[number]].row.name}{unseen}")
        size = state_dtype(row.parameter).itemsize
        moment = (reader.layout.numel + reader.layout.mass_shape[0]) * size
        inverse = reader.layout.numel * size * len(self.options.powers)
        return replace(row, inputs=f"{reader.layout}{unseen}", moment_bytes=moment, inverse_bytes=inverse)

    def diagnostics(self) -> dict[str, float]:
        """Counters, and the age of the oldest moment in steps."""
        counts = {name: float(count) for name, count in self.counts.items()}
        age = {"input_moment_age": float(self.steps - 1 - min(self._ready.values()))} if self._ready else {}
        return {**counts, **age}
