"""`launch_worker.py '[[COMMAND, ...], ...]'`: several vadit commands in one process of a group, one after the other."""

from __future__ import annotations

import json
import sys

from vadit import cli
from vadit.train import engine


def main() -> int:
    leave, engine.finish = engine.finish, lambda: None  # at the very end only
    codes = [cli.main(command) for command in json.loads(sys.argv[1])]
    leave()
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
