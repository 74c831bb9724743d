"""`steepest data`: shards of tokens are made of texts, and checked."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.command import Arg, Command, Group
from steepest.lab.cli.options import AsJson, File, checking_usage, count, number
from steepest.lab.cli.outcome import DONE, FAILED, Table, failed, print_json, print_tables
from steepest.lab.errors import UsageError

if TYPE_CHECKING:
    from steepest.lab.data.check import CheckedShard
    from steepest.lab.data.shards import SplitName

COLUMNS = ("shard", "tokens", "documents", "SHA-256")
SPLITS: dict[SplitName, str] = {"train": "training", "val": "validation"}


def share(text: str) -> float:
    """Of what is not trained on."""
    value = number(text, above=0.0)
    if value > 0.5:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most 0.5")
    return value


Tokens = Annotated[int, functools.partial(count, least=1024, most=2**31 - 1)]
Share = Annotated[float, share]


class Pack(Command, AsJson):
    """Make shards of GPT-2's tokens of texts, for --task fineweb.

    A file is one document, each line of a .jsonl another, in its field "text". Of a folder all files are taken, in the
    order of their paths, but hidden ones. <|endoftext|> stands before every document. For validation, --validation's
    share of the documents is held out, evenly spread; of a single file that is one document, the end.

    Nothing is downloaded. Killed at any moment and repeated, the command ends with the same files; with other texts or
    options it refuses to go on. Needs pip install 'steepest[data]'.

    examples:
      steepest data pack notes.txt --tokenizer gpt2 --out out/shards
      steepest data pack books web.jsonl --tokenizer gpt2/tokenizer.json --validation 0.01 --out out/shards
    """

    saves = True

    texts: Annotated[tuple[File, ...], Arg("files and folders, UTF-8", "TEXT", "place")]
    tokenizer: Annotated[
        File,
        Arg(
            "GPT-2's: tokenizer.json, or a folder with it, or with vocab.json or encoder.json and merges.txt or "
            "vocab.bpe",
            "PATH",
        ),
    ]
    out: Annotated[File, Arg("a folder for the shards alone, in none of the texts", "DIR")]
    shard_tokens: Annotated[Tokens, Arg("of a shard; a window of training does not go from one to the next", "N")] = (
        100_000_000
    )
    validation: Annotated[Share, Arg("share that is held out")] = 0.05

    def run(self) -> int:
        """Make them, and tell how many there are."""
        import msgspec
        from rich.console import Console

        from steepest.lab.data.documents import identify
        from steepest.lab.data.pack import Progress, check_apart, pack
        from steepest.lab.data.tokenizer import GPT2, read_tokenizer

        check_apart(self.out, self.texts)
        tokenizer = read_tokenizer(self.tokenizer)
        with Console(stderr=True).status("Reading the texts once, by which they are known again"):
            texts = [identify(path) for path in self.texts]
        size, read = sum(text.bytes for text in texts), 0
        with _bar(size) as (advance, line):

            def tell(progress: Progress) -> None:
                nonlocal read
                advance(progress.read - read, f"{progress.tokens:,} tokens")
                read = progress.read
                if progress.shard is not None:
                    line(f"{progress.shard.name}: {progress.shard.tokens:,} tokens")

            manifest = pack(
                texts,
                tokenizer,
                self.out,
                shard_tokens=self.shard_tokens,
                validation=self.validation,
                tell=tell,
            )
        known = tokenizer.sha256 == GPT2
        if self.json:
            return print_json({**msgspec.to_builtins(manifest), "gpt2": known})
        for split, name in SPLITS.items():
            print(_counted(name, [shard.tokens for shard in manifest.shards if shard.split == split]))
        if not known:
            print(
                "The vocabulary is not GPT-2's, though it has as many tokens: losses compare with no other's, and "
                "the shards go with no others."
            )
        print(f"Shards: {self.out}")
        return DONE


class Check(Command, AsJson):
    """Read all shards of a folder, and tell what they hold and what is wrong with them.

    Header, size and every token are checked, and the SHA-256 printed, to compare with those of whoever made the shards.
    Where they were made by `steepest data pack` it is compared with what was written then, so that no byte of them has
    changed and none is missing or foreign. The exit code is 1 if something is wrong.

    examples:
      steepest data pack notes.txt --tokenizer gpt2 --out out/shards
      steepest data check out/shards
    """

    folder: Annotated[File, Arg("with *_train_*.bin and *_val_*.bin", "DIR", "place")]

    def run(self) -> int:
        """Check them."""
        from steepest.lab.data.check import check_folder
        from steepest.lab.data.shards import shard_paths

        with checking_usage():
            if not self.folder.is_dir():
                raise UsageError(f"{str(self.folder)!r} is not a folder. Give the one with the shards.")
            paths = [path for split in SPLITS for path in shard_paths(self.folder, split, needed=False)]
            with _bar(sum(path.lstat().st_size for path in paths)) as (advance, _):
                checked, others = check_folder(self.folder, tell=advance)
        whole = {split: [one for one in checked if one.split == split and one.problem is None] for split in SPLITS}
        windows = {split: _windows(shards) for split, shards in whole.items()}
        problems = [*(one.problem for one in checked if one.problem), *others]
        if self.json:
            shards = [asdict(one) for one in checked]
            print_json({"shards": shards, "windows": windows, "problems": problems})
        else:
            rows = [[one.name, *map(_shown, (one.tokens, one.documents, one.sha256))] for one in checked]
            notes = [
                f"{_counted(name, [one.tokens or 0 for one in whole[split]])}; windows of "
                + ", ".join(f"{length}: {found:,}" for length, found in windows[split].items())
                for split, name in SPLITS.items()
            ]
            print_tables([Table(str(self.folder), COLUMNS, rows, notes)])
        for problem in problems:
            failed(problem)
        return FAILED if problems else DONE


def _windows(shards: Sequence[CheckedShard]) -> dict[int, int]:
    """How many windows of each preset of the task they give, by its length."""
    from steepest.lab.tasks.fineweb import PRESETS

    lengths = sorted({preset.window for preset in PRESETS.values()})
    return {length: sum((one.tokens or 0) // (length + 1) for one in shards) for length in lengths}


def _counted(name: str, tokens: Sequence[int]) -> str:
    return f"For {name}: {sum(tokens):,} tokens in {len(tokens)} shard{'' if len(tokens) == 1 else 's'}"


def _shown(value: int | str | None) -> str:
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else value


@contextlib.contextmanager
def _bar(size: int) -> Generator[tuple[Callable[..., None], Callable[[str], None]]]:
    """A bar on a terminal, and lines elsewhere: what moves it by bytes, and what prints a line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, expand=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=size)

        def advance(more: int, told: str = "") -> None:
            bar.update(task, advance=more, description=told)

        def line(text: str) -> None:
            if not console.is_terminal:
                console.print(text, markup=False, highlight=False)

        yield advance, line


GROUP = Group("Shards of tokens, for --task fineweb.", {"pack": Pack, "check": Check})
