"""Every example runs as a reader runs it, within its time, and says something; what it should say is in `SAYS`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steepest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LIMIT = 240  # seconds, on a machine that does other things besides; alone each takes less than a minute
# A line that must be there, and what must hold of the numbers in it.
SAYS = {
    "trainer_gpt2": (r"loss (\S+) -> (\S+)", lambda first, last: last < first - 1),
    "lora": (r"before: loss (\S+)\nafter: loss (\S+)", lambda before, after: after < before / 10),
    "lightning_images": (r"accuracy (\S+)%", lambda accuracy: accuracy > 95),
    "fsdp2_loop": (r"loss (\S+) -> (\S+); from the checkpoint (\S+)$", lambda a, b, c: b == c < a - 2),
    "choose_batch_size": (r"^ +8 +(\d+) +\d+\n(?:.*\n)* +512 +(\d+) +\d+$", lambda few, many: few > 1.5 * many),
    "lr_free_muonmax_momo": (r"10 +(\S+) +(\S+)$", lambda without, momo: momo < 0.5),
}


@pytest.mark.slow
@pytest.mark.hosts
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_says_what_it_should(path, tmp_path):
    source = str(Path(steepest.__file__).parents[1])
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": source, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if path.stem in SAYS:
        pattern, holds = SAYS[path.stem]
        found = re.search(pattern, done.stdout, flags=re.MULTILINE)
        assert found, done.stdout
        assert holds(*map(float, found.groups())), found[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.hosts
def test_the_sharded_loop_runs_under_torchrun(tmp_path):
    """Standalone: the launcher finds a free port."""
    source = str(Path(steepest.__file__).parents[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "examples" / "fsdp2_loop.py"), "--steps", "4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    _, end, again = map(float, re.search(SAYS["fsdp2_loop"][0], done.stdout, flags=re.MULTILINE).groups())
    assert end == again


def test_what_examples_say_is_of_examples_that_are_there():
    assert set(SAYS) <= {path.stem for path in EXAMPLES}
