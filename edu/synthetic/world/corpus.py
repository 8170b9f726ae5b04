"""The embedded default data: the small world of edu.synthetic.world.documents and the problems of edu.synthetic.world.problems, in the files of a real source.

What is measured later is never trained on, by construction: a text that works out a held-out problem is dropped (edu.synthetic.world.problems), held-out wordings
of questions are used by `chats_test.jsonl` alone, and validation documents are drawn first, so that no training document is one of them.
"""

import json
import os
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq

from edu.data.atomic_io import publish
from edu.synthetic.world.documents import chats, draw_documents, held_out_chats
from edu.synthetic.world.problems import problem_files
from edu.synthetic.world.templates import DATA

ROWS_PER_GROUP = 1_000
DOCUMENTS_PER_SHARD = 20_000
VALIDATION_SHARE = 40  # one document for every 40 of training: 2,000 beside 80,000
MANIFEST = "corpus.json"
SOURCES = ("templates", "documents", "problems", "corpus")


def write_corpus(out_dir: Path, seed: int = 0, documents: int = 80_000) -> None:
    """Write the embedded default: shards, `val/`, `problems/*.jsonl`, `chats.jsonl`, `chats_test.jsonl`.

    1. A finished manifest of the same settings, whose files are all there in their sizes: nothing to do.
    2. Otherwise an unfinished manifest is left first, then every file is written to a temporary name and renamed.
    3. The manifest is finished last, so that an interrupted write is redone.

    Raises ValueError on too few `documents`, or when the folder holds shards that were not written by this function.
    """
    if documents < 2:
        raise ValueError(f"documents: {documents} are too few, give at least 2")
    manifest, settings = out_dir / MANIFEST, _settings(seed, documents)
    if _is_complete(out_dir, settings):
        return
    old_shards = list(out_dir.glob("shard_*.parquet"))
    if old_shards and not manifest.exists():
        raise ValueError(f"{out_dir} holds shards of another source: name another folder for the embedded data")
    _replace(manifest, lambda path: path.write_text(json.dumps({"unfinished": settings})))
    for shard in old_shards:
        shard.unlink()
    sizes = {name: _replace(out_dir / name, write) for name, write in _files(seed, documents)}
    _replace(manifest, lambda path: path.write_text(json.dumps({**settings, "files": sizes}, indent=1)))


def _settings(seed: int, documents: int) -> dict[str, int]:
    """What the files depend on; the sources are among it, so that a changed template or generator is written anew."""
    code = Path(__file__).parent
    sources = [DATA / "world.yaml", DATA / "problems.yaml", *(code / f"{name}.py" for name in SOURCES)]
    return {"seed": seed, "documents": documents, "sources": crc32(b"".join(path.read_bytes() for path in sources))}


def _is_complete(out_dir: Path, settings: dict[str, int]) -> bool:
    try:
        manifest = json.loads((out_dir / MANIFEST).read_text())
        sizes = manifest.pop("files")
        return manifest == settings and all((out_dir / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False


def _files(seed: int, count: int) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Names and writers of all files."""
    texts = draw_documents(seed)
    size = min(DOCUMENTS_PER_SHARD, -(-count // 2))
    held_back = list(islice(texts, max(1, count // VALIDATION_SHARE)))
    yield "val/shard_00000.parquet", lambda path: _write_shard(path, held_back)
    for index, start in enumerate(range(0, count, size)):
        shard = list(islice(texts, min(size, count - start)))
        yield f"shard_{index:05d}.parquet", lambda path, shard=shard: _write_shard(path, shard)
    files = chain(problem_files(seed), [("chats.jsonl", chats(seed)), ("chats_test.jsonl", held_out_chats(seed))])
    for name, lines in files:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        yield name, lambda path, text=text: path.write_text(text)


def _write_shard(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=ROWS_PER_GROUP, write_page_checksum=True)


def _replace(path: Path, write: Callable[[Path], Any]) -> int:
    """Write under a temporary name, then rename; gives the size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size
