"""`steepest translate`: what to write here for another library's optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.command import Arg, Command
from steepest.lab.cli.options import AsJson, Assigned, Count, Number, Value, checking_usage
from steepest.lab.cli.outcome import DONE, print_json

if TYPE_CHECKING:
    from steepest.integrations.peers import Translation

# spelled out, so that --help does not wait for torch; a test compares them with the library's
PEERS = (
    "KellerJordan, dion, dmuon, emerging_optimizers, gram_newton_schulz, heavyball, muonium, optax, pytorch_optimizer, "
    "torch.optim.AdamW, torch.optim.Muon"
)


def _plain(value: Value) -> object:
    """Several numbers with commas between them, or nothing; else what it is."""
    if value == "None":
        return None
    try:
        numbers = [float(one) for one in str(value).split(",")] if isinstance(value, str) and "," in value else []
    except ValueError:
        return value
    return tuple(numbers) or value


class Translate(Command, AsJson):
    """Print what to write here for another library's optimizer, so that it takes the same steps.

    Options that are left out have the defaults that they have there. Printed are the call and, for each option, what it
    became, or why it has no counterpart. Nothing of that library is needed.

    examples:
      steepest translate dion --lr 0.02
      steepest translate dion --lr 0.02 --set mu=0.9 --set adjust_lr=rms_norm --json
      steepest translate torch.optim.AdamW --lr 1e-3 --weight-decay 0.1 --set betas=0.9,0.95
      steepest translate muonium --lr 0.02 --weight-decay 0.1 --shape 4096 1024
    """

    source: Annotated[str, Arg(PEERS, "PEER", "place")]
    lr: Annotated[Number | None, Arg("learning rate there", "RATE")] = None
    weight_decay: Annotated[Number | None, Arg("weight decay there", "RATE")] = None
    set: Annotated[tuple[Assigned, ...], Arg("another option, as it is called there", "OPTION=VALUE", "repeated")] = ()
    shape: Annotated[tuple[Count, ...], Arg("rows and columns of a matrix, as in --shape 4096 1024", "N")] = ()

    def run(self) -> int:
        """Print it."""
        from steepest.integrations.peers.conventions import options_of, translate

        with checking_usage():
            known = options_of(self.source)
            rate = "learning_rate" if "learning_rate" in known else "lr"
            given = {rate: self.lr, "weight_decay": self.weight_decay}
            options = {name: value for name, value in given.items() if value is not None}
            options |= {name: _plain(value) for name, value in self.set}
            translation = translate(self.source, shape=self.shape or None, **options)
        if self.json:
            return print_json(_content(translation))
        print(translation)
        return DONE


def _content(translation: Translation) -> dict[str, object]:
    return {
        "source": translation.source,
        "recipe": translation.recipe,
        "options": translation.options,
        "rest_weight_decay": translation.rest_decay,
        "call": translation.call,
        "rows": [row._asdict() for row in translation.rows],
        "notes": translation.notes,
    }
