"""The lead of Newton-Muon over Muon along the runs of `tiny`, paired by seed.

.venv/bin/python results/newton_muon/lead.py
"""

import json
import statistics
from pathlib import Path

from steepest.lab.disk.packed import StudyFiles
from steepest.lab.studies.records import Listed

STUDY = Path(__file__).parent / "tiny"


def main() -> None:
    """Print the mean difference of evaluation losses, its standard error and its sign per seed, every 100 steps."""
    losses: dict[tuple[str, int], dict[int, float]] = {}
    study = StudyFiles(STUDY)
    for run in map(study.run, study.study(Listed).runs):
        config = json.loads(run.text("config.json"))
        rows = map(json.loads, run.lines("metrics.jsonl"))
        losses[config["method"], config["seed"]] = {r["step"]: r["loss"] for r in rows if r["kind"] == "eval"}
    seeds = sorted(seed for method, seed in losses if method == "muon")
    for step in (100, 200, 300, 400, 500):
        lead = [losses["newton-muon", seed][step] - losses["muon", seed][step] for seed in seeds]
        error = statistics.stdev(lead) / len(lead) ** 0.5
        ahead = sum(x < 0 for x in lead)
        print(f"| {step} | {statistics.mean(lead):+.4f} ± {error:.4f} | {ahead} of {len(lead)} |")  # noqa: T201 - a command


if __name__ == "__main__":
    main()
