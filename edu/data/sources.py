"""Sources of shards: parquet, JSON lines or text, here or on the Hub, as --source names them.

1. Files are listed. A path says their split by the Hub's words (edu.data.shards.split_of); test splits are left out.
2. Parquet files are shards as they stand. JSON lines (field `text`) and text files are written as parquet.
3. Where no file is called validation, one document in SHARE of shard 0 is held out, by a checksum of its text.
"""

import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from edu.config.network import public_url
from edu.data.atomic_io import publish
from edu.data.download import Again, TransferError
from edu.data.hub_files import hub_errors
from edu.data.rows import read_rows
from edu.data.shards import KNOWN, SPLITS, Get, Source, check_parquet, find_pattern, split_of

KINDS = (".parquet", ".jsonl", ".txt")
SHARE = 50
SHARD_BYTES = 100 << 20  # JSON lines and text files are joined up to this size
DOCUMENT = 4000  # characters after which a text file's next blank line ends a document; after four times that, any line
SEPARATOR = "<|endoftext|>"  # ends a document of a text file


def find_source(text: str, val_index: int | None = None) -> Source:
    """Read --source: a known name, a folder or file, a URL (with {index}: of many), or `org/name[:path]` on the Hub.

    `val_index` makes one shard the validation split where the source does not name one; ValueError where it does.
    """
    if text in KNOWN or "{" in text:
        source = find_pattern(text)
        source = source if source.validation else replace(source, convert=convert)
    elif "://" in text:
        _check_kind(text, urlsplit(text).path)
        source = Source(text, text, "", ((text,),), 1, convert=convert)
    elif Path(text).exists():
        source = _local_source(text, Path(text).resolve())
    elif text.partition(":")[0].count("/") == 1 and not text.startswith(("/", "./", "../", "~")):
        source = _hub_source(text)
    else:
        names = ", ".join(["tiny", *KNOWN])
        raise ValueError(f"--source {text}: is none of {names}, a file, a folder, a URL, org/name[:path]")
    if val_index is None:
        return source
    if source.validation:
        raise ValueError(f"--val-index {val_index}: source {text} names its validation shards itself; leave it out")
    source.url(val_index)
    return replace(source, validation=(val_index,))


def _check_kind(text: str, path: str) -> None:
    if PurePosixPath(path).suffix.lower() not in KINDS:
        raise ValueError(f"--source {public_url(text)}: is no file of {', '.join(KINDS)}")


def _local_source(text: str, place: Path) -> Source:
    """List a folder, those below it included, or take one file; neighboring text files are joined."""
    folder = place if place.is_dir() else place.parent
    found = sorted(place.rglob("*")) if place.is_dir() else [place]
    names = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
    if (folder / "manifest.json").exists():  # made by download_shards: the rest is not its own
        names = [name for name in names if name.endswith(".parquet")]
    sizes = {name: (folder / name).stat().st_size for name in names}
    if place.is_file():
        _check_kind(text, place.name)
    train, val, left_out = _by_split(names, text) if place.is_dir() else (names, [], [])
    groups = [_join(part, sizes) for part in (train, val)]
    files = tuple(tuple(str(folder / name) for name in group) for part in groups for group in part)
    totals = tuple(sum(sizes[name] for name in group) for part in groups for group in part)
    validation = tuple(range(len(groups[0]), len(files)))
    return Source(text, str(place), "", files, len(files), validation, convert, totals, tuple(left_out))


def _hub_source(text: str) -> Source:
    """List the data files of a Hub data set, or those below a path of it; parquet if there is any."""
    from huggingface_hub import HfApi

    repo, _, path = text.partition(":")
    path = path.strip("/")
    with hub_errors(f"--source {text}", "read"):
        siblings = HfApi().dataset_info(repo, files_metadata=True).siblings or []
    sizes = {each.rfilename: each.size or 0 for each in siblings}
    names = sorted(name for name in sizes if not path or name == path or name.startswith(f"{path}/"))
    kind = next((kind for kind in KINDS if any(name.endswith(kind) for name in names)), "")
    train, val, left_out = _by_split([name for name in names if name.endswith(kind)], text)
    words = {word for words in SPLITS.values() for word in words.split()}
    parents = {"/".join(part for part in PurePosixPath(name).parent.parts if part not in words) for name in train}
    if len(parents) > 1:
        choice = ", ".join(f"{repo}:{parent}" for parent in sorted(parents) if parent)
        raise ValueError(f"--source {text}: holds several data sets; choose one of {choice}")
    files, validation = tuple((name,) for name in (*train, *val)), tuple(range(len(train), len(train) + len(val)))
    totals = tuple(sizes[name] for name in (*train, *val))
    return Source(text, path, repo, files, len(files), validation, convert, totals, tuple(left_out))


def _by_split(names: Sequence[str], text: str) -> tuple[list[str], list[str], list[str]]:
    """Divide data files into training, validation and others; ValueError if there is nothing to train on."""
    data = [
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in KINDS
        and not any(part.startswith(".") for part in PurePosixPath(name).parts)
        and PurePosixPath(name).stem.lower() not in ("readme", "license")
    ]
    train, val, left_out = ([name for name in data if split_of(name) == split] for split in SPLITS)
    if not train:
        raise ValueError(f"--source {text}: holds no training files ({', '.join(KINDS)}), {len(data)} of other splits")
    return train, val, left_out


def _join(names: Sequence[str], sizes: dict[str, int]) -> list[list[str]]:
    """Group files into shards, in order: parquet files are one each, others are joined up to SHARD_BYTES."""
    groups = list[list[str]]()
    for name in names:
        single = name.endswith(".parquet") or not groups or groups[-1][-1].endswith(".parquet")
        if single or sum(sizes[each] for each in groups[-1]) + sizes[name] > SHARD_BYTES:
            groups.append([])
        groups[-1].append(name)
    return groups


def convert(files: Sequence[str], path: Path, share: Path | None, get: Get) -> bool:
    """Write files as the shard `path`, part of them as `share` if it is given; False if both are there already."""
    remote, kind = "://" in files[0], PurePosixPath(urlsplit(files[0]).path).suffix.lower()
    if remote and share is None and kind not in KINDS[1:]:
        return get(files[0], path, check_parquet)
    targets = [path] if share is None else [share, path]  # in the order of their renaming
    if all(target.exists() for target in targets):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False):
        if all(target.exists() for target in targets):  # another process was faster
            return False
        raw = [Path(file) for file in files]
        if remote:
            raw = [path.with_name(f".{path.stem}.raw{kind or '.parquet'}")]
            get(files[0], raw[0], (lambda *_: None) if kind in KINDS[1:] else check_parquet)
        temporary = [target.with_name(f".{target.name}.tmp") for target in targets]
        try:
            for each in temporary:
                each.parent.mkdir(parents=True, exist_ok=True)
                each.unlink(missing_ok=True)
            write_shard(raw, temporary[-1], None if share is None else temporary[0])
            for each, target in zip(temporary, targets, strict=True):
                publish(each, target)
        finally:
            for each in [*temporary, *(raw if remote and path.exists() else ())]:
                each.unlink(missing_ok=True)
    with suppress(OSError):  # Windows: who waits for it holds it open
        path.with_name(f".{path.name}.lock").unlink()
    return True


def write_shard(files: Sequence[Path], shard: Path, share: Path | None) -> None:
    """Write the texts of files as a parquet shard, one in SHARE of the documents to `share` if it is given."""
    if share is None and files[0].suffix == ".parquet":
        shutil.copyfile(files[0], shard)
        try:
            check_parquet(shard)
        except Again as error:
            raise TransferError(str(error)) from error
        return
    held_out = set[int]()
    if share is not None:
        sums = {_checksum(text) for text in read_texts(files)}
        if len(sums) < 2:
            reason = "one document cannot be both training and validation"
            raise ValueError(f"{files[0]}: {reason}; give more text, or a second file called validation")
        held_out = {each for each in sums if each % SHARE == 0} or {min(sums)}
        held_out = held_out if len(held_out) < len(sums) else {min(sums)}
        _write(share, (text for text in read_texts(files) if _checksum(text) in held_out))
    if not _write(shard, (text for text in read_texts(files) if _checksum(text) not in held_out)):
        raise ValueError(f"{files[0]}: holds no text")


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def _write(path: Path, texts: Iterator[str]) -> int:
    """Write one column `text`; return the number of rows."""
    rows = 0
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        while chunk := list(islice(texts, 1024)):
            writer.write_table(pa.table({"text": chunk}))
            rows += len(chunk)
    return rows


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """Yield the documents of files; ValueError names the file, and the row, that has no text."""
    for path in files:
        if path.suffix.lower() == ".txt":
            yield from (text for text in _text_documents(path) if text.strip())
            continue
        for place, row in read_rows(path, "text"):
            text = row.get("text")
            if "text" not in row or not isinstance(text, str | None):
                raise ValueError(f"{place}: needs a field 'text' that is text; has {', '.join(map(str, row))}")
            if text:
                yield text


def _text_documents(path: Path) -> Iterator[str]:
    """Cut a text file at SEPARATOR, else at blank lines, into documents of about DOCUMENT characters."""
    document, size = list[str](), 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in iter(lambda: file.readline(4 * DOCUMENT), ""):
                if "\0" in line:
                    raise ValueError(f"{path}: holds zero bytes, so it is not UTF-8 text; save it as UTF-8 text")
                *finished, rest = line.split(SEPARATOR)
                for text in finished:
                    yield "".join([*document, text])
                    document, size = [], 0
                document.append(rest)
                size += len(rest)
                if size > 4 * DOCUMENT or (size > DOCUMENT and not rest.strip()):
                    yield "".join(document)
                    document, size = [], 0
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8 text") from error
    yield "".join(document)
