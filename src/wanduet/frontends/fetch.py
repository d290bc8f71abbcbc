"""`wanduet download`: fetch a model, or check one that is here. Apart from the other commands: it needs no torch."""

import sys
from typing import Any

from wanduet.config import EngineConfig
from wanduet.specs import RANDOM_SPECS
from wanduet.weights.download import MINIATURE, download, local_model, verify_manifest


def run_download(config: EngineConfig) -> dict[str, Any]:
    """Fetch and check a model; a folder is checked only. Raises ModelNotFoundError, WeightsError."""
    if config.model in RANDOM_SPECS:
        return {"model": config.model, "note": "Random weights are made in memory; there is nothing to fetch."}
    remember = config.data_folder / "verified.json"
    local = local_model(config.model)
    if local is not None:
        for files in (local.transformer, local.vae, local.text_encoder):
            files.shapes  # noqa: B018 - reads the headers, which are checked against the files' sizes
        note = (
            "The miniature comes with wanduet; there is nothing to fetch."
            if config.model == MINIATURE
            else "A folder on this machine; there is nothing to fetch."
        )
        checked = verify_manifest(local, None)
        return {"model": config.model, "path": str(local.path), "note": note, "files_verified": checked}
    print(f"Fetching {config.model} ...", file=sys.stderr)
    found = download(config.model, config.revision, remember)
    return {
        "model": config.model,
        "path": str(found.folder.path),
        "revision": found.folder.revision,
        "bytes": found.num_bytes,
        "files_verified": found.num_verified,
    }
