"""The command line as a person types it, in this process."""

from __future__ import annotations

from unittest import mock

from rich.console import Console
from typer.testing import CliRunner

from lorica import cli


def lorica(*words: object, code: int = 0) -> str:
    """What `lorica WORDS` prints on a wide terminal; its errors are raised as they are."""
    with mock.patch.object(cli, "OUT", Console(width=200)):
        done = CliRunner().invoke(cli.app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout
