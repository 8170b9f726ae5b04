"""My downloader: httpx2, and a table of what to do."""

import os
import time
import uuid

import httpx2

BASE_URL = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"
MAGIC = b"PAR1"


class Again(Exception):
    """May be different next time."""


def fetch(url, part):
    with httpx2.stream("GET", url, follow_redirects=True, timeout=30) as response:
        if response.status_code == 429 or response.status_code >= 500:
            raise Again(f"{url}: status {response.status_code}")
        if response.status_code != 200:
            raise RuntimeError(f"{url}: status {response.status_code}")
        with part.open("wb") as f:
            for chunk in response.iter_raw(1 << 16):
                f.write(chunk)
        said = response.headers.get("content-length")
    size = part.stat().st_size
    if said is not None and int(said) != size:
        raise Again(f"{url}: {size} of {said} bytes")
    with part.open("rb") as f:
        begin = f.read(4)
        f.seek(-min(4, size), os.SEEK_END)
        end = f.read()
    if size < 12 or not begin == end == MAGIC:
        raise Again(f"{url}: no parquet file")


def download_shard(index, target_dir, base_url=BASE_URL, attempts=5):
    name = f"shard_{index:05}.parquet"
    final = target_dir / name
    if final.exists():
        return final
    target_dir.mkdir(parents=True, exist_ok=True)
    url = f"{base_url}/{name}"
    part = target_dir / f".{name}.{uuid.uuid4().hex}"
    try:
        for attempt in range(attempts):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                fetch(url, part)
            except (Again, httpx2.TransportError) as error:
                problem = error
            else:
                part.rename(final)
                return final
        raise RuntimeError(f"{url}: gave up after {attempts} attempts: {problem}") from problem
    finally:
        part.unlink(missing_ok=True)
