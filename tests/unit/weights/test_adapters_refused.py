"""LoRA files that cannot be used are refused as a whole, with a sentence that says why."""

import json
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.unit.weights.lora_files import SHAPES, Q, base_weights, normal, read, saved, saved_peft
from wanduet.errors import ModelNotFoundError, WanduetError, WeightsError
from wanduet.weights.adapters.facts import describe_adapter

A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
GOOD = {A: normal(3, 24), B: normal(24, 3)}


def with_one(value: float) -> torch.Tensor:
    """B with one value that no weight has."""
    values = normal(24, 3)
    values[13, 1] = value
    return values


CASES = {
    "unknown module": (GOOD | {"blocks.0.cross_attn.gate.lora_A.weight": normal(3, 24)}, "blocks.0.cross_attn.gate"),
    "a block too many": (GOOD | {"blocks.3.ffn.2.diff_b": normal(24)}, "blocks.3.ffn.2.diff_b"),
    "a whole weight beside": (GOOD | {f"{Q}.weight": normal(24, 24)}, f"{Q}.weight"),
    "a without b": ({A: GOOD[A]}, "lacks up"),
    "b without a": (GOOD | {"proj_out.lora_up.weight": normal(64, 3)}, "proj_out is incomplete, it lacks down"),
    "alpha alone": (GOOD | {"proj_out.alpha": torch.tensor(1.0)}, "has alpha without"),
    "magnitudes alone": (GOOD | {"proj_out.diff": normal(64, 24), "proj_out.dora_scale": normal(64, 1)}, "dora_scale without"),
    "half of a LoHa": ({f"{Q}.hada_w1_a": normal(24, 2), f"{Q}.hada_w1_b": normal(2, 24)}, "lacks hada_w2_a"),
    "half of a LoKr": ({f"{Q}.lokr_w1": normal(4, 4), f"{Q}.lokr_w2_a": normal(6, 2)}, "LoKr factors"),
    "another rank in b": (GOOD | {B: normal(24, 4)}, "do not fit"),
    "wrong output": ({A: normal(3, 24), B: normal(20, 3)}, "do not fit: down [3, 24], up [20, 3]"),
    "wrong LoKr": ({f"{Q}.lokr_w1": normal(4, 4), f"{Q}.lokr_w2": normal(5, 6)}, "do not fit"),
    "wrong difference": (GOOD | {"proj_out.diff": normal(24, 64)}, "another shape"),
    "wrong bias": (GOOD | {f"{Q}.diff_b": normal(20)}, "another shape"),
    "bias that the model lacks": (GOOD | {"blocks.0.attn1.norm_q.diff_b": normal(24)}, "another shape"),
    "wrong magnitudes": (GOOD | {f"{Q}.dora_scale": normal(20, 1)}, "DoRA"),
    "product for a norm": (
        GOOD | {"blocks.0.norm3.lora_A.weight": normal(1, 1), "blocks.0.norm3.lora_B.weight": normal(24, 1)},
        "is no matrix",
    ),
    "a difference of one number": (GOOD | {"proj_out.diff": torch.tensor(1.0)}, "no matrix or vector in proj_out.diff"),
    "rank 0": ({A: normal(0, 24), B: normal(24, 0)}, "no matrix or vector in"),
    "many alphas": (GOOD | {f"{Q}.alpha": normal(3)}, "alpha of more than one value"),
    "nan": (GOOD | {B: with_one(torch.nan)}, f"NaN, infinity or whole numbers in {B}"),
    "infinity": (GOOD | {B: with_one(torch.inf)}, f"in {B}"),
    "negative infinity in bf16": (GOOD | {B: with_one(-torch.inf).bfloat16()}, f"in {B}"),
    "infinite alpha": (GOOD | {f"{Q}.alpha": torch.tensor(torch.inf)}, f"in {Q}.alpha"),
    "whole numbers": (GOOD | {B: torch.ones(24, 3, dtype=torch.int8)}, f"in {B}"),
    "two that differ": (
        GOOD | {"diffusion_model.blocks.0.self_attn.q.lora_B.weight": normal(24, 3, seed=5)},
        "mean the same and differ",
    ),
    "of two transformers": (
        {f"diffusion_model.transformer_{expert}.blocks.{expert}.self_attn.q.diff": normal(24, 24) for expert in "12"},
        "two transformers of Wan2.2",
    ),
    "of two transformers in diffusers": (
        {f"{prefix}.{name}": value for prefix in ("transformer", "transformer_2") for name, value in GOOD.items()},
        "two transformers of Wan2.2",
    ),
    "14B": (
        {f"blocks.{block}.attn1.to_k.lora_{part}.weight": normal(*shape) for block in (0, 39)
         for part, shape in (("A", (2, 5120)), ("B", (5120, 2)))},
        "is made for 14B (hidden size 5120); this model has 24",
    ),
    "1.3B, differences alone": (
        {"blocks.0.diff_m": normal(1, 6, 1536)}, "is made for 1.3B (hidden size 1536); this model has 24",
    ),
    "14B, biases alone": ({"blocks.0.self_attn.q.diff_b": normal(5120)}, "is made for 14B (hidden size 5120)"),
    "another size": (
        {"blocks.0.ffn.2.lora_A.weight": normal(2, 9), "blocks.0.ffn.2.lora_B.weight": normal(3072, 2)},
        "another model, of hidden size 3072",
    ),
}  # fmt: skip
SUFFIXES = ["w_norm", "b_norm", "set_weight", "reshape_weight", "oft_blocks", "lora_mid.weight", "hada_t1", "lokr_t2"]
NO_LORA = {
    "a whole model": (base_weights(), "is a whole model, not a LoRA"),
    "a whole model, prefixed": (
        {"model.diffusion_model.blocks.0.self_attn.q.weight": normal(2, 2)}, "is a whole model, not a LoRA",
    ),
    "for Flux": (
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": normal(2, 24)},
        "none of its 1 tensors belongs to Wan's transformer (transformer.single_transformer_blocks.0",
    ),
    "text encoder alone": ({"lora_te_x.lora_up.weight": normal(2, 24)}, "all its tensors are of a text encoder"),
    "images alone": (
        {"blocks.0.cross_attn.k_img.diff": normal(24, 24)}, "all its tensors are of image conditioning",
    ),
    "empty": ({}, "none of its 0 tensors"),
}  # fmt: skip


def refusal(path: Path, error: type[WanduetError] = WeightsError) -> str:
    with pytest.raises(error) as caught:
        read(path)
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    tensors, wanted = CASES[case]
    assert wanted in refusal(saved(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_kinds_that_are_not_read_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", GOOD | {f"{Q}.{suffix}": normal(2, 2)})
    assert f"does not read: {Q}.{suffix}" in refusal(path)


@pytest.mark.parametrize("case", NO_LORA)
def test_what_is_no_lora_for_wan_is_named(case: str, tmp_path: Path) -> None:
    tensors, wanted = NO_LORA[case]
    assert wanted in refusal(saved(tmp_path / "a.safetensors", tensors), ModelNotFoundError)


def test_all_that_match_nothing_are_listed(tmp_path: Path) -> None:
    extra = {f"blocks.{block}.attn3.q.lora_A.weight": normal(1, 1) for block in range(9)}
    message = refusal(saved(tmp_path / "a.safetensors", GOOD | extra))
    assert "has 9 tensors that match nothing" in message
    assert all(name in message for name in extra)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"peft_type": "VERA"}, "of the type VERA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model too"),
        ({"r": 3, "use_dora": True}, "has no magnitudes"),
        ({"lora_alpha": "8"}, "lora_alpha '8', which is no number"),
        ({"alpha_pattern": [1]}, "no JSON object"),
        ({"alpha_pattern": {"(a+)+": 1}}, "too complicated"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_configs_that_cannot_be_followed_are_refused(config: dict[str, object], wanted: str, tmp_path: Path) -> None:
    assert wanted in refusal(saved_peft(tmp_path / "adapter", GOOD, config))
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    assert wanted in refusal(saved(tmp_path / "a.safetensors", GOOD, {"lora_adapter_metadata": text}))


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    assert "no LoRA file" in refusal(tmp_path / "none.safetensors", ModelNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "no LoRA of PEFT" in refusal(tmp_path / "empty", ModelNotFoundError)
    (tmp_path / "a.json").write_text("{}")
    assert "it is a JSON file" in refusal(tmp_path / "a.json", ModelNotFoundError)
    torch.save({"x": {1, 2}, "hook": print}, tmp_path / "code.pt")
    assert "to open it would run code" in refusal(tmp_path / "code.pt")
    torch.save({"state_dict": GOOD | {"step": 3}}, tmp_path / "nested.pt")
    assert "no dictionary of tensors" in refusal(tmp_path / "nested.pt")
    whole = saved(tmp_path / "a.safetensors", GOOD).read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-7])
    assert "is damaged" in refusal(tmp_path / "a.safetensors")
    assert set(SHAPES) >= {f"{Q}.weight"}


SHAPES_OF_Q = {
    "lora_A.weight": (3, 24), "lora_B.weight": (24, 3), "lora_B.bias": (24,), "alpha": (), "diff": (24, 24),
    "diff_b": (24,), "dora_scale": (24, 1), "lora_magnitude_vector": (24,), "hada_w1_a": (24, 2), "hada_w1_b": (2, 24),
    "hada_w2_a": (24, 2), "hada_w2_b": (2, 24), "lokr_w1": (4, 3), "lokr_w1_a": (4, 2), "lokr_w1_b": (2, 3),
    "lokr_w2": (6, 8), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 8),
}  # fmt: skip
WHOLE = [
    ["lora_A.weight", "lora_B.weight"],
    ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    ["lokr_w1", "lokr_w2"],
    ["lokr_w1_a", "lokr_w1_b", "lokr_w2"],
    ["diff"],
]
MODULES = (Q, "blocks.0.diff_m", "blocks.1.norm3", "patch_embedding", "head.modulation", "img_emb.proj.1")
FORMS = ((), (0,), (1,), (24,), (24, 24), (3, 24), (24, 3), (0, 24), (24, 0), (1, 24), (24, 1), (24, 16, 1, 2, 2))


@pytest.mark.parametrize("seed", range(2))
def test_no_mixture_of_tensors_fails_without_a_sentence(seed: int, tmp_path: Path) -> None:
    chosen, results = random.Random(seed), Counter[str]()
    for _ in range(80):
        names = [*chosen.choice(WHOLE), *chosen.choices(list(SHAPES_OF_Q), k=chosen.randint(0, 2))]
        tensors = {f"{Q}.{name}": torch.ones(SHAPES_OF_Q[name]) for name in names}
        if chosen.random() < 0.3:
            tensors.popitem()
        if chosen.random() < 0.4:
            tensors[f"{chosen.choice(MODULES)}.{chosen.choice(names)}"] = torch.ones(chosen.choice(FORMS))
        path = saved(tmp_path / "a.safetensors", tensors)
        with suppress(WanduetError):
            json.dumps(describe_adapter(path))
        try:
            updates = read(path).updates
        except WanduetError:
            results["refused"] += 1
            continue
        for name, update in updates.items():
            got = update.applied(torch.ones(SHAPES[name]), 1.0)
            assert got.shape == SHAPES[name] == update.shape
            assert got.isfinite().all()
        results["read"] += 1
    assert min(results["read"], results["refused"]) > 10
