import subprocess
import sys

import pytest

from steepest.lab.runs import memory
from steepest.lab.runs.memory import peak_memory

CHILD = "import runpy, sys; print(runpy.run_path(sys.argv[1])['peak_memory']())"


@pytest.mark.slow
def test_it_grows_with_what_was_held_and_does_not_shrink():
    before = peak_memory()
    held = bytearray(b"x") * (before + 2**26)  # above all peaks so far
    assert before + 2**26 <= peak_memory() < 4 * (before + 2**26)
    del held
    assert peak_memory() >= before + 2**26


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands the peak of one program on to the next")
def test_a_small_process_of_a_large_one_is_small():
    assert peak_memory() > 100e6  # torch is loaded here, and nothing there
    child = subprocess.run([sys.executable, "-c", CHILD, memory.__file__], check=True, capture_output=True, text=True)
    assert 1e6 < int(child.stdout) < 100e6


def test_the_line_is_in_kibibytes(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t    99 kB\nVmHWM:\t    12 kB\nVmRSS:\t    7 kB\n")
    assert peak_memory(status=tmp_path / "status") == 12 * 1024


@pytest.mark.parametrize("content", [None, "Name:\tpython\n"])
def test_without_the_line_the_resource_usage_is_taken(tmp_path, content):
    if content is not None:
        (tmp_path / "status").write_text(content)
    assert 50e6 < peak_memory(status=tmp_path / "status") < 50e9  # bytes, not kilobytes
