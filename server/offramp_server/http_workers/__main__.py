"""The entry of a worker process, which the engine's process starts; it is not meant for people."""

import sys

from offramp_server.http_workers.worker import work

if __name__ == "__main__":
    sys.exit(work(*map(int, sys.argv[1:])))
