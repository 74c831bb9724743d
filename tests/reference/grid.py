"""Steepest descent in any product norm, constrained or regularised, with and without Momo, in float64.

Everything is taken from the whole history by its definition, never from the step before: averages of gradients are sums
with explicit weights, and Momo's model is the weighted sum of the linearised losses at the present weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
# Of one block, gradients of all steps so far and the averages that its directions were sought for, (t, m, n) each: what
# is done to the average before the direction is found, and to the direction after.
Around = Callable[[Array, Array], tuple[Callable[[Array], Array], Callable[[Array], Array]]]
Oracle = Callable[[list[Array], int], tuple[float, list[Array]]]  # weights of all blocks, step -> loss, gradients


@dataclass(frozen=True)
class Block:
    start: Array
    label: str
    norm: str  # "spectral", "frobenius", "sign", "ada_inf" or "ada_2"
    lr: float
    weight_decay: float = 0.0
    nesterov: bool = False
    scale: float = 1.0  # of the spectral norm
    eps: float = 1e-8  # of the norms that adapt
    cautious: bool = False  # whether only weights decay that the step makes smaller
    around: Around | None = None
    beside: Callable[[Array, Array], Array] | None = None  # what a weight makes of the D that is taken from it
    sphere: str = ""  # "kept" or "relative": the weight stays as long as it was at the start

    @property
    def adapts(self) -> bool:
        return self.norm in ("ada_inf", "ada_2")


@dataclass(frozen=True)
class Mixture:
    """Several averages, each debiased, with weights that go from the first row to the second."""

    betas: tuple[float, ...]
    weights: tuple[float, ...]
    later: tuple[float, ...]
    between: tuple[int, int]

    def shares(self, t: int) -> Array:
        begin, end = self.between
        if t >= end:
            return np.array(self.later)
        if t <= begin:
            return np.array(self.weights)
        return ((end - t) * np.array(self.weights) + (t - begin) * np.array(self.later)) / (end - begin)


@dataclass(frozen=True)
class Method:
    tree: tuple  # ("max" | "sum" | "euclid", child, ...): a child is such a tree or a label
    regularized: bool = False
    beta: float | Mixture = 0.9
    beta2: float = 0.95
    lower_bound: float | str | Callable[[int], float] | None = None  # None: not Momo
    stale: bool = False


@dataclass(frozen=True)
class Step:
    weights: list[Array]
    length: float  # t
    total: float  # N
    value: float  # V
    lower_bound: float


def average_weights(t: int, beta: float | Mixture, nesterov: bool) -> Array:
    """What each of the first t gradients weighs in the average, oldest first; the sum is one."""
    if isinstance(beta, Mixture):
        each = zip(beta.shares(t), beta.betas, strict=True)
        return np.sum([share * average_weights(t, own, nesterov) for share, own in each], axis=0)
    weights = (1 - beta) * beta ** np.arange(t - 1, -1, -1) / (1 - beta**t)
    newest = np.arange(t) == t - 1
    return (beta * weights * (1 - beta**t) + (1 - beta) * newest) / (1 - beta ** (t + 1)) if nesterov else weights


def steepest(block: Block, n: Array, v: Array) -> Array:
    """The D of norm one with the largest <n, D>."""
    if block.norm == "spectral":
        u, s, vh = np.linalg.svd(n, full_matrices=False)
        return block.scale * u[:, s > 1e-13 * s.max()] @ vh[s > 1e-13 * s.max()]
    if block.norm == "sign":
        return np.sign(n)
    d = n if block.norm == "frobenius" else n / (np.sqrt(v) + block.eps)
    return d if block.norm == "ada_inf" else d / np.sqrt((n * d).sum())


def direction(block: Block, gradients: Array, averages: Array, v: Array, weight: Array) -> Array:
    """The D that is applied: none where the way around the norm leads up."""
    n = averages[-1]
    if block.around is None and block.beside is None:
        return steepest(block, n, v)
    before, after = block.around(gradients, averages) if block.around else (lambda n: n, lambda d: d)
    d = after(steepest(block, before(n), v))
    d = block.beside(d, weight) if block.beside else d
    return d if (n * d).sum() >= 0 else 0 * d


def combine(tree: tuple, labels: Sequence[str], duals: Sequence[float]) -> tuple[float, Array]:
    """Dual norm of everything below a node, and the coefficient of each block: (L,), 0 outside of the node."""
    kind, *children = tree
    below: list[tuple[float, Array]] = []
    for child in children:
        leaves = [(duals[i], np.eye(len(labels))[i]) for i, label in enumerate(labels) if label == child]
        below += leaves if isinstance(child, str) else [combine(child, labels, duals)]
    if not below:
        return 0.0, np.zeros(len(labels))
    values = np.array([value for value, _ in below])
    if kind == "max":
        total, shares = values.sum(), np.ones(len(values))
    elif kind == "sum":
        total, shares = values.max(), np.eye(len(values))[values.argmax()]
    else:
        total = np.sqrt((values**2).sum())
        shares = values / total if total > 0 else 0 * values
    return total, sum(share * coefficients for share, (_, coefficients) in zip(shares, below, strict=True))


class History:
    """Losses, weights and gradients of all steps so far, and averages of them by explicit weights."""

    def __init__(self, blocks: Sequence[Block], steps: int) -> None:
        self.losses = np.zeros(steps)
        self.points, self.gradients = ([np.zeros((steps, *block.start.shape)) for block in blocks] for _ in range(2))
        self.t = 0

    def add(self, loss: float, weights: list[Array], gradients: list[Array]) -> None:
        self.losses[self.t] = loss
        for past, latest in zip(self.points + self.gradients, weights + gradients, strict=True):
            past[self.t] = latest
        self.t += 1

    def average(self, index: int, rho: Array, power: int = 1) -> Array:
        return np.tensordot(rho, self.gradients[index][: self.t] ** power, 1)

    def model(self, rho: Array, weights: list[Array]) -> float:
        """Momo's V: the weighted sum of f_i + <g_i, W - W_i>."""
        values = self.losses[: self.t].copy()
        for g, past, w in zip(self.gradients, self.points, weights, strict=True):
            values += (g[: self.t] * (w - past[: self.t])).reshape(self.t, -1).sum(1)
        return rho @ values


def descend(
    blocks: Sequence[Block],
    oracle: Oracle,
    steps: int,
    method: Method,
    after: Callable[[list[Array]], list[Array]] = list,
) -> list[Step]:
    """Each step's weights and what led to them. Step numbers of the oracle and the lower bound count from 0.

    `after` says where somebody else moves the weights after each step.
    """
    history, bound, duals, trajectory = History(blocks, steps), 0.0, None, []
    weights = [block.start for block in blocks]
    ahead = [block.nesterov and not block.adapts for block in blocks]
    sought: list[list[Array]] = [[] for _ in blocks]
    s = np.array([block.lr**0.5 if method.regularized else block.lr for block in blocks])
    decay = [block.lr * block.weight_decay for block in blocks]
    for t in range(1, steps + 1):
        loss, gradients = oracle(weights, t - 1)
        history.add(loss, weights, gradients)
        squares = average_weights(t, method.beta2, False)
        n = [history.average(i, average_weights(t, method.beta, ahead[i])) for i in range(len(blocks))]
        for past, latest in zip(sought, n, strict=True):
            past.append(latest)
        d = [
            direction(block, history.gradients[i][:t], np.array(sought[i]), history.average(i, squares, 2), weights[i])
            for i, block in enumerate(blocks)
        ]
        d = [a * radius(b) / np.linalg.norm(a) if b.sphere == "relative" else a for a, b in zip(d, blocks, strict=True)]
        earlier, duals = duals, [_inner(a, b) for a, b in zip(n, d, strict=True)]
        late = method.stale and earlier is not None
        used = [earlier[i] if late and block.norm == "spectral" else duals[i] for i, block in enumerate(blocks)]
        total, c = combine(method.tree, [block.label for block in blocks], s * used)
        value = history.model(average_weights(t, method.beta, any(ahead)), weights)
        lost = [w * (w * d[i] > 0) if blocks[i].cautious else w for i, w in enumerate(weights)]
        decayed = value - sum(rate * _inner(a, w) for rate, a, w in zip(decay, n, lost, strict=True))
        whole = s * c * (total if method.regularized else 1.0)
        outward = [_inner(a, w) / _inner(w, w) if b.sphere else 0.0 for a, w, b in zip(d, weights, blocks, strict=True)]
        q = total**2 if method.regularized else total
        q -= sum(own * x * _inner(a, w) for own, x, a, w in zip(whole, outward, n, weights, strict=True))
        length, bound = _length(method, decayed, q, bound, t - 1)
        reach = length * whole
        weights = [w - decay[i] * lost[i] - reach[i] * d[i] for i, w in enumerate(weights)]
        weights = [w * radius(b) / np.linalg.norm(w) if b.sphere else w for w, b in zip(weights, blocks, strict=True)]
        weights = after(weights)
        trajectory.append(Step(weights, length, total, value, bound))
    return trajectory


def radius(block: Block) -> float:
    return float(np.linalg.norm(block.start))


def _inner(a: Array, b: Array) -> float:
    return float((a * b).sum())


def _length(method: Method, value: float, q: float, bound: float, step: int) -> tuple[float, float]:
    """t, and the lower bound that goes on to the next step; `value` is V less what decay takes off it."""
    if method.lower_bound is None:
        return 1.0, bound
    if callable(method.lower_bound):
        bound = method.lower_bound(step)
    elif method.lower_bound != "auto":
        bound = method.lower_bound
    elif value < bound:
        bound = max(value / 2, 0.0)
    gap = max(value - bound, 0.0)
    length = min(gap / q, 1.0) if q > 0 else float(gap > 0 and q == 0)
    return length, max(value - length * q / 2, 0.0) if method.lower_bound == "auto" else bound
