"""What is special about each norm; the contract that all of them keep is in tests/test_testing.py."""

import re

import pytest
import torch

from steepest.geometry import (
    NORMS,
    Ada2,
    AdaInf,
    ColNorm,
    Frobenius,
    Nuclear,
    RowNorm,
    Schatten,
    Sign,
    Spectral,
    get_norm,
    scale_factor,
)
from tests.cases import cases


def moments(shape, rng):
    m = torch.randn(shape, generator=rng, dtype=torch.float64)
    v = torch.rand(shape, generator=rng, dtype=torch.float64)
    return m, v


def test_a_class_with_directions_of_its_own_has_them_for_many_shapes_too():
    class Ones(Spectral):
        def lmo(self, m, /, v=None):
            return -torch.ones_like(m)

    class Twice(Spectral):
        def lmos(self, batches, moments, **options):
            return [2 * one for one in super().lmos(batches, moments, **options)]

    m = torch.eye(2)
    assert (Ones().lmos([m], [None], radius=3.0)[0] == -3).all()
    assert (Ones().free_radius, Twice().free_radius) == (False, True)
    assert torch.equal(Twice().lmo(m), 2 * Spectral().lmo(m))


def test_adams_step_is_the_direction_of_its_norm(rng):
    m, v = moments((4, 5), rng)
    torch.testing.assert_close(AdaInf(eps=1e-8).lmo(m, v), -m / (v.sqrt() + 1e-8), rtol=1e-15, atol=0)
    assert (AdaInf(eps=0.0).lmo(torch.zeros(2, 2), torch.zeros(2, 2)) == 0).all()


def test_the_ends_and_the_middle_of_the_schatten_norms_are_known_ones(rng):
    m, _ = moments((3, 5, 4), rng)
    torch.testing.assert_close(Schatten(p=2.0).lmo(m), Frobenius().lmo(m))
    torch.testing.assert_close(Schatten(p=1e6).lmo(m), Spectral(scale="none", polar="svd").lmo(m), rtol=0, atol=1e-4)
    torch.testing.assert_close(Schatten(p=1 + 1e-3).dual(m), Nuclear().dual(m), rtol=1e-2, atol=0)


def test_rows_and_columns_are_each_others_transpose(rng):
    m, _ = moments((2, 4, 3), rng)
    assert torch.equal(RowNorm().lmo(m).mT, ColNorm().lmo(m.mT))
    torch.testing.assert_close(RowNorm().dual(m), ColNorm().dual(m.mT))
    torch.testing.assert_close(torch.linalg.vector_norm(RowNorm().lmo(m), dim=-1), torch.ones(2, 4).double())


def test_adams_two_norms_agree_on_the_length_of_its_step(rng):
    m, v = moments((4, 5), rng)
    torch.testing.assert_close(AdaInf().dual(m, v), Ada2().dual(m, v) ** 2)
    torch.testing.assert_close(Ada2().lmo(m, v) * Ada2().dual(m, v), AdaInf().lmo(m, v))


@cases("norm", [Nuclear(), Schatten(p=3.0), RowNorm(), ColNorm(), Ada2()])
@cases("dtype", [torch.bfloat16, torch.float32])
def test_types_are_kept_and_a_bad_matrix_spoils_itself_only(norm, dtype, rng):
    m = torch.randn(2, 3, 4, generator=rng).to(dtype)
    v = torch.ones_like(m)
    alone = norm.lmo(m[:1], v[:1])
    m[1, 0, 0] = torch.nan
    result = norm.lmo(m, v)
    assert result.dtype == dtype
    assert torch.equal(result[:1], alone)
    assert result[1].isnan().any()


def test_the_rules_for_the_scale_are_those_of_torch():
    from torch.optim._muon import _adjust_lr

    for shape in [(3, 7), (7, 3), (4, 4), (1, 9)]:
        for rule in ("original", "match_rms_adamw"):
            expected = _adjust_lr(1.0, rule, torch.Size(shape))
            assert scale_factor(rule, *shape) == pytest.approx(expected, rel=1e-15)


def test_names_and_objects_are_taken():
    assert get_norm("sign") == Sign()
    assert get_norm(Spectral(scale="none")) == Spectral(scale="none")
    assert {type(get_norm(name)) for name in NORMS} == set(NORMS.values())


def test_norms_print_their_name_and_what_was_changed():
    assert str(Spectral()) == "spectral"
    assert str(Spectral(scale="none", polar="svd")) == "spectral scale=none polar=svd"
    assert str(AdaInf(eps=1e-6)) == "ada_inf eps=1e-06"

    class Mine(Sign):
        pass

    assert str(Mine()) == "Mine"


@cases(
    "call, error, message",
    [
        (lambda: get_norm("spectra"), ValueError, "Unknown norm 'spectra': did you mean 'spectral'?"),
        (lambda: get_norm(Spectral), TypeError, "norm must be a name or an object such as Spectral(), got <class"),
        (lambda: get_norm(3), TypeError, "norm must be a name or an object such as Spectral(), got 3"),
        (lambda: Spectral(scale="orginal"), ValueError, "Unknown scale 'orginal': did you mean 'original'?"),
        (lambda: Spectral(polar="svdd"), ValueError, "Spectral: Unknown polar 'svdd': did you mean 'svd'?"),
        (lambda: Spectral(coefficients="cns"), ValueError, "Unknown coefficients 'cns': did you mean 'cans'?"),
        (lambda: AdaInf(eps=-1.0), ValueError, "AdaInf: eps must be finite and at least 0, got -1.0."),
        (lambda: AdaInf(eps="1e-8"), TypeError, "AdaInf: eps must be a number, got '1e-8'. Write eps=1e-08"),
        (lambda: AdaInf(eps=float("inf")), ValueError, "AdaInf: eps must be finite and at least 0, got inf."),
        (
            lambda: Spectral(dtype="bfloat16"),
            TypeError,
            "Spectral: dtype must be one of torch.float16, torch.bfloat16, torch.float32, torch.float64, or None, got",
        ),
        (
            lambda: AdaInf().lmo(torch.ones(2, 2)),
            ValueError,
            "AdaInf needs the second moment v of the gradient, got None",
        ),
        (lambda: Ada2().lmo(torch.ones(2, 2)), ValueError, "Ada2 needs the second moment v of the gradient, got None"),
        (lambda: Ada2(eps=-1.0), ValueError, "Ada2: eps must be finite and at least 0, got -1.0."),
        (
            lambda: Schatten(p=1.0),
            ValueError,
            "Schatten: p must be finite and above 1, got 1.0. At the ends are Nuclear()",
        ),
        (lambda: AdaInf().primal(torch.ones(2, 2)), ValueError, "AdaInf.primal needs the momentum m"),
    ],
)
def test_the_error_says_what_came_and_what_was_expected(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@cases("size", [1e-38, 1e-30, 1e-20, 1e20, 2e37])
@cases("norm", [Ada2(), Frobenius(), RowNorm(), ColNorm()])
def test_small_and_large_entries_stay_in_range(norm, size, rng):
    m = size * (0.25 + torch.rand(2, 3, 4, generator=rng))
    v = torch.ones(2, 3, 4) if norm.adapts else None
    wide = None if v is None else v.double()
    torch.testing.assert_close(norm.dual(m, v).double(), norm.dual(m.double(), wide), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.lmo(m, v).double(), norm.lmo(m.double(), wide), rtol=1e-5, atol=0)
