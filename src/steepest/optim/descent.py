"""The one optimizer: steepest descent in a norm per layer. Recipes only choose its pieces.

A step goes the same way for every parameter:

    gradient -> average (momentum) -> view as matrices -> steepest direction in the norm -> decay and move

Everything between the gradient and the move is a pure function of tensors in its own file; here they are put in order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from steepest.anatomy import Plan, PlanRow, Role, View
from steepest.geometry import Norm, get_norm
from steepest.optim.bucket import Bucket, apply_, directions
from steepest.optim.diagnostics import StepRecord
from steepest.optim.guard import Guard, OnNonFinite
from steepest.optim.momentum import average_, debias, look_ahead
from steepest.optim.options import DEFAULT_NORMS, check_betas, check_group, check_role, for_role
from steepest.optim.parameters import Parameters, collect, complete_row
from steepest.optim.state import MOMENTUM, SECOND, STEP, check_saved, ensure_state, restored, state_dtype

Group = dict[str, Any]
PerRole = Mapping[Role, Any]


class SteepestDescent(Optimizer):
    """Steepest descent with momentum, in a norm for each role of parameter.

    A step subtracts decoupled weight decay and adds the learning rate times the direction of norm one that decreases
    the averaged gradient fastest: W <- (1 - lr · weight_decay) W + lr · lmo(average). This is constrained steepest
    descent in the largest of the layers' norms, each divided by its learning rate (arXiv:2510.09827).

    Every option but `on_nonfinite` may be one value, or a mapping from role to value.

    Args:
        params: A module, whose parameters are routed to roles and views (`route`); or parameters, named parameters or
            parameter groups, or a plan. A group may set any option for itself, and `role` and `view`. Without a role,
            parameters with two or more dimensions are matrices and the others vectors.
        lr: Learning rate: the length of a step in the group's norm. A number or a 0-d tensor.
        momentum: Weight of the old average of gradients, in [0, 1); for norms that do not adapt. In the groups, and so
            for schedulers, "momentum" is this weight for every norm.
        nesterov: Look ahead by one gradient; for norms that do not adapt.
        weight_decay: Decoupled; the rate per step is lr times this, with the scheduled lr.
        betas: Weights of the old averages of gradients and of their squares, for norms that adapt (`AdaInf`).
        norms: Norm of each role, by object or name; roles left out keep Spectral() for matrices, AdaInf() otherwise.
        on_nonfinite: "skip" passes over a step whose gradient or loss is not finite, with all parameters and state
            untouched, counts it and warns once; "raise" raises `NonFiniteError`.

    Attributes:
        plan: Which parameter has which role, view, norm and learning rate, and why. Print it.

    Raises:
        ValueError: If an option is unknown or out of range, or a parameter cannot be optimised.
        TypeError: If an option or parameter is of the wrong type.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float | Tensor | PerRole = 0.02,
        momentum: float | PerRole = 0.95,
        nesterov: bool | PerRole = False,
        weight_decay: float | PerRole = 0.0,
        betas: tuple[float, float] | PerRole = (0.9, 0.95),
        norms: Mapping[Role, Norm | str] | None = None,
        on_nonfinite: OnNonFinite = "skip",
    ) -> None:
        for role in norms or {}:
            for_role("norms", norms, role)
        self._defaults_per_role: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "betas": betas,
            "norm": {**DEFAULT_NORMS, **(norms or {})},
        }
        self._guard = Guard(on_nonfinite)
        self._record = StepRecord()
        self._rows: dict[Tensor, PlanRow] = {}
        rows, groups = collect(params)
        self._rows.update(rows)
        # torch's schedulers look for these names among the defaults; what counts is in the groups.
        defaults = {key: _any_role(self._defaults_per_role[key]) for key in ("lr", "momentum", "weight_decay")}
        super().__init__(groups, defaults)

    @property
    def plan(self) -> Plan:
        """Routing of every parameter, with the norms and learning rates of now."""
        return Plan(
            tuple(
                complete_row(self._rows[parameter], group)
                for group in self.param_groups
                for parameter in cast(list[Tensor], group["params"])
            )
        )

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with options of their own or the optimizer's.

        Args:
            param_group: As in the constructor: "params" and any options.

        Raises:
            ValueError: If an option or a parameter does not fit.
            TypeError: If an option or a parameter is of the wrong type.
        """
        where = f"parameter group {len(self.param_groups)}"
        rows, groups = collect([param_group], known=self._rows, where=where)
        (group,) = groups
        self._complete(group, where)
        check_group(group, where=where)
        for row in rows.values():
            _check_view(row, group["norm"])
        super().add_param_group(group)
        self._rows.update(rows)

    def _complete(self, group: Group, where: str) -> None:
        """Fill in what a group leaves open; `momentum` is the weight of the old average of gradients in every group."""
        check_role(group["role"], where=where)
        role = cast(Role, group["role"])

        def default(option: str) -> Any:
            return for_role(option, self._defaults_per_role[option], role)

        norm = group["norm"] = get_norm(group["norm"] if "norm" in group else default("norm"))
        if norm.adapts:
            given = "betas" in group
            betas = check_betas(where, group.pop("betas") if given else default("betas"))
            group["momentum"] = betas[0] if given else group.get("momentum", betas[0])
            group["beta2"] = betas[1] if given else group.get("beta2", betas[1])
        elif "betas" in group:
            raise ValueError(f"{where}: betas are for norms that adapt, and {norm} does not; give momentum instead.")
        for option in ("lr", "momentum", "nesterov", "weight_decay"):
            if option not in group:
                group[option] = default(option)
        if isinstance(group["lr"], Tensor):  # schedulers write into it: one per group
            group["lr"] = group["lr"].clone()
        group.setdefault("beta2", 0.0)
        group.setdefault("view", None)
        group["skipped_steps"] = 0

    @overload
    def step(self, closure: None = None, *, loss: Tensor | float | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: Tensor | float | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: Tensor | float | None = None) -> float | None:
        """Take one step. Parameters without a gradient are left alone; gradients are not written to.

        Args:
            closure: Computes the loss and its gradients, and returns the loss.
            loss: The loss whose gradients are present, if known: a step with a loss that is not finite is not taken.

        Returns:
            What the closure returned, or None.

        Raises:
            NonFiniteError: If a gradient or the loss is not finite and `on_nonfinite` is "raise".
            ValueError: If a gradient is sparse.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        present = [(g, [p for p in g["params"] if p.grad is not None and p.numel()]) for g in self.param_groups]
        parameters = [parameter for _, members in present for parameter in members]
        if not parameters:
            return returned
        names = [self._rows[parameter].name for parameter in parameters]
        gradients = [_dense_gradient(parameter, name) for parameter, name in zip(parameters, names, strict=True)]
        admitted = self._guard.admit(names, gradients, returned if loss is None else loss)
        if admitted is False:
            self._publish_skips()
            return returned
        accept = admitted if isinstance(admitted, Tensor) else None
        self._record.clear()
        for group, members in present:
            for bucket in self._buckets(members, matrix=group["norm"].matrix):
                self._move(group, bucket, accept)
        return returned

    def _move(self, group: Group, bucket: Bucket, accept: Tensor | None) -> None:
        """The way of one step, for parameters of one layout."""
        norm = cast(Norm, group["norm"])
        states = [cast(dict[str, Tensor], self.state[parameter]) for parameter in bucket.parameters]
        for state, parameter in zip(states, bucket.parameters, strict=True):
            ensure_state(state, parameter, adapts=norm.adapts)
        wide = state_dtype(bucket.parameters[0])
        gradients = [cast(Tensor, parameter.grad).to(wide) for parameter in bucket.parameters]
        if accept is not None:
            accept = accept.to(gradients[0].device)
        beta = group["momentum"]
        steps = [state[STEP] for state in states]
        torch._foreach_add_(steps, 1.0 if accept is None else accept.to(wide))
        count = torch.stack(steps)

        buffers = [state[MOMENTUM] for state in states]
        average_(buffers, gradients, beta, accept=accept)
        ahead = bool(group["nesterov"]) and not norm.adapts
        averages = look_ahead(buffers, gradients, beta) if ahead else buffers
        averages = _divided(averages, debias(beta, count + 1 if ahead else count))
        squares = None
        if norm.adapts:
            seconds = [state[SECOND] for state in states]
            squared = torch._foreach_mul(gradients, gradients)
            torch._foreach_clamp_max_(squared, torch.finfo(wide).max)  # an infinite square would stay for ever
            average_(seconds, squared, group["beta2"], accept=accept)
            squares = _divided(seconds, debias(group["beta2"], count))

        batches = directions(bucket, norm, averages, squares, accept=accept)
        lr = cast(float | Tensor, group["lr"])
        lr = lr.to(batches[0].device) if isinstance(lr, Tensor) else lr
        self._record.add(group["role"], norm, batches, lr=lr)
        moves = bucket.parameter_shaped(batches)
        apply_(bucket.parameters, moves, lr=lr, weight_decay=group["weight_decay"], accept=accept)

    def _buckets(self, parameters: Sequence[Tensor], *, matrix: bool) -> Iterator[Bucket]:
        """Parameters of one group, together where they have one layout; in order of first appearance."""
        alike: dict[tuple[object, ...], list[Tensor]] = {}
        for parameter in parameters:
            view = self._rows[parameter].view if matrix else None
            key = (parameter.shape, view, parameter.dtype, parameter.device)
            alike.setdefault(key, []).append(parameter)
        for (_, view, *_), members in alike.items():
            yield Bucket(tuple(members), cast(View | None, view))

    def diagnostics(self) -> dict[str, float]:
        """Scalars of the last step; reading them waits for the device.

        Returns:
            "skipped_steps": steps passed over because something was not finite. Per role that moved:
            "ROLE/update_rms": root mean square of the entries added to the weights, decay not counted;
            "ROLE/orthogonality_error": for the spectral norm, the largest ‖Q Qᵀ Q - Q‖_F / ‖Q‖_F over one polar factor
            Q of each layout; 0 for an exact one, whatever its rank.
        """
        self._publish_skips()
        return {"skipped_steps": float(self._guard.skipped_steps()), **self._record.read()}

    def _publish_skips(self) -> None:
        skipped = self._guard.skipped_steps()
        for group in self.param_groups:
            group["skipped_steps"] = skipped

    def state_dict(self) -> dict[str, Any]:
        """State and options; norms and views as text, so that `torch.load(weights_only=True)` reads it back."""
        self._publish_skips()
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group["norm"] = repr(group["norm"])
            group["view"] = None if group["view"] is None else str(group["view"])
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Norms and views stay those of this optimizer.

        Args:
            state_dict: What `state_dict` returned, from this or another world.

        Raises:
            ValueError: If groups, roles, kinds of norm or shapes do not match, or the state is of another optimizer.
                Nothing is changed then.
        """
        kept = [dict(group) for group in self.param_groups]
        effective: dict[str, Any] = {}

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            check_saved(given, self.param_groups, [self._rows[p].name for p in self._parameters()])
            effective.update(given)

        # Last before and first after: hooks of the user see, and may change, what they would see of any optimizer.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(effective, kept), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore(self, saved: dict[str, Any], kept: Sequence[Group]) -> None:
        """Put back what torch's loading has replaced or rounded."""
        for group, old in zip(self.param_groups, kept, strict=True):
            group.update({key: old[key] for key in old if key not in group or key in ("norm", "view")})
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, self._parameters(), strict=True):
            if index in saved["state"]:
                self.state[parameter] = restored(saved["state"][index], parameter)
        self._guard.restore(int(max((group["skipped_steps"] for group in self.param_groups), default=0)))

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; torch's own keeps only what its optimizers have."""
        own = ("_defaults_per_role", "_guard", "_record", "_rows")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


def _divided(averages: Iterable[Tensor], weights: Tensor) -> list[Tensor]:
    """Each average divided by the sum of its weights; 0 where nothing was averaged yet."""
    safe = torch.where(weights == 0, 1.0, weights)
    return list(torch._foreach_div(list(averages), list(safe.unbind())))


def _dense_gradient(parameter: Tensor, name: str) -> Tensor:
    gradient = cast(Tensor, parameter.grad)
    if gradient.layout != torch.strided:
        raise ValueError(
            f"The gradient of {name!r} has layout {gradient.layout}, but a dense one is needed. "
            "Build the embedding with sparse=False."
        )
    return gradient


def _check_view(row: PlanRow, norm: Norm) -> None:
    """A norm of linear maps needs to know the map."""
    if row.view is not None:
        row.view.blocks(row.shape)
    elif norm.matrix:
        raise ValueError(
            f"{row.name!r} of shape {tuple(row.shape)} has no view as matrices, which the group's norm needs. "
            "Give the group a view=, or another role or norm."
        )


def _any_role(value: Any) -> Any:
    return next(iter(value.values()), None) if isinstance(value, Mapping) else value
