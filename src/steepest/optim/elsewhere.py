"""What other optimizers call their options, and what to write here."""

from collections.abc import Mapping

_NO_SWITCH = "Leave it out: parameters are stepped together wherever that is faster."
_COEFFICIENTS = "Write coefficients=: a name such as 'jordan' (five steps), or a list with one (a, b, c) for each step."
_ADAM_LR = "Write adam_lr=, or other_lr= for Scion: the rate of everything that is no matrix."
SORTING = ("use_muon", "algorithm")  # which say something with every value
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("fused", "foreach"), _NO_SWITCH),
    **dict.fromkeys(("ns_steps", "backend_steps", "num_ns_steps", "newton_schulz_steps"), _COEFFICIENTS),
    **dict.fromkeys(("ns_coefficients", "ns_coeffs", "coefficient_type", "polar_express"), _COEFFICIENTS),
    **dict.fromkeys(("adjust_lr_fn", "adjust_lr", "scale_mode"), "Write scale='original' or 'match_rms_adamw'."),
    **dict.fromkeys(("momentum_beta", "mu", "beta"), "Write momentum=."),
    **dict.fromkeys(("beta1", "beta2"), "Write betas=(beta1, beta2)."),
    **dict.fromkeys(("adamw_betas", "adam_betas"), "Write betas=."),
    **dict.fromkeys(("adamw_eps", "adam_eps", "epsilon"), "Write eps=."),
    **dict.fromkeys(("adamw_lr", "scalar_lr", "aux_lr", "embed_lr", "head_lr"), _ADAM_LR),
    **dict.fromkeys(("wd", "decay", "adamw_wd", "weight_decay_rate"), "Write weight_decay=."),
    **dict.fromkeys(("learning_rate", "alpha", "muon_lr"), "Write lr=."),
    **dict.fromkeys(
        ("adamw_params", "adam_params", "muon_params", "scalar_params"),
        "Pass the model as the first argument, which sorts its parameters, or groups with a role= each.",
    ),
    **dict.fromkeys(("rank", "world_size"), "Leave it out: every rank takes the whole step."),
    "capturable": "Leave it out: a step never waits for the device. Give lr as a 0-d tensor to change it in a graph.",
    "differentiable": "Leave it out: no gradient flows through a step.",
    "maximize": "Leave it out, and negate the loss.",
    "amsgrad": "Leave it out: there is no such variant; torch.optim.AdamW has it.",
    "use_muon": "Write role='matrix' for True, and role='embedding', 'head' or 'vector' for False.",
    "algorithm": "Write role='matrix' for Muon, and role='embedding', 'head' or 'vector' for the others.",
    "dampening": "Leave it out: averages weigh a new gradient with 1 - momentum.",
    "lower_bound": "Write step_size=Momo(lower_bound=...).",
}
