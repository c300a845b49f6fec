"""Training images that cannot be read: listed once, counted, and not too many.

Whoever loads a sample replaces such an image (ImageDataset) and says so in the sample itself, which is
how it gets from a worker process to here.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("hpm")

FILE = "bad_images.txt"


class TooManyBadImages(RuntimeError):
    """End of a run of whose images too many cannot be read."""


class BadImages:
    """What this run met of unreadable images; the list is a file of its folder and outlives the process.

    Args:
        folder: the run's.
        most: images that may be unreadable before the run ends.
        name: index -> path.
        share: runs a function on rank 0 and gives its result, or its error, to all (from_rank_zero).
        gather: this rank's object -> those of all ranks.
    """

    def __init__(
        self,
        folder: Path,
        most: int,
        name: Callable[[int], str],
        share: Callable[[Callable[[], Any]], Any],
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.path, self.most, self.name, self.share, self.gather = folder / FILE, most, name, share, gather
        self._met: set[int] = set()
        self._new: set[int] = set()
        self.known: set[str] = set(share(self._read))

    def _read(self) -> list[str]:
        if not self.path.exists():
            return []
        whole = self.path.read_text(errors="surrogateescape").split("\n")[:-1]  # a crash may have left half a line
        self._write(whole, "w")
        return whole

    def _write(self, names: Iterable[str], mode: str) -> None:
        with open(self.path, mode, errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in names)

    def watch(self, batches: Iterable) -> Iterator:
        """The batches, with what their samples say noted. It looks at tensors in the CPU's memory alone."""
        for batch in batches:
            self._new.update(batch.bad[batch.bad >= 0].tolist())
            yield batch

    def check(self) -> None:
        """List what is new, over all ranks: all must call this at the same step.

        Raises:
            TooManyBadImages: more than `most` are listed.
        """
        met = set().union(*self.gather(self._new)) - self._met
        self._new = set()
        self._met |= met
        names = sorted({self.name(index) for index in met} - self.known)
        if not names:
            return
        self.known |= set(names)
        self.share(lambda: self._write(names, "a"))
        log.warning(
            "%d image%s cannot be read and was replaced (%d in all, listed in %s): %s%s",
            *(len(names), "s" * (len(names) > 1), len(self.known), self.path, names[0], ", ..." * (len(names) > 1)),
        )
        if len(self.known) > self.most:
            raise TooManyBadImages(
                f"{len(self.known)} images cannot be read, more than --max_bad_images {self.most}; they are listed in "
                f"{self.path}: repair or remove them, or raise the limit"
            )
