"""`steepest bench train`: which part of a training step the optimizer takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from steepest.lab.cli.bench.results import check_out, described, print_table, write_results
from steepest.lab.cli.options import Commands, checking_usage, count, few, names, naming_methods, path, racers
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.outcome import DONE
from steepest.lab.tasks import TASKS

if TYPE_CHECKING:
    from steepest.lab.bench.train_share import Seconds, Share

OTHERS = ("newton-muon", "muonadam-momo", "muonmax", "muonmax-momo")  # timed besides the methods that race
COLUMNS = ("method", "fwd+bwd ms", "optimizer ms", "quartiles", "share", "step / muon's", "optimizer / muon's")
EXAMPLES = """examples:
  steepest bench train
  steepest bench train --preset demo small --methods muon,newton-muon,muonadam-momo --threads 2 --out out/share

Every round trains each method for one step on the same batch, in another order; ratios are taken within rounds. A
method that refreshes something every N steps does it in one step of four here; medians of ordinary steps and of
refreshes are weighed as (N - 1) : 1.
"""


def add_command(commands: Commands) -> None:
    """Declare train."""
    summary = "time training steps of several methods in turns, and tell the optimizer's share"
    parser = declare(commands, "train", _train, summary, EXAMPLES)
    parser.add_argument("--task", default="text", help=f"{', '.join(TASKS)}; default: %(default)s")
    parser.add_argument("--preset", nargs="+", default=["demo"], help="demo, tiny and small; default: demo")
    parser.add_argument("--data", type=path, metavar="PATH", help="a file or folder for text, cifar10, fineweb")
    default = f"{','.join(racers('text'))},{','.join(OTHERS)} on text"
    naming_methods(parser.add_argument("--methods", type=names, help=f"of %(known)s; default: {default}"))
    parser.add_argument("--steps", type=count, default=32, metavar="N", help="of each method; default: %(default)s")
    parser.add_argument("--every", type=count, default=32, metavar="N", help="steps per refresh; default: %(default)s")
    parser.add_argument("--threads", type=few, default=1, metavar="N", help="CPU threads; default: %(default)s")
    parser.add_argument("--out", type=path, metavar="DIR", help="where train.json, train.csv and train.png go")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _train(options: argparse.Namespace) -> int:
    import torch

    from steepest.lab.bench.train_share import summarize, time_steps

    check_out(options.out)
    from steepest.lab.tasks import make_task

    torch.set_num_threads(options.threads)
    methods = options.methods or [*racers(options.task), *OTHERS]
    with checking_usage():
        tasks = [make_task(options.task, preset, data=options.data) for preset in dict.fromkeys(options.preset)]
        seconds = {task.preset: time_steps(task, methods, steps=options.steps) for task in tasks}
        shares = {preset: summarize(own, every=options.every) for preset, own in seconds.items()}
    rows = [_row(options.task, preset, share) for preset, own in shares.items() for share in own]
    content = described({"steps": options.steps, "rows": rows, "seconds": _raw(seconds)})
    if options.out is not None:

        def draw() -> bytes:
            from steepest.lab.bench.train_png import train_png

            return train_png(shares)

        write_results(options.out, "train", content, rows, draw)
    if options.json:
        print(json.dumps(content, indent=2, allow_nan=False))
        return DONE
    for preset, own in shares.items():
        title = f"{options.task} {preset}: {options.steps} training steps of each method, {options.threads} thread(s)"
        print_table(title, COLUMNS, list(map(_cells, own)))
    return DONE


def _raw(seconds: Mapping[str, Mapping[str, Sequence[Seconds]]]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Of every step, in order of the rounds."""
    return {
        preset: {method: list(map(dataclasses.asdict, own)) for method, own in by_method.items()}
        for preset, by_method in seconds.items()
    }


def _row(task: str, preset: str, share: Share) -> dict[str, object]:
    """A line of the CSV; each median with its quartiles."""
    flat: dict[str, object] = {"task": task, "preset": preset, "method": share.method, "every": share.every}
    for name in ("forward_backward_ms", "optimizer_ms", "step_ratio", "optimizer_ratio"):
        own = getattr(share, name)
        flat |= {name: own.median, f"{name}_low": own.low, f"{name}_high": own.high}
    return {**flat, "share": share.share}


def _cells(share: Share) -> list[str]:
    own = share.optimizer_ms
    return [
        share.method + (f" (a refresh in {share.every})" if share.every else ""),
        f"{share.forward_backward_ms.median:.2f}",
        f"{own.median:.2f}",
        f"{own.low:.2f} to {own.high:.2f}",
        f"{share.share:.1%}",
        f"{share.step_ratio.median:.3f}",
        f"{share.optimizer_ratio.median:.3f}",
    ]
