"""Table of rows: storage of rows by slot, change tracking, journal and locks."""
