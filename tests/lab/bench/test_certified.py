"""Checks of a device: they pass where numbers are right, and fail where these are made wrong."""

import dataclasses
import itertools

import pytest
import torch

from steepest.lab.bench import certified
from steepest.lab.bench.certified import ALLOWED, MARGINS, Polar, check_polars, check_steps, own_methods, with_spectrum
from steepest.lab.methods import METHODS
from steepest.lab.models.gpt import GPTConfig
from steepest.linalg import COEFFICIENTS
from tests.cases import cases

SHAPES = [(16, 16), (24, 16)]
CONFIG = GPTConfig(vocabulary=16, layers=1, width=8, head_size=4)


def tokens():
    return torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))


def test_matrices_have_the_spectrum_that_they_are_said_to_have():
    matrix, values = with_spectrum((24, 16), seed=0)
    torch.testing.assert_close(torch.linalg.svdvals(matrix), values.flip(0))
    assert (float(values[-1]), float(values[0])) == pytest.approx((certified.LARGEST, certified.LEAST))


def test_polar_factors_lie_within_their_certificates():
    found = check_polars("cpu", shapes=SHAPES)
    assert len(found) == len(COEFFICIENTS) * len(MARGINS) * 2 * len(SHAPES)
    assert all(one.fine for one in found)
    refused = [one for one in found if one.allowed is None]
    assert {(one.coefficients, one.dtype) for one in refused} == {
        (name, dtype) for name in ("nonic", "cans") for dtype in ("float16", "bfloat16")
    }
    tried = [one for one in found if one.allowed is not None]
    for one in tried:
        assert one.beyond == max(0, one.low - one.smallest, one.largest - one.high)
    # margins are no room for anything else: half precision is within a fourth of them, float32 within a hundredth
    assert all(one.beyond <= one.allowed / (100 if one.dtype == "float32" else 4) for one in tried)


@cases("wrong", ["scaled", "rank", "nan", "rotated by nothing"])
def test_polar_factors_that_are_off_are_found(wrong, monkeypatch):
    def off(x, **options):
        found = certified_polar(x, **options)
        if wrong == "scaled":
            return 1.2 * found
        if wrong == "rank":
            return torch.cat([found[:1], found[:-1]])
        return found * torch.nan if wrong == "nan" else found

    certified_polar = certified.polar
    monkeypatch.setattr(certified, "polar", off)
    found = [one for one in check_polars("cpu", shapes=SHAPES[:1]) if one.coefficients == "quintic"]
    assert all(one.fine == (wrong == "rotated by nothing") for one in found)
    if wrong == "nan":
        assert {(one.beyond, one.reason) for one in found} == {(None, "not finite")}


def test_what_is_not_finite_is_not_fine():
    one = Polar("jordan", "float32", "gram", "2 x 2", 0.7, 1.2, allowed=1e-4)
    assert not one.fine
    assert dataclasses.replace(one, beyond=1e-4).fine
    assert not dataclasses.replace(one, beyond=2e-4).fine


def test_all_methods_of_this_library_are_checked():
    names = own_methods()
    assert {"muon", "newton-muon", "scion", "muonmax-momo", "adam", "sign-descent"} <= set(names)
    assert not {"adamw", "sgd", "torch-muon"} & set(names)
    assert set(names) < set(METHODS)


@pytest.mark.slow
def test_steps_are_those_in_float64():
    found = check_steps(own_methods(), CONFIG, tokens=tokens(), device="cpu")
    assert [one.method for one in found] == own_methods()
    assert all(one.fine for one in found), [one for one in found if not one.fine]
    assert {one.products for one in found} == {"float32"}
    assert all(one.deviation > 0 for one in found if one.method in ("muon", "newton-muon", "scion"))


def after_steps(monkeypatch, change):
    """On the device, where weights are in float32, something is done to one of them after the last step."""
    build = certified.build_optimizer

    def built(*given):
        optimizer = build(*given)
        step, first = optimizer.step, optimizer.param_groups[0]["params"][0]
        taken = itertools.count(1)

        def changed(**options):
            step(**options)
            if first.dtype == torch.float32 and next(taken) == certified.STEPS:
                with torch.no_grad():
                    change(first)

        optimizer.step = changed
        return optimizer

    monkeypatch.setattr(certified, "build_optimizer", built)


@cases("method", ["muon", "newton-muon", "muonmax-momo"])
@cases("wrong", [False, True])
def test_steps_that_are_off_are_found(method, wrong, monkeypatch):
    def off(param):
        return param.add_(1e-3 * wrong)

    after_steps(monkeypatch, off)
    (found,) = check_steps([method], CONFIG, tokens=tokens(), device="cpu")
    assert found.fine != wrong
    assert found.allowed == ALLOWED[torch.float32]


def test_steps_that_are_not_finite_are_not_fine(monkeypatch):
    after_steps(monkeypatch, lambda param: param.fill_(torch.nan))
    (found,) = check_steps(["muon"], CONFIG, tokens=tokens(), device="cpu")
    assert (found.deviation, found.fine) == (None, False)
