"""Fail if a test was skipped that the list does not name. Usage: check_skips.py results.xml allowed_skips.txt"""

import sys
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree


def main() -> int:
    results, allowed = Path(sys.argv[1]), Path(sys.argv[2])
    lines = [line.split("#")[0].strip() for line in allowed.read_text().splitlines()]
    patterns = [line for line in lines if line]
    unexpected = []
    for case in ElementTree.parse(results).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is None or skipped.get("type") == "pytest.xfail":
            continue
        name = "::".join(part for part in (case.get("classname"), case.get("name")) if part)
        if not any(fnmatch(name, pattern) for pattern in patterns):
            unexpected.append(f"{name}: {skipped.get('message')}")
    for line in unexpected:
        print(f"error: skipped, and not in {allowed}: {line}", file=sys.stderr)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
