"""A folder of shards: many downloaded at once, and the proof that all of them are what was downloaded."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

from edu.data.download import Retry, sha256_of
from edu.data.shards import Progress, ShardError, Source, download_shard, parquet_files, read_manifest


def download_shards(
    indices: Sequence[int],
    target_dir: Path | str,
    source: Source,
    *,
    workers: int = 4,
    retry: Retry | None = None,
    on_progress: Progress | None = None,
) -> dict[int, ShardError]:
    """Download in parallel threads; return the errors by index: whatever is not among them is there.

    Ctrl-C stops every worker at its next bytes; the partial files stay for the next run.
    """
    stop, failed = Event(), {}

    def progress(index: int, done: int, total: int | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        if on_progress:
            on_progress(index, done, total)

    def work(index: int) -> None:
        download_shard(index, target_dir, source, retry=retry, pause=stop.wait, on_progress=progress)

    with ThreadPoolExecutor(workers) as pool:
        try:
            jobs = {pool.submit(work, index): index for index in indices}
            for job in as_completed(jobs):
                try:
                    job.result()
                except ShardError as error:
                    failed[jobs[job]] = error
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def verify_folder(data_dir: Path | str) -> list[str]:
    """Compare every shard with the manifest: sizes and checksums, missing files, unknown ones. Returns complaints."""
    folder, manifest = Path(data_dir), read_manifest(data_dir)
    if not manifest:
        raise ValueError(f"{folder / 'manifest.json'}: nothing to verify; run scripts/download_shards.py first")
    problems = []
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing; download it again")
        elif path.stat().st_size != entry["size"] or sha256_of(path) != entry["sha256"]:
            problems.append(f"{path}: not the file that was downloaded; delete it and download it again")
    found = {path.relative_to(folder).as_posix() for path in parquet_files(folder)}
    return problems + [
        f"{folder / name}: not in the manifest; download or remove it" for name in sorted(found - set(manifest))
    ]
