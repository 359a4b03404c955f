"""Lines of standard input that are JSON objects, collected under a name in a file: `collect.py FILE NAME < output`."""

import json
import sys
from contextlib import suppress
from pathlib import Path


def main() -> None:
    file, name = Path(sys.argv[1]), sys.argv[2]
    found = []
    for line in sys.stdin:
        with suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                found.append(value)
    every = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**every, name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
