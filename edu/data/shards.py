"""Parquet shards of text: where they come from, the folder they make, and the proof that it is whole (challenge 1).

A shard gets its final name once its size, checksum and parquet footer are right (edu.data.download), then an entry in
`manifest.json`. Training shards lie in the folder itself, validation shards in its `val/`. No torch here.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypedDict

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from huggingface_hub import hf_hub_url

from edu.config.network import public_url
from edu.data.atomic_io import write_text
from edu.data.download import Again, Retry, TransferError, fetch, sha256_of
from edu.data.parquet import holds_text

Progress = Callable[[int, int, int | None], None]  # (shard index, bytes here, bytes in all or None)
Get = Callable[[str, Path, Callable[[Path, bool], None]], bool]  # (URL, path, check), as `fetch`
SHARD_NAME = "shard_{index:05d}.parquet"
SPLITS = {"train": "train training", "val": "validation valid val dev", "test": "test testing eval evaluation"}
"""Words in a path that name a split, as the Hub reads them."""


class ShardError(OSError):
    """A shard that could not be had; the message names the file, the URL and what to do."""


class Entry(TypedDict):
    """A file's entry in the manifest."""

    size: int
    sha256: str
    url: str
    source: str


@dataclass(frozen=True)
class Source:
    """An origin of shards: a Hub data set (has `repo`), local files, or a web server.

    >>> KNOWN["fineweb-edu"].training(3), KNOWN["fineweb-edu"].validation
    ([0, 1, 2], (1822,))
    """

    name: str
    """The value of --source."""
    pattern: str
    """A path in the repo or a URL, {index} to be filled in; with `files`, the folder or file that holds them."""
    repo: str = ""
    files: tuple[tuple[str, ...], ...] = ()
    """By index, training first: what a shard is made of, a path in the repo or a URL, or several local paths."""
    num_shards: int | None = None
    """Training and validation together; None: unknown."""
    validation: tuple[int, ...] = ()
    """The indices that go to val/. None given: a share of shard 0 does."""
    convert: Callable[[Sequence[str], Path, Path | None, Get], bool] | None = None
    """Has files, fetched by `Get`, as a shard, a share of it at the third path if any; None: every file is a shard."""
    sizes: tuple[int, ...] = ()
    """Bytes by index, where known before."""
    left_out: tuple[str, ...] = ()
    """Files of other splits."""

    @property
    def origin(self) -> str:
        """Return the identity kept in the manifest; shards of two origins never share a folder."""
        where = ":".join(filter(None, (self.repo, self.pattern))) if self.repo else public_url(self.pattern)
        return f"{where}, a share of shard 0 for validation" if self.convert and not self.validation else where

    def shares(self, index: int) -> bool:
        """Check whether a part of this shard is the validation split, for want of another."""
        return self.convert is not None and not self.validation and index == 0

    def url(self, index: int) -> str:
        """Return the file's address (on the Hub: below HF_ENDPOINT) or local path; ValueError if there is no such shard."""
        if index < 0 or (self.num_shards is not None and index >= self.num_shards):
            raise ValueError(f"source {self.name} has no shard {index}; its last is {(self.num_shards or 0) - 1}")
        file = self.files[index][0] if self.files else self.pattern.format(index=index)
        return hf_hub_url(self.repo, file, repo_type="dataset") if self.repo else file

    def training(self, count: int) -> list[int]:
        """Return the first `count` indices that are not validation."""
        most = None if self.num_shards is None else self.num_shards - len(self.validation)
        if count < 1 or (most is not None and count > most):
            limit = "1 or more" if most is None else f"1 to {most}"
            raise ValueError(f"--num-shards {count}: source {self.name} has {limit} training shards")
        return [index for index in range(count + len(self.validation)) if index not in self.validation][:count]


KNOWN = {
    name: Source(name, SHARD_NAME, repo, num_shards=last + 1, validation=(last,))
    for name, repo, last in [
        ("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", 1822),
        ("climbmix", "karpathy/climbmix-400b-shuffle", 6542),
    ]
}


def split_of(name: str) -> str:
    """Return the split (of SPLITS) that the first such word in a path names; "train" without one.

    >>> split_of("data/validation-00000-of-00001.parquet"), split_of("val/shard_7.parquet"), split_of("latest.txt")
    ('val', 'val', 'train')
    """
    split_by_word = {word: split for split, words in SPLITS.items() for word in words.split()}
    found = re.search(rf"(?<![a-z])({'|'.join(split_by_word)})(?![a-z])", name.lower())
    return split_by_word[found[1]] if found else "train"


def shard_path(index: int, target_dir: Path | str, source: Source) -> Path:
    """Return the final path: validation shards in `val/`, where training never looks."""
    return Path(target_dir, "val" if index in source.validation else "", SHARD_NAME.format(index=index))


def parquet_files(data_dir: Path | str) -> list[Path]:
    """List all parquet files below a folder, sorted, hidden ones left out."""
    found = sorted(Path(data_dir).rglob("*.parquet"))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(data_dir).parts)]


def list_shards(data_dir: Path | str, split: Literal["train", "val"]) -> list[Path]:
    """List the shards of one split, sorted, folders within included; ValueError naming the command when there are none."""
    folder, found = Path(data_dir), parquet_files(data_dir)
    if shards := [path for path in found if split_of(path.relative_to(folder).as_posix()) == split]:
        return shards
    if found and not (folder / "manifest.json").exists():
        command = f"--source {data_dir} --out data/mine (takes a share for validation), and use data/mine"
    else:
        command = f"--source {folder.name if folder.name in {'tiny', *KNOWN} else 'SOURCE'} --out {data_dir}"
    where = folder / "val" if split == "val" else folder
    raise ValueError(f"{where}: no {split} shards (*.parquet) here; run: python scripts/download_shards.py {command}")


def find_pattern(text: str) -> Source:
    """Read a known name, `https://host/part-{index:03d}.parquet`, or `org/name:path-{index:05d}.parquet` (on the Hub)."""
    if text in KNOWN:
        return KNOWN[text]
    repo, _, file = ("", "", text) if re.match("https?://", text) else text.partition(":")
    try:
        first, second = file.format(index=0), file.format(index=1)
        httpx2.URL(first)
    except (LookupError, ValueError, AttributeError, httpx2.InvalidURL) as error:
        raise ValueError(f"--source: the pattern {public_url(file)} cannot be filled in: {error}") from error
    if first == second:
        raise ValueError(f"--source {public_url(text)}: the pattern needs an {{index}}, such as {SHARD_NAME}")
    return Source(text, file, repo)


def download_shard(
    index: int,
    target_dir: Path | str,
    source: str | Source = "fineweb-edu",
    *,
    retry: Retry | None = None,
    pause: Callable[[float], object] = time.sleep,
    on_progress: Progress | None = None,
) -> Path:
    """Download and check shard `index` into `target_dir` (a validation shard: in its `val/`); return its path.

    Raises ShardError after the last retry, or at once where another attempt cannot help (HTTP 404, a full disk, no
    column `text`); ValueError for a source or index that does not exist. Whatever happens, a power failure included,
    the final name holds the right file or does not exist, and calling again completes it.
    """
    source = find_pattern(source) if isinstance(source, str) else source
    url, path = source.url(index), shard_path(index, target_dir, source)
    # 1. A folder holds shards of one origin, and a shard of one split is never there in the other too.
    refuse_mixing(target_dir, source.origin)
    report = (lambda done, total: on_progress(index, done, total)) if on_progress else None
    get = partial(fetch, hub=bool(source.repo), retry=retry, pause=pause, report=report)
    twin = Path(target_dir, "" if path.parent.name == "val" else "val", path.name)
    shared = source.shares(index)
    files = source.files[index] if source.files and not source.repo else (url,)
    place = public_url(url) if len(files) == 1 else f"{url} and {len(files) - 1} more"
    try:
        if twin.exists() and not shared:
            raise TransferError(f"{twin} is this shard in the other split; delete it, or choose another --out")
        # 2. Fetch it under a temporary name, check it, rename it; a file of another form is written as a shard instead.
        if source.convert:
            fresh = source.convert(files, path, twin if shared else None, get)
        else:
            fresh = get(url, path, check_parquet)
        # 3. Enter size and checksum in the manifest, so that a later change is noticed.
        for made in (path, twin) if shared else (path,):
            record_shard(made, target_dir, place, source.origin, checked=fresh)
    # 4. Say whether a rerun helps: it continues from the bytes that are here.
    except Again as error:
        raise ShardError(f"{path}: {public_url(f'{url}: {error}')}; run it again, it goes on from here") from error
    except (TransferError, ConnectionError) as error:
        raise ShardError(f"{path}: {public_url(f'{url}: {error}')}") from error
    except OSError as error:
        raise ShardError(
            f"{path}: {public_url(f'{url}: {error}')}; mend that (room? rights?) and run it again"
        ) from error
    return path


def check_parquet(path: Path, proven: bool = False) -> None:
    """Raise Again if the file is not readable, TransferError if it is but cannot serve as a shard.

    Not `proven` by a checksum, every page of the text is decoded (0.5 s for 100 MB), not only the footer.
    """
    try:
        with pq.ParquetFile(path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
            if not holds_text(schema) or not rows:
                columns = ", ".join(schema.names)
                raise TransferError(f"not a shard: needs rows with a string column `text`; has {rows} of {columns}")
            for _ in () if proven else file.iter_batches(batch_size=1024, columns=["text"]):
                pass
    except TransferError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = f"not a readable parquet file: {error}"
        raise (TransferError(reason) if proven else Again(reason, keep=False)) from error


def read_manifest(data_dir: Path | str) -> dict[str, Entry]:
    """Return the entries by path relative to the folder ("val/shard_01822.parquet"); empty without a manifest."""
    path = Path(data_dir, "manifest.json")
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if isinstance(entries, dict) and all(
            isinstance(entry, dict) and {"size", "sha256", "source"} <= set(entry) for entry in entries.values()
        ):
            return entries  # type: ignore[return-value]
        raise ValueError("expected size, sha256 and source of each shard")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a manifest ({error}); delete it: the next download writes it anew") from error


def refuse_mixing(data_dir: Path | str, origin: str) -> None:
    """Raise ValueError if the folder holds shards of another origin."""
    if others := {entry["source"] for entry in read_manifest(data_dir).values()} - {origin}:
        raise ValueError(f"{data_dir}: holds shards of {', '.join(others)}, not of {origin}; choose another --out")


def record_shard(path: Path, data_dir: Path | str, url: str, origin: str, *, checked: bool = False) -> None:
    """Enter a shard in the manifest; TransferError if what stands there is not what was entered, or no shard at all."""
    folder, name, size = Path(data_dir), path.relative_to(data_dir).as_posix(), path.stat().st_size
    if known := read_manifest(folder).get(name):
        if "://" not in url + known["url"] and url and known["url"] != url:
            raise TransferError(f"it was made of {known['url']}; delete {folder}, or choose another --out")
        if known["size"] != size:
            raise TransferError(f"the file has {size} bytes, its manifest says {known['size']}; delete it and rerun")
        return
    try:
        check_parquet(path, proven=checked)
    except (Again, TransferError) as error:
        raise TransferError(f"{error}; delete the file and rerun") from error
    entry: Entry = {"size": size, "sha256": sha256_of(path), "url": url, "source": origin}
    with FileLock(folder / ".manifest.lock", fallback_to_soft=False):
        entries = dict(sorted({**read_manifest(folder), name: entry}.items()))
        write_text(folder / "manifest.json", json.dumps(entries, indent=1))
