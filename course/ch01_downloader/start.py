"""Chapter 1: the shard downloader. Fill in the body; `make grade CHALLENGE=1` says what holds.

A shard is one parquet file of a large data set: <base_url>/shard_00007.parquet is number 7.
"""

from pathlib import Path

BASE_URL = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"


def download_shard(index: int, target_dir: Path, base_url: str = BASE_URL, attempts: int = 5) -> Path:
    """Return target_dir/shard_<index with five digits>.parquet, downloaded unless it is there already.

    target_dir is made if need be.

    1. A file with the final name is complete, by construction: if it is there, ask the server nothing.
    2. Write the body under another name in the same folder, a part at a time, and rename it when it is whole.
    3. Whole means: as long as Content-Length says, where the server says it, and a parquet file, which begins and ends
       with the four bytes PAR1.
    4. Connections that break, files that are not whole, and the statuses 429 and 500 to 599 may be different next time:
       wait with time.sleep 1 second, then 2, 4, 8, ... and try again, at most `attempts` times in all.
    5. Other errors, such as 404, will not: raise at once. Whatever is raised names the URL.
    """
    raise NotImplementedError
