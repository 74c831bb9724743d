"""Beginning and end of a rank: a process that a test starts to be one of several."""

import contextlib
import io
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import types
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

FORKSERVER = multiprocessing.get_context("forkserver")  # torch is imported once for all ranks
PRELOAD = ["steepest", "torch._dynamo", *(f"torch.distributed.{n}" for n in ("fsdp", "tensor.parallel", "checkpoint"))]
PATIENCE = 60  # seconds that a rank waits for another in one exchange


def join_ranks(rank, world, folder, *, patience=None):
    """One thread each, as they share the machine's cores; they meet in a file."""
    torch.set_num_threads(1)
    options = {} if patience is None else {"timeout": timedelta(seconds=patience)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world, **options)


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


class RanksFailed(AssertionError):  # noqa: N818 - a check that failed, in other processes
    """Some ranks raised an error, ended or did not answer; `errors` has what each says, None where all is well."""

    def __init__(self, errors):
        self.errors = errors
        super().__init__("\n".join(f"rank {rank}: {error or 'done'}" for rank, error in enumerate(errors)))


class World:
    """Ranks that are started once and do one task after the other.

    A task is a function of a module, which all ranks call at once with the same arguments; the world of one whose task
    failed on some rank is ended, as the others may wait for it forever, and started anew for the next task.
    """

    def __init__(self, size, *, patience=PATIENCE):
        self.size, self.patience = size, patience
        self.processes = []

    def start(self):
        FORKSERVER.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.pipes = []
        for rank in range(self.size):
            here, there = FORKSERVER.Pipe()
            process = FORKSERVER.Process(
                target=serve, args=(rank, self.size, self.folder.name, there, self.patience), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, task, *args, limit=120, grace=3):
        """What the task returns on each rank.

        Args:
            task: The function.
            args: Of it.
            limit: Seconds that it may take.
            grace: Seconds that are left to the others when one rank has failed.

        Raises:
            RanksFailed: If it raises on some.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((task, args))
        answers, until = {}, time.monotonic() + limit
        while left := [pipe for pipe in self.pipes if pipe not in answers]:
            ready = multiprocessing.connection.wait(left, until - time.monotonic())
            for pipe in ready or left:
                answers[pipe] = self.answer(pipe) if ready else ("no answer", None)
                if answers[pipe][0]:  # the others may wait for it in vain
                    until = min(until, time.monotonic() + grace)
        found = [answers[pipe] for pipe in self.pipes]
        if any(error for error, _ in found):
            self.end()
            raise RanksFailed([error for error, _ in found])
        return [value for _, value in found]

    def answer(self, pipe):
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            return "ended", None

    def end(self):
        """Kill what still lives."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes = []


def serve(rank, size, folder, pipe, patience):
    """A rank of a world: does tasks until nobody asks any more."""
    join_ranks(rank, size, folder, patience=patience)
    while True:
        try:
            task, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = None, task(*args)
        except Exception:  # noqa: BLE001 - whatever it is, the test shows it
            answer = traceback.format_exc(), None
        pipe.send(answer)
