"""Moving a checkpoint to another format: planned and refused before a byte is written, streamed, verified, reported."""

from transload.porting.report import Moved, PortReport
from transload.porting.run import port
from transload.porting.verify import Verification, verify

__all__ = ["Moved", "PortReport", "Verification", "port", "verify"]
