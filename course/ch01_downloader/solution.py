"""The plain solution of chapter 1: fetch, check, rename; wait and try again."""

import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

BASE_URL = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"


def fetch(url: str, temporary: Path) -> None:
    """Write the body to a file; OSError or ValueError where it is not whole."""
    with urlopen(url, timeout=30) as response, temporary.open("wb") as file:
        while part := response.read(1 << 16):
            file.write(part)
        announced = response.headers.get("Content-Length")
    size = temporary.stat().st_size
    if announced is not None and size != int(announced):
        raise ValueError(f"{size} bytes of {announced} came")
    with temporary.open("rb") as file:
        first = file.read(4)
        file.seek(max(0, size - 4))
        if first != b"PAR1" or file.read(4) != b"PAR1":
            raise ValueError("not a whole parquet file")


def download_shard(index: int, target_dir: Path, base_url: str = BASE_URL, attempts: int = 5) -> Path:
    name = f"shard_{index:05d}.parquet"
    path, url = target_dir / name, f"{base_url}/{name}"
    if path.exists():
        return path
    target_dir.mkdir(parents=True, exist_ok=True)
    temporary = target_dir / f".{name}.part"
    for attempt in range(attempts):
        try:
            fetch(url, temporary)
            temporary.replace(path)
            return path
        except HTTPError as error:
            error.close()
            if error.code != 429 and error.code < 500:
                raise RuntimeError(f"{url}: {error}") from None
            reason = str(error)
        except (OSError, ValueError) as error:
            reason = str(error)
        if attempt + 1 < attempts:
            time.sleep(2**attempt)
    raise RuntimeError(f"{url}: given up after {attempts} attempts: {reason}")
