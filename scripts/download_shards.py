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
    """tiny, fineweb-edu, climbmix, a folder, a file, a Hub data set org/name[:path], or a URL; {index:05d} stands for many."""
    num_shards: int | None = None
    """Training shards to have (default 8, of local files all); validation comes on top. Not for tiny, which is whole."""
    out: Path | None = None
    """Folder to put them in; default data/NAME, by the name of the source."""
    workers: int = 4
    """Downloads at a time."""
    val_index: int | None = None
    """Shard for validation where no file is called so; default: one document in 50 of shard 0."""
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
        from edu.data.shard_folder import verify_folder
        from edu.data.shards import read_manifest

        problems = verify_folder(out)
        print(printable("\n".join(problems)) or f"{out}: all {len(read_manifest(out))} shards are right")
        return 1 if problems else 0
    return write_tiny(args, out) if args.source == "tiny" else download(args, out)


def default_folder(source: str) -> Path:
    """Return data/NAME: of the folder or file, the data set, or the last part of a URL that has no {index}."""
    if "://" in source:
        parts = [part for part in source.partition("?")[0].split("/")[2:] if part and "{" not in part]
        return Path("data", Path(parts[-1]).stem if len(parts) > 1 else parts[-1].partition(":")[0])
    place = Path(source)
    if place.exists():
        return Path("data", place.resolve().name if place.is_dir() else place.stem)
    return Path("data", source.partition(":")[0].rpartition("/")[2])


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


def megabytes(size: int) -> str:
    """Return a number of bytes in words.

    >>> megabytes(97_300_000), megabytes(25_100)
    ('97.3 MB', '0.03 MB')
    """
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e6:.2f} MB"


def download(args: Args, out: Path) -> int:
    """Say what will be fetched, fetch what is missing, and list what could not be had."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from edu.data.shard_folder import download_shards
    from edu.data.shards import SHARD_NAME
    from edu.data.sources import SHARE, find_source

    source = find_source(args.source, args.val_index)
    local = Path(args.source).resolve()
    if local.is_dir() and out.resolve().is_relative_to(local):
        raise ValueError(f"--out {out}: lies in --source {args.source}; name a folder outside, such as data/mine")
    most = None if source.num_shards is None else source.num_shards - len(source.validation)
    usual = most if local.exists() and most else min(8, most or 8)
    training = source.training(usual if args.num_shards is None else args.num_shards)
    indices = [*source.validation, *training]
    held_out = (
        f"{len(source.validation)} for validation"
        if source.validation
        else f"1 document in {SHARE} of shard 0 held out"
    )
    size = f", {megabytes(sum(source.sizes[index] for index in indices))}" if source.sizes else ""
    print(f"{source.origin} -> {out}: {len(training)} shards for training, {held_out}{size}", flush=True)
    if source.left_out:
        print(f"left out (other splits): {', '.join(source.left_out)}")
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as bars:
        tasks, announced = {}, dict.fromkeys(indices, 0.0)

        def show(index: int, done: int, total: int | None) -> None:
            if index not in tasks:
                tasks[index] = bars.add_task(SHARD_NAME.format(index=index))
            bars.update(tasks[index], completed=done, total=total, visible=done != total)
            if bars.disable and total and done / total >= announced[index] + 0.25:
                announced[index] = done / total
                print(f"{SHARD_NAME.format(index=index)}: {megabytes(done)} of {megabytes(total)}", flush=True)

        failed = download_shards(indices, out, source, workers=args.workers, on_progress=show)
    print(f"{out}: {len(indices) - len(failed)} of {len(indices)} shards are there")
    for error in failed.values():
        print(f"missing: {printable(error)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
