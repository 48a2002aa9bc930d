"""What loaders need of a machine, known before they are built. Nothing heavy is imported."""

SHARED = "/dev/shm"  # where Linux keeps shared memory
AHEAD = 2  # batches that are read before they are asked for, in all or by each worker
PLACES = AHEAD + 2  # batches of a worker in shared memory: it makes AHEAD, and the reader may hold two
MOST_OPEN = 256  # shards that a process maps at a time; each takes a file descriptor


def shared_memory(workers: int, batch: int, sample: int) -> int:
    """Bytes of /dev/shm for the batches of workers, of ``batch`` samples of so many bytes each."""
    return workers * PLACES * batch * sample


def open_files(workers: int) -> int:
    """File descriptors of a rank or of a worker: shards, pipes to each worker, and 256 for libraries and sockets."""
    return MOST_OPEN + 8 * workers + 256
