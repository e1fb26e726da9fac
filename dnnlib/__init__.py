"""Small helpers without torch: errors, options of commands, signals, files, downloads, formatting, logging."""

from . import early as early
from .errors import UserError, first_line, need, one_line_errors
from .files import check_regular, make_folder, parse_json, replacing, sha256_of, write_text
from .formatting import format_count, format_duration
from .logger import Logger

__all__ = [
    "Logger",
    "UserError",
    "check_regular",
    "first_line",
    "format_count",
    "format_duration",
    "make_folder",
    "need",
    "one_line_errors",
    "parse_json",
    "replacing",
    "sha256_of",
    "write_text",
]
