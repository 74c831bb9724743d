"""Which averages other libraries' optimizers keep, under which keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Averages:
    """Where a peer keeps the averages of one kind of parameter.

    Args:
        first: Key of the average of gradients.
        beta: Where in a group its b stands: a key, one key or another by version, or "betas" for the first of two.
        second: Key of the average of squares.
        beta2: Likewise.
        rows: Key of the average of squares of the direction's rows, as NorMuon's.
        rows_beta: Likewise.
        summed: Whether the gradient is added whole.
        summed_with: A key of groups whose gradients are added whole.
    """

    first: str
    beta: tuple[str, ...]
    second: str | None = None
    beta2: tuple[str, ...] = ()
    rows: str | None = None
    summed: bool = False
    summed_with: str | None = None


@dataclass(frozen=True)
class Source:
    """How a peer keeps its state.

    Args:
        title: Whose.
        kinds: The first of which a parameter's state has all keys is meant.
        sorts: Whether it may have sorted the parameters of a group by shape, the largest first.
        no_average: Algorithms of groups whose buffers are no averages of gradients.
    """

    title: str
    kinds: tuple[Averages, ...]
    sorts: bool = False
    no_average: Mapping[str, str] = field(default_factory=dict[str, str])


_ADAM = Averages("exp_avg", ("betas",), second="exp_avg_sq", beta2=("betas",))
_MUON = Averages("momentum_buffer", ("momentum",))
_LEFT_OVER = "its buffer is what steps left over (error feedback), no average of gradients"
SOURCES: Mapping[str, Source] = {
    "torch.optim.Muon": Source("torch.optim.Muon", (_MUON,)),
    "torch.optim.AdamW": Source("torch.optim.AdamW", (_ADAM,)),
    "torch.optim.Adam": Source("torch.optim.Adam", (_ADAM,)),
    "KellerJordan": Source("Muon of KellerJordan/Muon", (_ADAM, _MUON), sorts=True),
    "dion": Source(
        "Muon or NorMuon of microsoft/dion",
        (
            Averages("momentum", ("beta1",), second="variance", beta2=("beta2",)),
            Averages("momentum", ("mu",), rows="variance_neuron", summed=True),
        ),
        no_average={
            "lion": "Lion's average is made with beta2 and read with beta1",
            **dict.fromkeys(("dion", "dion2", "nordion2", "dion3"), _LEFT_OVER),
        },
    ),
    "emerging_optimizers": Source(
        "Muon of NVIDIA's Emerging-Optimizers", (Averages("momentum_buffer", ("momentum", "momentum_beta")),)
    ),
    "pytorch_optimizer": Source(
        "Muon of pytorch_optimizer",
        (
            _ADAM,
            Averages("momentum_buffer", ("momentum",), rows="second_momentum_buffer", summed_with="qk_clip_threshold"),
        ),
    ),
    "timm": Source("Muon of timm", (_ADAM, _MUON)),
}
"""What `import_state` reads, by the name that its `source=` takes."""

# Entries that say nothing that would be missed.
SILENT = ("step", "use_muon")
