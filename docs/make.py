"""Writes docs/cli.md: the command line's reference, from the commands themselves."""

from pathlib import Path

from wanduet.frontends.cli import app

if __name__ == "__main__":
    text = app.generate_docs(output_format="markdown", recursive=True)
    Path(__file__).with_name("cli.md").write_text(text)
