"""The course's commands: python -m course start 5, grade 5, hint 5, ablate 5, progress."""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from course.grading import Chapter, Refused, chapters, find_chapter, grade


def start(chapter: Chapter) -> int:
    """Copy start.py to my/, unless the learner's file is there already."""
    if chapter.mine.exists():
        print(f"{chapter.mine} is there already, and stays as it is; to begin anew, move it away first")
        return 0
    chapter.mine.parent.mkdir(exist_ok=True)
    shutil.copyfile(chapter.folder / "start.py", chapter.mine)
    print(f"{chapter.mine}: fill the bodies in. Read {_shown(chapter.folder)}/README.md first.")
    print(f"Then: make grade CHALLENGE={chapter.number}")
    return 0


def show_grade(chapter: Chapter, path: Path) -> int:
    """Print each law with what is wrong; 0 if all hold, else 1."""
    started = time.monotonic()
    print(f"Chapter {chapter.number}: {chapter.title} ({path})")
    try:
        verdicts = grade(chapter, path)
    except Refused as refusal:
        print(f"  not graded: {refusal}")
        return 1
    for verdict in verdicts:
        print(f"  {'ok  ' if verdict.problem is None else 'FAIL'} {verdict.law}")
        if verdict.problem is not None:
            print(f"         {verdict.problem}")
    held = sum(verdict.problem is None for verdict in verdicts)
    print(f"{held} of {len(verdicts)} laws hold ({time.monotonic() - started:.1f} s)")
    if held < len(verdicts):
        print(f"The first that fails is the one to mend first. Stuck: make hint CHALLENGE={chapter.number}")
    return int(held < len(verdicts))


def watch(chapter: Chapter, path: Path) -> int:
    """Grade again whenever the file is saved, until Ctrl-C."""
    seen = None
    try:
        while True:
            now = path.stat().st_mtime_ns if path.exists() else None
            if now != seen:
                seen = now
                show_grade(chapter, path)
                print("waiting for the next save (Ctrl-C ends)\n")
            time.sleep(0.5)
    except KeyboardInterrupt:
        return 0


def show_hints(chapter: Chapter, number: int | None) -> int:
    """Print the first hint, or the one of a number."""
    text = (chapter.folder / "README.md").read_text(encoding="utf-8")
    hints = re.findall(r"<details><summary>Hint \d+</summary>\s*(.*?)\s*</details>", text, re.DOTALL)
    wanted = number or 1
    if not 1 <= wanted <= len(hints):
        print(f"error: chapter {chapter.number} has hints 1 to {len(hints)}", file=sys.stderr)
        return 2
    print(f"Hint {wanted} of {len(hints)}: {hints[wanted - 1]}")
    if wanted < len(hints):
        print(f"The next one: make hint CHALLENGE={chapter.number} HINT={wanted + 1}")
    return 0


def ablate(chapter: Chapter) -> int:
    """Run the chapter's ablation."""
    script = chapter.folder / "ablation.py"
    if not script.is_file():
        print(f"chapter {chapter.number} has no ablation")
        return 0
    return subprocess.run([sys.executable, "-m", f"course.{chapter.folder.name}.ablation"], check=False).returncode


def show_progress() -> int:
    """Print a bar for each chapter: the share of its laws that the learner's file keeps."""
    for chapter in chapters():
        line = f"{chapter.number:2d}  {chapter.title:34}"
        if not chapter.mine.exists():
            print(f"{line}  {'.' * 20}  not started: make start CHALLENGE={chapter.number}")
            continue
        try:
            verdicts = grade(chapter, chapter.mine)
        except Refused as refusal:
            print(f"{line}  {'.' * 20}  {refusal}")
            continue
        held = sum(verdict.problem is None for verdict in verdicts)
        filled = 20 * held // len(verdicts)
        print(f"{line}  {'#' * filled}{'.' * (20 - filled)}  {held} of {len(verdicts)} laws")
    return 0


def _shown(path: Path) -> str:
    """Return a path as it is typed from here, where it can be."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m course", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("start", "grade", "hint", "ablate"):
        command = commands.add_parser(name)
        command.add_argument("challenge", type=int, help="number of the chapter, 1 to 10")
        if name == "grade":
            command.add_argument("--module", type=Path, help="the file to grade, in place of my/NAME.py")
            command.add_argument("--watch", action="store_true", help="grade again at every save")
        if name == "hint":
            command.add_argument("number", type=int, nargs="?", help="which hint")
    commands.add_parser("progress")
    args = parser.parse_args()
    if args.command == "progress":
        return show_progress()
    try:
        chapter = find_chapter(args.challenge)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.command == "grade":
        path = args.module or chapter.mine
        return watch(chapter, path) if args.watch else show_grade(chapter, path)
    if args.command == "hint":
        return show_hints(chapter, args.number)
    return {"start": start, "ablate": ablate}[args.command](chapter)


if __name__ == "__main__":
    sys.exit(main())
