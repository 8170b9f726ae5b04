"""Fetch text shards and the validation shard. Example: python scripts/download_shards.py --source fineweb-edu

Without the network: --source tiny writes the embedded corpus. Rerun at any time: what is there is kept, what was
begun is continued. About 100 MB a shard, so 8 + 1 of them take 75 s at 100 Mbit/s; --verify reads 1 GB a second.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from edu.config.cli import parse, run_script
from edu.config.terminal import printable


@dataclass(frozen=True)
class Args:
    source: str = "tiny"
    """tiny, fineweb-edu, climbmix, a Hub dataset org/name[:pattern], a URL pattern with {index:05d}, or a folder."""
    num_shards: int | None = None
    """Training shards to have (default 8); the validation shard always comes on top. Not for tiny, which is whole."""
    out: Path | None = None
    """Where to put them; default data/<source>."""
    workers: int = 4
    """Downloads at a time."""
    val_index: int | None = None
    """Which shard is for validation, where the source does not say so itself."""
    seed: int = 0
    """Of the embedded corpus, --source tiny."""
    verify: bool = False
    """Download nothing: check the folder against its manifest.json; exit code 1 if a file is wrong."""


def main() -> int:
    """Return 1 if a shard is missing or wrong, 0 if all are there."""
    args = parse(Args)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: give 1 or more")
    out = args.out or default_folder(args.source)
    if args.verify:
        from edu.data.shards import read_manifest, verify_folder

        problems = verify_folder(out)
        print(printable("\n".join(problems)) or f"{out}: all {len(read_manifest(out))} shards are right")
        return 1 if problems else 0
    return write_tiny(args, out) if args.source == "tiny" else download(args, out)


def default_folder(source: str) -> Path:
    """data/<source> for a name or a Hub dataset."""
    from edu.data.shards import KNOWN

    name = source.partition(":")[0].rpartition("/")[2]
    if source not in ("tiny", *KNOWN) and ("://" in source or Path(source).is_dir()):
        raise ValueError(f"--source {source}: name a folder for its shards with --out, such as data/mine")
    return Path("data", name)


def write_tiny(args: Args, out: Path) -> int:
    """Write the embedded corpus, unless it is there, and enter it in the manifest."""
    if args.num_shards is not None:
        raise ValueError(f"--num-shards {args.num_shards}: the tiny corpus has a fixed size; leave it out")
    from edu.data.download import sha256_of
    from edu.data.shards import list_shards, read_manifest, record_shard
    from edu.synthetic.world.corpus import MANIFEST, write_corpus

    write_corpus(out, seed=args.seed)
    origin = f"tiny {sha256_of(out / MANIFEST)}"  # another seed or generator is another source
    if {entry["source"] for entry in read_manifest(out).values()} != {origin}:
        (out / "manifest.json").unlink(missing_ok=True)
    shards = list_shards(out, "train") + list_shards(out, "val")
    for path in shards:
        record_shard(path, out, "", origin)
    print(f"{out}: {len(shards)} of {len(shards)} shards are there")
    return 0


def download(args: Args, out: Path) -> int:
    """Download what is missing, with a bar for each running shard on a terminal; list what could not be had."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from edu.data.shards import SHARD_NAME, download_shards, find_source

    source = find_source(args.source, args.val_index)
    if not source.validation:
        raise ValueError(f"--source {args.source}: say with --val-index which of its shards is for validation")
    indices = [*source.validation, *source.training(8 if args.num_shards is None else args.num_shards)]
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as bars:
        tasks = {}

        def show(index: int, done: int, total: int | None) -> None:
            if index not in tasks:
                tasks[index] = bars.add_task(SHARD_NAME.format(index=index))
            bars.update(tasks[index], completed=done, total=total, visible=done != total)

        failed = download_shards(indices, out, source, workers=args.workers, on_progress=show)
    print(f"{out}: {len(indices) - len(failed)} of {len(indices)} shards are there")
    for error in failed.values():
        print(f"missing: {printable(error)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
