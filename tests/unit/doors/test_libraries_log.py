"""Libraries' messages are kept in a file; a terminal shows ours."""

import io
import logging
from pathlib import Path

from wanduet.doors.cli.libraries_log import LOG_FILE, handlers


def say(folder: Path) -> str:
    stream = io.StringIO()
    own = handlers(folder, stream)
    for name, level, text in (
        ("wanduet.kernels.select", logging.WARNING, "ours"),
        ("py.warnings", logging.WARNING, "types and addresses"),
        ("flash_attn.cute", logging.WARNING, "chatter"),
        ("transformers", logging.ERROR, "an error"),
    ):
        for handler in own:
            handler.handle(logging.LogRecord(name, level, "", 0, text, None, None))
    for handler in own:
        handler.close()
    return stream.getvalue()


def test_a_terminal_shows_our_messages_and_the_file_has_the_others(tmp_path: Path) -> None:
    assert say(tmp_path / "data") == "ours\nan error\n"
    kept = (tmp_path / "data" / LOG_FILE).read_text()
    assert all(text in kept for text in ("types and addresses", "chatter", "an error"))
    assert "ours" not in kept


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert say(tmp_path / "file") == "ours\nan error\n"
    assert capsys.readouterr().err == ""
