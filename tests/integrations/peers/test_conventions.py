"""With translated options, steps here are the peer's."""

import inspect
import re

import pytest
import pytorch_optimizer
import torch

import steepest
from steepest.integrations.peers import PEERS, translate
from steepest.integrations.peers.conventions import options_of
from steepest.linalg import COEFFICIENTS
from tests.cases import cases
from tests.reference import peers

JORDAN = [(3.4445, -4.7750, 2.0315)]
QUINTIC = COEFFICIENTS["quintic"].steps
EXPRESS = {
    slack: COEFFICIENTS[name].steps
    for slack, name in [(1.01, "polar_express"), (1.02, "polar_express_1.02"), (1.05, "polar_express_1.05")]
}


def parameters(dtype=torch.float64):
    torch.manual_seed(5)
    shapes = ((8, 3), (3, 8), (5, 5), (4, 6))  # the last is a head
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def compare(translation, make, *, head=True, shapes=slice(0, 3), tolerance=1e-10, dtype=torch.float64, options=None):
    """Five steps of both, from the same weights with the same gradients; those of decay and rates are large."""
    theirs, ours = parameters(dtype), parameters(dtype)
    optimizers = [make(theirs[shapes], theirs[3:] if head else [])]
    groups = [{"params": [(f"w{i}", p) for i, p in enumerate(ours[shapes])], "role": "matrix"}]
    groups += [{"params": [("head", ours[3])], "role": "head"}] if head else []
    optimizers.append(translation.build(groups, **(options or {})))
    chosen = [*zip(theirs[shapes], ours[shapes], strict=True), *([(theirs[3], ours[3])] if head else [])]
    before = [p.detach().clone() for p, _ in chosen]
    for _ in range(5):
        for there, here in chosen:
            there.grad = torch.randn_like(there)
            here.grad = there.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (there, here), start in zip(chosen, before, strict=True):
        assert (there - here).norm() <= tolerance * (there - start).norm()


@cases(
    "options",
    [
        {},
        {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        {"lr": 0.1, "adjust_lr_fn": "original", "ns_steps": 7},
        {"lr": 0.1, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 12, "eps": 1e-3},
    ],
)
def test_torch_muon(options, monkeypatch):
    """The real one, in float64."""
    exact = lambda g, triple, steps, eps: peers.orthogonalized(g, [triple] * steps)  # noqa: E731
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", exact)
    compare(translate("torch.optim.Muon", **options), lambda p, _: torch.optim.Muon(p, **options), head=False)


def test_torch_muon_as_it_is():
    """The real one, in its bfloat16, for which there is an option."""
    translation = translate("torch.optim.Muon", lr=0.1)
    half = {"tolerance": 0.05, "dtype": torch.float32, "options": {"dtype": torch.bfloat16}}
    compare(translation, lambda p, _: torch.optim.Muon(p, lr=0.1), head=False, **half)


@cases("options", [{}, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.5}])
def test_torch_adamw(options):
    compare(translate("torch.optim.AdamW", **options), lambda p, h: torch.optim.AdamW([*p, *h], **options))


@cases(
    "options",
    [
        {},
        {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.8},
        {"weight_decay": 0.5, "adam_lr": 0.1, "adam_betas": (0.8, 0.9), "adam_eps": 1e-3, "adam_weight_decay": 0.2},
        {"weight_decay": 0.5, "adam_lr": 0.1, "adam_weight_decay": 0.5},
    ],
)
def test_keller_jordan(options):
    def make(matrices, head):
        every = {name: options.get(name, default) for name, default in options_of("KellerJordan").items()}
        of_adam = {name.removeprefix("adam_"): value for name, value in every.items() if name.startswith("adam_")}
        of_muon = {name: value for name, value in every.items() if not name.startswith("adam_")}
        groups = [{"params": matrices, "use_muon": True, **of_muon}, {"params": head, "use_muon": False, **of_adam}]
        return peers.KellerJordan(groups, quintics=JORDAN * 5)

    compare(translate("KellerJordan", **options), make)


@cases(
    "options",
    [
        {},
        {"lr": 0.1, "weight_decay": 0.5, "nesterov": False, "use_adjusted_lr": True, "ns_coeffs": "quintic"},
        {"ns_coeffs": "quintic", "ns_steps": 7, "adamw_lr": 0.1, "adamw_wd": 0.3, "adamw_eps": 1e-3},
        {"ns_coeffs": [(2.0, -1.5, 0.5), (1.8, -1.2, 0.4)], "ns_steps": 6, "momentum": 0.5},
        {"ns_coeffs": (2.0, -1.5, 0.5), "ns_steps": 3, "adamw_betas": (0.5, 0.9)},
    ],
)
def test_pytorch_optimizer(options, monkeypatch):
    """The real one, in float64."""

    def exact(g, num_steps, weights):
        return peers.orthogonalized(g, [weights[min(n, len(weights) - 1)] for n in range(num_steps)])

    monkeypatch.setattr(pytorch_optimizer.optimizer.muon.base, "zero_power_via_newton_schulz_5", exact)

    def make(matrices, head):
        groups = [{"params": matrices, "use_muon": True}, {"params": head, "use_muon": False}]
        return pytorch_optimizer.Muon(groups, **options)

    compare(translate("pytorch_optimizer", **options), make)


@cases(
    "options, quintics",
    [
        ({}, EXPRESS[1.02]),
        ({"lr": 0.1, "mu": 0.8, "nesterov": True, "adjust_lr": "rms_norm", "weight_decay": 0.5}, EXPRESS[1.02]),
        ({"adjust_lr": None, "use_polar_express": False, "betas": (0.5, 0.9), "epsilon": 1e-3}, QUINTIC),
        ({"use_gram_newton_schulz": True, "adamw_lr": 0.3, "adamw_weight_decay": 0.1}, EXPRESS[1.05]),
    ],
)
def test_dion(options, quintics):
    def make(matrices, head):
        own = {name: options[name] for name in ("lr", "mu", "nesterov", "adjust_lr", "weight_decay") if name in options}
        betas = options.get("betas", (0.9, 0.95))
        own |= {"beta1": betas[0], "beta2": betas[1], "epsilon": options.get("epsilon", 1e-8)}
        rest = {name: options[f"adamw_{name}"] for name in ("lr", "weight_decay") if f"adamw_{name}" in options}
        groups = [{"params": matrices}, {"params": head, "algorithm": "adamw", **rest}]
        return peers.Dion(groups, quintics=quintics, **{"lr": 0.01, **own})

    compare(translate("dion", **options), make)


@cases(
    "options, quintics, per_step",
    [
        ({}, QUINTIC, None),
        ({"lr": 0.1, "weight_decay": 0.5, "nesterov": True, "extra_scale_factor": 0.2}, QUINTIC, None),
        (
            {"scale_mode": "unit_rms_norm", "extra_scale_factor": 3.0, "coefficient_type": "polar_express"},
            EXPRESS[1.01],
            None,
        ),
        ({"scale_mode": "shape_scaling", "coefficient_type": "simple", "num_ns_steps": 3}, JORDAN * 3, None),
        ({"num_ns_steps": 10}, QUINTIC * 2, None),
        ({"lr": 0.1, "weight_decay": 0.05, "weight_decay_method": "independent"}, QUINTIC, 0.05),
        ({"lr": 0.1, "weight_decay": 0.5, "weight_decay_method": "palm"}, QUINTIC, 0.005),
    ],
)
def test_emerging_optimizers(options, quintics, per_step):
    def make(matrices, _):
        kept = ("lr", "momentum", "nesterov", "weight_decay", "scale_mode", "extra_scale_factor")
        own = {"lr": 3e-4, **{name: options[name] for name in kept if name in options}}
        own |= {} if per_step is None else {"weight_decay": per_step / own["lr"]}
        return peers.EmergingOptimizers(matrices, quintics=quintics, **own)

    compare(translate("emerging_optimizers", **options), make, head=False)


@cases(
    "source, scale, kept, quintics, options",
    [
        ("gram_newton_schulz", peers.match_rms, peers.summed, EXPRESS[1.05], {"lr": 0.1, "nesterov": False}),
        ("muonium", peers.original, peers.summed, EXPRESS[1.02], {"lr": 0.1, "weight_decay": 0.0}),
        ("optax", peers.original, peers.averaged, JORDAN * 5, {"lr": 0.1, "nesterov": False, "weight_decay": 0.3}),
    ],
)
def test_others(source, scale, kept, quintics, options):
    def make(matrices, _):
        own = {"momentum": 0.95, "nesterov": True, "weight_decay": 0.1, **options}
        return peers.PlainMuon(matrices, scale, kept, quintics=quintics, **own)

    given = {"learning_rate" if (source, name) == ("optax", "lr") else name: value for name, value in options.items()}
    compare(translate(source, **given), make, head=False)


def test_gram_newton_schulz_by_name_of_its_set_and_with_one_of_its_own():
    for given, quintics in (
        ({"ns_coefficients_preset": "YOU_COEFFICIENTS", "adjust_lr": "spectral_norm"}, QUINTIC),
        ({"ns_coefficients": [[2.0, -1.5, 0.5]] * 6, "adjust_lr": "spectral_norm"}, [(2.0, -1.5, 0.5)] * 6),
        ({"ns_algorithm": "standard_newton_schulz", "adjust_lr": "spectral_norm"}, EXPRESS[1.05]),
    ):
        own = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}

        def make(matrices, _, quintics=quintics, own=own):
            return peers.PlainMuon(matrices, peers.Dion.SCALES["spectral_norm"], peers.summed, quintics=quintics, **own)

        compare(translate("gram_newton_schulz", **own, **given), make, head=False)


@cases("options", [{}, {"lr": 0.1, "weight_decay": 0.3, "adamw_lr": 0.2, "adamw_betas": (0.5, 0.9), "ns_steps": 3}])
def test_dmuon(options):
    """Its AdamW is that of dion's reference, and all rates are its own."""

    class Both:
        def __init__(self, matrices, head):
            own = {"lr": options.get("lr", 0.02), "weight_decay": options.get("weight_decay", 0.0)}
            own |= {"momentum": 0.95, "nesterov": True, "quintics": EXPRESS[1.05][: options.get("ns_steps", 5)]}
            self.muon = peers.PlainMuon(matrices, peers.match_rms, peers.summed, **own)
            rates = {"lr": options.get("adamw_lr", 1e-3), "betas": options.get("adamw_betas", (0.9, 0.999))}
            self.adamw = torch.optim.AdamW(head, weight_decay=0.01, **rates)

        def step(self):
            self.muon.step()
            self.adamw.step()

    compare(translate("dmuon", **options), Both)


@pytest.mark.slow
@cases(
    "options",
    [
        {"lr": 0.1, "nesterov": False, "betas": (0.8, 0.99), "weight_decay": 0.3},
        {"lr": 0.1, "heavyball_momentum": True},
        {"lr": 0.1, "heavyball_momentum": True, "nesterov": False},
    ],
)
def test_heavyball(options, monkeypatch):
    """The real one, in its bfloat16."""
    import heavyball

    monkeypatch.setattr(heavyball.utils, "compile_mode", None)
    make = lambda p, _: heavyball.Muon(p, compile_step=False, **options)  # noqa: E731
    half = {"tolerance": 0.05, "dtype": torch.float32, "options": {"dtype": torch.bfloat16}}
    compare(translate("heavyball", **options), make, head=False, **half)


@cases("shape, which", [((8, 3), 0), ((3, 8), 1)])
def test_muonium_decays_by_the_length_of_the_step(shape, which):
    def make(matrices, _):
        own = {"lr": 0.1, "momentum": 0.95, "nesterov": True, "weight_decay": 0.3, "quintics": EXPRESS[1.02]}
        return peers.PlainMuon(matrices, peers.original, peers.summed, scaled_decay=True, **own)

    translation = translate("muonium", lr=0.1, weight_decay=0.3, cautious=False, shape=shape)
    compare(translation, make, head=False, shapes=slice(which, which + 1))
    without = translate("muonium", lr=0.1, weight_decay=0.3)
    assert [row.theirs for row in without.lost] == ["weight_decay", "cautious"]


def test_optax_says_what_its_nesterov_does():
    assert any("bias correction" in note for note in translate("optax", learning_rate=0.1).notes)
    assert translate("optax", learning_rate=0.1).options["adam_lr"] == 0.1


def test_every_peer_was_tried():
    source = inspect.getsource(inspect.getmodule(test_every_peer_was_tried))
    assert [name for name in PEERS if f'"{name}"' not in source] == []


@cases("source", PEERS)
def test_the_call_is_what_is_built_and_the_length_of_a_step_is_told(source):
    rates = {"optax": {"learning_rate": 0.1}}.get(source, {"lr": 0.1})
    translation = translate(source, **rates, shape=(8, 3))
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 3))
    found = {"steepest": steepest, "model": model}
    exec(translation.call, found)  # noqa: S102 - our own text
    built = translation.build(model)
    assert [str(g) for g in found["optimizer"].param_groups] == [str(g) for g in built.param_groups]
    told = re.search(r"spectral norm ([\d.e-]+), there", str(translation))
    assert (told is None) == (source == "torch.optim.AdamW")
    if told:
        row = next(row for row in built.plan if row.role == "matrix")
        norm = built.norm_of(built.param_groups[0])
        assert float(told[1]) == pytest.approx(row.lr * norm.polar_scale(*row.shape), rel=1e-5)


@cases(
    "source, options, lost",
    [
        ("torch.optim.Muon", {}, ["eps"]),
        ("torch.optim.AdamW", {"amsgrad": True, "foreach": False, "fused": True}, ["amsgrad", "foreach", "fused"]),
        ("dion", {"cautious_wd": True, "flatten": True}, ["cautious_wd", "flatten"]),
        ("emerging_optimizers", {"weight_decay_method": "l2"}, ["weight_decay, weight_decay_method"]),
        ("emerging_optimizers", {"coefficient_type": "aol"}, ["coefficient_type, num_ns_steps"]),
        ("emerging_optimizers", {"num_ns_steps": 6}, ["coefficient_type, num_ns_steps"]),
        (
            "emerging_optimizers",
            {"coefficient_type": "polar_express", "num_ns_steps": 10},
            ["coefficient_type, num_ns_steps"],
        ),
        ("heavyball", {"caution": True, "warmup_steps": 9}, ["nesterov", "eps", "caution", "warmup_steps"]),
        ("optax", {"learning_rate": 0.1, "adaptive": True}, ["adaptive"]),
        ("pytorch_optimizer", {"weight_decouple": False, "maximize": True}, ["weight_decouple", "maximize"]),
    ],
)
def test_what_has_no_counterpart_is_said(source, options, lost):
    assert [row.theirs for row in translate(source, **options).lost] == lost


@cases(
    "source, options, error, told",
    [
        ("dionn", {}, ValueError, "did you mean 'dion'"),
        ("dion", {"momentum": 0.9}, TypeError, "has no option 'momentum'"),
        ("dion", {"lr": "1e-3"}, TypeError, "dion: lr must be a number"),
        ("dion", {"lr": -1.0}, ValueError, "dion: lr must be finite and at least 0"),
        ("dion", {"nesterov": 1}, TypeError, "dion: nesterov must be True or False"),
        ("dion", {"adjust_lr": "rms"}, ValueError, "dion: Unknown adjust_lr 'rms'. Valid: None, rms_norm"),
        ("muonium", {}, TypeError, "muonium: give lr=, which has no default"),
        ("dmuon", {"ns_steps": 6}, ValueError, "at most 5"),
        ("torch.optim.Muon", {"ns_coefficients": (1.0, 2.0)}, TypeError, "three finite numbers"),
        ("torch.optim.Muon", {"ns_coefficients": (4.0, -7.1, 2.5)}, ValueError, "unsafe"),
        ("torch.optim.Muon", {"ns_steps": 0}, ValueError, "has no steps"),
        ("torch.optim.AdamW", {"betas": 0.9}, TypeError, "betas must be two numbers"),
        ("emerging_optimizers", {"extra_scale_factor": 0.0}, ValueError, "above 0"),
        ("torch.optim.Muon", {"shape": (3,)}, TypeError, "shape must be two whole numbers"),
        ("torch.optim.Muon", {"shape": (3, 0)}, ValueError, "shape must be"),
    ],
)
def test_what_cannot_be_translated_is_refused(source, options, error, told):
    with pytest.raises(error, match=told):
        translate(source, **options)
