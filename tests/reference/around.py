"""What stages do around the norm, in float64 from all gradients so far: for `Block.around`."""

from collections.abc import Callable, Sequence

import numpy as np

from tests.reference.grid import Around, Array


def moving(values: Array, beta: float) -> Array:
    """A moving average from zero, by its weights."""
    t = len(values)
    return np.tensordot((1 - beta) * beta ** np.arange(t - 1, -1, -1.0), values, 1)


def scaled_like(d: Array, found: Array) -> Array:
    size = np.sqrt((d**2).sum())
    return d * np.sqrt((found**2).sum()) / size if size > 0 else d


def diagonal_metric(
    *,
    sides: str = "both",
    source: str = "noise",
    exponent: float = 0.5,
    bounds: tuple[float, float] = (0.5, 2.0),
    beta2: float = 0.95,
    keep_size: bool = True,
) -> Around:
    """IsoMuon's metric: B^-1/2 lmo(B^-1/2 M A^-1/2) A^-1/2."""

    def metric(squares: Array) -> Array:
        v = moving(squares, beta2)
        if v.mean() == 0:
            return np.ones_like(v)
        r = np.minimum(np.maximum((v / v.mean()) ** exponent, bounds[0]), bounds[1])
        return r / r.mean()

    def around(gradients, averages):
        squares = (gradients - averages) ** 2 if source == "noise" else gradients**2
        if source == "noise":
            squares[0] = 0  # the first average is the first gradient
        _, m, n = gradients.shape
        b = metric(squares.mean(2)) if sides != "columns" else np.ones(m)
        a = metric(squares.mean(1)) if sides != "rows" else np.ones(n)
        left, right = np.diag(b**-0.5), np.diag(a**-0.5)

        def after(found):
            d = left @ found @ right
            return scaled_like(d, found) if keep_size else d

        return lambda average: left @ average @ right, after

    return around


def descending(moment: Array) -> Array:
    """Eigenvectors; in the null space those of fixed vectors, by Gram and Schmidt."""
    values, vectors = np.linalg.eigh(moment)
    k = len(values)
    basis = [vectors[:, j] for j in range(k - 1, -1, -1) if values[j] > 1e-13 * values[-1]]
    for j in range(len(basis) + 1, k + 1):
        v = np.cos(np.pi * (3 - 5**0.5) * j * np.arange(1, k + 1))
        for _ in range(2):
            for q in basis:
                v = v - (q @ v) * q
        basis.append(v / np.linalg.norm(v))
    return np.array(basis).T


def kept_sides(
    products: Array, beta: float, every: int, place: int, renew: Callable[[Array, Array, int], Array]
) -> list[Array]:
    """After each step, what is made of the moving average of products: at first, and in the turns of a parameter."""
    found = [renew(moving(products[:1], beta), None, 1)]
    for t in range(1, len(products)):
        turn = (t + place) % every == 0
        found.append(renew(moving(products[: t + 1], beta), found[-1], t + 1) if turn else found[-1])
    return found


def diagonal_blocks(products: Array, block_size: int) -> list[Array]:
    """Blocks (steps, b, b) on the diagonal of moments (steps, k, k): the fewest equal ones of at most that size."""
    k = products.shape[1]
    b = max(b for b in range(1, min(k, block_size) + 1) if k % b == 0)
    return [products[:, at : at + b, at : at + b] for at in range(0, k, b)]


def block_diagonal(blocks: Sequence[Array]) -> Array:
    """The matrix of which these are the diagonal blocks."""
    k, at = sum(map(len, blocks)), 0
    whole = np.zeros((k, k))
    for own in blocks:
        whole[at : at + len(own), at : at + len(own)] = own
        at += len(own)
    return whole


def eigenbasis(
    place: int,
    *,
    beta: float = 0.95,
    beta2: float = 0.95,
    every: int = 10,
    method: str = "qr",
    eps: float = 1e-8,
    block_size: int = 8192,
    split: bool = False,
) -> Around:
    """SOAP's basis, with the lmo after it."""

    def renew(moment, old, count):
        del count
        if old is None or method == "eigh":
            return descending(moment)
        return np.linalg.qr((moment + 1e-4 * np.trace(moment) / len(moment) * np.eye(len(moment))) @ old)[0]

    def bases(products):
        parts = [kept_sides(own, beta, every, place, renew) for own in diagonal_blocks(products, block_size)]
        return [block_diagonal(own) for own in zip(*parts, strict=True)]

    def around(gradients, averages):
        transposed = gradients.transpose(0, 2, 1)
        left, right = bases(gradients @ transposed), bases(transposed @ gradients)
        squares = np.array([(q.T @ g @ p) ** 2 for q, g, p in zip(left, gradients, right, strict=True)])
        root = np.sqrt(moving(squares, beta2) / (1 - beta2 ** len(squares)))
        power = np.where(root > 1e-13 * root.max(), (root + eps) ** (-0.5 if split else -1.0), 0.0)
        q, p = left[-1], right[-1]

        def half(m):
            return q @ (q.T @ m @ p * power) @ p.T

        return half, lambda found: scaled_like(half(found), found) if split else found

    return around


def shampoo_powers(
    place: int,
    *,
    exponent: float = 0.3,
    beta: float = 0.95,
    every: int = 10,
    ridge: float = 1e-3,
    block_size: int = 8192,
    split: bool = False,
    prior: float = 0.0,
) -> Around:
    """PMuon's product of powers, with the lmo after it, or in the middle."""

    def power(moment, old, count):
        del old
        mean = np.trace(moment) / len(moment)
        unbiased = mean / (1 - beta**count)
        values, vectors = np.linalg.eigh(moment + (ridge * mean + prior * beta**count * unbiased) * np.eye(len(moment)))
        return vectors @ np.diag(values ** -(exponent / (1 + split))) @ vectors.T

    def powers(products):
        alone = np.array([block_diagonal(own) for own in zip(*diagonal_blocks(products, block_size), strict=True)])
        return kept_sides(alone, beta, every, place, power)[-1]

    def around(gradients, averages):
        transposed = gradients.transpose(0, 2, 1)
        left, right = powers(gradients @ transposed), powers(transposed @ gradients)

        def half(m):
            return left @ m @ right

        return half, lambda found: scaled_like(half(found), found) if split else found

    return around
