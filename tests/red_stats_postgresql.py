"""A throwaway PostgreSQL with what red_stats_design.md puts into it.

Shared by test_red_stats_design.py and benchmark.py.
"""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from red_stats_document import blocks

POSTGRESQL = blocks("sql postgresql")
PREPARED = re.findall(
    r"^PREPARE .*?;$", "".join(b.code for b in POSTGRESQL), re.MULTILINE | re.DOTALL
)


def postgresql_binaries() -> Path | None:
    """The folder of initdb: on the path, or where Debian keeps it, newest version first."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    folders = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max(
        (f.parent for f in folders), key=lambda f: int(f.parent.name), default=None
    )


class Cluster:
    """A throwaway PostgreSQL that listens on a socket in its own folder only."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        # Not below tmp_path: PostgreSQL refuses to run as root, and another user cannot
        # enter root's temporary folders.
        self.folder = Path(tempfile.mkdtemp(prefix="red-stats-"))
        self.user: str | None = None
        if os.geteuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            self.user = "postgres" if "postgres" in known else "nobody"
            shutil.chown(self.folder, self.user)

    def command(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.binaries / program, "-D", self.folder / "data", *arguments],
            check=True,
            capture_output=True,
            cwd=self.folder,
            user=self.user,
        )

    def start(self) -> None:
        encoding = ("--locale=C", "--encoding=UTF8", "--auth=trust")
        self.command("initdb", *encoding, "--username=red", "--no-sync")
        settings = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        log = str(self.folder / "log")
        self.command(
            "pg_ctl", "start", "--wait", f"--options={settings}", f"--log={log}"
        )

    def stop(self) -> None:
        self.command("pg_ctl", "stop", "--mode=immediate")
        shutil.rmtree(self.folder)

    def psql(
        self,
        database: str,
        *arguments: str | Path,
        stderr: int | IO[str] = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """A session of psql; it reads its standard input unless `arguments` name a file."""
        options = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "red"]
        where = ["-h", str(self.folder), "-d", database]
        return subprocess.Popen(
            ["psql", *options, "-F", "\t", *where, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={
                **os.environ,
                "PGTZ": "UTC",
                "PGOPTIONS": "-c client_min_messages=error",
            },
        )

    def popen(self, database: str, sql: str) -> subprocess.Popen[str]:
        """Start a session that runs `sql` from a file, so that several can run at once."""
        script = self.folder / f"{os.urandom(8).hex()}.sql"
        script.write_text(sql, encoding="utf-8")
        return self.psql(database, "-f", script)

    def run(self, database: str, sql: str) -> str:
        """Run `sql` in a session of its own; return what it writes."""
        with self.popen(database, sql) as process:
            output, errors = process.communicate()
        assert not errors, errors
        assert process.returncode == 0
        return output


class Database:
    """One database of the cluster, with the document's tables, functions and statements.

    Calling it runs SQL in one session that stays open, since starting psql takes longer
    than most statements.
    """

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.open()

    def open(self) -> None:
        # Not a pipe, which nobody reads: psql would wait when it is full of errors.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.session = self.cluster.psql(self.name, stderr=self.errors)
        self("\n".join(PREPARED))

    def __call__(self, sql: str) -> list[list[str]]:
        """Run `sql`; return what it selects, values as text."""
        assert self.session.stdin and self.session.stdout
        self.session.stdin.write(f"{sql}\n\\echo END\n")
        self.session.stdin.flush()
        rows: list[list[str]] = []
        for line in self.session.stdout:
            if line == "END\n":
                return rows
            rows.append(line.rstrip("\n").split("\t"))
        self.errors.seek(0)
        errors = self.errors.read()
        self.close()
        self.open()
        raise AssertionError(errors)

    def error(self, sql: str) -> str:
        """Run `sql`, which fails, in a session of its own; return the message."""
        script = "\n".join([*PREPARED, sql])
        with self.cluster.popen(self.name, script) as process:
            _, errors = process.communicate()
        assert process.returncode != 0
        return errors

    def together(self, *scripts: str) -> list[list[list[str]]]:
        """Run the scripts in as many sessions at the same time; return what each selects."""
        prepared = "\n".join(PREPARED)
        running = [self.cluster.popen(self.name, prepared + s) for s in scripts]
        outputs = []
        for process in running:
            with process:
                output, errors = process.communicate()
            assert not errors, errors
            assert process.returncode == 0
            outputs.append([line.split("\t") for line in output.splitlines()])
        return outputs

    def close(self) -> None:
        with self.errors, self.session as session:
            session.communicate()
