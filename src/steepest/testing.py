"""The laws that norms, stages and recipes keep, for pieces that you write; each check raises AssertionError.

    from steepest.testing import check_norm, check_recipe, check_stage

    check_norm(MyNorm())
    check_stage(MyStage())
    check_recipe(MyRecipe)

The library's own pieces are held to the same laws by its tests.
"""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from steepest.anatomy import Bucket, Load, PlanRow
from steepest.geometry import Norm
from steepest.geometry.norm import completed
from steepest.linalg import polar
from steepest.optim import Momo, Muon, SteepestDescent
from steepest.stages import Stage

__all__ = ["NORM_LAWS", "RECIPE_LAWS", "STAGE_LAWS", "check_norm", "check_recipe", "check_stage"]

SHAPES = ((1, 1), (3, 7), (7, 3), (2, 5, 5), (2, 2, 1, 4))
EMPTY = ((0, 3), (2, 0, 4), (0, 2, 2))
EXACT = 1e-12  # of float64, after sums over a few dozen entries
SPREADS = (0.0, 1e-3, 1e-1, 1.0, 10.0)  # from the best direction to arbitrary ones
MATRIX = (-2, -1)

Tensors: TypeAlias = list[Tensor]


def check_norm(norm: Norm, *, tolerance: float = EXACT) -> None:
    """Hold a norm to every law of `NORM_LAWS`.

    Args:
        norm: An object with `adapts`, `matrix`, `primal`, `dual` and `lmo`; it need not derive from `steepest.Norm`.
        tolerance: Relative error of `lmo`, `dual` and `primal` in float64, for norms that are computed approximately.

    Raises:
        AssertionError: If a law does not hold; the message has law, shape, numbers and what to look at.
    """
    for law in NORM_LAWS:
        law(completed(norm), tolerance)


def check_stage(stage: Stage) -> None:
    """Hold a stage to every law of `STAGE_LAWS`, and Muon with it to those of `RECIPE_LAWS`.

    Args:
        stage: As it is given to an optimizer's `stages`.

    Raises:
        AssertionError: If a law does not hold; the message has law, numbers and what to look at.
    """
    for law in STAGE_LAWS:
        try:
            law(stage)
        except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(f"{stage}: {law.__name__}: {type(error).__name__}: {error}") from error
    check_recipe(partial(Muon, stages=[stage]))


def check_recipe(make: Callable[..., SteepestDescent]) -> None:
    """Hold a recipe to every law of `RECIPE_LAWS`, on a small network with convolutions.

    Args:
        make: Called as `make(model, **options)`: a recipe, or a `functools.partial` of one with options.

    Raises:
        AssertionError: If a law does not hold; the message has law, numbers and what to look at.
    """
    for law in RECIPE_LAWS:
        law(make)


def _fail(who: object, law: str, numbers: str, remedy: str) -> None:
    raise AssertionError(f"{who}: {law}, but {numbers}. {remedy}")


def _hold(fine: object, who: object, law: str, numbers: str, remedy: str) -> None:
    if not fine:
        _fail(who, law, numbers, remedy)


def _same(actual: Tensor, expected: Tensor, error: float, who: object, law: str, remedy: str, **where: object) -> None:
    """Two tensors, up to an error."""
    place = "".join(f" {name} {value}" for name, value in where.items())
    _hold(
        actual.shape == expected.shape and actual.dtype == expected.dtype,
        who,
        law,
        f"at{place} there is {actual.dtype} of shape {tuple(actual.shape)}, not {expected.dtype} of shape "
        f"{tuple(expected.shape)}",
        remedy,
    )
    worst = float((actual - expected).abs().max()) if actual.numel() else 0.0
    _hold(worst <= error, who, law, f"at{place} they differ by {worst:.3g}, more than {error:.3g}", remedy)


# --------------------------------------------------------------------------------------------------------------------
# Norms


def _moments(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    m = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return m.to(dtype), torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def directions_attain_the_dual_norm(norm: Norm, tolerance: float) -> None:
    """<M, lmo(M)> = -dual(M), and primal(lmo(M)) = 1."""
    for shape in SHAPES:
        m, v = _moments(shape)
        d = norm.lmo(m, v)
        gain = (m * d).sum(MATRIX)
        size, expected = norm.primal(d, m, v), -norm.dual(m, v)
        scale = expected.abs().clamp(min=1e-300)
        law = "dual(M) = -<M, lmo(M)>"
        _same(gain / scale, expected / scale, tolerance, norm, law, "lmo returns D, to be added, not -D.", shape=shape)
        law = "primal(lmo(M)) = 1"
        _same(size, torch.ones_like(size), tolerance, norm, law, "Divide the direction by its norm.", shape=shape)


def no_weight_of_norm_one_gains_more(norm: Norm, tolerance: float) -> None:
    """Hölder: <M, W> <= dual(M) · primal(W) for all W, near the best direction and far from it."""
    for shape in SHAPES:
        m, v = _moments(shape)
        generator = torch.Generator(device="cpu").manual_seed(1)
        best = (m * norm.lmo(m, v)).sum(MATRIX)
        for spread in SPREADS:
            noise = torch.randn(300, *shape, generator=generator, dtype=torch.float64, device="cpu")
            w = norm.lmo(m, v) + spread * noise
            allowed = tolerance if tolerance <= EXACT else tolerance * float(best.abs().max())
            beyond = float((best - (m * w).sum(MATRIX) / norm.primal(w, m, v)).max())
            law = "<M, W> <= dual(M) · primal(W)"
            numbers = f"at shape {shape} a W is {beyond:.3g} better than lmo(M)"
            _hold(beyond <= allowed, norm, law, numbers, _REMEDY)


def a_search_finds_the_dual_norm(norm: Norm, tolerance: float) -> None:
    """max <M, W> / primal(W), found by random steps that use neither `lmo` nor `dual`, is dual(M)."""
    for shape in ((1, 4), (2, 3)):
        m, v = _moments(shape)
        generator = torch.Generator(device="cpu").manual_seed(2)
        w = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        found = -math.inf
        for trial in range(600):
            step = 10 ** (-4 * trial / 600) * torch.randn(
                64, *shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            near = w + step * w.abs().mean()
            slopes = (m * near).sum(MATRIX) / norm.primal(near, m, v)
            if float(slopes.max()) > found:
                found, w = float(slopes.max()), near[int(slopes.argmax())]
        dual = float(norm.dual(m, v))
        numbers = f"at shape {shape} it is {dual:.6g}, and a search found {found:.6g}"
        law = "dual(M) is the largest <M, W> with primal(W) <= 1"
        _hold(dual * 0.99 <= found <= dual * (1 + tolerance), norm, law, numbers, _REMEDY)


_REMEDY = "primal, dual and lmo are not of one norm: derive two of them anew from the third."


def arguments_are_only_read(norm: Norm, tolerance: float) -> None:
    """Nothing is written to M and V."""
    m, v = _moments((3, 4, 5))
    before = m.clone(), v.clone()
    norm.lmo(m, v)
    norm.dual(m, v)
    norm.primal(m, m, v)
    fine = torch.equal(m, before[0]) and torch.equal(v, before[1])
    _hold(fine, norm, "arguments are only read", "M or V was written to", "Work on a copy.")


def zero_and_nothing_stay(norm: Norm, tolerance: float) -> None:
    """lmo(0) = 0, and a matrix without entries has a direction without entries."""
    d = norm.lmo(*torch.zeros(2, 2, 3, device="cpu"))
    _hold((d == 0).all(), norm, "lmo(0) = 0", f"it is {d.tolist()}", "Divide by 1 where the dual norm is 0.")
    for shape in EMPTY:
        empty = torch.zeros(shape, device="cpu")
        got = norm.lmo(empty, empty).shape
        _hold(got == empty.shape, norm, "lmo keeps the shape", f"{shape} became {tuple(got)}", "Return M as it is.")


def the_size_of_a_gradient_does_not_matter(norm: Norm, tolerance: float) -> None:
    """lmo(c M) = lmo(M) for c > 0, in float32, from 1e-30 to 1e30; of norms that do not adapt."""
    for seed, power in () if norm.adapts else product(range(3), range(-30, 31, 3)):
        m, v = _moments((3, 4), torch.float32, seed)
        law, remedy = "lmo(c M) = lmo(M)", "Divide by the largest entry first, so that squares stay in range."
        d = norm.lmo(m * 10.0**power, v)
        _same(d, norm.lmo(m, v), max(1e-4, tolerance), norm, law, remedy, c=f"1e{power}")


def single_precision_is_close_to_double(norm: Norm, tolerance: float) -> None:
    """Directions and dual norms of float32 are those of float64, up to rounding; types are kept."""
    for shape in SHAPES:
        m, v = _moments(shape, torch.float32)
        law, remedy = (
            "float32 is float64 up to rounding",
            "Keep the type of M; avoid differences of large sums.",
        )
        for name in ("lmo", "dual"):
            own = getattr(norm, name)
            wide = own(m.double(), v.double()).float()
            error = max(1e-4, tolerance) * max(1.0, float(wide.abs().max()))
            _same(own(m, v), wide, error, norm, law, remedy, shape=shape, of=name)


def a_batch_is_its_matrices(norm: Norm, tolerance: float) -> None:
    """lmo, dual and primal of a batch are those of each matrix; and of several batches at once, times the radius."""
    m, v = _moments((4, 3, 5))
    law, remedy = "a batch is its matrices one by one", "Reduce over the last two dimensions only."
    for i in range(len(m)):
        _same(norm.lmo(m, v)[i], norm.lmo(m[i], v[i]), max(tolerance, EXACT), norm, law, remedy, of="lmo")
        _same(norm.dual(m, v)[i], norm.dual(m[i], v[i]), max(tolerance, EXACT), norm, law, remedy, of="dual")
        _same(norm.primal(m, m, v)[i], norm.primal(m[i], m[i], v[i]), max(tolerance, EXACT), norm, law, remedy)
    batches, squares = zip(*(_moments(shape, seed=i) for i, shape in enumerate(((2, 3, 5), (1, 4, 2)))), strict=True)
    for radius in (1.0, 0.25):
        found = norm.lmos(batches, squares, memory_cap=1 << 12, radius=radius)
        law, remedy = "lmos is radius times lmo of each", "Leave lmos out, or multiply with the radius once."
        for one, m, v in zip(found, batches, squares, strict=True):
            _same(one, radius * norm.lmo(m, v), max(tolerance, EXACT), norm, law, remedy, radius=radius)


def a_bad_matrix_spoils_itself_only(norm: Norm, tolerance: float) -> None:
    """A NaN leaves the directions of other matrices as they are, and raises nothing; types are kept."""
    for dtype in (torch.bfloat16, torch.float32):
        m = _moments((2, 3, 4), dtype)[0]
        v = torch.ones_like(m)
        alone = norm.lmo(m[:1], v[:1])
        m[1, 0, 0] = torch.nan
        result = norm.lmo(m, v)
        law = "a NaN spoils its own matrix only"
        _hold(result.dtype == dtype, norm, "types are kept", f"{dtype} became {result.dtype}", "Convert back.")
        _hold(torch.equal(result[:1], alone), norm, law, "its neighbour changed", "Reduce over matrices.")


def polar_factors_have_one_singular_value(norm: Norm, tolerance: float) -> None:
    """Where `polar_scale` says s, directions have the singular values s and 0 only."""
    for shape in ((3, 7), (7, 3)):
        scale = norm.polar_scale(*shape)
        if scale is not None:
            values = torch.linalg.svdvals(norm.lmo(*_moments(shape)))
            law, remedy = "singular values of directions are polar_scale", "Return None from polar_scale."
            _same(values / scale, torch.ones_like(values), max(tolerance, 1e-10), norm, law, remedy, shape=shape)


NORM_LAWS: tuple[Callable[[Norm, float], None], ...] = (
    directions_attain_the_dual_norm,
    no_weight_of_norm_one_gains_more,
    a_search_finds_the_dual_norm,
    arguments_are_only_read,
    zero_and_nothing_stay,
    the_size_of_a_gradient_does_not_matter,
    single_precision_is_close_to_double,
    a_batch_is_its_matrices,
    a_bad_matrix_spoils_itself_only,
    polar_factors_have_one_singular_value,
)
"""What `check_norm` holds a norm to."""


# --------------------------------------------------------------------------------------------------------------------
# Stages


@dataclass
class _Staged:
    """A stage at work, on the matrices of `network` after some steps."""

    model: nn.Module
    optimizer: SteepestDescent
    stage: Stage
    load: Load
    states: list[dict[str, Tensor]]
    rows: list[PlanRow]
    changing: Load  # whose gradients it may change: of all its roles

    @classmethod
    def of(cls, stage: Stage) -> "_Staged":
        model = network()
        optimizer = Muon(model, stages=[stage], coefficients="cubic12")
        train(model, optimizer, range(5))
        rows = [row for row in optimizer.plan if row.role == "matrix"]
        load = Load([Bucket((row.parameter,), row.view) for row in rows])
        changing = Load([Bucket((row.parameter,), row.view) for row in optimizer.plan if row.role in stage.roles])
        (attached,) = optimizer.stages
        attached.allocate(optimizer.state)
        attached.refresh(optimizer.state, (), None)
        return cls(model, optimizer, attached, load, [optimizer.state[row.parameter] for row in rows], rows, changing)

    def random(self, seed: int) -> tuple[Tensor, ...]:
        """Averages of gradients, as it were."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return tuple(torch.randn(own.shape, generator=generator, device="cpu") for own in self.weights())

    def gradients(self, seed: int) -> Tensors:
        """Of all parameters of the stage's roles."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return [torch.randn(p.shape, generator=generator, device="cpu") for p in self.changing.parameters]

    def factors(self, seed: int) -> tuple[Tensor, ...]:
        """Directions in the spectral norm."""
        return tuple(polar(-own, method="svd") for own in self.random(seed))

    def before(self, averages: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What directions are sought for; the state stays as it was."""
        return self.stage.before(self.load, averages, copy.deepcopy(self.states))

    def observed(self, gradients: tuple[Tensor, ...], accept: Tensor | None = None) -> "_Staged":
        """The same, after a look at gradients, which are the averages too; the state here stays as it was."""
        own = replace(self, states=copy.deepcopy(self.states))
        self.stage.observe(own.load, gradients, tuple(0.5 * one for one in gradients), own.states, accept)
        return own

    def after(self, directions: tuple[Tensor, ...], accept: Tensor | None = None) -> tuple[Tensor, ...]:
        """What becomes of directions; the state stays as it was."""
        found = self.stage.after(self.load, directions, copy.deepcopy(self.states), accept)
        return self.stage.beside(self.load, found, self.weights()) if self.stage.sees_weights else found

    def weights(self) -> tuple[Tensor, ...]:
        """The weights as matrices."""
        return self.load.matrices([parameter.detach() for parameter in self.load.parameters])

    def kept(self) -> Tensors:
        """What the stage keeps of the parameters."""
        keys = [[entry.key for entry in self.stage.entries(row)] for row in self.rows]
        return [state[key].clone() for state, own in zip(self.states, keys, strict=True) for key in own if key in state]


def entries_are_what_is_declared(stage: Stage) -> None:
    """After some steps, what is kept under the stage's prefix is what `entries` says, with its shapes and types."""
    own = _Staged.of(stage)
    law = "what is kept is what entries declares"
    for row, state in zip(own.rows, own.states, strict=True):
        declared = {entry.key: entry for entry in own.stage.entries(row)}
        ours = {key for key in (*state, *declared) if stage.prefix and key.startswith(stage.prefix)}
        strange = ours ^ declared.keys()
        _hold(not strange, stage, law, f"{row.name} has {sorted(strange)}", "Set prefix, and begin every key with it.")
        for key, entry in declared.items():
            missing = entry.eager and key not in state
            _hold(not missing, stage, law, f"{row.name} has no {key!r}", "Do not take entries out of the state.")
            if key in state:
                _same(state[key], torch.empty_like(entry.zeros(row.parameter)).copy_(state[key]), 0.0, stage, law, "")


def batches_are_only_read(stage: Stage) -> None:
    """No method of a stage writes to a batch that it is given, and all keep shapes and types."""
    own = _Staged.of(stage)
    weights = [one.clone() for one in own.weights()]
    law, remedy = (
        "arguments are only read, and shapes kept",
        "Work on a copy; return what has the shape of the argument.",
    )
    given = own.random(0)
    before = [batch.clone() for batch in given]
    tensors = own.gradients(0)
    plain = [tensor.clone() for tensor in tensors]
    own.stage.observe(own.load, given, given, copy.deepcopy(own.states), None)
    made = [own.before(given), own.after(given), own.stage.gradient(own.changing, tensors)]
    for batch, as_it_was in zip((*given, *tensors, *own.weights()), (*before, *plain, *weights), strict=True):
        _same(batch, as_it_was, 0.0, stage, law, remedy)
    for result, like in zip(made, (given, given, tensors), strict=True):
        fine = [(one.shape, one.dtype) for one in result] == [(one.shape, one.dtype) for one in like]
        _hold(fine, stage, law, f"{[one.shape for one in like]} became {[one.shape for one in result]}", remedy)


def gradients_are_averaged_or_it_is_said(stage: Stage) -> None:
    """Where `gradient` changes something, `no_duals` says that averages do not tell how the loss changes."""
    own = _Staged.of(stage)
    given = own.gradients(5)
    made = own.stage.gradient(own.changing, [one.clone() for one in given])
    same = all(torch.equal(one, other) for one, other in zip(made, given, strict=True))
    law = "what changes gradients says no_duals"
    _hold(same or own.stage.no_duals, stage, law, "it says nothing", "Set no_duals to the reason and the remedy.")


def directions_go_down(stage: Stage) -> None:
    """For an average M and what becomes of the direction for it, -<M, D> is at least 0, unless it `may_climb`."""
    own = _Staged.of(stage)
    for seed in range(0 if own.stage.may_climb else 5):
        m = own.random(seed)
        d = tuple(polar(-one, method="svd") for one in own.before(m))
        for one, found in zip(m, own.after(d), strict=True):
            least = float(-(one * found).sum(MATRIX).max())
            fine = least >= -1e-4 * float(one.abs().sum())
            remedy = "Turn no direction round, or say that it may_climb."
            _hold(fine, stage, "-<M, D> is at least 0", f"it is {least:.3g}", remedy)


def a_linear_stage_is_linear(stage: Stage) -> None:
    """Where `linear` says so, after(c D) = c after(D)."""
    own = _Staged.of(stage)
    if own.stage.linear:
        d = own.factors(1)
        for one, other in zip(own.after(tuple(4 * one for one in d)), own.after(d), strict=True):
            error = 1e-5 * float(one.abs().max())
            _same(one, 4 * other, error, stage, "after(c D) = c after(D)", "Leave linear at False.")


def the_ball_is_kept_where_that_is_said(stage: Stage) -> None:
    """Where `keeps_ball` says so, what `after` makes of polar factors has no singular value above one."""
    own = _Staged.of(stage)
    if own.stage.keeps_ball:
        for seed in range(3):
            for one in own.after(own.factors(seed)):
                largest = float(torch.linalg.matrix_norm(one, ord=2).max())
                _hold(largest < 1 + 1e-4, stage, "keeps_ball", f"a norm is {largest:.6g}", "Leave keeps_ball at False.")


def a_step_that_is_not_taken_changes_no_entry(stage: Stage) -> None:
    """Where `accept` is False, `observe`, `after` and `refresh` leave the state as it is."""
    own = _Staged.of(stage)
    never = torch.tensor(False, device="cpu")
    backward(own.model, 9)
    before = own.kept()
    own.stage.refresh(own.optimizer.state, [p for p in own.model.parameters() if p.grad is not None], never)
    given = own.random(2)
    own.stage.observe(own.load, tuple(torch.zeros_like(one) for one in given), given, own.states, never)
    own.stage.after(own.load, own.factors(2), own.states, never)
    law = "a step that is not taken changes no entry"
    for one, other in zip(own.kept(), before, strict=True):
        _same(one, other, 0.0, stage, law, "Write torch.where(accept, new, old).")


def no_direction_stays_none(stage: Stage) -> None:
    """after(0) = 0, and what is finite stays so where directions have rank one."""
    own = _Staged.of(stage)
    law, remedy = "after(0) = 0", "Divide by 1 where a size is 0."
    for one in own.after(tuple(torch.zeros_like(d) for d in own.factors(0))):
        _hold((one == 0).all(), stage, law, f"it is {one.flatten()[0]:.6g}, ...", remedy)
    thin = tuple(torch.zeros_like(d).index_fill(-2, torch.tensor([0], device="cpu"), 0.5) for d in own.factors(0))
    for one in own.after(thin):
        _hold(one.isfinite().all(), stage, "directions stay finite", "those of rank one do not", remedy)


def gradients_of_any_size_leave_finite_entries(stage: Stage) -> None:
    """After `observe` of gradients whose squares are infinite, or zero, entries and directions are finite."""
    own = _Staged.of(stage)
    law = "gradients of any size leave finite entries"
    remedy = "Bound what is squared, and divide by 1 where a size is 0."
    for size in (1e30, 1e-30, 0.0):
        seen = own.observed(tuple(size * one for one in own.random(4)))
        for one in (*seen.kept(), *seen.before(own.random(5)), *seen.after(own.factors(5))):
            _hold(one.isfinite().all(), stage, law, f"those of gradients of size {size:g} do not", remedy)


def a_load_is_its_parameters(stage: Stage) -> None:
    """What becomes of a parameter does not depend on those that share its load."""
    own = _Staged.of(stage)
    m = own.random(3)
    seen = own.observed(own.random(4))
    place = 0
    for number, bucket in enumerate(own.load.buckets):
        alone = Load([bucket])
        part = slice(place, place + alone.batches)
        together = [*seen.before(m)[part], *seen.after(m)[part]]
        row = slice(number, number + 1)
        by_itself = replace(own, load=alone, states=own.states[row], rows=own.rows[row])
        by_itself = by_itself.observed(own.random(4)[part])
        single = [*by_itself.before(m[part]), *by_itself.after(m[part])]
        for one, other in zip(single, together, strict=True):
            _same(one, other, 1e-6, stage, "a load is its parameters", "Use what is kept of each parameter alone.")
        place = part.stop


STAGE_LAWS: tuple[Callable[[Stage], None], ...] = (
    entries_are_what_is_declared,
    batches_are_only_read,
    gradients_are_averaged_or_it_is_said,
    directions_go_down,
    a_linear_stage_is_linear,
    the_ball_is_kept_where_that_is_said,
    a_step_that_is_not_taken_changes_no_entry,
    no_direction_stays_none,
    gradients_of_any_size_leave_finite_entries,
    a_load_is_its_parameters,
)
"""What `check_stage` holds a stage to."""


# --------------------------------------------------------------------------------------------------------------------
# Recipes

Make: TypeAlias = Callable[..., SteepestDescent]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The network of the laws: convolutions, one of them grouped, gains, a matrix and a head; always the same."""
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=2),
            nn.GroupNorm(2, 6),
            nn.Flatten(),
            nn.Linear(24, 12),
            nn.ReLU(),
            nn.Linear(12, 4),
        )
    return model.to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (size, 2, 4, 4) and classes (size,) of one step."""
    generator = torch.Generator(device="cpu").manual_seed(step)
    x = torch.randn(size, 2, 4, 4, generator=generator, device="cpu")
    return x.to(dtype), torch.randint(0, 4, (size,), generator=generator, device="cpu")


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients of one step's batch; returns the loss."""
    x, y = batch(step, dtype)
    loss = nn.functional.cross_entropy(model(x).to(torch.promote_types(dtype, torch.float32)), y)
    loss.backward()
    return loss


def train(
    model: nn.Module, optimizer: SteepestDescent, steps: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensors:
    """Take a step for each batch, whose loss is told; returns the weights."""
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step, dtype)
        optimizer.step(loss=loss.detach())
    return _weights(model)


def _weights(model: nn.Module) -> Tensors:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _state(model: nn.Module, optimizer: SteepestDescent) -> Tensors:
    kept = [optimizer.state[parameter] for parameter in model.parameters() if parameter in optimizer.state]
    return [state[key].clone() for state in kept for key in sorted(state) if isinstance(state[key], Tensor)]


def _alike(actual: Tensors, expected: Tensors, make: Make, law: str, remedy: str, error: float = 0.0) -> None:
    who = _name(make)
    _hold(len(actual) == len(expected), who, law, f"there are {len(actual)} tensors, not {len(expected)}", remedy)
    for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if error or not torch.equal(one, other):
            _same(one, other, error, who, law, remedy, tensor=place)


def _name(make: Make) -> str:
    inner = make.func if isinstance(make, partial) else make
    return getattr(inner, "__name__", type(inner).__name__)


def steps_learn_and_leave_gradients_alone(make: Make) -> None:
    """A batch seen forty times has a smaller loss, and gradients are as they were."""
    model = network()
    optimizer = make(model)
    first = backward(model, 0).detach()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    optimizer.step(loss=first)
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    _alike(after, gradients, make, "gradients are only read", "Work on a copy.")
    train(model, optimizer, [0] * 40)
    last = backward(model, 0).item()
    numbers = f"it was {first.item():.4g} and is {last:.4g}"
    remedy = "Look at the sign of directions, and at the default learning rate."
    _hold(last < 0.98 * first.item(), _name(make), "forty steps on one batch lower its loss", numbers, remedy)


def resuming_is_exact(make: Make) -> None:
    """A run that is saved, read with weights_only=True and loaded into a new optimizer goes on to the last bit."""
    model = network()
    expected = train(model, make(model), range(6))
    for stop in (0, 1, 3):
        model = network()
        optimizer = make(model)
        train(model, optimizer, range(stop))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model = network()
        train(model, make(model), [7])  # other weights, to be overwritten
        model.load_state_dict(saved["model"])
        optimizer = make(model)
        optimizer.load_state_dict(saved["optimizer"])
        law, remedy = f"a run saved after {stop} steps goes on exactly", "Keep in the state whatever a step reads."
        _alike(train(model, optimizer, range(stop, 6)), expected, make, law, remedy)


def copies_continue_on_their_own(make: Make) -> None:
    """Model and optimizer, copied or pickled together, go on exactly, and share nothing."""
    for way, clone in (("deepcopy", copy.deepcopy), ("pickle", _pickled)):
        model = network()
        optimizer = make(model)
        train(model, optimizer, range(3))
        law, remedy = f"a {way} goes on exactly", "Keep no function and no tensor outside of state and groups."
        try:
            twin_model, twin = clone((model, optimizer))
        except Exception as error:
            raise AssertionError(f"{_name(make)}: {law}, but it cannot be made: {error}. {remedy}") from error
        fine = str(twin.plan) == str(optimizer.plan)
        _hold(fine, _name(make), law, f"its plan became\n{twin.plan}", remedy)
        expected = train(model, optimizer, range(3, 6))
        _alike(train(twin_model, twin, range(3, 6)), expected, make, law, remedy)


def _pickled(pair: tuple[nn.Sequential, SteepestDescent]) -> tuple[nn.Sequential, SteepestDescent]:
    return pickle.loads(pickle.dumps(pair))  # noqa: S301 - our own bytes


def a_gradient_that_is_not_finite_leaves_no_trace(make: Make) -> None:
    """Weights and state stay as they are, and the step is counted."""
    for bad in (math.nan, math.inf):
        model = network()
        optimizer = make(model)
        train(model, optimizer, range(2))
        before = _weights(model) + _state(model, optimizer)
        loss = backward(model, 2).detach()
        for parameter in list(model.parameters())[-2:]:
            if parameter.grad is not None:
                parameter.grad.view(-1)[1] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step(loss=loss)
            optimizer.step(loss=loss)
        law, remedy = (
            f"a gradient with {bad} changes nothing",
            "Write nothing before the guard is asked.",
        )
        _alike(_weights(model) + _state(model, optimizer), before, make, law, remedy)
        skipped = optimizer.diagnostics()["skipped_steps"]
        _hold(skipped == 2, _name(make), "skipped steps are counted", f"two became {skipped:g}", remedy)


def a_parameter_without_a_gradient_is_left_alone(make: Make) -> None:
    """It neither moves nor decays nor counts, whether others have a gradient or none has."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(3))
    idle = list(model.parameters())[-2]
    before = [idle.detach().clone(), *(kept.clone() for kept in optimizer.state[idle].values())]
    loss = backward(model, 3).detach()
    idle.grad = None
    optimizer.step(loss=loss)
    optimizer.zero_grad()
    optimizer.step(loss=loss)
    law, remedy = "a parameter without a gradient is left alone", "Take parameters with p.grad only."
    _alike([idle.detach(), *optimizer.state[idle].values()], before, make, law, remedy)


def frozen_parameters_wait(make: Make) -> None:
    """A parameter that is frozen when the optimizer is built is optimised from when it is thawed."""
    model = network()
    weight = next(model.parameters())
    weight.requires_grad_(False)
    optimizer = make(model)
    frozen = weight.detach().clone()
    train(model, optimizer, range(2))
    law, remedy = "a frozen parameter stays", "Take parameters with p.grad only."
    _alike([weight.detach()], [frozen], make, law, remedy)
    _hold(weight not in optimizer.state, _name(make), law, "it has a state", remedy)
    weight.requires_grad_(True)
    train(model, optimizer, range(2))
    moved = not torch.equal(weight, frozen)
    _hold(moved, _name(make), "a thawed parameter moves", "it does not", "Leave frozen ones in their group.")


def a_rate_may_be_a_tensor_and_scheduled(make: Make) -> None:
    """A tensor as learning rate is its number, schedulers are heard, and at a rate of 0 no weight moves."""
    runs: list[Tensors] = []
    for kind in (float, _as_tensor):
        model = network(torch.float64)
        optimizer = make(model)
        for group in optimizer.param_groups:
            group["lr"] = kind(group["lr"])
        runs.append(train(model, optimizer, range(4), torch.float64))
    law, remedy = "a rate that is a tensor is its number", "Multiply with the rate in the type of the weights."
    _alike(runs[1], runs[0], make, law, remedy, 1e-13)
    model = network()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 1))
    moved = train(model, optimizer, [0])
    scheduler.step()
    law, remedy = "schedulers set the rate", "Read param_groups[i]['lr'] in every step."
    _alike(train(model, optimizer, range(1, 3)), moved, make, law, remedy)


def _as_tensor(rate: float) -> Tensor:
    return torch.tensor(float(rate), dtype=torch.float64, device="cpu")


def accumulated_gradients_are_one_batch(make: Make) -> None:
    """Four micro-batches, each with a quarter of the loss, make the step of the whole batch."""
    whole, parts = network(torch.float64), network(torch.float64)
    optimizers = make(whole), make(parts)
    for step in range(3):
        loss = backward(whole, step, torch.float64).detach()
        x, y = batch(step, torch.float64)
        for own_x, own_y in zip(x.split(2), y.split(2), strict=True):
            (nn.functional.cross_entropy(parts(own_x), own_y) / 4).backward()
        for optimizer in optimizers:
            optimizer.step(loss=loss)
            optimizer.zero_grad()
    law, remedy = "micro-batches make the step of their batch", "Read gradients when the step is taken only."
    _alike(_weights(parts), _weights(whole), make, law, remedy, 1e-11)


def a_closure_is_a_loss_that_is_told(make: Make) -> None:
    """step(closure) computes gradients, and does what step(loss=...) does with that loss."""
    a, b = network(), network()
    first, second = make(a), make(b)

    def closure() -> Tensor:
        first.zero_grad()
        return backward(a, 0)

    returned = torch.as_tensor(first.step(cast(Any, closure)), device="cpu").detach()
    expected = backward(b, 0).detach()
    second.step(loss=expected)
    law, remedy = "step(closure) is step(loss=...), and returns it", "Leave step() to SteepestDescent."
    _alike([returned], [expected], make, law, remedy)
    _alike(_weights(a), _weights(b), make, law, remedy)


def half_precision_has_wider_state(make: Make) -> None:
    """Averages of bfloat16 parameters are float32, also after loading; counts are int64."""
    model = network(torch.bfloat16)
    optimizer = make(model)
    train(model, optimizer, range(3), torch.bfloat16)
    resumed = make(model)
    resumed.load_state_dict(state_dict=optimizer.state_dict())  # by keyword, as distributed checkpoints call it
    law, remedy = "averages of bfloat16 are float32, counts int64", "Make the state in state_dtype(parameter)."
    _alike(_state(model, resumed), _state(model, optimizer), make, law, remedy)
    for parameter in model.parameters():
        for key, kept in resumed.state[parameter].items():
            expected = torch.int64 if key == "step" else torch.float32
            _hold(kept.dtype == expected, _name(make), law, f"{key} is {kept.dtype}", remedy)


def momo_bounds_the_step(make: Make) -> None:
    """With step_size=Momo(), a step needs the loss, takes a part t of itself in [0, 1], and resumes exactly."""
    model = network()
    momo = partial(make, step_size=Momo())
    optimizer = momo(model)
    backward(model, 0)
    told = _refused(lambda: optimizer.step())
    numbers = "a step without one was taken"
    _hold(told, _name(make), "Momo needs the loss", numbers, "Pass step_size on to SteepestDescent.")
    for step in range(4):
        train(model, optimizer, [step])
        t = optimizer.diagnostics()["t"]
        _hold(0 <= t <= 1, _name(make), "Momo takes a part of the step", f"t is {t:g}", "Leave t to Momo.")
    resuming_is_exact(momo)


def wrong_options_are_refused(make: Make) -> None:
    """Options that are unknown or out of range raise TypeError or ValueError, and the message has name and value."""
    wrong: tuple[tuple[str, Any], ...] = (
        ("lr", "1e-3"),
        ("lr", -1.0),
        ("lr", math.nan),
        ("stepsize", 1),
        ("on_nonfinite", "skp"),
        ("momo", 1),
    )
    for option, value in wrong:
        told = _refused(lambda option=option, value=value: make(network(), **{option: value}))
        _hold(told, _name(make), "wrong options are refused", f"{option}={value!r} was taken", "Decorate with @recipe.")
        shown = option in told and (option not in ("lr", "on_nonfinite") or repr(value) in told)
        _hold(
            shown,
            _name(make),
            "messages name option and value",
            f"for {option}={value!r} it is {told!r}",
            "See checks.",
        )


def _refused(call: Callable[[], object]) -> str:
    """What a refusal says; nothing if there is none."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return ""


RECIPE_LAWS: tuple[Callable[[Make], None], ...] = (
    steps_learn_and_leave_gradients_alone,
    resuming_is_exact,
    copies_continue_on_their_own,
    a_gradient_that_is_not_finite_leaves_no_trace,
    a_parameter_without_a_gradient_is_left_alone,
    frozen_parameters_wait,
    a_rate_may_be_a_tensor_and_scheduled,
    accumulated_gradients_are_one_batch,
    a_closure_is_a_loss_that_is_told,
    half_precision_has_wider_state,
    momo_bounds_the_step,
    wrong_options_are_refused,
)
"""What `check_recipe` holds a recipe to."""
