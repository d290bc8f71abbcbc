"""A node's devices as JSON: `python -m wanduet.cluster.probe`, run on each node once."""

from pydantic import TypeAdapter

from wanduet.planning.hardware import Hardware, detect

_ADAPTER = TypeAdapter(Hardware)


def read_probe(text: str) -> Hardware:
    """What a probe printed."""
    return _ADAPTER.validate_json(text.strip().splitlines()[-1])


if __name__ == "__main__":
    print(_ADAPTER.dump_json(detect()).decode())
