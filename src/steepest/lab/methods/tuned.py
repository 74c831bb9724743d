"""The one table of tuned options: what each method runs with by default on a task and preset, and how that was found.

Rows of tracks are what published scripts run with; nothing was searched here. A preset without an entry for a method
takes the options of the preset demo, without the record: they were not searched there. A method without an entry at
demo runs with the defaults of its signature in `methods.py`, chosen by hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from steepest.lab.disk.fields import Count, Text

OptionValue = bool | int | float | str


@dataclass(frozen=True)
class Tuning:
    """How the options of a method were chosen.

    Args:
        trials: Number of tried settings; None when it is not known.
        source: Where the search is recorded; None when it is not.
        edge: Whether the best setting lay at the edge of what was tried.
    """

    trials: Count | None
    source: Text | None
    edge: bool = False


@dataclass(frozen=True)
class Tuned:
    """Options that were found, where they differ from the method's signature, and the record of the search."""

    options: Mapping[str, OptionValue] = field(default_factory=dict[str, OptionValue])
    tuning: Tuning | None = None


def _found(*, edge: bool = False, **options: OptionValue) -> Tuned:
    """Best of as many tried settings for every method, over both learning rates and all momenta."""
    return Tuned(options, Tuning(trials=16, source="results/tuning/README.md", edge=edge))


_JORDAN = _found(lr=0.0565685, other_lr=0.02, momentum=0.85, beta1=0.9, beta2=0.999, edge=True)

# Record 4 of modded-nanogpt with Newton-Muon: arXiv:2604.01472, and train_*_1.py of
# https://github.com/zhehangdu/Newton-Muon. Its matrices step by sqrt(max(m, n)) times a tenth of the rate of the tied
# table, ours with this scale by 0.2 sqrt(max(m, n)) times `lr`. AdamW's betas are the code's; appendix A of the paper
# has (0.9, 0.999) for the run with AdamW alone.
_SHORT_MUON: Mapping[str, OptionValue] = {
    "lr": 0.0018,
    "other_lr": 0.0036,
    "momentum": 0.95,
    "beta1": 0.9,
    "beta2": 0.95,
    "scale": "match_rms_adamw",
    "coefficients": "jordan",
}
_SHORT = {
    "adamw": Tuned({"lr": 0.000576, "other_lr": 0.0036, "beta1": 0.9, "beta2": 0.95}),
    "muon": Tuned(_SHORT_MUON),
    "newton-muon": Tuned({**_SHORT_MUON, "lr": 0.002, "other_lr": 0.004, "preset": "paper_record4", "every": 32}),
}
# About record 28, train_*_2.py there. Its scale by the shape as stored is 1 for every matrix; tables have 75 times the
# rate of the head.
_MEDIUM_MUON: Mapping[str, OptionValue] = {
    "lr": 0.05,
    "other_lr": 0.008,
    "table_lr": 0.6,
    "momentum": 0.95,
    "beta1": 0.8,
    "beta2": 0.95,
    "scale": "none",
    "coefficients": "jordan",
}
_MEDIUM = {
    "muon": Tuned(_MEDIUM_MUON),
    "newton-muon": Tuned({**_MEDIUM_MUON, "preset": "paper_record28", "every": 16}),
}
# arXiv:2510.09827 in the scripts of its authors, https://github.com/modichirag/GPT-opt: the rate of all but matrices is
# 1e-3; s is 16 (MuonAdam), 4 (Scion, MuonMax) or 64 (PolarGrad), and multiplies that of matrices in constrained
# descent, its square in regularised descent. Momo's bound is their default.
_FINEWEB1B_RATES = {"muonadam": 0.016, "scion": 0.004, "muonmax": 0.016, "polargrad": 4.096}
_FINEWEB1B = {
    name: Tuned(
        {"lr": lr, "other_lr": 0.001, "momentum": 0.95, **({} if plain == "scion" else {"beta2": 0.95}), **momo}
    )
    for plain, lr in _FINEWEB1B_RATES.items()
    for name, momo in ((plain, {}), (f"{plain}-momo", {"lower_bound": 3.2}))
}
# arXiv:2507.01598 in the scripts of its authors, https://github.com/Hiroki11x/critical_batchsize_muon: of the rates at
# batch 512 the middle ones; a scale that is 1 for all kernels, three steps of the polynomial, the stem with AdamW.
_IMAGES_MUON: Mapping[str, OptionValue] = {
    "beta1": 0.9,
    "beta2": 0.999,
    "scale": "none",
    "coefficients": "jordan:3",
}
_STEM, _ALL_BUT_KERNELS = "*stem.weight", "*stem.weight,*hidden.*.weight"


def _of_images(*, lr: float, other_lr: float, momentum: float, rest: str) -> Mapping[str, Tuned]:
    rates: Mapping[str, OptionValue] = {"lr": lr, "other_lr": other_lr, "momentum": momentum}
    own = {**_IMAGES_MUON, **rates, "rest": rest}
    return {
        "adamw": Tuned({"lr": 0.001, "other_lr": 0.001, "beta1": 0.9, "beta2": 0.999}),
        "sgd": Tuned({"lr": 0.0005, "momentum": 0.95}),
        **{name: Tuned(own) for name in ("muon", "muon-plain", "muon-wd", "muon-plain-wd")},
    }


_RESNET18 = _of_images(lr=0.005, other_lr=0.001, momentum=0.999, rest=_STEM)
_VGG16 = _of_images(lr=0.1, other_lr=0.0001, momentum=0.95, rest=_ALL_BUT_KERNELS)


def _looking_every(steps: int, rows: Mapping[str, Tuned]) -> Mapping[str, Tuned]:
    """The same for a rehearsal, in which Newton-Muon looks at inputs more often."""
    return {**rows, "newton-muon": Tuned({**rows["newton-muon"].options, "every": steps})}


TUNED: Mapping[tuple[str, str], Mapping[str, Tuned]] = {
    ("text", "demo"): {
        "adamw": _found(lr=0.004, other_lr=0.032, beta1=0.6, beta2=0.8, edge=True),
        "muon": _found(lr=0.08, other_lr=0.02, momentum=0.7, beta1=0.9, beta2=0.95, edge=True),
        "muon-jordan": _JORDAN,
        "muon-nonic": _found(lr=0.08, other_lr=0.02, momentum=0.7, beta1=0.9, beta2=0.999, edge=True),
        "torch-muon": _JORDAN,  # the same step in bfloat16
        "muonadam": _found(lr=0.08, other_lr=0.02, momentum=0.5, beta2=0.95, edge=True),
        # of an older search over the learning rates alone, whose record no longer holds
        "newton-muon": Tuned({"lr": 0.04, "other_lr": 0.02}),
    },
    ("digits", "demo"): {
        "adamw": Tuned({"lr": 0.01, "other_lr": 0.02}),
        "muon": Tuned({"lr": 0.04, "other_lr": 0.01}),
        "muonadam": Tuned({"lr": 0.02, "other_lr": 0.02}),
    },
    ("fineweb", "gpt2-short"): _SHORT,
    ("fineweb", "gpt2-short-rehearsal"): _looking_every(2, _SHORT),
    ("fineweb", "gpt2-medium"): _MEDIUM,
    ("fineweb", "gpt2-medium-rehearsal"): _looking_every(2, _MEDIUM),
    ("fineweb", "gpt2-fineweb1b"): _FINEWEB1B,
    ("fineweb", "gpt2-fineweb1b-rehearsal"): _FINEWEB1B,
    ("cifar10", "resnet18"): _RESNET18,
    ("cifar10", "resnet18-rehearsal"): _of_images(lr=0.001, other_lr=0.0001, momentum=0.999, rest=_STEM),
    ("cifar100", "vgg16"): _VGG16,
    ("cifar100", "vgg16-rehearsal"): _of_images(lr=0.01, other_lr=0.00001, momentum=0.95, rest=_ALL_BUT_KERNELS),
}
