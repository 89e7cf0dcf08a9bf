"""What `mlx-empire WORDS` prints, in this process."""

from __future__ import annotations

import pytest

from mlx_empire import cli


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """All that the command prints; it must end with `code`."""
    try:
        ended = cli.main([str(word) for word in words])
    except SystemExit as left:
        ended = int(left.code or 0)
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out + captured.err
