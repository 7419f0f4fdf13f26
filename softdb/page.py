"""A store as one HTML page: `write_page`, as `softdb.lab.page` defines it."""

from softdb.lab.page import write_page

__all__ = ["write_page"]
