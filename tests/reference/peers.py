"""Other libraries' Muons in any precision, in our own words, from the conventions that each of them documents.

For libraries that are not on the package index: the keys of their states and groups are theirs, the code is not. A
direction is the exact polar factor, or what a list of quintics makes of singular values.
"""

import torch

from tests.reference.muon import polar


def orthogonalized(m, quintics):
    """Of each matrix in the last two dimensions; None: exactly."""
    if m.ndim > 2:
        return torch.stack([orthogonalized(one, quintics) for one in m])
    if quintics is None:
        return polar(m)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    s = s / s.norm()
    for a, b, c in quintics:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


class Peer(torch.optim.Optimizer):
    """A loop over parameters; `update` says what is added to one, without the learning rate."""

    def __init__(self, groups, quintics=None, **defaults):
        super().__init__(groups, defaults)
        self.quintics = quintics

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if "step" in group:
                group["step"] += 1
            for p in group["params"]:
                update = self.update(p, self.state[p], group)
                p.mul_(1 - group["lr"] * self.decay(p, group))
                p.sub_(group["lr"] * update)

    def decay(self, p, group):
        return group["weight_decay"]


def adam(g, m, v, betas, count, eps):
    m.lerp_(g, 1 - betas[0])
    v.lerp_(g * g, 1 - betas[1])
    return (m / (1 - betas[0] ** count)) / ((v / (1 - betas[1] ** count)).sqrt() + eps)


def averaged(g, state, key, beta, nesterov):
    """m <- b m + (1-b) g from zero, and what a step follows."""
    m = state.setdefault(key, torch.zeros_like(g))
    m.lerp_(g, 1 - beta)
    return g.lerp(m, beta) if nesterov else m


def summed(g, state, key, beta, nesterov):
    """s <- b s + g from zero, and what a step follows."""
    s = state.setdefault(key, torch.zeros_like(g))
    s.mul_(beta).add_(g)
    return g + beta * s if nesterov else s


class KellerJordan(Peer):
    """MuonWithAuxAdam: groups with use_muon; where it runs on many ranks, it sorts the matrices by shape."""

    def __init__(self, groups, sorts=False, **options):
        for group in groups if sorts else ():
            if group["use_muon"]:
                group["params"] = sorted(group["params"], key=lambda p: p.shape, reverse=True)
        super().__init__(groups, **options)

    def update(self, p, state, group):
        if group["use_muon"]:
            o = orthogonalized(averaged(p.grad, state, "momentum_buffer", group["momentum"], True), self.quintics)
            return max(1, p.shape[-2] / p.shape[-1]) ** 0.5 * o
        state["step"] = state.get("step", 0) + 1
        m, v = (state.setdefault(key, torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq"))
        return adam(p.grad, m, v, group["betas"], state["step"], group["eps"])

    def state_of_rank(self, rank, world):
        """The averages of matrices are with the rank that owns them; all have Adam's."""
        saved = self.state_dict()
        for group in saved["param_groups"]:
            for place, index in enumerate(group["params"]):
                if group["use_muon"] and place % world != rank:
                    saved["state"].pop(index)
        return saved


class Dion(Peer):
    """Muon, and with variance NorMuon: sums of gradients; AdamW where a group says so."""

    SCALES = {  # noqa: RUF012 - read only
        "spectral_norm": lambda m, n: (m / n) ** 0.5,
        "rms_norm": lambda m, n: 0.2 * max(m, n) ** 0.5,
        None: lambda m, n: 1.0,
    }

    def __init__(self, groups, norm=False, **options):
        algorithm = "normuon" if norm else "muon"
        own = {"mu": 0.95, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "nesterov": False, "weight_decay": 0.01}
        super().__init__(groups, **{**own, "step": 0, "adjust_lr": "spectral_norm", "algorithm": algorithm, **options})

    def update(self, p, state, group):
        if group["algorithm"] == "adamw":
            m, v = (state.setdefault(key, torch.zeros_like(p)) for key in ("momentum", "variance"))
            return adam(p.grad, m, v, (group["beta1"], group["beta2"]), group["step"], group["epsilon"])
        o = orthogonalized(summed(p.grad, state, "momentum", group["mu"], group["nesterov"]), self.quintics)
        if group["algorithm"] == "normuon":
            v = state.setdefault("variance_neuron", torch.zeros_like(p[..., :1]))
            v.lerp_(o.square().mean(-1, keepdim=True), 1 - group["muon_beta2"])
            scaled = o / (v.sqrt() + 1e-10)
            o = scaled * o.norm() / scaled.norm()
        return self.SCALES[group["adjust_lr"]](*p.shape[-2:]) * o


class Dion2(Peer):
    """A quarter of the rows at a time; what is applied is taken out of the buffer but for a part."""

    def __init__(self, groups, **options):
        super().__init__(groups, **{"ef_decay": 0.95, "step": 0, "algorithm": "dion2", "weight_decay": 0.01, **options})

    def update(self, p, state, group):
        m = state.setdefault("momentum", torch.zeros_like(p))
        m.add_(p.grad)
        rows = m.norm(p=1, dim=1).topk(max(1, len(m) // 4)).indices
        update = torch.zeros_like(p)
        update[rows] = orthogonalized(m[rows], self.quintics)
        m[rows] *= group["ef_decay"]
        return update


class EmergingOptimizers(Peer):
    """NVIDIA's Muon; "spectral" is sqrt(max(m, n)), without the 0.2 of others."""

    SCALES = {  # noqa: RUF012 - read only
        "shape_scaling": lambda m, n: max(1, m / n) ** 0.5,
        "spectral": lambda m, n: max(m, n) ** 0.5,
        "unit_rms_norm": lambda m, n: (m / n) ** 0.5,
    }

    def __init__(self, groups, scale_mode="spectral", extra_scale_factor=1.0, **options):
        own = {"momentum": 0.95, "nesterov": False, "weight_decay": 0.01, "weight_decay_method": "decoupled"}
        super().__init__(groups, **{**own, **options})
        self.scale = lambda m, n: extra_scale_factor * self.SCALES[scale_mode](m, n)

    def update(self, p, state, group):
        o = orthogonalized(
            averaged(p.grad, state, "momentum_buffer", group["momentum"], group["nesterov"]), self.quintics
        )
        return self.scale(*p.shape) * o


class PlainMuon(Peer):
    """What dmuon, muonium, gram-newton-schulz, heavyball and optax do to a matrix.

    Args:
        scale: Length of a step by shape.
        kept: `averaged` or `summed`.
        scaled_decay: Whether decay is times the length, too.
    """

    def __init__(self, groups, scale, kept, scaled_decay=False, **options):
        super().__init__(groups, **options)
        self.scale, self.kept, self.scaled_decay = scale, kept, scaled_decay

    def decay(self, p, group):
        return group["weight_decay"] * (self.scale(*p.shape) if self.scaled_decay else 1)

    def update(self, p, state, group):
        m = self.kept(p.grad, state, "momentum_buffer", group["momentum"], group["nesterov"])
        return self.scale(*p.shape) * orthogonalized(m, self.quintics)


def original(m, n):
    return max(1, m / n) ** 0.5


def match_rms(m, n):
    return 0.2 * max(m, n) ** 0.5
