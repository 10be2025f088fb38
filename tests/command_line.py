"""`snell-scale` as a user calls it, inside the test's own process."""

import sys

import pytest

from snell_scale import cli


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `snell-scale ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["snell-scale", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err
