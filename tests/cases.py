"""Many alike cases as one test."""

import functools
import inspect
import itertools

import torch


def cases(names, values):
    """As `pytest.mark.parametrize`, but all cases are one test; every case that fails is named.

    For laws that hold for hundreds of alike inputs, each too small to be a test of its own. Stacked, they make a grid.
    Each case starts with the same seeds, a `tmp_path` of its own, and a `monkeypatch` that is undone after it; all else
    that the test asks for is shared by its cases.
    """

    def decorate(test):
        grid = [(names, list(values)), *getattr(test, "grid", [])]
        single = getattr(test, "single", test)
        filled = {name for part, _ in grid for name in words(part)}

        @functools.wraps(single)
        def every(subtests, **asked):
            for number, chosen in enumerate(itertools.product(*(part for _, part in grid))):
                case = {}
                for (part, _), value in zip(grid, chosen, strict=True):
                    case |= named(words(part), value)
                with subtests.test(**case):
                    run(single, {**asked, **case}, number)

        needed = [each for each in inspect.signature(single).parameters.values() if each.name not in filled]
        subtests = inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        every.__signature__ = inspect.Signature([subtests, *needed])
        every.grid, every.single = grid, single
        return every

    return decorate


def words(names):
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def named(names, value):
    if hasattr(value, "marks"):  # a pytest.param
        value = value.values
    elif len(names) == 1:
        value = (value,)
    return dict(zip(names, value, strict=True))


def run(test, given, number):
    torch.manual_seed(0)
    if "rng" in given:
        given["rng"].manual_seed(given["rng"].initial_seed())
    if "tmp_path" in given:
        given["tmp_path"] = given["tmp_path"] / str(number)
        given["tmp_path"].mkdir()
    if "monkeypatch" in given:
        with given["monkeypatch"].context() as given["monkeypatch"]:
            test(**given)
    else:
        test(**given)
