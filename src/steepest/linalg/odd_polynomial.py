"""Odd polynomials p(x) = a x + b x³ + c x⁵ + ... of one variable: values, images of intervals, best fits to one."""

import torch

# Coefficients of x, x³, x⁵ and so on.
Step = tuple[float, ...]


def value(step: Step, x: float) -> float:
    """p(x)."""
    return x * _horner(step, x * x)


def stationary(step: Step) -> list[float]:
    """Positive zeros of p'(x), sorted: a + 3 b u + 5 c u² + ... with u = x²."""
    slopes = [(2 * index + 1) * number for index, number in enumerate(step)]
    return sorted(root**0.5 for root in real_roots(slopes) if root > 0)


def image(step: Step, low: float, high: float) -> tuple[float, float]:
    """Exact image of [low, high]."""
    points = [low, high, *(x for x in stationary(step) if low < x < high)]
    values = [value(step, x) for x in points]
    return min(values), max(values)


def smallest_gain(step: Step, high: float) -> float:
    """Smallest p(x)/x = a + b u + c u² + ... over u = x² in [0, high²]."""
    slopes = [index * number for index, number in enumerate(step)][1:]
    inner = [root for root in real_roots(slopes) if 0 < root < high * high]
    return min(_horner(step, u) for u in (0.0, high * high, *inner))


def divided(step: Step, factor: float) -> Step:
    """The polynomial x -> p(x / factor)."""
    return tuple(number / factor ** (2 * index + 1) for index, number in enumerate(step))


def times(step: Step, factor: float) -> Step:
    """factor · p."""
    return tuple(number * factor for number in step)


def real_roots(numbers: list[float]) -> list[float]:
    """Real zeros of a polynomial.

    Args:
        numbers: Coefficients, the constant first; leading ones may be zero or as good as zero.
    """
    while numbers and abs(numbers[-1]) <= 1e-15 * max(map(abs, numbers)):
        numbers = numbers[:-1]
    degree = len(numbers) - 1
    if degree < 1:
        return []
    if degree == 1:
        return [-numbers[0] / numbers[1]]
    if degree == 2:
        return _quadratic_roots(*numbers)
    companion = torch.diag(torch.ones(degree - 1, dtype=torch.float64, device="cpu"), -1)
    companion[:, -1] = torch.tensor(
        [-number / numbers[-1] for number in numbers[:-1]], dtype=torch.float64, device="cpu"
    )
    # a double zero comes out as a pair a little off the real line; its real part is close enough to look at
    return [root.real for root in torch.linalg.eigvals(companion).tolist() if abs(root.imag) <= 1e-6 * abs(root)]


def _quadratic_roots(constant: float, linear: float, square: float) -> list[float]:
    discriminant = linear * linear - 4 * square * constant
    if discriminant < 0:
        return []
    # the root that does not cancel, and the other from the product of both
    half = -(linear + (discriminant**0.5 if linear >= 0 else -(discriminant**0.5))) / 2
    return [0.0] if half == 0 else [half / square, constant / half]


def best_fit(low: float, high: float, terms: int) -> Step:
    """The odd polynomial closest to 1 on [low, high] in the largest error, by the exchange of its extremes.

    The error takes its extreme value with alternating sign at `terms` + 1 points, the two ends among them.

    Args:
        low: In (0, high).
        high: Any.
        terms: Number of coefficients, at least 2.
    """
    inner = _first_guess(low, high, terms)
    error, previous = 0.0, None
    step: Step = ()
    for _ in range(200):
        points = torch.tensor([low, *inner, high], dtype=torch.float64, device="cpu") / high
        columns = [points ** (2 * index + 1) for index in range(terms)]
        signs = torch.tensor([(-1.0) ** index for index in range(terms + 1)], dtype=torch.float64, device="cpu")
        solution = torch.linalg.solve(
            torch.stack([*columns, signs], dim=1), torch.ones(terms + 1, dtype=torch.float64, device="cpu")
        )
        *numbers, error = solution.tolist()
        step = divided(tuple(numbers), high)
        inner = [x for x in stationary(step) if low < x < high]
        if len(inner) != terms - 1 or (previous is not None and abs(error - previous) < 1e-15):
            break
        previous = error
    return step


def _first_guess(low: float, high: float, terms: int) -> list[float]:
    """Extremes of a Chebyshev polynomial, moved to where an odd polynomial's lie."""
    cosines = torch.cos(torch.arange(1, terms, dtype=torch.float64, device="cpu") * torch.pi / terms)
    return ((low + high) / 2 - (high - low) / 2 * cosines).tolist()


def _horner(step: Step, u: float) -> float:
    result = 0.0
    for number in reversed(step):
        result = result * u + number
    return result
