"""The stage of layer inputs: when to look at them, whose moment is whose, what is multiplied, what a checkpoint holds.

Per step: `expect` before the forward pass, `refresh` in the step before anything else, `gradient`, `before` and `after`
for each load, and `passed` at its end.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import LINEAR, Load, PlanRow
from steepest.notices import warn
from steepest.ranks import (
    Duties,
    Exchange,
    Route,
    Team,
    is_sharded,
    kept_like,
    laid_out,
    listeners,
    local,
    summed,
    unanimous,
)
from steepest.ranks.boxes import full, own_box
from steepest.stages.inputs.moments import given_rows
from steepest.stages.inputs.options import INPUT_OPTIONS, INPUT_STEPS, InputMoment
from steepest.stages.inputs.readers import Reader, find_readers, refuse_unmatched
from steepest.stages.inputs.refresh import (
    INPUT_MASS,
    INPUT_MOMENT,
    INPUT_POWERS,
    Outcome,
    invert_,
    multiplied,
    new_moments,
    no_powers,
    refresh_,
)
from steepest.stages.inputs.watch import InputWatch
from steepest.stages.stage import Entry, Stage, States, state_dtype

INPUT_LEADER = "input_leader"  # 0-d, number of the reader whose moment a reader uses; UNSETTLED until that is known
UNSETTLED = -1.0
MOMENT_KEYS = (INPUT_MOMENT, INPUT_MASS)
INPUT_SUM, INPUT_SUM_MASS = "input_sum", "input_sum_mass"  # seen since the last step, if a refresh is under way


@dataclass(frozen=True)
class Applied:
    """The powers of one step.

    Args:
        options: Of the preconditioning.
        powers: Identity of a parameter to how it is read, and the powers (one per exponent, *shape of its layout).
        blend: Part of them that is used.
    """

    options: InputMoment
    powers: Mapping[int, tuple[Reader, Tensor]]
    blend: float

    def times(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor], which: int) -> list[Tensor]:
        """Multiply with P_a or P_b.

        Args:
            parameters: To which the tensors belong.
            tensors: Shaped like them.
            which: 0 for P_a, 1 for P_b.

        Returns:
            New tensors, or the given ones where nothing is to be multiplied.
        """
        exponent = self.options.exponents[which]
        if exponent == 0:
            return list(tensors)
        place = self.options.powers.index(exponent)
        return [self._one(parameter, tensor, place) for parameter, tensor in zip(parameters, tensors, strict=True)]

    def _one(self, parameter: Tensor, tensor: Tensor, place: int) -> Tensor:
        found = self.powers.get(id(parameter))
        if found is None:
            return tensor
        (reader, powers), solver = found, self.options.solver
        power = powers[place]
        if tensor.shape != parameter.shape and reader.layout.structure == "diagonal":  # a part of others than matrices
            start, stop = own_box(parameter)[0 if reader.view.transposed else 1]
            power = power[:, start:stop]
        if reader.view == LINEAR and tensor.ndim == 2:
            result = multiplied(tensor.unsqueeze(0), power, reader.layout, solver=solver)[0]
        else:
            (batch,) = reader.view.split_tensor(tensor)
            result = reader.view.merge((multiplied(batch, power, reader.layout, solver=solver),), tensor.shape)
        return result if self.blend == 1 else torch.lerp(tensor, result, self.blend)


def _any(gradient: Any) -> bool:
    """Whether something of what this rank has of a gradient is not zero; it may have none that others have."""
    return gradient is not None and bool(local([gradient])[0].any())


def _tell_of_unseen(readers: Sequence[Reader], options: InputMoment) -> None:
    """Warn of layers whose inputs hooks cannot see, where that will raise."""
    unseen = [reader for reader in readers if options.hooks and not reader.feeds]
    if unseen and options.missing == "raise":
        instead = "to Muon" if unseen[0].row.role == "matrix" else "as they are"
        warn(
            f"Hooks cannot see the inputs of {', '.join(reader.row.name for reader in unseen)}: "
            f"{unseen[0].unseen}. "
            "Call record_input(parameter, inputs) in each micro-batch of a step that refreshes, or leave them "
            f"{instead} with InputMoment(structure={{{unseen[0].row.name!r}: 'none'}}) or missing='muon'."
        )


class MissingInputsError(RuntimeError):
    """A layer has a gradient, but what it was fed was not seen, and the optimizer was told to raise."""


class InputMoments(Stage):
    """Keeps the moments of a model's inputs, for one optimizer.

    Args:
        options: What to do.
        rows: Of the parameters of the roles that are preconditioned, as routed.

    Raises:
        ValueError: If no parameter is left to precondition, none can be hooked, or one is a table and a head.
    """

    prefix = InputMoment.prefix
    group_keys = InputMoment.group_keys

    def __init__(self, options: InputMoment, rows: Sequence[PlanRow]) -> None:
        self.options = options
        self.roles = options.roles
        refuse_unmatched(options, [row.name for row in rows])
        readers = find_readers(rows, options)
        if not readers:
            raise ValueError(
                f"InputMoment: no {' or '.join(self.roles)} is left to precondition. By default these are, of "
                "matrices, the layers that read at least twice as many features as they write; give structure='full' "
                "for all, or leave out precondition=."
            )
        if options.hooks and not any(reader.feeds for reader in readers):
            raise ValueError(
                f"InputMoment: no module is known that feeds {readers[0].row.name!r} or any other parameter. Pass the "
                "model (or steepest.route(model)) instead of its parameters, or give InputMoment(hooks=False) and call "
                "record_input() in each step that refreshes."
            )
        _tell_of_unseen(readers, options)
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
        self._applied: Applied | None = None  # in this step
        self._powers: dict[int, Tensor] = {}  # of leaders, where they are needed
        self._owing: set[int] = set()  # leaders whose powers are to be made of the moment that is there
        self._duties = Duties(Team())
        self.expect()

    def assigned(self, duties: Duties) -> None:
        """Hear who works on which layers: there their powers are needed.

        Args:
            duties: Of all parameters of the optimizer.
        """
        before, self._duties = self._duties, duties
        if before.team.ranks != duties.team.ranks:
            self._powers = {}
        self._owing = set(self._ready)

    def added(self, rows: Sequence[PlanRow]) -> None:
        """Look at the inputs of more parameters when it is their turn."""
        first, groups = len(self.readers), max(reader.group for reader in self.readers) + 1
        found = [replace(reader, group=reader.group + groups) for reader in find_readers(rows, self.options)]
        if not found:
            return
        _tell_of_unseen(found, self.options)
        self.watch.extend(found)  # self.readers is its list
        self._numbers |= {reader.parameter: first + place for place, reader in enumerate(found)}
        self._leaders += [self._first_of(reader.group) for reader in found]
        self.expect()

    @property
    def changes_gradients(self) -> bool:
        """With on="gradient"."""
        return self.options.on == "gradient"

    def attach(self, rows: Sequence[PlanRow]) -> Stage:
        """Refuse to work for a second optimizer."""
        raise ValueError(
            f"stages: what looks at the inputs of {self.readers[0].row.name!r} is at work for another optimizer. Give "
            "the options, InputMoment(...), instead of what optimizer.stages holds."
        )

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
        self._applied = None
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

    @contextmanager
    def masked(self, mask: Tensor) -> Generator[None]:
        """Within it, tokens count by their mask.

        Args:
            mask: (batch, time) or (batch,), at least 0.
        """
        before, self.watch.weights = self.watch.weights, mask.detach()
        try:
            yield
        finally:
            self.watch.weights = before

    @property
    def linear(self) -> bool:
        """What directions are multiplied with does not depend on them."""
        return True

    @property
    def keeps_ball(self) -> bool:
        """Whether directions stay what they are."""
        return self.options.keeps_ball

    @property
    def no_duals(self) -> str | None:
        """Why momenta do not tell how the loss changes."""
        return self.options.no_duals

    def cleared(self) -> None:
        """What was seen belongs to gradients that are gone."""
        self.watch.forget()

    def gradient(self, load: Load, gradients: list[Tensor]) -> list[Tensor]:
        """G P_a, with on="gradient"."""
        if self._applied is None or self.options.on != "gradient":
            return gradients
        return self._applied.times(load.parameters, gradients, 0)

    def before(
        self, load: Load, batches: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, ...]:
        """M P_a, with on="momentum"."""
        del states
        return batches if self.options.on == "gradient" else self._times(load, batches, 0)

    def after(
        self, load: Load, directions: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]], accept: Tensor | None
    ) -> tuple[Tensor, ...]:
        """D P_b."""
        del states, accept
        return self._times(load, directions, 1)

    def _times(self, load: Load, batches: tuple[Tensor, ...], which: int) -> tuple[Tensor, ...]:
        if self._applied is None or self.options.exponents[which] == 0:
            return batches
        return load.matrices(self._applied.times(load.parameters, load.parameter_shaped(batches), which))

    @property
    def exchanges(self) -> bool:
        """Whether the next refresh sums over ranks."""
        return bool(self.watch.summing)

    @property
    def _team(self) -> Team:
        """With whom sums of inputs are shared."""
        return listeners(self._duties.team)

    def refresh(self, states: States, present: Sequence[Tensor], accept: Tensor | None) -> None:
        """Bring those moments up to date that are due.

        Args:
            states: Of the parameters; written to.
            present: Parameters with a gradient.
            accept: A 0-d boolean; where it is False no moment changes. None means True.

        Raises:
            MissingInputsError: If inputs are missing and the options say "raise".
        """
        self._revive(states)
        self._sum_up(states, present, accept)
        self._applied = self.powers()

    def _sum_up(self, states: States, present: Sequence[Tensor], accept: Tensor | None) -> None:
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
        chosen = {due[place]: (totals[place], masses[place]) for place in taken}

        def renew(mine: Sequence[int], own: list[dict[str, Tensor]]) -> Outcome:
            return refresh_(
                own,
                [self.readers[number].layout for number in mine],
                [cast(Tensor, chosen[number][0]) for number in mine],
                [chosen[number][1] for number in mine],
                options=self.options,
                accept=accept,
            )

        self._at_owners(states, leaders, renew, keep=True)
        self._ready.update(dict.fromkeys(leaders, self.steps))

    def _revive(self, states: States) -> None:
        """Make powers of moments that came without them, with a checkpoint, or that somebody else had so far."""
        owing = sorted(self._owing & self._ready.keys())
        self._owing = set()
        if self._team.size == 1:
            owing = [number for number in owing if number not in self._powers]
        if not owing:
            return

        def remake(mine: Sequence[int], own: list[dict[str, Tensor]]) -> Outcome:
            layouts = [self.readers[number].layout for number in mine]
            outcome = Outcome()
            invert_(own, layouts, [state[INPUT_MASS] > 0 for state in own], options=self.options, outcome=outcome)
            return Outcome()  # these were counted when the moment was refreshed

        self._at_owners(states, owing, remake, keep=False)

    def _at_owners(
        self,
        states: States,
        leaders: Sequence[int],
        work: Callable[[Sequence[int], list[dict[str, Tensor]]], Outcome],
        *,
        keep: bool,
    ) -> None:
        """Do something to moments and powers where their owners are.

        Args:
            states: Of the parameters; written to.
            leaders: Whose moments.
            work: Is told which leaders this rank works on, and their whole moments, masses and powers; writes to them.
            keep: Whether moments and masses change.
        """
        duties, team = self._duties, self._duties.team
        shared = [number for number in leaders if duties.shares(self.readers[number].parameter)]
        alone = [number for number in leaders if number not in shared]
        own = [dict(states[self.readers[number].parameter]) for number in alone]
        for number, state in zip(alone, own, strict=True):
            state[INPUT_POWERS] = self._powers_of(number)
        if alone:
            self._count(work(alone, own))
        if not shared:
            return
        owners = {number: self._owner(number) for number in shared}
        routes: list[Route] = []
        kept: list[Tensor] = []
        for key in MOMENT_KEYS:
            for number in shared:
                tensor = states[self.readers[number].parameter][key]
                members = duties.layouts[self.readers[number].parameter].members
                layout = team.layout(self.readers[number].row.name, tensor, copies=members)
                routes.append(Route(owners[number], full(layout.shape), layout.boxes))
                kept.append(tensor)
        exchange = Exchange(team, routes)
        parts = local(kept)
        whole = dict(zip(((key, n) for key in MOMENT_KEYS for n in shared), exchange.gather(parts).wait(), strict=True))
        mine = [number for number in shared if owners[number] == team.own]
        own = [
            {**{key: cast(Tensor, whole[key, number]) for key in MOMENT_KEYS}, INPUT_POWERS: self._powers_of(number)}
            for number in mine
        ]
        outcome = work(mine, own) if mine else Outcome()
        counted = team.summed(parts[0].new_tensor([outcome.raised, outcome.kept]))
        self._count(Outcome(*(int(number) for number in counted.tolist())))
        if keep:
            for target, part in zip(parts, exchange.scatter(list(whole.values()), parts[0]).wait(), strict=True):
                if part is not None and part is not target:
                    target.copy_(part)
        self._hand_out(shared, owners, parts[0])

    def _owner(self, number: int) -> int:
        """Who keeps a moment up to date; of what all work on where it is, each in turn."""
        parameter = self.readers[number].parameter
        if self._everywhere(parameter):
            members = self._duties.layouts[parameter].members
            return members[number % len(members)]
        return self._duties.owner(parameter)

    def _everywhere(self, parameter: Tensor) -> bool:
        """Whether each rank works on what it keeps of a parameter, in a norm that looks at each entry by itself."""
        return self._duties.shares(parameter) and parameter not in self._duties.routes

    def powers_of(self, parameter: Tensor) -> Tensor | None:
        """The powers that a layer's gradient is multiplied with.

        Args:
            parameter: Of the layer.

        Returns:
            (exponents, *shape of its moment), which it may share with other layers; None before its first refresh, and
            on ranks that do not work on it.
        """
        number = self._numbers.get(parameter)
        return None if number is None else self._powers.get(self._leaders[number])

    def _powers_of(self, number: int) -> Tensor:
        """Powers of a leader, to be written to."""
        if number not in self._powers:
            reader = self.readers[number]
            device = local([reader.parameter])[0].device
            self._powers[number] = no_powers(reader.layout, self.options, state_dtype(reader.parameter), device)
        return self._powers[number]

    def _hand_out(self, leaders: Sequence[int], owners: Mapping[int, int], like: Tensor) -> None:
        """Give powers to those who work on other layers that read the same, or on parts of this one."""
        duties, team = self._duties, self._duties.team
        routes: list[Route] = []
        sent: list[int] = []
        for number in leaders:
            readers = [reader for reader, leader in zip(self.readers, self._leaders, strict=True) if leader == number]
            parameters = [reader.parameter for reader in readers if duties.shares(reader.parameter)]
            users = {duties.owner(parameter) for parameter in parameters if not self._everywhere(parameter)}
            users.update(*(duties.layouts[p].members for p in parameters if self._everywhere(p)))
            if users - {owners[number]}:
                shape = full((len(self.options.powers), *self.readers[number].layout.shape))
                routes.append(
                    Route(owners[number], shape, tuple(shape if r in users else None for r in range(team.size)))
                )
                sent.append(number)
        # ranks that share other layers have other owners, and may have something to send where these have not
        always = not all(duties.everyone(self.readers[number].parameter) for number in leaders)
        if routes or always:
            given = [self._powers_of(n) if owners[n] == team.own else None for n in sent]
            exchange = Exchange(team, routes, always=always)
            for number, powers in zip(sent, exchange.scatter(given, like).wait(), strict=True):
                if powers is not None:
                    self._powers[number] = powers

    def allocate(self, states: States) -> None:
        """Moments and powers of those that have their own, and to whom the others belong."""
        self._ensure(states, set(self._leaders))

    def _ensure(self, states: States, leaders: Iterable[int]) -> None:
        for reader in self.readers:
            if INPUT_LEADER not in states[reader.parameter]:
                states[reader.parameter][INPUT_LEADER] = self._number(reader, UNSETTLED)
        for number in leaders:
            parameter, layout = self.readers[number].parameter, self.readers[number].layout
            if INPUT_MOMENT not in states[parameter]:
                device = local([parameter])[0].device
                new_moments(states[parameter], layout, self.options, state_dtype(parameter), device)
                if is_sharded(parameter):
                    like = kept_like(parameter, layout.shape, state_dtype(parameter))
                    states[parameter][INPUT_MOMENT] = laid_out(states[parameter][INPUT_MOMENT], like)
        self._link(states)

    def _link(self, states: States) -> None:
        """Those that use another's moment hold the same tensors: keys of the state do not depend on who shares."""
        for number, (reader, leader) in enumerate(zip(self.readers, self._leaders, strict=True)):
            theirs = states[self.readers[leader].parameter]
            if leader != number and INPUT_MOMENT in theirs:
                states[reader.parameter].update({key: theirs[key] for key in MOMENT_KEYS})

    def _over_ranks(
        self, due: Sequence[int], present: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor], list[float]]:
        """Over all ranks: sums and masses of each due reader, zeros where nothing was seen, and who lacks inputs.

        Where layers have owners, these alone get the sums. Who lacks inputs is exchanged with the rest: what one rank
        refuses, all do, or the others would wait for it.
        """
        numbers = {self._numbers[p]: p for p in present if p in self._numbers}
        unseen = [number in numbers and number not in self.watch.seen for number in due]
        lacks = [one and _any(numbers[n].grad) for n, one in zip(due, unseen, strict=True)]
        totals: list[Tensor] = []
        masses: list[Tensor] = []
        for number in due:
            reader = self.readers[number]
            device = local([reader.parameter])[0].device
            like = torch.empty(0, dtype=state_dtype(reader.parameter), device=device)
            sums = self.watch.sums(number)
            empty = (like.new_zeros(reader.layout.shape), like.new_zeros(reader.layout.mass_shape))
            total, mass = empty if sums is None else (part.to(device) for part in sums)
            totals.append(total)
            masses.append(mass)
        team, duties = self._team, self._duties
        owned = [place for place, n in enumerate(due) if duties.everyone(self.readers[n].parameter)]
        rest = [place for place in range(len(due)) if place not in owned]
        *found, lacking = summed([*masses, *(totals[place] for place in rest), masses[0].new_tensor(lacks)], team)
        whole: list[Tensor | None] = [None] * len(due)
        for place, total in zip(rest, found[len(due) :], strict=True):
            whole[place] = total
        by_kind: dict[torch.dtype, list[int]] = {}
        for place in owned:
            by_kind.setdefault(totals[place].dtype, []).append(place)
        for places in by_kind.values():
            owners = [self._owner(due[place]) for place in places]
            sums = team.sum_to(owners, [totals[place] for place in places])
            for place, total in zip(places, sums, strict=True):
                whole[place] = total
        return whole, found[: len(due)], lacking.tolist()

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
        agreed = unanimous(found, self.readers[0].parameter.device, self._team)
        for number, leader in zip(fresh, agreed, strict=True):
            self._lead(states, number, number if leader is None else leader)
            self._settled.add(number)

    def _lead(self, states: States, number: int, leader: int) -> None:
        state = states[self.readers[number].parameter]
        state[INPUT_LEADER] = self._number(self.readers[number], leader)
        if self._leaders[number] != number or leader != number:  # what it holds is another's, or no longer used
            for key in MOMENT_KEYS:
                state.pop(key, None)
            self._powers.pop(number, None)
        self._leaders[number] = leader

    def _number(self, reader: Reader, value: float) -> Tensor:
        return torch.tensor(float(value), dtype=state_dtype(reader.parameter), device="cpu")

    def _part(self, states: States) -> None:
        """A reader that no longer reads what its leader reads goes on alone, with a copy of the moment."""
        followers = sorted(self.watch.comparing)
        differ = [int(self._differs(number)) for number in followers]
        device = self.readers[0].parameter.device
        for number, same in zip(followers, unanimous(differ, device, self._team), strict=True):
            if same == 0:
                continue
            leader_number = self._leaders[number]
            leader = states[self.readers[leader_number].parameter]
            self._lead(states, number, number)
            states[self.readers[number].parameter].update({key: leader[key].clone() for key in MOMENT_KEYS})
            if leader_number in self._powers:
                self._powers[number] = self._powers[leader_number].clone()
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

    def powers(self) -> Applied | None:
        """What this step multiplies with; None while there is nothing, or the blend is zero."""
        blend = self.options.blend_at(self.steps)
        powers = {
            id(reader.parameter): (reader, self._powers[leader])
            for number, (reader, leader) in enumerate(zip(self.readers, self._leaders, strict=True))
            if number in self._settled and leader in self._ready and leader in self._powers
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

    @property
    def numbers(self) -> dict[str, Any]:
        """How many steps were done, and what momenta and powers in the state depend on."""
        return {INPUT_STEPS: self.steps, INPUT_OPTIONS: self._tag}

    @property
    def _tag(self) -> str:
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

    def replaced(self, row: PlanRow, shape: tuple[int, ...], where: str) -> None:
        """A weight of a layer whose inputs are looked at has another in its place."""
        if row.parameter in self._numbers:
            raise ValueError(
                f"{row.name!r} is preconditioned by what its layer reads, but in {where} a parameter of shape "
                f"{shape} took its place without add_param_group, and nobody looks at its inputs. "
                "Build a new optimizer with the model as it is now."
            )

    def entries(self, row: PlanRow) -> Sequence[Entry]:
        """Moment and mass, whose moment it is, and what was seen since the last step; powers are made of these."""
        number = self._numbers.get(row.parameter)
        if number is None:
            return ()
        layout = self.readers[number].layout
        shape, mass = torch.Size(layout.shape), torch.Size(layout.mass_shape)
        powers = torch.Size((len(self.options.powers), *shape))
        return (
            Entry(INPUT_MOMENT, shape, eager=False, travels=False),
            Entry(INPUT_MASS, mass, least=0.0, eager=False, divided=False, travels=False),
            Entry(INPUT_POWERS, powers, eager=False, divided=False, travels=False),  # in states of before
            Entry(INPUT_LEADER, torch.Size(()), eager=False, read=False, divided=False, travels=False),
            Entry(INPUT_SUM, shape, eager=False, read=False, divided=False, travels=False),
            Entry(INPUT_SUM_MASS, mass, eager=False, read=False, divided=False, travels=False),
        )

    def save(self, states: States) -> None:
        """Put what was seen since the last step into the state, for a checkpoint between two micro-batches."""
        self.watch.settle()
        for number, reader in enumerate(self.readers):
            sums = self.watch.sums(number)
            if sums is not None:
                states[reader.parameter].update(dict(zip((INPUT_SUM, INPUT_SUM_MASS), sums, strict=True)))
            elif INPUT_SUM in (state := states.get(reader.parameter, {})):  # an empty one would pass for made state
                del state[INPUT_SUM], state[INPUT_SUM_MASS]

    def load(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Continue from loaded state.

        Args:
            states: Of the parameters, as loaded.
            groups: Of the state dict.
        """
        self.steps = int(max(group.get(INPUT_STEPS, 0) for group in groups))
        self._settled, self._ready, self._owed = set(), {}, set()
        self._leaders, self._powers = self._saved_leaders(states), {}
        for number, reader in enumerate(self.readers):
            state = states.get(reader.parameter, {})
            state.pop(INPUT_POWERS, None)
            if float(state.get(INPUT_LEADER, UNSETTLED)) != UNSETTLED:
                self._settled.add(number)
                self._lead(states, number, self._leaders[number])  # by the numbers of here
            if INPUT_MASS in state and bool((state[INPUT_MASS] > 0).any()):
                self._ready[number] = self._last_refresh(reader)
        self._owing = set(self._ready)
        self._link(states)
        self.expect()
        for number, reader in enumerate(self.readers):
            state = states.get(reader.parameter, {})
            if INPUT_SUM in state and number in self.watch.summing:
                self.watch.seed(number, state.pop(INPUT_SUM), state.pop(INPUT_SUM_MASS))

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
