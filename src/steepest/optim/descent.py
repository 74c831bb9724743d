"""The one optimizer: steepest descent in a norm per layer. Recipes only choose its pieces.

A step goes the same way for every parameter:

    gradient -> average (momentum) -> as matrices -> stages before -> steepest direction in the norm -> stages after
             -> product norm over all layers -> step size -> decay and move

Everything between the gradient and the move is a pure function of tensors in its own file; here they are put in order.
"""

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from steepest.anatomy import ROLES, Override, Plan, PlanRow, Role, aligned, route
from steepest.checks import refusal, shown
from steepest.geometry import Norm, Product
from steepest.geometry.norm import completed
from steepest.notices import warn
from steepest.optim.arguments import checked_options
from steepest.optim.ball import beyond_ball, weight_numbers
from steepest.optim.combine import Combine, DualMode
from steepest.optim.decay import Decay, Decays
from steepest.optim.diagnostics import StepRecord
from steepest.optim.families import FAMILY, Families, where_of
from steepest.optim.groups import (
    AVERAGES,
    Group,
    Norms,
    Rates,
    averages_of,
    make_plain,
    plain,
    settle_averages,
    view_of,
    view_text,
)
from steepest.optim.guard import Guard, NonFiniteError, OnNonFinite, dense_gradients
from steepest.optim.momentum import FORGET_EVERY, Averages, debias
from steepest.optim.momo import Heard, Loss, Losses, StepSize
from steepest.optim.momo.model import FURTHER_KEYS, MODEL_KEYS
from steepest.optim.move import Move
from steepest.optim.options import (
    DEFAULT_NORMS,
    DTYPES,
    METHOD,
    PER_ROLE,
    STEPS_TAKEN,
    check_group,
    check_norms,
    check_numbers,
    check_parameter,
    complete_group,
)
from steepest.optim.packing import Packing
from steepest.optim.parameters import (
    Parameters,
    check_view,
    collect,
    complete_row,
    name_groups,
    newcomer,
    refuse_repeats,
)
from steepest.optim.replay import check_recordable, recording
from steepest.optim.saved import check_mapping, check_saved
from steepest.optim.sharing import Sharing, Summary
from steepest.optim.state import (
    DUAL,
    LOW,
    MOMENTUM,
    STEP,
    Schema,
    allocate,
    check_fits,
    check_state,
    drop_unknown,
    exchangeable,
    forget_untouched,
    momenta,
    restored,
    schema,
)
from steepest.optim.storage import Rounding, Storage, noise_of
from steepest.ranks import Team, decide, is_sharded, laid_out, listeners, local, own_box, scalar_type
from steepest.stages import KNOWN, InputMoment, Stage
from steepest.stages.inputs import InputMoments

ByRole = Mapping[Role, Any]
# What a group needs for a step; where one is missing, the group was not made by add_param_group.
NEEDED = frozenset({"params", "role", "norm", "lr", "momentum", "nesterov", "weight_decay", "beta2"})
SHOWN = 3  # names in a message
IN_BACKWARD = (
    "step() was called during backward, as where an optimizer for each parameter steps when its gradient is there. But "
    "{} needs a number of all layers. Step once after backward, with one optimizer; or choose a method whose layers "
    "move on their own, such as Muon, MuonAdam or Scion without Momo."
)
METHOD_WORDS = {False: "constrained descent", True: "regularized descent"}
# What stays this optimizer's when a state is loaded.
OWN = ("norm", "view", "name", "param_names", "decay_kind", AVERAGES, FAMILY, METHOD)


@dataclass
class Ready:
    """What one rank knows of a step before it is taken.

    Args:
        present: Groups, each with those of its parameters that have a gradient, on any rank.
        parameters: All of these.
        gradients: What this rank has of each.
        heard: Of the loss.
        admitted: Whether everything is finite; 0-d where that is not read.
        rests: Whether the step changes no weight, as all ranks say; None: nobody asked.
    """

    present: list[tuple[Group, list[Tensor]]] = field(default_factory=list[tuple[Group, list[Tensor]]])
    parameters: list[Tensor] = field(default_factory=list[Tensor])
    gradients: list[Tensor] = field(default_factory=list[Tensor])
    heard: Heard = field(default_factory=Heard)
    admitted: bool | Tensor = True
    rests: bool | None = None

    def idle(self, still: bool) -> bool:
        """Whether the step changes no weight, as when torch's distributed checkpoints take one to make the state.

        Args:
            still: Whether all learning rates are zero.
        """
        if self.rests is not None:
            return self.rests
        return still and not any(gradient.any() for gradient in self.gradients)


class SteepestDescent(Optimizer):
    """Steepest descent with momentum, in a norm for each role of parameter.

    By default a step subtracts decoupled weight decay and adds the learning rate times the direction of norm one that
    decreases the averaged gradient fastest: W <- (1 - lr · weight_decay) W + lr · lmo(average). This is constrained
    steepest descent in the largest of the layers' norms, each divided by its learning rate (arXiv:2510.09827). Other
    ways of making one norm of all, regularised descent and Momo's step size are `product`, `regularized`, `step_size`.

    The options from `lr` to `betas` may be one value, or a mapping from role to value.

    Args:
        params: A module, whose parameters are routed to roles and views (`route`); or parameters, named parameters or
            parameter groups, or a plan. A group may set any option for itself, options of its norm, `role`, `view` and
            `name`; plain keys of others are kept. Without a role, parameters with two or more dimensions are matrices
            and the others vectors, in groups of their own.
        lr: Learning rate: the length of a step in the group's norm. A number or a 0-d tensor.
        momentum: Weight of the old average of gradients, in [0, 1), or several averages, such as `Averages.two()`; for
            norms that do not adapt. In the groups, and so for schedulers, "momentum" is this weight, or the first, for
            every norm.
        nesterov: Look ahead by one gradient; for norms that do not adapt.
        weight_decay: A number, of decoupled decay, or a kind of decay such as `Decoupled(0.1)`; the rate per step is lr
            times the number, with the scheduled lr. `Sphere()` keeps the norm of each matrix instead.
        betas: Weights of the old averages of gradients and of their squares, for norms that adapt (`AdaInf`); the first
            may be several averages, `Averages(...)`. None: (0.9, 0.95), or (momentum, 0.95) with Momo.
        norms: Norm of each role, by object or name; roles left out keep Spectral() for matrices, AdaInf() otherwise.
        families: Options of parameters by role, or by a pattern of their names with * and ?, such as {"*.bias":
            {"betas": (0.9, 0.997)}, "embedding": {"lr": 0.7}}: what else a group may set. The first that matches
            counts; each makes a group of its own, named after it; rates are absolute.
        product: Norm of all layers from the norms of each: `Max()`, `Sum()`, `Euclid()`, `Hybrid()` or a tree of them
            over roles and names of groups.
        regularized: False: constrained descent, steps of a fixed norm; True: steps in proportion to the dual norm.
        step_size: None or `Fixed()`: the whole step; `Momo(...)`: as much as its model of the loss says is useful, for
            which it needs the loss of every step and one momentum for all groups.
        precondition: `InputMoment(...)` or the name of one of its presets: multiply the matrices' momenta, or the
            gradients of its `roles`, with an inverse second moment of their inputs, as Newton-Muon does. The first
            stage.
        stages: What else stands around the search for the matrices' directions, such as `RowScaling()`, the outermost
            first.
        dual: Where a number of all layers must be known before the first can move: "cached" keeps all directions for
            it; "stale" uses the last step's dual norms of the matrices.
        on_nonfinite: "skip" passes over a step whose gradient or loss is not finite, with all parameters and state
            untouched, counts it and warns once; "raise" raises `NonFiniteError`.
        rounding: Of the float32 result of a step to a bfloat16 weight: "nearest", which leaves a gain of 1 where it is
            if it is to move by less than 0.002; "stochastic", right on average; or "kept": what does not fit into the
            weight is kept beside it, 2 bytes for each, so that weight and state are the float32 weight.
        momentum_dtype: torch.bfloat16 keeps averages of gradients in 16 bits; None: in float32.
        process_group: Ranks that keep copies of the parameters that are plain tensors, and step together. None: those
            of `DistributedDataParallel`, if the model is or contains such a module; else each is this process' own.
            Parameters that are DTensors say themselves who keeps what.
        exchange_dtype: Type of averages and directions on their way between ranks, such as torch.bfloat16. None: that
            of the averages, so that no bit is lost.
        memory_cap: Bytes that a step's temporaries may take, where layers can be moved one after the other; one
            parameter is never divided, and the norms that need a decomposition take more. None: one and a half times
            the largest set of parameters of one shape, at least 6 MiB.

    Attributes:
        plan: Which parameter has which role, view, norm and learning rate, and why. Print it.

    Raises:
        ValueError: If an option is unknown or out of range, or a parameter cannot be optimised.
        TypeError: If an option or parameter is of the wrong type.
    """

    @checked_options(by_role=PER_ROLE)
    def __init__(
        self,
        params: Parameters,
        *,
        lr: float | Tensor | ByRole = 0.02,
        momentum: float | Averages | ByRole = 0.95,
        nesterov: bool | ByRole = False,
        weight_decay: float | Decay | ByRole = 0.0,
        betas: tuple[float | Averages, float] | ByRole | None = None,
        norms: Mapping[Role, Norm | str] | None = None,
        families: Mapping[str, Mapping[str, Any]] | None = None,
        product: Product | str = "max",
        regularized: bool = False,
        step_size: StepSize | None = None,
        precondition: InputMoment | str | None = None,
        stages: Sequence[Stage] = (),
        dual: DualMode = "cached",
        on_nonfinite: OnNonFinite = "skip",
        rounding: Rounding = "nearest",
        momentum_dtype: torch.dtype | None = None,
        process_group: Any = None,
        exchange_dtype: torch.dtype | None = None,
        memory_cap: int | None = None,
    ) -> None:
        self._defaults_per_role: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "betas": betas,
            "norm": {**DEFAULT_NORMS, **check_norms(norms)},
        }
        self._families = Families(families)
        self._guard = Guard(on_nonfinite)
        self._storage = Storage(rounding, momentum_dtype)
        self._record = StepRecord()
        self._steps = 0
        self._losses = Losses(step_size)
        self._combine = Combine(product, self._losses, regularized=regularized, dual=dual)
        self._packing = Packing(memory_cap)
        self._sharing = Sharing(process_group, exchange_dtype)
        self._rates = Rates()
        self._norms = Norms()
        self._decays = Decays()
        self._warned_of_ball = self._built = False
        self._warm = False  # whether a step was taken with the state of now
        self._stages: list[Stage] = []
        self._schemas: dict[Tensor, tuple[PlanRow, object, torch.dtype, Schema]] = {}
        self._members: list[list[Tensor]] = []  # of each group, when they were last looked at
        self._model = weakref.ref(params) if isinstance(params, nn.Module) else None
        self._stray: set[str] = set()  # parameters of the model that are not here, and were told of
        rows, groups = self._collect(params)
        self._families.check_used(groups, rows)
        name_groups(groups, [])
        self._rows: dict[Tensor, PlanRow] = dict(rows)
        # torch's schedulers look for these names among the defaults; what counts is in the groups.
        defaults = {key: _any_role(self._defaults_per_role[key]) for key in ("lr", "momentum", "weight_decay")}
        if isinstance(defaults["weight_decay"], Decay):
            defaults["weight_decay"] = defaults["weight_decay"].rate
        if isinstance(defaults["momentum"], Averages):
            defaults["momentum"] = defaults["momentum"].betas[0]
        super().__init__(groups, defaults)
        self._combine.check_labels([group["name"] for group in self.param_groups])
        self._losses.watch([group["params"] for group in self.param_groups])
        self._attach(checked_stages(precondition, stages))
        self._rows = {parameter: replace(row, sites=()) for parameter, row in self._rows.items()}
        self._built = True
        self._share()

    def _share(self) -> None:
        """Find out who keeps, and who works on, what."""
        members = [
            (self._rows[parameter], self.norm_of(group), self.stages_of(group))
            for group in self.param_groups
            for parameter in group["params"]
        ]
        if self._sharing.know(members):
            for stage in self._stages:
                stage.assigned(self._sharing.duties)

    def _attach(self, stages: Sequence[Stage]) -> None:
        needs = self._combine.needs_duals
        for stage in stages:
            if needs and stage.no_duals:
                raise ValueError(stage.no_duals)
        self._schemas.clear()
        attached: list[Stage] = []
        for stage in stages:
            groups = [group for group in self.param_groups if self._works_on(stage, group)]
            rows = [self._rows[p] for group in groups for p in group["params"]]
            attached.append(stage.attach([row for row in rows if row.trainable]))
        self._stages = attached
        for group in self.param_groups:
            for row in (self._rows[parameter] for parameter in group["params"]):
                if row.trainable:
                    check_stages(row, self.stages_of(group))
            for stage in self._stages:
                group.update(stage.group_keys)

    @property
    def plan(self) -> Plan:
        """Routing of every parameter, with the norms, learning rates and moments of inputs of now."""
        self._settle()
        self._meet()
        self._share()
        owners = self._sharing.summary.owners if self._sharing.team.size > 1 else {}
        rows = [
            complete_row(
                self._rows[parameter], group, self.norm_of(group), self._schema(parameter, group).values(), owners
            )
            for group in self.param_groups
            for parameter in cast(list[Tensor], group["params"])
        ]
        for stage in self._stages:
            rows = list(map(stage.complete, rows))
        return Plan(tuple(rows))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What stands around the search for the matrices' directions, attached to this optimizer."""
        return tuple(self._stages)

    @property
    def sharing(self) -> Summary:
        """How ranks share the work, and what the last step sent."""
        return self._sharing.summary

    @property
    def model(self) -> nn.Module | None:
        """The module that the optimizer was built with, while it is there."""
        return self._model() if self._model else None

    @property
    def names(self) -> dict[Tensor, str]:
        """Names of the parameters."""
        self._meet()
        return {parameter: self._rows[parameter].name for parameter in self._parameters()}

    def on_spheres(self, parameters: Sequence[Tensor]) -> list[str]:
        """Names of those parameters whose norm is kept.

        Args:
            parameters: Any; others than this optimizer's are kept by nobody.
        """
        self._settle()
        asked, names = set(parameters), self.names
        kept = [group["params"] for group in self.param_groups if self._decays.of(group).keeps_norms]
        return [names[parameter] for own in kept for parameter in own if parameter in asked]

    @property
    def skipped_steps(self) -> int | Tensor:
        """Number of steps that were not taken; a 0-d tensor that nobody waits for, where that is on a device."""
        return self._guard.skipped

    @property
    def team(self) -> Team:
        """The ranks that keep parts or copies of the parameters, as far as that is known."""
        return self._sharing.team

    @property
    def memory_cap(self) -> int | None:
        """Bytes that a step's temporaries may take, see the constructor; may be set at any time."""
        return self._packing.memory_cap

    @memory_cap.setter
    def memory_cap(self, number: int | None) -> None:
        self._packing = Packing(number)

    def norm_of(self, group: Mapping[str, Any]) -> Norm:
        """The norm of a group, in which its text stands.

        Args:
            group: One of `param_groups`.
        """
        return self._norms.settle(dict(group), "norm_of")

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with options of their own or the optimizer's.

        Args:
            param_group: As in the constructor: "params" and any options. Without a role, matrices and vectors make a
                group each.

        Raises:
            ValueError: If an option or a parameter does not fit.
            TypeError: If an option or a parameter is of the wrong type.
        """
        if not isinstance(cast(object, param_group), dict):
            raise TypeError(f"param_group must be a dict with 'params', got {shown(param_group)}.")
        self._settle()
        self._meet()
        where = f"parameter group {len(self.param_groups)}"
        if param_group.get("norm") in self._norms:
            param_group = {**param_group, "norm": self._norms.of(param_group)}
        rows, groups = self._collect([param_group], known=self._rows, where=where)
        refuse_repeats({p: self._rows[p] for p in self._parameters()}, rows)
        name_groups(groups, [group["name"] for group in self.param_groups])
        for group in groups:
            own = where_of(group, where)
            make_plain(group, own, strict=False)
            complete_group(group, own, self._defaults_per_role, momo=self._losses.momo is not None)
            self._decays.settle(group, own)
            group.update(self._losses.saved([], averages_of(group)))
            group[METHOD] = self._combine.method
            for stage in (*KNOWN, *self._stages):
                group.update(stage.group_keys)
            make_plain(group, own, strict=False)
            check_group(group, where=own)
            self._combine.label(group)
            for name, parameter in group["params"]:
                self._storage.check(name, parameter)
                check_view(rows[parameter], group["norm"])
                check_stages(rows[parameter], self.stages_of(group))
        self._check_together([*self.param_groups, *groups])
        for group in groups:
            group["params"] = [parameter for _, parameter in group["params"]]  # named apart: a group may be empty
            group.update(norm=self._norms.text(group["norm"]), view=view_text(view_of(group, where)))
            super().add_param_group(group)
            self._members.append(list(group["params"]))
            self._rates.add(group)
        self._rows.update(rows)
        self._losses.watch_more(list(rows))
        if self._built:
            self._share()

    def add_module(
        self,
        module: nn.Module,
        name: str = "",
        *,
        overrides: Mapping[str, Override] | None = None,
        **options: Any,
    ) -> Plan:
        """Add the layers of a module that came later, between two steps: each parameter to the group of its role.

        Like those of any optimizer, states go by the order of parameters within groups: load one where the same layers
        were added in the same order, or by torch.distributed.checkpoint.state_dict, which goes by names.

        Args:
            module: What of it is here already, or frozen for good, is left out. A part of the model that the optimizer
                was built with is routed within that, so that its last layer is no output head by mistake.
            name: Put before the names of parameters of a module that is no part of the model.
            overrides: Likewise as in `route`, by the names that the parameters get.
            **options: Of groups, such as `lr`: the parameters are then in groups of their own, one for each role.

        Returns:
            The rows that were added.

        Raises:
            ValueError: If there is nothing to add, an option does not fit, or it is not clear to which group a
                parameter belongs. Nothing is changed then.
            TypeError: If `module` is no module, or an option is of the wrong type. Nothing is changed then, either.
        """
        if not isinstance(cast(object, module), nn.Module):
            raise TypeError(refusal("add_module: module", "a torch.nn.Module", module))
        self._settle()
        self._meet()
        known = set(self._parameters())
        rows = [row for row in self._routed(module, name, overrides) if row.parameter not in known]
        if not rows:
            raise ValueError(f"add_module: all parameters of {type(module).__name__} are in the optimizer already.")
        for row in rows:
            check_parameter(row.name, row.parameter)
        kinds: dict[Tensor, tuple[Role, str]] = {row.parameter: (row.role, self._family_of(row)) for row in rows}
        places: dict[tuple[Role, str], Group | None] = {}
        for role, family in sorted(set(kinds.values()), key=_by_role):
            own = [group for group in self.param_groups if group["role"] == role]
            if self._families:
                own = [group for group in own if group.get(FAMILY) == family]
            places[role, family] = own[0] if own and not options else None
            if len(own) > 1 and not options:
                names = ", ".join(repr(group["name"]) for group in own)
                raise ValueError(
                    f"add_module: the role {role!r} has the groups {names}, and it is not clear to which one the "
                    "new parameters belong. Give options for groups of their own, such as lr=."
                )
        kept = [(group, list(group["params"]), group.get("param_names")) for group in self.param_groups]
        before = dict(self._rows)
        try:
            self._rows.update({row.parameter: row for row in rows})
            for (role, family), group in places.items():
                members = [row for row in rows if kinds[row.parameter] == (role, family)]
                if group is None:
                    named = [(row.name, row.parameter) for row in members]
                    self.add_param_group({"params": named, "role": role, **options})
                    continue
                norm = self._norms.of(group)
                for row in members:
                    self._storage.check(row.name, row.parameter)
                    check_view(row, norm)
                    check_stages(row, self.stages_of(group))
                names = group.get("param_names") or self._names_of(group["params"])
                group["params"] = [*group["params"], *(row.parameter for row in members)]
                group["param_names"] = [*names, *(row.name for row in members)]
            for stage in reversed(self._stages):  # those of users first: they may refuse
                if staged := [row for row in rows if row.role in stage.roles and row.trainable]:
                    stage.added(staged)
        except BaseException:
            del self.param_groups[len(kept) :], self._members[len(kept) :]
            self._rates.forget(len(kept))
            for group, members, names in kept:
                group.update(params=members, param_names=names)
            self._rows = before
            raise
        self._rows.update({row.parameter: replace(row, sites=()) for row in rows})
        self._members = [list(group["params"]) for group in self.param_groups]
        self._losses.watch_more([row.parameter for row in rows])
        self._share()
        return Plan(tuple(rows))

    def _family_of(self, row: PlanRow) -> str:
        """The family of a parameter; empty if it is in none."""
        return self._families.of(row.role, [row.name, *(site.name for site in row.sites)])

    def _routed(self, module: nn.Module, name: str, overrides: Mapping[str, Override] | None) -> list[PlanRow]:
        """Rows of a module, within the model if it is a part of it."""
        model = self._model() if self._model else None
        if model is not None and any(part is module for part in model.modules()):
            own = set(module.parameters())
            rows = [row for row in route(model, overrides=overrides) if row.parameter in own]
        else:
            prefix = f"{name}." if name else ""
            inner: dict[str, Override] = {key.removeprefix(prefix): rule for key, rule in (overrides or {}).items()}
            rows = [replace(row, name=prefix + row.name) for row in route(module, overrides=inner)]
        return [row for row in rows if row.trainable or row.parameter.dtype in DTYPES]

    def _tell_of_strays(self) -> None:
        """Warn of trainable parameters of the model that came after the optimizer was built, or took others' place."""
        model = self._model() if self._model and self._steps & (self._steps - 1) == 0 else None
        if model is None:
            return
        known = set(self._parameters())
        missed = [n for n, p in model.named_parameters() if p.requires_grad and p not in known and n not in self._stray]
        if missed:
            self._stray.update(missed)
            more = f" and {len(missed) - SHOWN} more" if len(missed) > SHOWN else ""
            warn(
                f"Parameters of the model that are not in the optimizer will never be trained: "
                f"{', '.join(map(repr, missed[:SHOWN]))}{more}. They came after it was built, as adapters do, or "
                "others took their place. Build the optimizer last, or call optimizer.add_module(module) for layers "
                "that were added."
            )

    def __repr__(self) -> str:
        """A page about the groups; `plan` has the parameters."""
        columns = ("name", "tensors", "numbers", "lr", "momentum", "nesterov", "beta2", "weight_decay", "norm")
        lines: list[tuple[str, ...]] = [columns]
        for group in self.param_groups:
            adapts = group.get("norm") in self._norms and self._norms.of(group).adapts
            numbers = sum(self._rows[p].numel if p in self._rows else p.numel() for p in group["params"])
            unused = {} if adapts else {"beta2": "-"}
            shown_here = {**group, **unused, "nesterov": group.get("nesterov") or "-"}
            averages = averages_of(group)
            if averages is not None:
                shown_here["momentum"] = ", ".join(map(_cell, averages.betas_from(group["momentum"])))
            cells = [_cell(shown_here.get(key)) for key in columns[3:]]
            lines.append((str(group.get("name")), str(len(group["params"])), f"{numbers:,}", *cells))
        about = [repr(self._losses.step_size)] if self._losses.momo else []
        about += dict.fromkeys(group[AVERAGES] for group in self.param_groups if group.get(AVERAGES))
        about += [repr(getattr(stage, "options", stage)) for stage in self._stages]
        head = ", ".join([f"{type(self).__name__}: {METHOD_WORDS[self._combine.regularized]}", *about])
        return "\n".join([head, *aligned(lines), f"{self._steps} steps taken; see .plan for each parameter"])

    def _check_together(self, groups: Sequence[Group]) -> None:
        """Refuse momenta that differ where they must not; warn, once, of a group whose lr · weight_decay is above 1."""
        self._losses.check_momenta(groups)
        for group in () if self._warned_of_ball else groups:
            if (product := beyond_ball(group)) is not None:
                self._warned_of_ball = True
                ball = self._keeps_ball(group) and self._decays.of(group).radius(group["weight_decay"]) is not None
                lost = "weights are no longer kept within norm 1 / weight_decay"
                warn(
                    f"lr · weight_decay is {product:.3g} for the role {group['role']!r}: above 1, "
                    f"{lost if ball else 'decay takes more from weights than they have'}, and from 2 on they may grow "
                    "without bound. Lower lr or weight_decay."
                )

    def _collect(self, params: Parameters, **options: Any) -> tuple[dict[Tensor, PlanRow], list[Group]]:
        defaults = self._defaults_per_role
        return collect(params, norms=defaults["norm"], rates=defaults["lr"], families=self._families, **options)

    def _settle(self) -> None:
        """Take over what users, schedulers and trainers wrote into the groups since the last look."""
        for index, group in enumerate(self.param_groups):
            where = f"parameter group {index}"
            if missing := NEEDED - group.keys():
                raise ValueError(
                    f"{where} has no {sorted(missing)[0]!r}: it came into param_groups without add_param_group. Take "
                    "it out and pass it to add_param_group, which fills in what is left open."
                )
            if type(group["params"]) is not list:
                members = group["params"]
                group["params"] = [members] if isinstance(members, Tensor) else list(members)
            self._norms.settle(group, where)
            self._decays.settle(group, where)
            settle_averages(group, where, made=True)
            if type(group.get("view")) not in (str, type(None)):
                group["view"] = view_text(view_of(group, where))
            make_plain(group, where)

    def _meet(self, *, moving: bool = False) -> None:
        """Know all parameters that stand in the groups, also those that came without `add_param_group`.

        Args:
            moving: Whether a step comes, for which shapes count; between steps hosts may fold parameters away.

        Raises:
            ValueError: If it is not clear how one can be optimised.
            TypeError: If one is nothing that can be optimised.
        """
        found: dict[Tensor, PlanRow] = {}
        groups: dict[Tensor, Group] = {}
        gone: set[Tensor] = set()
        for index, group in enumerate(self.param_groups):
            where = f"parameter group {index}"
            before = self._members[index] if index < len(self._members) else []
            count = len(group["params"])
            places = before if len(before) == count else [None] * count
            names = [f"{where}[{place}]" for place in range(count)]
            if len(group.get("param_names") or ()) == count:
                names = list(map(str, group["param_names"]))
            for parameter, there, name in zip(group["params"], places, names, strict=True):
                row = self._rows.get(parameter) if isinstance(parameter, Tensor) else None
                grown = moving and row is not None and parameter.numel() and row.shape != tuple(parameter.shape)
                if row is None or row.role != group["role"] or grown:
                    old = row or (self._rows.get(there) if there is not None else None)
                    row = self._newcomer(parameter, name, group, old, where)
                    gone |= {there} if there is not None else set()
                if parameter in found:
                    raise ValueError(f"{row.name!r} stands twice in param_groups, also in {where}; list it once.")
                found[parameter], groups[parameter] = row, group
        changed = [parameter for parameter, row in found.items() if self._rows.get(parameter) is not row]
        for parameter in changed:
            entries = self._entries(found[parameter], groups[parameter])
            check_fits(self.state.get(parameter, {}), parameter, found[parameter].name, entries)
        for parameter in gone - found.keys():  # another one stands in its place
            for known in (self._rows, self._schemas, self.state):
                known.pop(parameter, None)
        self._rows.update(found)
        self._members = [list(group["params"]) for group in self.param_groups]
        for group in self.param_groups:
            if changed or len(group.get("param_names") or group["params"]) != len(group["params"]):
                group["param_names"] = [found[parameter].name for parameter in group["params"]]
        if changed:
            self._losses.replaced([group["params"] for group in self.param_groups])

    def _newcomer(self, parameter: Any, name: str, group: Group, old: PlanRow | None, where: str) -> PlanRow:
        if old is not None:
            for stage in self._stages:
                stage.replaced(old, tuple(getattr(parameter, "shape", ())), where)
        return newcomer(parameter, name, group, self.norm_of(group), old, where)

    @overload
    def step(self, closure: None = None, *, loss: Loss | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: Loss | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: Loss | None = None) -> float | None:
        """Take one step. Parameters without a gradient, on all ranks, are left alone; gradients are not written to.

        Args:
            closure: Computes the loss and its gradients, and returns the loss.
            loss: The loss whose gradients are present, not scaled, if known: a step with a loss that is not finite is
                not taken. Else what `record_loss` was told counts, else what the closure returned.

        Returns:
            What the closure returned, or None.

        Raises:
            NonFiniteError: If a gradient, the loss or the step is not finite and `on_nonfinite` is "raise".
            ValueError: If a gradient is sparse or does not fit, a number of a group is out of its range, the loss is
                not one number, or Momo misses it.
            TypeError: If the loss, a gradient or a number of a group is not real, or the closure is no function.
            RuntimeError: If a CUDA graph is being captured, and its replays would not be steps like this one; or if
                backward is not over, and the step needs a number of all layers.
        """
        if self._combine.needs_duals and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(IN_BACKWARD.format(self._combine.needs_duals))
        returned = None if closure is None else self._losses.run(closure)
        if recording():
            self._check_recordable()
        ready = Ready()
        told = loss is not None or returned is not None or self._losses.told
        try:
            self._prepare(ready, loss, returned)
        except Exception:
            if self._agree(ready, told=told, refused=True):  # else the others would wait; they pass over the step
                ready.admitted = False
                self._passed(ready)
            raise
        self._agree(ready, told=told)
        if not ready.parameters:
            return returned
        if ready.admitted is False:
            self._publish_skips()
        else:
            self._losses.agreed(ready.heard)
            try:
                self._take(ready, ready.admitted if isinstance(ready.admitted, Tensor) else None)
            except NonFiniteError:  # averages hold the gradients of this step all the same
                self._passed(ready)
                raise
        self._passed(ready)
        return returned

    def _check_recordable(self) -> None:
        momo = self._losses.momo
        check_recordable(
            warm=self._warm,
            waits=self._guard.on_nonfinite == "raise",
            frozen_bound=momo is not None and callable(momo.lower_bound),
            stages=self._stages,
            ranks=self._sharing.team.size,
        )

    def _passed(self, ready: Ready) -> None:
        for stage in self._stages:
            stage.passed(skipped=ready.admitted is False, idle=lambda: ready.idle(self._still))
        self._losses.stepped()
        live = {STEPS_TAKEN: self._steps, **self._losses.live()}
        for stage in self._stages:
            live.update(stage.numbers)
        for group in self.param_groups:  # who reads groups between checkpoints finds no old numbers
            group.update(live)

    def _take(self, ready: Ready, accept: Tensor | None) -> None:
        """Make the step that all ranks admitted, where `accept` does."""
        self._allocate()
        for stage in self._stages:
            stage.refresh(self.state, ready.parameters, accept)
        self._record.clear()
        self._steps += 1
        moves = self._moves(ready, accept)
        before = sum(move.portion.sent_bytes for move in moves)
        with self._told(moves):
            fine = self._combine.take(moves, ready.heard, accept, self._record)
        self._sharing.note([move.portion for move in moves], before)
        if self._guard.made(partial(self._names, moves), fine, accept):
            self._publish_skips()
        self._warm = True

    def _prepare(self, ready: Ready, explicit: Loss | None, returned: Loss | None) -> None:
        """Find out what this rank knows of a step before it is taken, and all that may be wrong with it."""
        self._settle()
        if not self._sharing.knows(self._parameters()):  # others may wait for this rank, whatever is wrong here
            self._share()
        ready.present = [(g, [p for p in g["params"] if p.grad is not None and p.numel()]) for g in self.param_groups]
        alone = self._sharing.team.size == 1  # else others may have gradients of what has none here
        moving = [(place, group) for place, (group, own) in enumerate(ready.present) if own or not alone]
        unread = check_numbers(moving)
        heard = ready.heard
        self._losses.hear(heard, explicit, returned)
        ready.parameters = parameters = [parameter for _, members in ready.present for parameter in members]
        if not parameters and alone:
            self._tell_of_strays()  # which may be all that has gradients
            heard.changed = self._losses.changed()
            return
        if not self._packing.fits(ready.present):
            self._meet(moving=True)
            self._share()
        self._tell_of_strays()
        names = partial(self._names_of, parameters)
        ready.gradients = self._local_gradients(parameters, names)
        self._losses.check_told(heard.loss, lambda: ready.idle(self._still))
        self._check_together([group for _, group in moving])
        self._check_states(ready.present)
        heard.lower_bound = self._losses.bound(heard.loss)
        self._rates.check(self.param_groups)
        ready.admitted = self._guard.restrict(self._guard.admit(names, ready.gradients, heard.loss), unread)
        if ready.admitted is not False:
            self._losses.look(heard)

    def _local_gradients(self, parameters: Sequence[Tensor], names: Callable[[], Sequence[str]]) -> list[Tensor]:
        """What this rank has of gradients that are there; a sum that ranks have not made yet is made here."""
        found = dense_gradients(parameters, names)
        pairs = zip(found, parameters, strict=True)
        return local(
            [laid_out(gradient, p) if is_sharded(p) or is_sharded(gradient) else gradient for gradient, p in pairs]
        )

    def _agree(self, ready: Ready, *, told: bool, refused: bool = False) -> bool:
        """Hear of the other ranks whether they can take the step, and share what all of them must know.

        Args:
            ready: Of this rank; what is shared is written to it.
            told: Whether it was told a loss.
            refused: Whether it has to raise an error.

        Returns:
            Whether there are other ranks that took part.

        Raises:
            ValueError: If ranks know different parameters, or only some have the gradient of one that is copied.
        """
        heard, team = ready.heard, self._sharing.team
        device = next((parameter.device for parameter in self._rows), torch.device("cpu"))
        if team.size == 1:
            # Torch's checkpoints may take an idle step, without a loss, on one rank alone.
            idle = bool(ready.parameters) and heard.loss is None and not refused
            ask = told or (self._losses.momo is not None and not idle)
            ask = ask or any(stage.exchanges for stage in self._stages)
            everyone = listeners(team) if ask else team
        else:
            everyone = team
            team.agreed_bytes = 0
            self._sharing.check_alike(device, self._sharing.fingerprint(self.memory_cap))
        numbers = [heard.loss, heard.part, heard.clipping, heard.witnessed, heard.changed]
        counts: list[float] = []
        if self._sharing.counts(device, still=self._still):
            known = self._sharing.fingerprint(self.memory_cap)
            counts = [0.0 if p.grad is None else self._sharing.counted(p) for p in self._parameters()]
            counts += [known & 0xFFFF, known >> 16, float(not ready.idle(self._still))]
        admitted = False if refused else ready.admitted
        told_here = heard.loss is not None
        fine, numbers, counted = decide(admitted, numbers, counts, device, everyone)
        heard.loss, heard.part, heard.clipping, heard.witnessed, heard.changed = numbers
        if not told_here and device.type != "cpu":  # whether others were told one is not read
            heard.loss = None
        if refused:
            return everyone.size > 1
        if counts and counted is not None:
            *gradients, low, high, busy = counted.tolist()
            if [low, high] != [team.size * part for part in counts[-3:-1]]:
                self._sharing.refuse_unlike()
            ready.rests = not busy
            self._complete(ready, gradients)
        if ready.parameters:
            ready.admitted = self._guard.follow(ready.admitted, fine, heard.loss)
        return everyone.size > 1

    def _complete(self, ready: Ready, counts: Sequence[float]) -> None:
        """Take zeros for gradients that other ranks have: of experts that nothing was sent to here."""
        members = self._parameters()
        present = {p for p, count in zip(members, counts, strict=True) if count and p.numel()}
        self._sharing.check_counts([self._rows[p] for p in members], counts)
        if len(present) == len(ready.parameters):
            return
        own = dict(zip(ready.parameters, ready.gradients, strict=True))
        ready.present = [(g, [p for p in g["params"] if p in present]) for g in self.param_groups]
        ready.parameters = [parameter for _, part in ready.present for parameter in part]
        zeros = {p: torch.zeros_like(local([p])[0]) for p in ready.parameters if p not in own}
        ready.gradients = [own[p] if p in own else zeros[p] for p in ready.parameters]
        if not self._packing.fits(ready.present):
            self._meet(moving=True)

    def _check_states(self, present: Sequence[tuple[Group, list[Tensor]]]) -> None:
        """Everything that may be wrong with a parameter, before the first is written to."""
        for group, members in present:
            for parameter in members:
                adapts, entries = self._norms.of(group).adapts, self._schema(parameter, group)
                if parameter in self.state:
                    forget_untouched(self.state[parameter], parameter, entries)
                check_state(self.state.get(parameter, {}), parameter, entries, adapts=adapts, row=self._rows[parameter])

    @contextmanager
    def _told(self, moves: Sequence[Move]) -> Generator[None]:
        """An error that comes when averages are written already says which."""
        try:
            yield
        except BaseException as error:
            names = self._names(moves)
            averaged = [name for own, move in zip(names, moves, strict=True) if move.averaged for name in own]
            moved = [name for own, move in zip(names, moves, strict=True) if move.moved for name in own]
            if averaged:
                error.add_note(
                    f"The step ended halfway: averages and counts of {', '.join(averaged)} hold the gradients of this "
                    f"step, weights of {', '.join(moved) or 'none'} have moved. Go on from a checkpoint to undo that."
                )
            raise

    def _names(self, moves: Sequence[Move]) -> list[list[str]]:
        return [self._names_of(move.load.parameters) for move in moves]

    def _names_of(self, parameters: Sequence[Tensor]) -> list[str]:
        return [self._rows[parameter].name for parameter in parameters]

    def _entries(self, row: PlanRow, group: Group) -> Schema:
        stages, norm = self.stages_of(group), self._norms.of(group)
        radii = 0
        if self._decays.of(group).keeps_norms:
            radii = sum(count for count, _, _ in row.blocks()) if norm.matrix and row.view is not None else 1
        averages = averages_of(group)
        count = 1 if averages is None else len(averages)
        return schema(row, adapts=norm.adapts, stages=stages, storage=self._storage, averages=count, radii=radii)

    def _schema(self, parameter: Tensor, group: Group) -> Schema:
        """What may be kept of a parameter."""
        row, dtype = self._rows[parameter], parameter.dtype
        norm = group["norm"], group["decay_kind"], group.get(AVERAGES)
        known = self._schemas.get(parameter)
        if known is None or known[0] is not row or known[1] != norm or known[2] is not dtype:
            self._storage.check(row.name, parameter)  # of another type than when it was added, maybe
            known = self._schemas[parameter] = row, norm, dtype, self._entries(row, group)
        return known[3]

    def _allocate(self) -> None:
        """Make the state of all parameters, alike on all ranks: also of those without a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad or parameter.grad is not None:
                    state = self.state[parameter]
                    allocate(state, parameter, self._schema(parameter, group))
        for stage in self._stages:
            stage.allocate(self.state)

    def _moves(self, ready: Ready, accept: Tensor | None) -> list[Move]:
        present = ready.present
        norms = [self._norms.of(group) for group, _ in present]
        stages = [self.stages_of(group) for group, _ in present]
        packed, cap = self._packing.of(present, self._rows, norms, stages, self._sharing, bounded=self._combine.streams)
        gradients = dict(zip(ready.parameters, ready.gradients, strict=True))
        return [
            Move(
                group,
                portion,
                [gradients[parameter] for parameter in portion.load.parameters],
                [self.state[parameter] for parameter in portion.load.parameters],
                norm=norm,
                label=self._combine.label(group),
                accept=accept,
                record=self._record,
                decay=self._decays.of(group),
                storage=self._storage,
                names=partial(self._names_of, portion.load.parameters),
                stages=around,
                memory_cap=cap,
                forgets=self._steps % FORGET_EVERY == 0 or recording(),  # a replay does not count steps
            )
            for (group, _), norm, around, portions in zip(present, norms, stages, packed, strict=True)
            for portion in portions
        ]

    def record_input(self, parameter: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
        """Show inputs of a layer that hooks do not see, in each micro-batch; ignored in steps that look at none.

        Inside an activation checkpoint it counts once; one with use_reentrant=True runs first without gradients, and
        hides the call.

        Args:
            parameter: Of the layer.
            x: (*tokens, n), what the layer multiplies with; (S, *tokens, n) for a stack of S matrices.
            weight: Of each token, (*tokens) or (S, *tokens), at least 0; None: 1.

        Raises:
            ValueError: If the parameter is not preconditioned, or a shape does not fit.
            RuntimeError: If the optimizer was built without `precondition`.
        """
        self._inputs("record_input").record(parameter, x, weight)

    @contextmanager
    def input_mask(self, mask: Tensor) -> Generator[None]:
        """Within it, tokens count by their mask where layer inputs are looked at: 0 for padding.

        Keep it around the backward pass too: that is where inputs of compiled and checkpointed layers are seen.

        Args:
            mask: (batch, time) or (batch,), at least 0; fits every layer whose inputs begin with these dimensions, and
                those that have all tokens in one dimension.

        Raises:
            RuntimeError: If the optimizer was built without `precondition`; from backward() outside of it.
        """
        with self._inputs("input_mask").masked(mask):
            yield

    def _inputs(self, caller: str) -> InputMoments:
        found = next((stage for stage in self._stages if isinstance(stage, InputMoments)), None)
        if found is None:
            raise RuntimeError(
                f"{caller}: this optimizer looks at no inputs; build it with precondition=InputMoment()."
            )
        return found

    def record_loss(
        self, loss: Loss, weight: float | None = None, *, already_divided: bool = False, scale: float = 1.0
    ) -> None:
        """Tell the loss of a micro-batch, for loops that call `step()` without it.

        Args:
            loss: Mean loss of the micro-batch, times `scale`: the one whose gradient, times `weight`, backward adds.
            weight: The micro-batch's part of the batch, 1 if it is left out; the weights between two steps sum to 1. A
                last window with fewer micro-batches than the losses were divided by, which leaves a smaller gradient
                of the mean loss, is known if losses are recorded as tensors, before their backward pass.
            already_divided: Whether `loss` is what backward is called on, already multiplied by its weight, as hosts
                hand it out. Without `weight`, losses between two steps then add up to the mean loss of the batch;
                record tensors with their graphs, so that those of gradients that are thrown away are forgotten.
            scale: What a GradScaler has multiplied `loss` with already, for hosts that show it afterwards only.

        Raises:
            ValueError: If the loss is not one real number, the weight is not in (0, 1], or the scale is not above 0.
            TypeError: If one is of the wrong type.
        """
        self._losses.tap.record(loss, weight, already_divided=already_divided, scale=scale)

    def exact(self, parameter: Tensor) -> Tensor:
        """What this rank keeps of a weight, with the bits that are kept beside it: a copy.

        Args:
            parameter: Of this optimizer.
        """
        (own,) = local([parameter.detach()])
        return self._storage.exact(own, self._kept_bits(parameter))

    def _kept_bits(self, parameter: Tensor) -> Tensor | None:
        low = self.state[parameter].get(LOW) if parameter in self.state else None
        return None if low is None else local([low])[0]

    @torch.no_grad()
    def displace(self, moves: Sequence[tuple[Tensor, Tensor, float | Tensor]]) -> None:
        """Move weights by what is no step, between two steps: for objects that stand beside the optimizer.

        Momo's model of the loss is linear, so its value goes along, and nothing starts again; what anybody else has
        written since the last step is still noticed. Kept bits are moved with their weights. With Momo and sharded
        parameters, all ranks call it together.

        Args:
            moves: A parameter of this optimizer, a direction like it, and a number that it is multiplied by; 0-d if it
                is on a device.
        """
        slopes = self._losses.momo is not None and self._losses.model is not None
        change = self._change(moves) if slopes else None
        with self._losses.displacing(change):
            for parameter, direction, factor in moves:
                own, add = local([parameter, direction])
                self._storage.add_(own, add, factor, self._kept_bits(parameter), partial(self._noise, parameter))

    def _noise(self, parameter: Tensor) -> Tensor:
        """Bits for rounding what is no step: others than those of the step."""
        count = (
            self.state[parameter][STEP] if parameter in self.state else torch.zeros((), dtype=torch.int64, device="cpu")
        )
        name = f"{self._rows[parameter].name}, displaced"
        return noise_of(name, count.to(local([parameter])[0].device), own_box(parameter), parameter.shape)

    def _change(self, moves: Sequence[tuple[Tensor, Tensor, float | Tensor]]) -> Tensor:
        """By what a displacement changes the value of the averaged model of the loss: 0-d, or one for each average."""
        duties, groups = self._sharing.duties, {p: group for group in self.param_groups for p in group["params"]}
        device = local(self._parameters()[:1])[0].device
        averages = averages_of(self.param_groups[0])  # under Momo the same in all groups
        keys = momenta(1 if averages is None else len(averages))
        total = torch.zeros(() if averages is None else len(keys), dtype=scalar_type(device), device=device)
        shared = any(duties.shares(parameter) for parameter in groups)
        for parameter, direction, factor in moves:
            state = self.state.get(parameter, {})
            if MOMENTUM not in state:
                continue
            add, count, *buffers = local([direction, state[STEP], *(state[key] for key in keys)])
            first = float(groups[parameter]["momentum"])
            betas = (first,) if averages is None else averages.betas_from(first)
            products: list[Tensor] = []
            for average, beta in zip(buffers, betas, strict=True):
                weight = debias(beta, count.to(total.dtype))
                own = (average.to(add.dtype) * add).sum(dtype=total.dtype) * factor
                products.append(own / torch.where(weight == 0, 1.0, weight))
            product = products[0] if averages is None else torch.stack(products)
            total += (product * duties.weight(parameter) if shared else product).to(device)
        return self._sharing.team.summed(total) if shared else total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as in torch."""
        self._losses.cleared()
        for stage in self._stages:
            stage.cleared()
        super().zero_grad(set_to_none)

    @property
    def _still(self) -> bool:
        """Whether all learning rates are zero, as torch's checkpoints set them; those on a device are not read."""
        rates = [group["lr"] for group in self.param_groups]
        here = all(not isinstance(rate, Tensor) or rate.device.type == "cpu" for rate in rates)
        return here and all(float(rate) == 0 for rate in rates)

    def diagnostics(self, *, weights: bool = False) -> dict[str, float]:
        """Scalars of the last step; reading them waits for the device.

        Args:
            weights: Add, for each parameter NAME of a group in the spectral norm: "weights/NAME/spectral_norm", by
                power iteration; and for constrained descent "ball_radius", within which weight decay keeps it, and
                "frank_wolfe_gap", ‖M‖_* + <M, W> / radius with the averaged gradient M; see `ball`. Of sharded
                parameters, all ranks that keep a part must ask together; without, one may ask alone.

        Returns:
            "skipped_steps": steps passed over because something was not finite. Per role that moved:
            "ROLE/update_rms": root mean square of the entries added to the weights, decay not counted;
            "ROLE/orthogonality_error": for the spectral norm, and of several ranks only of what this one worked on, the
            largest ‖Q Qᵀ Q - Q‖_F / ‖Q‖_F over one polar factor
            Q of each shape; 0 for an exact one, whatever its rank. Where layers are looked at together: "dual_norm",
            N; with Momo, "t", the part of the step that was taken, "gap" and "lower_bound". With stages that
            `may_climb`: "climbing_directions", how many matrices, of several ranks only of what this one worked on, did
            not move because their directions went up. With `precondition`,
            counts of matrices and layers: "input_ridge_raised", "input_kept_powers" (not finite, so the old ones serve
            on), "input_missing", "input_partial" (parts of the gradient came from inputs that were not seen),
            "input_parted" (layers that ceased to read what another reads); and "input_moment_age", steps since the
            oldest moment was refreshed.
        """
        self._publish_skips()
        staged = {name: number for stage in self._stages for name, number in stage.diagnostics().items()}
        looked: dict[str, float] = {}
        if weights:
            self._settle()
            self._meet()
            balls = [
                (group, self._norms.of(group), self._decays.of(group) if self._keeps_ball(group) else None)
                for group in self.param_groups
            ]
            looked = weight_numbers(balls, self._rows, self.state)
        if self._combine.regularized:  # steps of any length: there is no ball
            looked = {name: number for name, number in looked.items() if name.endswith("/spectral_norm")}
        return {**staged, "skipped_steps": float(self._guard.skipped_steps()), **self._record.read(), **looked}

    def _publish_skips(self) -> None:
        skipped = self._guard.skipped_steps()
        for group in self.param_groups:
            group["skipped_steps"] = skipped

    def state_dict(self) -> dict[str, Any]:
        """State and options: text, numbers and tensors, so that `torch.load(weights_only=True)` reads it back.

        State of parameters that stand in no group any more is left out. With Momo on sharded parameters, call it on all
        ranks: a sum over all weights is taken.

        Raises:
            TypeError: If somebody put something else into a group or the state.
        """
        self._settle()
        self._meet()
        self._publish_skips()
        for group in self.param_groups:
            group.update(self._losses.saved(self._parameters(), averages_of(group)))
            group[STEPS_TAKEN] = self._steps
            for stage in self._stages:
                group.update(stage.numbers)
        for stage in self._stages:
            stage.save(self.state)
        members = set(self._parameters())
        aside = {p: self.state.pop(p) for p in [*self.state] if p not in members}
        hook = self.register_state_dict_post_hook(_make_state_plain, prepend=True)  # those of users may change it all
        try:
            return super().state_dict()
        finally:
            hook.remove()
            self.state.update(aside)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Norms, views and names stay those of this optimizer.

        Args:
            state_dict: What `state_dict` returned, from this or another world.

        Raises:
            ValueError: If groups, roles, kinds of norm, shapes or values do not match, or the state is of another
                optimizer. Nothing is changed then.
            TypeError: If something is of the wrong type. Nothing is changed then, either.
        """
        check_mapping(state_dict)
        self._settle()
        self._meet()
        kept = [dict(group) for group in self.param_groups]
        present: dict[str, Any] = {
            "state": self.state,
            "param_groups": self.param_groups,
            "defaults": dict(self.defaults),
            "_steps": self._steps,
            "_warm": self._warm,
            "_schemas": dict(self._schemas),
        }
        effective: dict[str, Any] = {}
        parts = (self._losses, self._losses.tap, self._rates, self._guard, *self._stages)
        held = [(part, dict(vars(part))) for part in parts]
        restored: list[bool] = []

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            norms = list(map(self._norms.of, self.param_groups))
            schemas = [self._schema(p, group) for group in self.param_groups for p in group["params"]]
            given = check_saved(given, self.param_groups, norms, self._names_of(self._parameters()), schemas)
            indices = [index for group in given["param_groups"] for index in group["params"]]
            states = {p: given["state"].get(i, {}) for p, i in zip(self._parameters(), indices, strict=False)}
            for stage in self._stages:
                stage.check(_with_keys(stage, given["param_groups"]), states)
            effective.update(given)
            return given

        def restore(_: Optimizer) -> None:
            self._restore(effective, kept)
            restored.append(True)

        # Last before and first after: hooks of the user see, and may change, what they would see of any optimizer.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            if not restored:  # refused, or out of memory
                self.__dict__.update(present)
                for part, fields in held:
                    vars(part).update(fields)
            raise
        finally:
            before.remove()
            after.remove()

    def _restore(self, saved: dict[str, Any], kept: Sequence[Group]) -> None:
        """Put back what torch's loading has replaced or rounded."""
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        schemas = {parameter: self._schema(parameter, group) for group in kept for parameter in group["params"]}
        pairs = zip(indices, self._parameters(), strict=True)
        found = {p: saved["state"][i] for i, p in pairs if i in saved["state"]}
        states = {p: restored(state, p, schemas[p]) for p, state in found.items()}  # needs memory, so first
        for index, (group, old) in enumerate(zip(self.param_groups, kept, strict=True)):
            group.update({key: old[key] for key in old if key not in group or key in OWN})
            for key in (*MODEL_KEYS, *FURTHER_KEYS):
                if key not in old:
                    group.pop(key, None)
            if self._decays.of(group).keeps_norms:  # the rate of another kind, as decay_kind stays this one's
                group["weight_decay"] = 0.0
            make_plain(group, f"parameter group {index}")
        self.state.update(states)
        self._rates.restart(self.param_groups)
        self._warm = False
        self._steps = max((int(group[STEPS_TAKEN]) for group in self.param_groups), default=0)
        self._losses.load(saved["param_groups"][0] if saved["param_groups"] else {}, self._parameters())
        if not self._combine.keeps_duals:  # they would be old when somebody needs them
            for parameter in self._parameters():
                self.state[parameter].pop(DUAL, None)
        drop_unknown([(self.state[p], schemas[p]) for p in self._parameters()], self._stages)
        for stage in self._stages:
            stage.load(self.state, _with_keys(stage, saved["param_groups"]))
        self._guard.restore(int(max((group["skipped_steps"] for group in self.param_groups), default=0)))

    def stages_of(self, group: Group) -> list[Stage]:
        """The stages that work on a group.

        Args:
            group: One of `param_groups`.

        Raises:
            ValueError: If one cannot, for the group's norm.
        """
        return [stage for stage in self._stages if self._works_on(stage, group)]

    def _works_on(self, stage: Stage, group: Group) -> bool:
        """Whether a stage works on a group, whose norm may not be a text yet."""
        role: Role = group["role"]
        norm = self._norms.of(group) if isinstance(group["norm"], str) else group["norm"]
        if role not in stage.roles:
            return False
        if role == "matrix":
            return bool(norm.matrix and not norm.adapts)
        if not completed(norm).elementwise:
            raise ValueError(
                f"{stage.option}: it works on the role {role!r}, whose norm is {norm} here; of others than matrices it "
                "must look at each entry by itself, as AdaInf() and Sign() do. Give the role such a norm, or leave it "
                "out of roles=."
            )
        return True

    def _keeps_ball(self, group: Group) -> bool:
        """Whether directions have at most norm one, as stages say."""
        return group["role"] != "matrix" or all(stage.keeps_ball for stage in self.stages_of(group))

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: unscaling is left to GradScaler, which asks this just before a step; so its scale can be known."""
        self._losses.scaled()
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copy, pickle and torch's loading."""
        super().__setstate__(state)
        self._losses.watch_again([group["params"] for group in self.param_groups])

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; torch's own keeps only what its optimizers have."""
        own = [
            "_storage",
            "_defaults_per_role",
            "_families",
            "_guard",
            "_record",
            "_rows",
            "_steps",
            "_norms",
            "_members",
            "_decays",
        ]
        own += ["_losses", "_combine", "_packing", "_sharing", "_rates", "_stages", "_warned_of_ball", "_built"]
        alone = {"_schemas": {}, "_warm": False, "_model": None, "_stray": set[str]()}  # a copy is of no model
        return {**super().__getstate__(), **alone, **{name: getattr(self, name) for name in own}}


def checked_stages(precondition: InputMoment | str | None, stages: Sequence[Stage]) -> list[Stage]:
    """All stages, the preconditioning first.

    Args:
        precondition: By object or name of a preset.
        stages: The others.

    Raises:
        TypeError: If one is no stage.
        ValueError: If a preset is unknown, or two stages would keep their state under the same names.
    """
    if isinstance(precondition, str):
        try:
            precondition = InputMoment.preset(precondition)
        except ValueError as error:
            raise ValueError(f"precondition: {error}") from error
    if precondition is not None and not isinstance(cast(object, precondition), InputMoment):
        raise TypeError(refusal("precondition", "InputMoment(...), the name of a preset or None", precondition))
    fine = isinstance(cast(object, stages), list | tuple) and all(isinstance(one, Stage) for one in cast(Any, stages))
    if not fine:
        raise TypeError(refusal("stages", "a list of stages, such as [RowScaling()]", stages))
    every = [*([] if precondition is None else [precondition]), *stages]
    taken = [(stage.prefix, stage) for stage in every if stage.prefix]
    foreign = [(kind.prefix, kind) for kind in KNOWN if not any(kind.prefix == own for own, _ in taken)]
    for place, (prefix, stage) in enumerate(taken):
        for other, owner in (*taken[:place], *foreign):
            if prefix.startswith(other) or other.startswith(prefix):
                raise ValueError(
                    f"stages: {stage!r} and {owner!r} keep their state under names that begin with {prefix!r} and "
                    f"{other!r}. Leave one of them out, or give yours another prefix."
                )
    for stage in every:
        for key in stage.group_keys:
            if not stage.prefix or not key.startswith(stage.prefix):
                raise ValueError(f"stages: {stage!r} has the group key {key!r}, which must begin with its prefix.")
    return every


def check_stages(row: PlanRow, stages: Sequence[Stage]) -> None:
    """Refuse a matrix on which stages cannot work.

    Args:
        row: Of the plan.
        stages: Attached ones.

    Raises:
        ValueError: If a stage keeps something of it under a name that is not its own.
    """
    schema(row, adapts=False, stages=stages, storage=Storage())


def _by_role(kind: tuple[Role, str]) -> tuple[int, str]:
    """The order of groups that are added."""
    return ROLES.index(kind[0]), kind[1]


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _make_state_plain(_: Optimizer, packed: dict[str, Any]) -> None:
    for index, state in packed["state"].items():
        plain_state = {k: plain(v, f"state[{index}]: {k}") for k, v in state.items()}
        packed["state"][index] = {k: exchangeable(k, v) for k, v in plain_state.items()}


def _with_keys(stage: Stage, groups: Sequence[Group]) -> list[Group]:
    """Saved groups, with the keys of a stage also where it did not work when they were saved."""
    return [{**stage.group_keys, **group} for group in groups]


def _any_role(value: Any) -> Any:
    return next(iter(value.values()), None) if isinstance(value, Mapping) else value
