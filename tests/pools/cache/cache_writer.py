"""Writes pages into a folder until it is killed: ``python cache_writer.py FOLDER FIRST``. A line
for each that is said to be there."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.page_files import PageFolder
from moeserve.pools.cache.pages import StoredRun, seal


def main() -> None:
    folder = PageFolder(Path(sys.argv[1]))
    for number in range(int(sys.argv[2]), 1 << 30):
        content = sha256(number.to_bytes(4, "little")).digest()
        run = StoredRun(0, 0, 64, content[:16], content * 4096)
        folder.write(seal(PageKey(content), Namespace(bytes(16)), [run]))
        print(content.hex(), flush=True)


if __name__ == "__main__":
    main()
