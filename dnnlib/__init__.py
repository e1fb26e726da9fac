"""Small helpers without torch: command-line errors, files, formatting, logging."""

from .cli import one_line_errors
from .files import make_folder, replacing, sha256_of, write_text
from .formatting import format_count, format_duration
from .logger import Logger

__all__ = [
    "Logger",
    "format_count",
    "format_duration",
    "make_folder",
    "one_line_errors",
    "replacing",
    "sha256_of",
    "write_text",
]
