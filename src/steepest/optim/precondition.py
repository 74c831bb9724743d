"""What a checkpoint must hold of layer inputs, and how training goes on from it."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import InputMoment, Reader
from steepest.checks import refusal
from steepest.notices import warn
from steepest.optim.input_moments import (
    INPUT_LEADER,
    INPUT_SUM,
    INPUT_SUM_MASS,
    MOMENT_KEYS,
    UNSETTLED,
    InputMoments,
    States,
)
from steepest.optim.options import INPUT_OPTIONS, INPUT_STEPS
from steepest.optim.refresh import INPUT_MASS, INPUT_MOMENT, INPUT_POWERS, Outcome, invert_

INPUT_KEYS = (INPUT_MOMENT, INPUT_MASS, INPUT_POWERS, INPUT_LEADER, INPUT_SUM, INPUT_SUM_MASS)


class Preconditioner(InputMoments):
    """Moments that can be saved and loaded. Its arguments and errors are those of `InputMoments`."""

    @property
    def tag(self) -> str:
        """What momenta and powers in the state depend on."""
        options = self.options
        return f"on={options.on} exponents={options.exponents} solver={options.solver} normalize={options.normalize}"

    def check(self, groups: Sequence[Mapping[str, Any]], states: States) -> None:
        """Refuse momenta of gradients if these are not averaged alike here, and moments that are not there, or in part.

        Args:
            groups: Of a state dict.
            states: Of the parameters, as saved.

        Raises:
            ValueError: If so.
        """
        self._saved_leaders(states)
        for reader in self.readers:
            state = states.get(reader.parameter, {})
            for together in (MOMENT_KEYS, (INPUT_SUM, INPUT_SUM_MASS)):
                there, missing = ([key for key in together if (key in state) == has] for has in (True, False))
                if there and missing:
                    raise ValueError(
                        f"The state of {reader.row.name!r} has {there[0]!r}, but {missing[0]!r} is missing, without "
                        "which it means nothing: the checkpoint is damaged. Start with fresh state instead."
                    )
        saved = str(next((group[INPUT_OPTIONS] for group in groups if group.get(INPUT_OPTIONS)), ""))
        if saved and saved.split()[0] != f"on={self.options.on}":
            raise ValueError(
                f"The state was saved with InputMoment({saved.split()[0]}), here it is on={self.options.on!r}, for "
                "which its momenta are of another kind. Use the same, or start with fresh state."
            )

    def reads(self, parameter: Tensor) -> bool:
        """Whether a parameter is preconditioned by what its layer reads."""
        return parameter in self._numbers

    def known_shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """Entries that a parameter's saved state may have, with their shapes."""
        number = self._numbers.get(parameter)
        if number is None:
            return {}
        layout = self.readers[number].layout
        shape, mass = torch.Size(layout.shape), torch.Size(layout.mass_shape)
        powers = torch.Size((len(self.options.powers), *shape))
        return dict(zip(INPUT_KEYS, (shape, mass, powers, torch.Size(()), shape, mass), strict=True))

    def save_seen(self, states: States) -> None:
        """Put what was seen since the last step into the state, for a checkpoint between two micro-batches."""
        self.watch.settle()
        for number, reader in enumerate(self.readers):
            state, sums = states[reader.parameter], self.watch.sums(number)
            if sums is not None:
                state[INPUT_SUM], state[INPUT_SUM_MASS] = sums
            elif INPUT_SUM in state:
                del state[INPUT_SUM], state[INPUT_SUM_MASS]

    def load(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Continue from loaded state.

        Args:
            states: Of the parameters, as loaded.
            groups: Of the state dict.
        """
        self.steps = int(max(group.get(INPUT_STEPS, 0) for group in groups))
        self._settled, self._ready, self._owed = set(), {}, set()
        self._leaders = self._saved_leaders(states)
        for number, reader in enumerate(self.readers):
            state = states.get(reader.parameter, {})
            if float(state.get(INPUT_LEADER, UNSETTLED)) != UNSETTLED:
                self._settled.add(number)
                self._lead(states, number, self._leaders[number])  # by the numbers of here
            if INPUT_MASS in state and bool((state[INPUT_MASS] > 0).any()):
                self._ready[number] = self._last_refresh(reader)
        if any(group.get(INPUT_OPTIONS) not in (None, "", self.tag) for group in groups):
            self._invert_again(states)
        self._link(states)
        self.expect()
        for number, reader in enumerate(self.readers):
            state = states.get(reader.parameter, {})
            if INPUT_SUM in state and number in self.watch.summing:
                self.watch.seed(number, state.pop(INPUT_SUM), state.pop(INPUT_SUM_MASS))

    def _invert_again(self, states: States) -> None:
        """Powers that were saved under other options are not those of here; the moments are."""
        ready = sorted(self._ready)
        own = [states[self.readers[number].parameter] for number in ready]
        layouts = [self.readers[number].layout for number in ready]
        invert_(own, layouts, [state[INPUT_MASS] > 0 for state in own], options=self.options, outcome=Outcome())

    def _saved_leaders(self, states: States) -> list[int]:
        """Leaders by the numbers of here; those in the state are of the optimizer that saved it."""
        own = [states.get(reader.parameter, {}) for reader in self.readers]
        saved = [float(state.get(INPUT_LEADER, UNSETTLED)) for state in own]
        holders: dict[float, int] = {}
        for number, leader in enumerate(saved):  # all who share hold the moment, and the first of them leads
            if INPUT_MOMENT in own[number]:
                holders.setdefault(leader, number)
        leaders = [self._first_of(reader.group) for reader in self.readers]
        for number, (reader, leader) in enumerate(zip(self.readers, saved, strict=True)):
            if leader == UNSETTLED:
                continue
            if leader not in holders or self.readers[holders[leader]].layout != reader.layout:
                raise ValueError(
                    f"The state of {reader.row.name!r} refers to the moment of layer number {leader:g}, which is not "
                    "there: the checkpoint is damaged. Start with fresh state instead."
                )
            leaders[number] = holders[leader]
        return leaders

    def _last_refresh(self, reader: Reader) -> int:
        """The last step that was due for a reader, if none was left out."""
        start = self.options.start(reader.group, max(reader.group for reader in self.readers) + 1)
        last = self.steps - 1 if self.options.anneal is None else min(self.steps, self.options.anneal[1]) - 1
        return last - (last - start) % self.options.every


def drop_moments(states: States) -> None:
    """Forget moments that were saved by an optimizer that looked at inputs, where nobody does; warns if there are some.

    Args:
        states: Of the parameters, as loaded; written to.
    """
    dropped = [key for state in states.values() for key in INPUT_KEYS if state.pop(key, None) is not None]
    if dropped:
        warn(
            "The state holds moments of layer inputs, which this optimizer does not use: they are dropped. Build it "
            "with precondition=InputMoment() to go on with them.",
        )


def precondition_options(precondition: InputMoment | str | None) -> InputMoment | None:
    """Options of preconditioning, by object or name of a preset.

    Raises:
        TypeError: If it is neither.
        ValueError: If the preset is unknown.
    """
    if precondition is None or isinstance(cast(object, precondition), InputMoment):
        return cast(InputMoment | None, precondition)
    if isinstance(cast(object, precondition), str):
        try:
            return InputMoment.preset(cast(str, precondition))
        except ValueError as error:
            raise ValueError(f"precondition: {error}") from error
    raise TypeError(refusal("precondition", "InputMoment(...), the name of a preset or None", precondition))
