"""red_stats_design.md under seeded interleavings, as a whole and without its protections."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
from red_stats_scheduler import Task, Worker, pool

SEEDS = int(os.environ.get("RED_STATS_SEEDS", "150"))

# What is taken out of the document, and a seed that then breaks a promise.
WITHOUT = {
    "a generation that is saved before any work": (
        0,
        (", 4294967296)", ", 1)"),
        ("self.generation << 32 | self.number", "self.generation + self.number"),
        ("for partition in self.taken:   ", "for partition in ():   "),
    ),
    "an allowance for clocks": (0, ("CLOCKS = 1_000", "CLOCKS = 0")),
    "valid_to of the routes": (0, ("if at >= self.valid_to:", "if False:")),
    "a counter that filters erased clients": (
        0,
        ('if message["client_id"] not in self.erased', 'if "erase" not in message'),
    ),
    "a query that reads the list of erased clients": (
        0,
        ("= 0 AS kept", ">= 0 AS kept"),
    ),
    "times of one type": (
        0,
        (
            "at >= {start:DateTime64(3, 'UTC')} AND at < {start:DateTime64(3, 'UTC')}",
            "at >= {start:DateTime('UTC')} AND at < {start:DateTime('UTC')}",
        ),
    ),
    "closing that moves first": (
        0,
        ("if hour < self.closing:", "if hour < self.done:"),
    ),
    "recounting before the offsets are saved": (
        0,
        (
            "        self.recount()\n...         for partition in self.taken:\n...             self.save_partition(partition)",
            "        for partition in self.taken:\n...             self.save_partition(partition)\n...         self.recount()",
        ),
    ),
    "days that follow their late hours": (
        0,
        ('self.rebuild("day", day, clients)', "pass"),
    ),
    "FINAL": (0, ("FROM events FINAL\n    WHERE kept", "FROM events\n    WHERE kept")),
}
