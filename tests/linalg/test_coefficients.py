import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.linalg import COEFFICIENTS, Coefficients, describe, get_coefficients, minimax
from steepest.linalg.coefficients import LARGEST_PEAK, ROUNDING, SLACK
from steepest.linalg.odd_polynomial import image, stationary
from tests.cases import cases

# Images of [l, 1] as peers' tables give them: computed by others, in float64, on a fine grid.
PUBLISHED = [
    ("jordan", 1e-2, 0.682, 1.134),
    ("jordan", 3e-3, 0.682, 1.202),
    ("jordan", 1e-3, 0.471, 1.202),
    ("quintic", 1e-2, 0.978, 1.032),
    ("quintic", 3e-3, 0.978, 1.145),
    ("quintic", 1e-3, 0.475, 1.145),
    ("polar_express", 1e-2, 0.870, 1.124),
    ("polar_express", 1e-3, 0.846, 1.124),
    ("polar_express_1.02", 1e-2, 0.859, 1.141),
    ("polar_express_1.02", 1e-3, 0.847, 1.141),
    ("polar_express_1.05", 1e-2, 0.846, 1.124),
    ("polar_express_1.05", 1e-3, 0.729, 1.124),
    ("deepseek_v4", 1e-3, 1.000, 1.001),
    ("cubic12", 1e-3, 1.000, 1.000),
]
SLOPES = {
    "jordan": 485,
    "quintic": 493,
    "polar_express": 976,
    "polar_express_1.02": 970,
    "polar_express_1.05": 804,
}
AOL = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)
CANS_AS_PUBLISHED = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
PAPER_EIGHT_STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


@cases("name", COEFFICIENTS)
def test_every_set_shipped_is_safe_where_the_normaliser_can_land(name):
    chosen = COEFFICIENTS[name]
    assert chosen.certify().safe
    # a second derivation: walk a fine grid and lift every value by the rounding allowance after each step
    x = torch.linspace(1e-6, 1 + SLACK, 200_001, dtype=torch.float64)
    for step in chosen.steps:
        gain = sum(number * x ** (2 * index) for index, number in enumerate(step))
        assert gain.min() > 0
        x = torch.linspace(1e-6, float((x * gain).max()) * (1 + ROUNDING), 200_001, dtype=torch.float64)
        assert x.max() <= LARGEST_PEAK


@cases("name, lower, low, high", PUBLISHED)
def test_images_agree_with_the_published_ones(name, lower, low, high):
    found = COEFFICIENTS[name].certify(lower).image
    assert found == pytest.approx((low, high), abs=6e-4)


@cases("name, slope", SLOPES.items())
def test_slopes_agree_with_the_published_ones(name, slope):
    assert COEFFICIENTS[name].certify().slope == pytest.approx(slope, abs=0.6)


@given(
    name=st.sampled_from(sorted(COEFFICIENTS)),
    lower=st.floats(1e-4, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_the_image_is_that_of_a_fine_grid(name, lower):
    chosen = COEFFICIENTS[name]
    values = chosen(torch.logspace(torch.tensor(lower).log10().item(), 0, 20_001, dtype=torch.float64).clamp(lower, 1))
    low, high = chosen.certify(lower).image
    assert low <= values.min() + 1e-12
    assert values.max() <= high + 1e-12
    # step-wise extremes may be attained by different inputs only through a common one: images of intervals are exact
    assert values.min() == pytest.approx(low, abs=2e-3)
    assert values.max() == pytest.approx(high, abs=2e-3)


@given(a=st.floats(0.5, 5), b=st.floats(-8, 8), c=st.floats(-8, 8) | st.sampled_from([0.0, 1e-17, -1e-17, 1e-9]))
@settings(max_examples=200, deadline=None)
def test_the_image_of_an_interval_is_exact_for_any_quintic(a, b, c):
    x = torch.linspace(0.5, 1.0, 20_001, dtype=torch.float64)
    values = x * (a + b * x**2 + c * x**4)
    low, high = image((a, b, c), 0.5, 1.0)
    assert low == pytest.approx(values.min().item(), abs=1e-6)
    assert high == pytest.approx(values.max().item(), abs=1e-6)


def test_a_published_set_that_flips_directions_is_refused():
    with pytest.raises(ValueError, match=r"'aol' are unsafe .* the smallest p\(x\)/x is -0\.62"):
        Coefficients("aol", AOL, "a published table")
    # what the refusal prevents: the dominant direction of a rank-one matrix comes out reversed
    x = torch.ones((), dtype=torch.float64)
    for a, b, c in AOL:
        x = x * (a + b * x**2 + c * x**4)
    assert x == pytest.approx(-0.99, abs=0.01)


def test_a_published_set_without_slack_is_refused_and_does_overflow():
    with pytest.raises(ValueError, match=r"are unsafe .*the largest value 2\.23e\+108"):
        Coefficients("cans", CANS_AS_PUBLISHED, "a published table")
    x = torch.tensor(1 + 2.0**-8, dtype=torch.float64)  # one bfloat16 rounding above 1
    for a, b, c in CANS_AS_PUBLISHED:
        x = x * (a + b * x**2 + c * x**4)
    assert x > 1e6
    assert COEFFICIENTS["cans"](torch.tensor(1 + 2.0**-8)) < 1.2


def test_the_generator_reproduces_the_published_table():
    designed = minimax(1e-3, 8)
    for (a, b, c), (pa, pb, pc) in zip(designed.steps, PAPER_EIGHT_STEPS, strict=False):
        assert (a * 1.01, b * 1.01**3, c * 1.01**5) == pytest.approx((pa, pb, pc), rel=1e-7)
    assert designed.steps[7] == (1.875, -1.25, 0.375)


@pytest.mark.parametrize(("lower", "steps"), [(0.3, 1), (0.05, 2), (1e-2, 3), (1e-3, 4)])
def test_the_first_quintic_is_the_best_of_all_quintics(lower, steps):
    a, b, c = minimax(lower, steps, cushion=0.0).steps[0]
    a, b, c = a * 1.01, b * 1.01**3, c * 1.01**5
    grid = torch.linspace(lower, 1, 4001, dtype=torch.float64)
    turns = torch.tensor(stationary((a, b, c)), dtype=torch.float64)  # where the largest error is attained
    x = torch.cat([grid, turns[(turns > lower) & (turns < 1)]])
    best = (1 - x * (a + b * x**2 + c * x**4)).abs().max()
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):  # perturbations in every direction and of every size
        da, db, dc = (
            torch.randn(3, generator=generator, dtype=torch.float64) * 10 ** -torch.randint(1, 5, ())
        ).tolist()
        assert (1 - x * (a + da + (b + db) * x**2 + (c + dc) * x**4)).abs().max() >= best - 1e-9


def test_a_harder_lower_end_needs_more_steps():
    assert minimax(1e-4, 6).certify(1e-4).image[0] > COEFFICIENTS["polar_express"].certify(1e-4).image[0] + 0.3


def test_names_triples_and_sets_are_taken():
    assert get_coefficients("jordan") is COEFFICIENTS["jordan"]
    assert get_coefficients(COEFFICIENTS["cans"]) is COEFFICIENTS["cans"]
    assert get_coefficients([[2, -1.5, 0.5]] * 3).steps == ((2.0, -1.5, 0.5),) * 3


def test_lists_are_as_good_as_tuples():
    given = Coefficients("mine", [[2.0, -1.5, 0.5]] * 3, "")
    assert get_coefficients(given).steps == ((2.0, -1.5, 0.5),) * 3


@pytest.mark.parametrize("norm", ["frobenius", "schatten8"])
def test_degree_nine_is_designed_like_quintics(norm):
    designed = minimax(2.5e-3, 3, degree=9, norm=norm)
    for step, printed in zip(designed.steps, COEFFICIENTS["nonic"].steps, strict=True):
        assert step == pytest.approx(printed, rel=1e-9)
    low, high = designed.certify(2.5e-3).image
    quintics = minimax(2.5e-3, 4).certify(2.5e-3).image
    assert low > quintics[0]
    assert high < quintics[1]
    converged = minimax(0.5, 4, degree=9).steps[-1]
    assert converged == pytest.approx([315 / 128, -420 / 128, 378 / 128, -180 / 128, 35 / 128])


def test_describe_shows_every_step_and_the_certificate():
    lines = describe("cubic12", lower=1e-2).splitlines()
    assert len(lines) == 15
    assert lines[1].endswith("image of [0.01, 1]")
    assert lines[-1].endswith("safe: yes")


@cases(
    "call, error, message",
    [
        (
            lambda: get_coefficients("jordn"),
            ValueError,
            "Unknown coefficients 'jordn': did you mean 'jordan'?",
        ),
        (
            lambda: get_coefficients([1.0, 2.0]),
            TypeError,
            "coefficients must be a name, a Coefficients or a sequence of (a, b, c)",
        ),
        (
            lambda: Coefficients("none", (), ""),
            ValueError,
            "Coefficients: steps must be a sequence of (a, b, c) or (a, b, c, d, e), got (). It has no steps; give at",
        ),
        (
            lambda: Coefficients("n", ((1.0, float("nan"), 0.0),), ""),
            ValueError,
            "each step is three finite numbers",
        ),
        (lambda: COEFFICIENTS["jordan"].certify(0.0), ValueError, "certify takes lower in (0, 1], got 0.0"),
        (lambda: minimax(0.1, 3, degree=7), ValueError, "minimax takes degree=5 or 9, got 7"),
        (lambda: Coefficients("n", ((2.0, -1.5, 0.5),), "", "nuclear"), ValueError, "Unknown norm 'nuclear'"),
        (lambda: minimax(0.0, 5), ValueError, "minimax takes lower in (0, 1), got 0.0"),
        (lambda: minimax(0.1, 0), ValueError, "minimax takes a whole number of steps, at least one, got steps=0"),
        (
            lambda: minimax(0.1, 5, cushion=1.0),
            ValueError,
            "cushion in [0, 1) and safety in [1, 2), got 1.0 and 1.01",
        ),
        (lambda: minimax(1e-3, 8, safety=1.0), ValueError, "are unsafe on the singular values (0, 1.01]"),
    ],
)
def test_the_error_says_what_came_and_what_was_expected(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
