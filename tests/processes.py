"""Beginning and end of a rank: a process that a test starts to be one of several."""

import os

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
