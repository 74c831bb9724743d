"""Many alike cases as one test."""

import functools
import inspect
import itertools

import torch


def cases(names, values, ids=()):
    """As `pytest.mark.parametrize`, but all cases are one test; every case that fails is named.

    For laws that hold for many alike inputs, each too small to be a test of its own. Stacked, they make a grid. Each
    case starts with the same seeds, a `tmp_path` of its own, and a `monkeypatch` that is undone after it; all else that
    the test asks for is shared by its cases.
    """
    names = [name.strip() for name in names.split(",")]
    entries = [entry(names, value, known) for value, known in itertools.zip_longest(values, ids)]

    def decorate(test):
        grid = [entries, *getattr(test, "grid", [])]
        single = getattr(test, "single", test)

        @functools.wraps(test)
        def every(subtests, **asked):
            for number, chosen in enumerate(itertools.product(*grid)):
                given = {name: value for _, part in chosen for name, value in part.items()}
                with subtests.test(**{name: shown for part, _ in chosen for name, shown in part.items()}):
                    run(single, {**asked, **given}, number)

        asked = [parameter for name, parameter in inspect.signature(test).parameters.items() if name not in names]
        if test is single:
            asked.insert(0, inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD))
        every.__signature__ = inspect.Signature(asked)
        every.grid, every.single = grid, single
        return every

    return decorate


def entry(names, value, known):
    """What a case is called by, and its values; both by name."""
    if hasattr(value, "marks"):  # a pytest.param
        known, value = value.id, value.values
    elif len(names) == 1:
        value = (value,)
    values = dict(zip(names, value, strict=True))
    return {names[0]: known} if known else values, values


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
