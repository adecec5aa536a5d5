"""Block traces: readers of what others recorded, as arrays of requests.

request      what one request is
stream       bytes of a file, decompressed on the way; records, the loop of every reader; complaints
text         lines of fields by a layout; text_formats, the layouts by name; columns, from a header's names
blktrace, vscsi, parquet      the others
names        of devices and hosts, which a trace's files share
formats      which format a file has;  order, sorting and merging by time
trace        the front door
"""

from .formats import FORMATS
from .request import DISCARD, FLUSH, READ, REQUEST, WRITE, Requests
from .trace import Trace

__all__ = ["DISCARD", "FLUSH", "FORMATS", "READ", "REQUEST", "WRITE", "Requests", "Trace"]
