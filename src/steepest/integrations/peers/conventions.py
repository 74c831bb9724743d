"""What to write here for the options of another library's optimizer, so that it takes the same steps.

A step there is W <- (1 - decay) W - length · s(m, n) · P, with P what a polynomial makes of the averaged gradient. Ours
has one of four rules s by shape; where a peer's is one of them times c, a rate of c · lr is the same step, and decay,
which multiplies the rate, is divided by c. The direction does not depend on whether averages are sums or weigh to one.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import steepest.optim
from steepest.anatomy import aligned
from steepest.checks import Check, check_keywords, choice, flag, number, pair, refusal, whole
from steepest.geometry.scale import ScaleRule, scale_factor
from steepest.linalg import COEFFICIENTS, get_coefficients
from steepest.linalg.odd_polynomial import Step
from steepest.optim import SteepestDescent
from steepest.optim.parameters import Parameters

Shape = tuple[int, int]
JORDAN: Step = (3.4445, -4.7750, 2.0315)
DION_RULES: Mapping[str, ScaleRule] = {"spectral_norm": "spectral", "rms_norm": "match_rms_adamw", "None": "none"}
NO_EPS = "not needed: a matrix is brought to size one before it is divided by its norm"
CAUTIOUS = "write weight_decay=steepest.Cautious(rate) with the rate here: only weights decay that a step makes smaller"
_SWITCH = "leave it out: parameters are stepped together wherever that is faster"
_PRODUCTS = "write dtype= for another type of the matrix products; by default bfloat16 on CUDA and float32 elsewhere"
_NO_REST = (
    "Matrices only: translate the optimizer of everything else too, and pass its rates as adam_lr=, betas=, eps=."
)
_VECTORS = "Vectors (gains, biases) do not decay here; to let them, write weight_decay into their group."
_CONSTANT = (
    "holds while the learning rate is constant: here decay follows a schedule, there it does not in the same way"
)
_PLUS_AVERAGE = (
    "steps there follow gradient + average, in which the gradient weighs momentum / (1 - momentum) times as much as in "
    "Nesterov's, which is the nearest here; with heavyball_momentum=True, it is Nesterov's there, too"
)
ROLES_OF_REST = ("embedding", "head")


class TranslatedOption(NamedTuple):
    """One option of the peer.

    Args:
        theirs: Its name there.
        value: Its value there.
        ours: The option here that says the same, with its value; None: there is no such option.
        remark: Why, or what to know about it.
    """

    theirs: str
    value: Any
    ours: str | None
    remark: str


@dataclass(frozen=True)
class Translation:
    """Options here that take the steps that a peer takes. `str(translation)` is the call, with a table.

    Args:
        source: The peer.
        recipe: Name of the recipe.
        options: Its keyword arguments.
        rest_decay: Weight decay of embeddings and head, where it is not that of the matrices.
        rows: What each option of the peer became.
        notes: What else differs.
    """

    source: str
    recipe: str
    options: Mapping[str, Any]
    rest_decay: float | None
    rows: tuple[TranslatedOption, ...]
    notes: tuple[str, ...]

    @property
    def lost(self) -> tuple[TranslatedOption, ...]:
        """Options without a counterpart."""
        return tuple(row for row in self.rows if row.ours is None)

    @property
    def call(self) -> str:
        """The call as text, with what must be written after it."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        lines = [f"optimizer = steepest.{self.recipe}(model{options})"]
        if self.rest_decay is not None:
            lines += [
                "for group in optimizer.param_groups:",
                f"    if group['role'] in {ROLES_OF_REST}:",
                f"        group['weight_decay'] = {self.rest_decay!r}",
            ]
        return "\n".join(lines)

    def build(self, params: Parameters, **options: Any) -> SteepestDescent:
        """What `call` says.

        Args:
            params: As for every optimizer.
            options: Others, or in place of these.
        """
        optimizer: SteepestDescent = getattr(steepest.optim, self.recipe)(params, **{**self.options, **options})
        for group in optimizer.param_groups if self.rest_decay is not None else ():
            if group["role"] in ROLES_OF_REST:
                group["weight_decay"] = self.rest_decay
        return optimizer

    def __str__(self) -> str:
        lines = [("there", "here", "")]
        lines += [(f"{row.theirs}={row.value!r}", row.ours or "-", row.remark) for row in self.rows]
        return "\n".join([self.call, "", *aligned(lines), "", *self.notes]).rstrip()


@dataclass
class Sheet:
    """A translation while it is written."""

    recipe: str = "Muon"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    rest_decay: float | None = None
    rows: list[TranslatedOption] = field(default_factory=list[TranslatedOption])
    notes: list[str] = field(default_factory=list[str])

    def put(self, theirs: str, value: Any, ours: str, new: Any, remark: str = "") -> None:
        """An option that has a counterpart; products of rates are rounded to twelve digits, for people."""
        new = float(f"{new:.12g}") if isinstance(new, float) else new
        self.options[ours] = new
        self.rows.append(TranslatedOption(theirs, value, f"{ours}={new!r}", remark))

    def lose(self, theirs: str, value: Any, remark: str) -> None:
        """One that has none."""
        self.rows.append(TranslatedOption(theirs, value, None, remark))

    def lose_unless(self, default: Any, theirs: str, value: Any, remark: str) -> None:
        """One that has none where it does something."""
        if value != default:
            self.lose(theirs, value, remark)

    def length(self, theirs: str, lr: float, rule: ScaleRule, factor: float = 1.0) -> None:
        """Learning rate of steps of `factor` times the length by the rule."""
        remark = "" if factor == 1 else f"steps there are {factor:g} times as long as those of scale={rule!r}"
        self.put(theirs, lr, "lr", lr * factor, remark)
        self.options["scale"] = rule

    def decay(self, theirs: str, value: Any, here: float, remark: str = "") -> None:
        """Weight decay, which multiplies the rate here."""
        self.put(theirs, value, "weight_decay", here, remark)
        if here:
            self.notes.append(_VECTORS)

    def average(self, theirs: str, momentum: float, nesterov: bool, *, summed: bool = False) -> None:
        """Of gradients."""
        self.put(theirs, momentum, "momentum", momentum, "a sum there: the same direction" if summed else "")
        self.put("nesterov", nesterov, "nesterov", nesterov)

    def polynomial(self, theirs: str, value: Any, steps: Sequence[Step], remark: str = "") -> None:
        """By its name here, if it has one."""
        steps = tuple(steps)
        name = next((one.name for one in COEFFICIENTS.values() if one.steps == steps), None)
        get_coefficients(steps)  # not every polynomial is safe
        self.put(theirs, value, "coefficients", name or [tuple(step) for step in steps], remark)

    def adam(
        self, lr: tuple[str, float], betas: tuple[str, Any], eps: tuple[str, float], decay: tuple[str, float]
    ) -> None:
        """Of everything that is no matrix; decay of the matrices is known by now."""
        self.put(*lr, "adam_lr", lr[1])
        self.put(*betas, "betas", tuple(betas[1]))
        self.put(*eps, "eps", eps[1])
        if decay[1] != self.options["weight_decay"]:
            self.rest_decay = decay[1]
            self.rows.append(TranslatedOption(*decay, "param_groups[...]['weight_decay']", "of embeddings and head"))
        else:
            self.rows.append(TranslatedOption(*decay, f"weight_decay={decay[1]!r}", "of embeddings and head, too"))

    def alone(self) -> None:
        """There is no optimizer for the rest."""
        self.notes.append(_NO_REST)


Rule = Callable[..., None]


def _torch_muon(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: Any = JORDAN,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> None:
    rule = _word(
        "torch.optim.Muon: adjust_lr_fn",
        adjust_lr_fn or "original",
        {"original": "original", "match_rms_adamw": "match_rms_adamw"},
    )
    to.length("lr", lr, rule)
    to.decay("weight_decay", weight_decay, weight_decay)
    to.put("adjust_lr_fn", adjust_lr_fn, "scale", rule)
    to.average("momentum", momentum, nesterov)
    to.polynomial("ns_coefficients, ns_steps", (ns_coefficients, ns_steps), [_step(ns_coefficients)] * ns_steps)
    to.lose("eps", eps, NO_EPS)
    to.notes.append("Products there are bfloat16's on every device; write dtype=torch.bfloat16 for the same rounding.")
    to.alone()


def _torch_adamw(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
) -> None:
    to.recipe = "Adam"
    to.put("lr", lr, "lr", lr)
    to.put("betas", betas, "betas", tuple(betas))
    to.put("eps", eps, "eps", eps)
    to.decay("weight_decay", weight_decay, weight_decay)
    to.lose_unless(False, "amsgrad", amsgrad, "there is no such variant")
    to.lose_unless(False, "maximize", maximize, "negate the loss")
    to.lose_unless(None, "foreach", foreach, _SWITCH)
    to.lose_unless(None, "fused", fused, _SWITCH)
    to.lose_unless(False, "capturable", capturable, "leave it out: give lr as a 0-d tensor to change it in a graph")
    to.lose_unless(False, "differentiable", differentiable, "leave it out: no gradient flows through a step")
    to.notes.append(
        "Muon moves matrices at AdamW's rates: steepest.Muon(model, lr, scale='match_rms_adamw', betas=..., eps=...)."
    )


def _keller_jordan(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 0.02,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    adam_lr: float = 3e-4,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    adam_eps: float = 1e-10,
    adam_weight_decay: float = 0.0,
) -> None:
    to.length("lr", lr, "original")
    to.decay("weight_decay", weight_decay, weight_decay)
    to.average("momentum", momentum, True)
    to.polynomial("(five quintics)", JORDAN, [JORDAN] * 5)
    to.adam(
        ("adam_lr", adam_lr),
        ("adam_betas", adam_betas),
        ("adam_eps", adam_eps),
        ("adam_weight_decay", adam_weight_decay),
    )
    to.notes.append("adam_... are lr, betas, eps and weight_decay of its groups with use_muon=False.")
    to.notes.append("Kernels of convolutions have the scale of their last two dimensions there, of the matrix here.")


def _pytorch_optimizer(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 2e-2,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    weight_decouple: bool = True,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coeffs: Any = "original",
    use_adjusted_lr: bool = False,
    adamw_lr: float = 3e-4,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_wd: float = 0.0,
    adamw_eps: float = 1e-10,
    maximize: bool = False,
    foreach: bool | None = None,
    ns_method: str = "newton_schulz",
) -> None:
    rule: ScaleRule = "match_rms_adamw" if use_adjusted_lr else "original"
    to.length("lr", lr, rule)
    to.decay("weight_decay", weight_decay, weight_decay)
    to.put("use_adjusted_lr", use_adjusted_lr, "scale", rule)
    to.average("momentum", momentum, nesterov)
    remark = ""
    if isinstance(ns_coeffs, str):
        sets = {"original": [JORDAN], "quintic": COEFFICIENTS["quintic"].steps}
        near = {"polar_express": "polar_express", "polar_express_safer": "polar_express_1.02"}
        choice((*sets, *near))("pytorch_optimizer: ns_coeffs", ns_coeffs)
        if ns_coeffs in near:
            remark = "other numbers of that kind; for the same, pass pytorch_optimizer's NS_COEFFICIENTS as a list"
        given = sets[ns_coeffs] if ns_coeffs in sets else COEFFICIENTS[near[ns_coeffs]].steps
    else:
        given = [_step(ns_coeffs)] if _is_step(ns_coeffs) else [_step(one) for one in ns_coeffs]
    to.polynomial(
        "ns_coeffs, ns_steps", (ns_coeffs, ns_steps), [given[min(n, len(given) - 1)] for n in range(ns_steps)], remark
    )
    words = {"newton_schulz": "newton-schulz", "gram_newton_schulz": "gram"}
    to.put("ns_method", ns_method, "polar", _word("pytorch_optimizer: ns_method", ns_method, words))
    to.adam(("adamw_lr", adamw_lr), ("adamw_betas", adamw_betas), ("adamw_eps", adamw_eps), ("adamw_wd", adamw_wd))
    to.lose_unless(True, "weight_decouple", weight_decouple, "decay is always apart from the gradient here")
    to.lose_unless(False, "maximize", maximize, "negate the loss")
    to.lose_unless(None, "foreach", foreach, _SWITCH)


def _dion(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 0.01,
    mu: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.01,
    cautious_wd: bool = False,
    epsilon: float = 1e-8,
    nesterov: bool = False,
    adjust_lr: str | None = "spectral_norm",
    flatten: bool = False,
    use_gram_newton_schulz: bool = False,
    use_triton: bool = False,
    use_polar_express: bool = True,
    adamw_lr: float | None = None,
    adamw_weight_decay: float | None = None,
) -> None:
    rule = _word("dion: adjust_lr", str(adjust_lr), DION_RULES)
    to.length("lr", lr, rule)
    to.decay("weight_decay", weight_decay, weight_decay)
    to.put("adjust_lr", adjust_lr, "scale", rule)
    to.average("mu", mu, nesterov, summed=True)
    if use_gram_newton_schulz:
        to.put("use_gram_newton_schulz", True, "coefficients", "polar_express_1.05")
    else:
        name = "polar_express_1.02" if use_polar_express else "quintic"
        to.put("use_polar_express", use_polar_express, "coefficients", name)
    to.adam(
        ("adamw_lr", lr if adamw_lr is None else adamw_lr),
        ("betas", betas),
        ("epsilon", epsilon),
        ("adamw_weight_decay", weight_decay if adamw_weight_decay is None else adamw_weight_decay),
    )
    to.lose_unless(False, "cautious_wd", cautious_wd, CAUTIOUS)
    to.lose_unless(
        False, "use_triton", use_triton, "leave it out: symmetric products are used where they are installed"
    )
    to.lose_unless(False, "flatten", flatten, "leave it out: the plan flattens kernels and keeps experts apart")
    to.notes.append(
        "adamw_... are lr and weight_decay of its groups with algorithm='adamw'; left out, they are Muon's."
    )


def _emerging_optimizers(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 3e-4,
    momentum: float = 0.95,
    weight_decay: float = 0.01,
    nesterov: bool = False,
    weight_decay_method: str = "decoupled",
    fp32_matmul_prec: str = "medium",
    coefficient_type: str = "quintic",
    num_ns_steps: int = 5,
    scale_mode: str = "spectral",
    extra_scale_factor: float = 1.0,
    use_syrk: bool = False,
) -> None:
    rules = {"shape_scaling": "original", "spectral": "match_rms_adamw", "unit_rms_norm": "spectral"}
    rule = _word("emerging_optimizers: scale_mode", scale_mode, rules)
    factor = extra_scale_factor / 0.2 if scale_mode == "spectral" else extra_scale_factor
    if factor == 0:
        raise ValueError(refusal("emerging_optimizers: extra_scale_factor", "above 0", extra_scale_factor))
    rate = lr * factor
    told, given = "weight_decay, weight_decay_method", (weight_decay, weight_decay_method)
    choice(("decoupled", "independent", "palm", "l2"))("emerging_optimizers: weight_decay_method", weight_decay_method)
    to.length("lr", lr, rule, factor)
    if weight_decay_method == "l2" and weight_decay:
        to.options["weight_decay"] = 0.0
        to.lose(told, given, "decay is always apart from the gradient here; choose a weight_decay= anew")
    elif weight_decay_method in ("independent", "palm"):
        part = weight_decay if weight_decay_method == "independent" else lr * lr * weight_decay
        to.decay(told, given, part / rate if rate else 0.0, _CONSTANT)
    else:
        remark = "so that lr · weight_decay stays what it is" if factor != 1 and weight_decay else ""
        to.decay(told, given, weight_decay / factor, remark)
    to.put("scale_mode", scale_mode, "scale", rule)
    to.average("momentum", momentum, nesterov)
    _emerging_polynomial(to, coefficient_type, num_ns_steps)
    to.lose_unless("medium", "fp32_matmul_prec", fp32_matmul_prec, _PRODUCTS)
    to.lose_unless(False, "use_syrk", use_syrk, "leave it out: symmetric products are used where they are installed")
    to.alone()


def _emerging_polynomial(to: Sheet, kind: str, count: int) -> None:
    names = ("simple", "quintic", "polar_express", "cans", "aol")
    choice(names)("emerging_optimizers: coefficient_type", kind)
    told = "coefficient_type, num_ns_steps"
    if kind == "simple":
        to.polynomial(told, (kind, count), [JORDAN] * count)
    elif kind == "aol":
        to.lose(told, (kind, count), "unsafe: it turns the sign of large singular values; the default is used")
    elif count % len(COEFFICIENTS[kind].steps) or (kind == "polar_express" and count > 5):
        to.lose(told, (kind, count), "a longer set than ours of that name, which is used; write all steps as a list")
    else:
        slack = "divided by 1.01, as the set has no slack for rounding" if kind == "cans" else ""
        slack = "there rounded to four digits" if kind == "polar_express" else slack
        to.polynomial(told, (kind, count), COEFFICIENTS[kind].steps * (count // len(COEFFICIENTS[kind].steps)), slack)


def _heavyball(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    cautious_weight_decay: bool = False,
    caution: bool = False,
    mars: bool = False,
    warmup_steps: int = 0,
    nesterov: bool = True,
    heavyball_momentum: bool = False,
) -> None:
    to.length("lr", lr, "original")
    to.decay("weight_decay", weight_decay, weight_decay)
    to.put("betas", betas, "momentum", betas[0], "the first; the second is not used by its Muon")
    if heavyball_momentum or not nesterov:
        to.put("nesterov", nesterov, "nesterov", nesterov)
        to.lose_unless(False, "heavyball_momentum", heavyball_momentum, "not needed: a sum there, the same direction")
    else:
        to.options["nesterov"] = True
        to.lose("nesterov", True, _PLUS_AVERAGE)
    to.put("(orthogonalization)", "quintic", "coefficients", "quintic")
    to.lose("eps", eps, NO_EPS)
    to.lose_unless(False, "cautious_weight_decay", cautious_weight_decay, CAUTIOUS)
    to.lose_unless(False, "caution", caution, "no entry of a step is masked here")
    to.lose_unless(False, "mars", mars, "gradients are averaged as they are")
    to.lose_unless(0, "warmup_steps", warmup_steps, "write a scheduler, such as LinearLR")
    to.notes.append(
        "Vectors follow their averaged gradient there, Adam here; MuonAdamW of heavyball has Adam for them."
    )
    to.alone()


def _dmuon(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    ns_steps: int = 5,
    adamw_lr: float = 1e-3,
    adamw_betas: tuple[float, float] = (0.9, 0.999),
    adamw_weight_decay: float = 0.01,
    adamw_eps: float = 1e-8,
    ns_backend: str = "gram",
    nesterov: bool = True,
) -> None:
    to.length("lr", lr, "match_rms_adamw")
    to.decay("weight_decay", weight_decay, weight_decay)
    to.average("momentum", momentum, nesterov, summed=True)
    to.polynomial("ns_steps", ns_steps, COEFFICIENTS["polar_express_1.05"].steps[:ns_steps], "Polar Express 1.05 there")
    if ns_steps > len(COEFFICIENTS["polar_express_1.05"].steps):
        raise ValueError(refusal("dmuon: ns_steps", "at most 5, the steps of its set", ns_steps))
    words = {"gram": "gram", "direct": "newton-schulz"}
    to.put("ns_backend", ns_backend, "polar", _word("dmuon: ns_backend", ns_backend, words))
    to.adam(
        ("adamw_lr", adamw_lr),
        ("adamw_betas", adamw_betas),
        ("adamw_eps", adamw_eps),
        ("adamw_weight_decay", adamw_weight_decay),
    )
    to.notes.append("Products there are float16's; " + _PRODUCTS + ".")


def _muonium(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    cautious: bool = True,
) -> None:
    to.length("lr", lr, "original")
    if weight_decay and shape is None:
        to.options["weight_decay"] = 0.0
        to.lose("weight_decay", weight_decay, "there times the length of the step by shape; give shape= for one shape")
    else:
        here = weight_decay * (1.0 if shape is None else scale_factor("original", *shape))
        remark = f"there times the length of the step by shape, {shape}" if weight_decay else ""
        to.decay("weight_decay", weight_decay, here, remark)
    if weight_decay and cautious:
        to.lose("cautious", True, CAUTIOUS)
    to.average("momentum", momentum, nesterov, summed=True)
    to.put("(orthogonalization)", "PolarExpress 1.02", "coefficients", "polar_express_1.02")
    to.alone()


def _optax(
    to: Sheet,
    shape: Shape | None,
    *,
    learning_rate: float,
    ns_coeffs: Any = JORDAN,
    ns_steps: int = 5,
    beta: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    adaptive: bool = False,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_weight_decay: float = 0.0,
) -> None:
    to.length("learning_rate", learning_rate, "original")
    to.decay("weight_decay", weight_decay, weight_decay)
    to.average("beta", beta, nesterov)
    steps = [_step(ns_coeffs)] * ns_steps if _is_step(ns_coeffs) else [_step(one) for one in ns_coeffs]
    to.polynomial("ns_coeffs, ns_steps", (ns_coeffs, ns_steps), steps)
    to.adam(
        ("learning_rate", learning_rate),
        ("adam_b1, adam_b2", (adam_b1, adam_b2)),
        ("eps", eps),
        ("adam_weight_decay", adam_weight_decay),
    )
    to.lose_unless(False, "adaptive", adaptive, "regularised steps here are PolarGrad and MuonMax")
    to.notes.append("Matrices there are (in, out): shapes here are turned round, and the length of a step with them.")
    to.notes.append(
        "All tensors with two dimensions are matrices there, embeddings and head too; here the model decides."
    )
    if nesterov:
        to.notes.append(
            "Its bias correction weighs the newest gradient a little more in the first steps: both parts of Nesterov's "
            "average are divided by numbers of their own, where all others divide by one. Adam looks ahead there, too."
        )


def _gram_newton_schulz(
    to: Sheet,
    shape: Shape | None,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    adjust_lr: str | None = "rms_norm",
    ns_coefficients: Any = None,
    ns_coefficients_preset: str | None = None,
    ns_algorithm: str = "gram_newton_schulz",
    ns_epsilon: float = 1e-7,
) -> None:
    rule = _word("gram_newton_schulz: adjust_lr", str(adjust_lr), DION_RULES)
    to.length("lr", lr, rule)
    to.decay("weight_decay", weight_decay, weight_decay)
    to.put("adjust_lr", adjust_lr, "scale", rule)
    to.average("momentum", momentum, nesterov, summed=True)
    if ns_coefficients is not None and ns_coefficients_preset is None:
        to.polynomial("ns_coefficients", ns_coefficients, [_step(one) for one in ns_coefficients])
    else:
        sets = {"POLAR_EXPRESS_COEFFICIENTS": "polar_express_1.05", "YOU_COEFFICIENTS": "quintic"}
        preset = ns_coefficients_preset or "POLAR_EXPRESS_COEFFICIENTS"
        name = _word("gram_newton_schulz: ns_coefficients_preset", preset, sets)
        to.put("ns_coefficients_preset", ns_coefficients_preset, "coefficients", name)
    words = {"gram_newton_schulz": "gram", "standard_newton_schulz": "newton-schulz"}
    to.put("ns_algorithm", ns_algorithm, "polar", _word("gram_newton_schulz: ns_algorithm", ns_algorithm, words))
    to.lose("ns_epsilon", ns_epsilon, NO_EPS)
    to.notes.append("Products there are float16's; " + _PRODUCTS + ".")
    to.alone()


PEERS: Mapping[str, Rule] = {
    "KellerJordan": _keller_jordan,
    "dion": _dion,
    "dmuon": _dmuon,
    "emerging_optimizers": _emerging_optimizers,
    "gram_newton_schulz": _gram_newton_schulz,
    "heavyball": _heavyball,
    "muonium": _muonium,
    "optax": _optax,
    "pytorch_optimizer": _pytorch_optimizer,
    "torch.optim.AdamW": _torch_adamw,
    "torch.optim.Muon": _torch_muon,
}
"""Libraries whose options `translate` knows."""


def options_of(source: str) -> Mapping[str, Any]:
    """The options of a peer and their defaults there; `inspect.Parameter.empty` where there is none.

    Args:
        source: A key of `PEERS`.

    Raises:
        ValueError: If it is unknown.
    """
    choice(tuple(PEERS))("source", source)
    return {
        name: one.default
        for name, one in inspect.signature(PEERS[source]).parameters.items()
        if one.kind is inspect.Parameter.KEYWORD_ONLY
    }


def translate(source: str, *, shape: Sequence[int] | None = None, **options: Any) -> Translation:
    """What to write here for an optimizer of another library.

    Args:
        source: Whose, a key of `PEERS`.
        shape: (out, in) of a matrix, for peers whose decay depends on it; the length of a step is then told, too.
        **options: As they are called there; those left out have the defaults that they have there.

    Returns:
        The call, and what became of each option. `build(model)` makes the optimizer.

    Raises:
        ValueError: If the source or a value is unknown or out of range, or a polynomial is unsafe.
        TypeError: If an option is unknown or missing, or of the wrong type.

    Examples:
        >>> print(translate("dion", lr=0.02, mu=0.9).call)
        optimizer = steepest.Muon(model, lr=0.02, scale='spectral', weight_decay=0.01, momentum=0.9, nesterov=False, \
coefficients='polar_express_1.02', adam_lr=0.02, betas=(0.9, 0.95), eps=1e-08)
    """
    known = options_of(source)
    check_keywords(source, options, list(known), {})
    if missing := [
        name for name, default in known.items() if default is inspect.Parameter.empty and name not in options
    ]:
        raise TypeError(f"{source}: give {missing[0]}=, which has no default.")
    for name, value in options.items():
        if (check := _check_of(known[name])) is not None and value != known[name]:
            check(f"{source}: {name}", value)
    side = whole(1)
    sides = None if shape is None else pair(side, "two whole numbers, (out, in)")("shape", shape)
    to = Sheet()
    PEERS[source](to, sides, **options)
    if sides is not None and "scale" in to.options:
        length = to.options["lr"] * scale_factor(cast(ScaleRule, to.options["scale"]), *sides)
        size = f"{sides[0]} x {sides[1]}"
        to.notes.append(f"A step on a matrix of {size} has the spectral norm {length:.6g}, there and here.")
    return Translation(
        source, to.recipe, dict(to.options), to.rest_decay, tuple(to.rows), tuple(dict.fromkeys(to.notes))
    )


def _check_of(default: Any) -> Check | None:
    """What an option must be, by its default; None: its rule looks."""
    if isinstance(default, bool):
        return flag
    if isinstance(default, int):
        return whole(0)
    if isinstance(default, float) or default is inspect.Parameter.empty:
        return number()
    if isinstance(default, tuple) and len(cast(Sequence[Any], default)) == 2:
        return pair(number(), "two numbers")
    return None


def _word(name: str, value: str, words: Mapping[str, Any]) -> Any:
    choice(tuple(words))(name, value)
    return words[value]


def _is_step(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, int | float) for one in cast(Sequence[Any], value))


def _step(value: Any) -> Step:
    if not _is_step(value) or len(value) != 3 or not all(math.isfinite(one) for one in value):
        raise TypeError(refusal("coefficients", "three finite numbers", value))
    return tuple(float(one) for one in value)
