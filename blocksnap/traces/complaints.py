"""What is wrong with a trace: the first complaint ends the reading, or all are counted."""

from ..errors import TraceError
from .stream import ByteStream

__all__ = ["Complaints"]

_KEPT = 10


class Complaints:
    """Takes every complaint of the readers of one trace.

    With `keep_going`, bad records are left out and counted, and a file that cannot be read further ends
    there; without it the first complaint raises TraceError.
    """

    def __init__(self, *, keep_going: bool = False) -> None:
        self.keep_going = keep_going
        self.records = 0
        self.unread: list[str] = []
        self.messages: list[str] = []

    def bad_record(self, name: str, record: int, reason: str, *, count: int = 1) -> None:
        """Complain of one record (from 1 on), or of `count` of them of which it is the first."""
        self._complain(f"{name}: record {record}: {reason}", "leaves such records out")
        self.records += count

    def end(self, name: str, record: int, reason: str) -> None:
        """Complain that a file cannot be read from a record on."""
        self._complain(f"{name}: record {record}: {reason}", "reports what was before it")
        self.records += 1
        self.unread.append(name)

    def check_end(self, stream: ByteStream, record: int, rest: int, *, without: str = "") -> None:
        """Complain if a file ended early, or within a record of which `rest` bytes are there.

        `without` names what it lacks.
        """
        if stream.damage is not None:
            self.end(stream.name, record, stream.damage)
        elif rest:
            self.end(stream.name, record, f"the file ends within it, after {rest} bytes{without}")

    def _complain(self, sentence: str, remedy: str) -> None:
        if not self.keep_going:
            raise TraceError(f"{sentence} (--keep-going {remedy})")
        if len(self.messages) < _KEPT:
            self.messages.append(sentence)

    def as_dict(self) -> dict[str, object]:
        """Return the counts, the files that were not read to their end and the first few complaints."""
        return {"records": self.records, "unread": list(self.unread), "messages": list(self.messages)}
