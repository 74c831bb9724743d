"""The commands about the theory: scores of random quadratics, the model with one large input, a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from steepest.lab.cli.command import Arg, Command, Group
from steepest.lab.cli.options import AsJson, Count, Few, File, Number, Seed, checking_usage
from steepest.lab.cli.outcome import Table, print_json, print_tables

if TYPE_CHECKING:
    from steepest.lab.runs.trained import TrainedRun
    from steepest.theory import LayerDirections

Case = Literal["few-large", "many-large", "few-tokens", "no-spike"]  # a test compares them with the study's
CASES: tuple[Case, ...] = get_args(Case)


def png(text: str) -> Path:
    """A file to draw to."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png")
    return Path(text)


def _pictures():  # what draws loads libraries, for which a plot alone should wait
    from steepest.lab.report import theory_png

    return theory_png


class Drawn(AsJson):
    """A result that can be drawn, too."""

    plot: Annotated[Annotated[Path, png] | None, Arg("draw the result", "FILE.png")] = None

    def show(self, content: Mapping[str, object], table: Table, draw: Callable[[], bytes]) -> int:
        """Write the plot if one was asked for, then print the result, and return the exit code."""
        from steepest.lab.disk.files import write_whole

        if self.plot is not None:
            write_whole(self.plot, draw())
        return print_json(content) if self.json else print_tables([table])


class Scores(Command, Drawn):
    """Score directions on random quadratics.

    examples:
      steepest theory scores
      steepest theory scores --case few-large --simulations 64 --plot scores.png
    """

    simulations: Annotated[Few, Arg("per case", "N")] = 4
    seed: Annotated[Seed, Arg("of the simulations")] = 0
    case: Annotated[tuple[Case, ...], Arg("may be repeated; default: all", how="repeated")] = ()

    def run(self) -> int:
        """Simulate, and compare with Newton's direction."""
        from steepest.theory import simulate

        with checking_usage():
            studies = {
                case: simulate(case, simulations=self.simulations, seed=self.seed) for case in self.case or CASES
            }
        means = {case: {name: float(own.mean()) for name, own in study.items()} for case, study in studies.items()}
        ratios = {
            case: {name: float((values / study["newton"]).mean()) for name, values in study.items()}
            for case, study in studies.items()
        }

        names = list(next(iter(means.values())))
        rows = [[name, *(f"{means[case][name]:.0f} {ratios[case][name]:6.3f}" for case in means)] for name in names]
        title = f"Mean score and share of Newton's, {self.simulations} simulations"
        content = {"simulations": self.simulations, "seed": self.seed, "scores": means, "of_newton": ratios}
        return self.show(content, Table(title, ["direction", *means], rows), lambda: _pictures().scores_png(ratios))


class Spike(Command, Drawn):
    """Count steps on inputs with one large direction.

    examples:
      steepest theory spike
      steepest theory spike --kappa 10 100 1000 --eps 1e-6 --plot spike.png
    """

    kappa: Annotated[tuple[Number, ...], Arg("its variance; default: 2 4 16 64 256")] = (2.0, 4.0, 16.0, 64.0, 256.0)
    eps: Annotated[Number, Arg("error to reach")] = 1e-3

    def run(self) -> int:
        """Iterate every method at every variance."""
        from steepest.theory import iterations

        with checking_usage():
            counts = {kappa: iterations(kappa, eps=self.eps) for kappa in self.kappa}

        methods = list(next(iter(counts.values())))
        rows = [
            [f"{kappa:g}", *(" / ".join(map(str, dataclasses.astuple(found[method]))) for method in methods)]
            for kappa, found in counts.items()
        ]
        content = [
            {"kappa": kappa, **{method: dataclasses.asdict(steps) for method, steps in found.items()}}
            for kappa, found in counts.items()
        ]
        title = f"Steps to errors of {self.eps:g}: reached / settled / guaranteed"
        return self.show(
            {"eps": self.eps, "rows": content},
            Table(title, ["kappa", *methods], rows),
            lambda: _pictures().spike_png(counts, eps=self.eps),
        )


class Directions(Command, Drawn):
    """Score directions on a trained model.

    examples:
      steepest train --task digits --method muon --steps 50 --keep-checkpoint --out out/kept
      steepest theory directions out/kept
      steepest train --method muon --keep-checkpoint --out out/muon
      steepest theory directions out/muon --layers 'blocks.1.*' head --examples 32 --ridge 1e-6
    """

    run_dir: Annotated[File, Arg("of a run trained with --keep-checkpoint", "RUN_DIR", "place")]
    layers: Annotated[tuple[str, ...], Arg("default: all linear ones", "PATTERN")] = ("*",)
    examples: Annotated[Count, Arg("in the batch", "N")] = 8
    ridge: Annotated[Number, Arg("relative to tr(K)/n")] = 0.2
    data: Annotated[File | None, Arg("what the run was trained on, if given to it", "PATH")] = None

    def run(self) -> int:
        """Load the run, and compare directions layer by layer."""
        from steepest.lab.runs.trained import load_trained

        with checking_usage():
            trained = load_trained(self.run_dir, examples=self.examples, data=self.data)
        if not trained.same_code:
            told = "note: another version of the code trained this run; model and data are built by this one."
            print(told, file=sys.stderr)
        with checking_usage():
            layers = self._score(trained)

        title = f"{self.run_dir} after {trained.step} steps, {self.examples} examples, ridge {self.ridge:g}"
        table = Table(title, ["layer and direction", "alignment", "curvature", "score", "decrease"], _rows(layers))
        content = {"run": str(self.run_dir), "step": trained.step, "examples": self.examples, "ridge": self.ridge}
        return self.show({**content, "layers": _records(layers)}, table, lambda: _pictures().directions_png(layers))

    def _score(self, trained: TrainedRun) -> list[LayerDirections]:
        from steepest.theory import linear_layers, score_directions

        inputs, targets = (part.double() if part.is_floating_point() else part for part in trained.batch)
        return score_directions(
            trained.model,
            lambda model: trained.task.loss(model, (inputs, targets)),
            linear_layers(trained.model, self.layers),
            ridge=self.ridge,
            second_moments={name.removesuffix(".weight"): v for name, v in trained.second_moments.items()},
        )


def _rows(layers: Sequence[LayerDirections]) -> list[list[str]]:
    """A block per layer; where there is no score, the reason."""
    rows: list[list[str]] = []
    for layer in layers:
        raised = f", ridge x {10**layer.raised:,}" if layer.raised else ""
        rows.append([f"{layer.layer} (condition {layer.condition:.2g}{raised})", "", "", "", ""])
        for name, score in layer.scores.items():
            value = score.status if score.value is None else f"{score.value:.3g}"
            decrease = "" if score.decrease is None else f"{score.decrease:.3g}"
            rows.append([f"  {name}", f"{score.alignment:.3f}", f"{score.curvature:.3g}", value, decrease])
    return rows


def _records(layers: Sequence[LayerDirections]) -> list[dict[str, object]]:
    return [
        {
            "layer": layer.layer,
            "shape": layer.shape,
            "condition": layer.condition if math.isfinite(layer.condition) else None,
            "ridge_raised": layer.raised,
            "scores": {
                name: {**dataclasses.asdict(score), "score": score.value, "decrease": score.decrease}
                for name, score in layer.scores.items()
            },
        }
        for layer in layers
    ]


GROUP = Group(
    "Compare update directions: on quadratics, on a model that can be solved, on a trained one.",
    {"scores": Scores, "spike": Spike, "directions": Directions},
)
