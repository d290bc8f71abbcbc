"""Writes docs/cli.md, the command line's reference, from the commands themselves, README's table of cards, the table of
a request's fields in docs/server.md, and the tables of files in docs/models.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIZES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1080, 1920)}
CARDS = (
    "RTX 3060", "RTX 4060 Ti", "RTX 4070", "RTX 3090", "2xRTX 3090", "RTX 4090", "2xRTX 4090", "RTX 5090", "A100",
)  # fmt: skip
MODEL_CARDS = (8, 12, 16, 24)  # GiB
# Whole jobs as measured: files in benchmarks/results, by size.
MEASURED = {"H100": ("whole_job_480p", "whole_job_720p", "whole_job_1080p")}


def command_line() -> str:
    """The reference. Flags that several commands share are listed once, by the first."""
    from wanduet.doors.cli.help import EVERYWHERE
    from wanduet.doors.cli.main import app

    text = app.generate_docs(output_format="markdown", recursive=True)
    text = re.sub(r" \*\[env: \w+\]\*", "", text)  # EVERYWHERE says how they are named
    text = text.replace("(#wanduet-install", "(#wanduet---install")  # as GitHub derives it from the title
    text = text.replace("## Table of Contents", f"{EVERYWHERE}\n\n## Table of Contents", 1)
    listed: dict[str, str] = {}  # group and flags to the command that lists them
    commands = re.split(r"(?m)^(?=## )", text)
    return "".join(_once(command, listed) for command in commands)


def _once(command: str, listed: dict[str, str]) -> str:
    name = command.partition("\n")[0].removeprefix("## ")

    def shorten(found: re.Match[str]) -> str:
        first = listed.setdefault(found[0].strip(), name)
        if first == name:
            return found[0]
        return f"**{found[1]}**: those of [`{first}`](#{first.replace(' ', '-')}).\n"

    return re.sub(r"\*\*(Video|Speed, at a loss|Model|Engine|Server|Cluster)\*\*:\n\n(?:\* .*\n)+", shorten, command)


def with_card_table(readme: str) -> str:
    """README with its table of cards made anew."""
    return _with_table(readme, "cards", _rows())


def with_field_table(server: str) -> str:
    """docs/server.md with its table of a request's fields made anew."""
    return _with_table(server, "fields", _field_rows())


def with_model_tables(models: str) -> str:
    """docs/models.md with its tables of files for cards, and of wrong files, made anew."""
    return _with_table(_with_table(models, "files", _file_rows()), "wrong", _wrong_rows())


def _file_rows() -> Iterator[str]:
    from wanduet.config import EngineConfig, format_bytes
    from wanduet.planning.hardware import parse_hardware
    from wanduet.planning.planner import make_plan
    from wanduet.request import GenerationRequest
    from wanduet.runtime.models import Models

    yield "| card | model | fetch | flags | blocks on the card | its memory | host memory |"
    yield "|---|---|---|---|---|---|---|"
    for model, formats in (("1.3B", ("auto",)), ("14B", ("auto", "q8"))):
        models = Models(EngineConfig(model=f"random:{model.lower()}"))
        request = GenerationRequest(prompt="any", height=480, width=832, num_frames=81).resolve(models.spec)
        for size in MODEL_CARDS:
            for weights in formats:
                config = EngineConfig(model=f"random:{model.lower()}", weights=weights)
                plan = make_plan(request, models.memory, config, parse_hardware(f"{size}GiB,ram=64GiB"))
                assert plan.prediction.fits
                blocks = f"{plan.transformer.resident_blocks} of {models.spec.transformer.num_layers}"
                peak = max(max(device.phases.values()) for device in plan.prediction.devices)
                # In fp8, as the files for ComfyUI have 14B's: as many bytes as q8, without another rounding.
                form, flag = ("comfy", "`--weights fp8`") if weights == "q8" else ("bf16", "")
                form = "comfy" if model == "1.3B" else form
                memory = f"{format_bytes(peak)} | {format_bytes(plan.prediction.host_bytes)}"
                yield f"| {size} GiB | {model} | `--form {form}` | {flag} | {blocks} | {memory} |"


def _wrong_rows() -> Iterator[str]:
    from wanduet.weights.components import why_not
    from wanduet.weights.recognise import TAKE_T2V, recognise
    from wanduet.weights.source import TensorInfo

    def headers(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
        return {name: TensorInfo(Path("x"), shape, "BF16") for name, shape in shapes.items()}

    def transformer(channels: int, *names: str, width: int = 5120) -> dict[str, tuple[int, ...]]:
        found = dict.fromkeys(("head.modulation", "blocks.0.self_attn.q.weight", *names), (1,))
        return found | {"patch_embedding.weight": (width, channels, 1, 2, 2), "head.head.weight": (64, width)}

    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    files = {
        "Wan2.1 I2V": transformer(36, "img_emb.proj.0.bias"),
        "Wan2.1 FLF2V": transformer(36, "img_emb.emb_pos"),
        "Wan2.2 I2V": transformer(36),
        "VACE": transformer(16, "vace_patch_embedding.weight", width=1536),
        "SkyReels-V2 DF": transformer(16, "fps_embedding.weight"),
        "Wan2.2 TI2V-5B": transformer(48, width=3072),
        "`wan2.2_t2v_high_noise_14B_fp16.safetensors`": transformer(16),
        "Wan2.2's VAE": {"decoder.middle.0.residual.0.gamma": (1,), "decoder.conv1.weight": (1024, 48, 3, 3, 3)},
        "T5 v1.1": {query: (4096, 4096), "shared.weight": (32128, 4096)},
        "CLIP": {"vision_model.embeddings.class_embedding": (1280,)},
        "a LoRA as model": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (32, 5120)},
        "another model": {"some.weight": (1,)},
    }
    yield "| file | message | take instead |"
    yield "|---|---|---|"
    for name, shapes in files.items():
        (kind,) = recognise(headers(shapes))
        problem = why_not(Path(name.strip("`")), kind)
        assert problem is not None
        yield f"| {name} | {problem} | {kind.hint or TAKE_T2V} |"
    yield from (f"| {name} | {problem} | {hint} |" for name, problem, hint in _quantised_rows())


def _quantised_rows() -> Iterator[tuple[str, str, str]]:
    from wanduet.errors import WeightsError
    from wanduet.weights.quantised import dequantised
    from wanduet.weights.source import TensorInfo, WeightSource

    class Header(WeightSource):
        """A file of one tensor, without its data."""

        iterate = fingerprint = None  # type: ignore[assignment]

    Header.__abstractmethods__ = frozenset()
    layer = "blocks.0.ffn.0"
    names = {
        "nunchaku": f"{layer}.wscales", "bitsandbytes": f"{layer}.weight.absmax", "quanto": f"{layer}.weight._data",
        "GPTQ, AWQ": f"{layer}.qzeros", "NVFP4": f"{layer}.weight_scale_2",
    }  # fmt: skip
    for name, tensor in names.items():
        source = Header("transformer")
        source.tensors[tensor] = TensorInfo(Path("x"), (1,), "F32")
        try:
            dequantised(source)
        except WeightsError as error:
            yield name, error.message.removesuffix("."), str(error.hint)


def _with_table(page: str, name: str, rows: Iterator[str]) -> str:
    table = "\n".join(rows)
    marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(marks, lambda m: f"{m[1]}{table}\n{m[2]}", page, flags=re.DOTALL)


def _field_rows() -> Iterator[str]:
    from wanduet.request import REQUEST_FIELDS
    from wanduet.request_fields import LIMITS

    yield "| field | takes | |"
    yield "|---|---|---|"
    for name, field in REQUEST_FIELDS.items():
        if not field.is_required:
            limits = [
                f"{LIMITS[key]} {limit:{',' if field.kind is int else 'g'}}" for key, limit in field.limits.items()
            ]
            takes = ", ".join([field.takes, *limits])
            yield f"| `{name}` | {takes} | {field.help} |"


def _rows() -> Iterator[str]:
    from wanduet.config import EngineConfig
    from wanduet.planning.hardware import parse_hardware
    from wanduet.planning.planner import make_plan
    from wanduet.request import GenerationRequest
    from wanduet.runtime.models import Models

    config = EngineConfig(model="random:1.3b")
    models = Models(config)

    def minutes(hardware: str, height: int, width: int) -> str:
        request = GenerationRequest(prompt="any", height=height, width=width, num_frames=81).resolve(models.spec)
        plan = make_plan(request, models.memory, config, parse_hardware(f"{hardware},ram=32GiB"))
        assert plan.prediction.fits
        return _minutes(plan.prediction.seconds.total)

    yield "| card | " + " | ".join(SIZES) + " |"
    yield "|---|" + "---|" * len(SIZES)
    for hardware in CARDS:
        name = hardware.replace("2x", "2 × ")
        yield f"| {name} | " + " | ".join(minutes(hardware, *size) for size in SIZES.values()) + " |"
    for name, files in MEASURED.items():
        yield f"| {name} | " + " | ".join(f"**{_minutes(_measured(file))}**" for file in files) + " |"


def _minutes(seconds: float) -> str:
    """Two digits are all that a prediction is good for."""
    minutes = seconds / 60
    return f"{minutes:.1f}" if minutes < 10 else f"{minutes:.0f}"


def _measured(file: str) -> float:
    """Seconds of a job of 50 steps, from a run that may have made fewer: steps are alike."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())["sections"]["ours"]
    run = next(one for one in found if one["run"] == "whole")
    return 50 * float(run["step_s"]) + float(run["decode_s"]) + float(run["write_s"])


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(command_line())
    pages = {"README.md": with_card_table, "docs/server.md": with_field_table, "docs/models.md": with_model_tables}
    for page, renewed in ((ROOT / name, renewed) for name, renewed in pages.items()):
        page.write_text(renewed(page.read_text()))
