"""Prints a node's devices as JSON: `python -m wanduet.cluster.probe`, run once on each node."""

from pydantic import TypeAdapter

from wanduet.planning.hardware import Hardware, detect

_ADAPTER = TypeAdapter(Hardware)


def read_probe(text: str) -> Hardware:
    """Parse a probe's output."""
    return _ADAPTER.validate_json(text.strip().splitlines()[-1])


if __name__ == "__main__":
    print(_ADAPTER.dump_json(detect()).decode())
