"""Beginning and end of a rank: a process that a test starts to be one of several."""

import contextlib
import io
import os
import types
from pathlib import Path

import torch
import torch.distributed as dist


def join_ranks(rank, world, folder):
    """One thread each, as they share the machine's cores; they meet in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)


def leave_ranks():
    """The last line of a rank whose checks all passed.

    Nobody leaves before the others are done, and the process ends without taking its objects apart: what an exception's
    traceback still holds (a DDP module, a process group) is otherwise freed after gloo's threads, which now and then
    aborts the process.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def run_scripts(rank, world, scripts, ports, folder):
    """Run scripts one after the other, each as `torchrun` would; what they print is left in `folder`.

    Args:
        rank: Of this process.
        world: How many there are.
        scripts: Their text, by name.
        ports: Of the stores in which the ranks of each meet, made by who started the processes.
        folder: Also where scripts run.
    """
    torch.set_num_threads(1)
    os.chdir(folder)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(number) for name, number in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for (name, text), port in zip(scripts.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, name, "exec"), vars(types.ModuleType("script")))  # noqa: S102 - our own documents
        Path(f"{name}.{rank}").write_text(out.getvalue())
    os._exit(0)
