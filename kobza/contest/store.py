"""The contest's state in SQLite: what is acknowledged is on the disk, whoever pulls the plug and however many processes write.

Write-ahead log with synchronous=FULL: a transaction that returned has been synced. Each transaction has a connection of its own,
so threads and processes share nothing but the file; a writer waits for the others up to BUSY_SECONDS. The rules that must never
be broken (a voter votes once on a pair, names are unique) are constraints of the tables, not only of the code before them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kobza.config import InputError, require

APPLICATION = 0x6B6F627A  # "kobz": so that another program's database is not taken for a contest
BUSY_SECONDS = 20
MIGRATIONS = (  # the i-th brings user_version i to i + 1
    """
    CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE voters (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, name_key TEXT NOT NULL UNIQUE, joined REAL NOT NULL) STRICT;
    CREATE TABLE entries (
        id INTEGER PRIMARY KEY, title TEXT NOT NULL UNIQUE, person TEXT NOT NULL, voter TEXT REFERENCES voters (id),
        checkpoint TEXT NOT NULL, text_key TEXT NOT NULL, submission TEXT NOT NULL, added REAL NOT NULL,
        status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'accepted', 'refused')),
        verdict TEXT) STRICT;
    CREATE UNIQUE INDEX texts ON entries (text_key) WHERE status <> 'refused';
    CREATE TABLE pairs (
        id TEXT PRIMARY KEY, voter TEXT NOT NULL REFERENCES voters (id),
        left INTEGER NOT NULL REFERENCES entries (id), right INTEGER NOT NULL REFERENCES entries (id),
        low INTEGER GENERATED ALWAYS AS (min(left, right)) STORED,
        high INTEGER GENERATED ALWAYS AS (max(left, right)) STORED,
        shown REAL NOT NULL,
        CHECK (left <> right), UNIQUE (voter, low, high)) STRICT;
    CREATE TABLE votes (
        n INTEGER PRIMARY KEY AUTOINCREMENT, pair TEXT NOT NULL UNIQUE REFERENCES pairs (id),
        choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie')), at REAL NOT NULL) STRICT;
    CREATE TABLE log (n INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL) STRICT;
    """,
)


def create(path: Path) -> None:
    """A new, empty database; refused where there is one."""
    require(not path.exists(), f"{path}: there is a contest already; take another name")
    with _connected(path) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION}")
    migrate(path)


def migrate(path: Path) -> None:
    """Bring the tables of an older kobza to today's, each step whole or not at all; a newer kobza's are refused."""
    require(path.is_file(), f"{path}: no contest here; make one: kobza contest new NAME")
    newest = len(MIGRATIONS)
    with _connected(path) as db:
        found, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        require(found == APPLICATION, f"{path}: another program's database, not a contest's")
        require(
            version <= newest, f"{path}: of a newer kobza (format {version}; this one knows {newest}); update kobza"
        )
    for step in range(version, newest):
        with transaction(path) as db:
            if db.execute("PRAGMA user_version").fetchone()[0] == step:  # nobody else was quicker
                for statement in MIGRATIONS[step].split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {step + 1}")


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection inside BEGIN IMMEDIATE: all that is written in the block is on the disk when it ends, or nothing is."""
    with _connected(path) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one state of the database throughout."""
    with _connected(path) as db:
        db.execute("BEGIN")
        yield db
        db.execute("ROLLBACK")


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        db.row_factory = sqlite3.Row
        try:
            for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "trusted_schema = OFF"):
                db.execute(f"PRAGMA {setting}")
            yield db
        finally:
            db.close()
    except sqlite3.IntegrityError:
        raise  # whoever wrote knows what it means
    except sqlite3.OperationalError as error:
        raise InputError(f"{path}: {error}; free space, close other writers, or check the folder's rights") from None
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path}: not a contest's database ({error}); restore it from a copy") from None
