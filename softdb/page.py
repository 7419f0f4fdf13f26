"""Public import path of `write_page`, which `softdb.lab.page` defines."""

from softdb.lab.page import write_page

__all__ = ["write_page"]
