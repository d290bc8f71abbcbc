import dataclasses
from dataclasses import replace

import pytest
import torch

from wanduet.distributed.sequence.sharding import NoSharding
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.attention.call import AttentionCall, Step
from wanduet.models.dit.model import TextContext, WanTransformer

SPEC = replace(
    WAN_1_3B.transformer,
    num_attention_heads=2,
    attention_head_dim=24,
    ffn_dim=96,
    num_layers=2,
    text_dim=32,
    freq_dim=32,
)


@pytest.fixture
def model() -> WanTransformer:
    torch.manual_seed(0)
    return WanTransformer(SPEC).eval()


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, 16, 3, 6, 8), torch.tensor([400]), torch.randn(1, 9, 32)


@torch.no_grad()
def test_prepared_text_gives_the_same(model, given) -> None:
    latents, timestep, embeds = given
    text = model.prepare_text(embeds)
    assert isinstance(text, TextContext)
    assert torch.equal(model(latents, timestep, text), model(latents, timestep, embeds))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(4,), (0,), (8,), (9,), (3, 5)])
def test_padding_is_kept_once_and_counts_as_often_as_it_is_there(model, lengths) -> None:
    torch.manual_seed(2)
    latents, timestep = torch.randn(len(lengths), 16, 3, 6, 8), torch.tensor([400] * len(lengths))
    embeds = torch.randn(len(lengths), 9, 32)
    for prompt, length in zip(embeds, lengths, strict=True):
        prompt[length:] = 0
    text = model.prepare_text(embeds)
    assert text.keys[0].shape[1] == min(9, max(lengths) + 1)
    assert text.repeats == max(1, 9 - max(lengths))
    all_keys = [block.attn2.project_text(model.condition_embedder.embed_text(embeds), model.runtime)
                for block in model.blocks]  # fmt: skip
    whole = TextContext(*(tuple(part) for part in zip(*all_keys, strict=True)))
    assert whole.keys[0].shape[1] == 9
    torch.testing.assert_close(model(latents, timestep, text), model(latents, timestep, whole), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_inputs_are_left_alone(model, given) -> None:
    copies = [x.clone() for x in given]
    model(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@pytest.mark.parametrize("ffn_dim", [24, 96, 450, 10_000])  # more than all tokens fit the scratch, or only some
@pytest.mark.parametrize("batch", [1, 2])
def test_the_scratch_changes_only_rounding(given, ffn_dim: int, batch: int) -> None:
    torch.manual_seed(0)
    model = WanTransformer(dataclasses.replace(SPEC, ffn_dim=ffn_dim)).eval()
    latents, timestep, embeds = (x.expand(batch, *x.shape[1:]) * 1 for x in given)
    with torch.enable_grad():  # every tensor has its own memory
        expected = model(latents, timestep, embeds).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(latents, timestep, embeds), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_prompts_that_share_nothing_give_the_same(model, given) -> None:
    latents, timestep, embeds = given
    texts = [model.prepare_text(embeds * factor) for factor in (1, 2)]
    rope = model.prepare_rope(latents.shape, latents.device)
    shared = model.forward_cfg(latents, timestep, texts, rope)
    model.runtime = dataclasses.replace(model.runtime, share_first=False)
    apart = model.forward_cfg(latents, timestep, texts, rope)
    assert all(torch.equal(a, b) for a, b in zip(shared, apart, strict=True))


@torch.no_grad()
def test_bfloat16_keeps_float32_where_the_official_code_does(model, given) -> None:
    expected = model(*given)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(WanTransformer.parameter_dtype(name, torch.bfloat16))
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"patch_embedding.weight", "condition_embedder.time_proj.weight", "blocks.0.scale_shift_table"} <= kept
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    got = model(*given)
    assert got.dtype == torch.float32
    error = ((got - expected).norm() / expected.norm()).item()
    assert 1e-5 < error < 2e-2


def test_latents_that_do_not_divide_are_refused(model) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        model(torch.randn(1, 16, 3, 5, 8), torch.tensor([1]), torch.randn(1, 9, 32))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_together_give_what_each_gives_alone(model, given, dtype) -> None:
    latents, timestep, _ = given
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(WanTransformer.parameter_dtype(name, dtype))
    texts = [model.prepare_text(torch.randn(1, 9, 32)) for _ in range(3)]
    rope = model.prepare_rope(latents.shape, latents.device)
    together = model.forward_cfg(latents, timestep, texts, rope)
    assert all(torch.equal(got, model(latents, timestep, text)) for got, text in zip(together, texts, strict=True))


@torch.no_grad()
def test_the_first_self_attention_serves_all_prompts(model, given) -> None:
    latents, timestep, embeds = given
    calls = []

    def attention(q, k, v, call):
        calls.append(call)
        return sdpa(q, k, v)

    model.runtime = dataclasses.replace(model.runtime, attention=attention)
    text = model.prepare_text(embeds), model.prepare_text(embeds * 2)
    rope = model.prepare_rope(latents.shape, latents.device)
    model.forward_cfg(latents, timestep, text, rope, Step(7, 400.0))
    assert calls == [AttentionCall((3, 3, 4), block, Step(7, 400.0)) for block in (0, 1, 1)]
    calls.clear()
    model(latents, timestep, text[0])
    assert calls == [AttentionCall((3, 3, 4), block) for block in (0, 1)]


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1])
def test_attention_may_act_by_block(model, given, block) -> None:
    usual = model(*given)
    skips = lambda q, k, v, call: v * 0 if call.block == block else sdpa(q, k, v)  # noqa: E731
    model.runtime = dataclasses.replace(model.runtime, attention=skips)
    got = model(*given)
    model.runtime = dataclasses.replace(model.runtime, attention=sdpa)
    values = model.blocks[block].attn1.to_v
    values.weight.zero_(), values.bias.zero_()
    assert torch.equal(got, model(*given))
    assert not torch.equal(got, usual)


@torch.no_grad()
def test_what_is_sent_ahead_is_what_is_attended_to(model, given) -> None:
    sent: list[tuple[int, torch.Tensor]] = []

    class Ahead(NoSharding):
        overlaps_projections = True

        def send_qkv(self, index: int, x: torch.Tensor) -> None:
            sent.append((index, x.clone()))

        def attend(self, q, k, v, attention, call):
            assert [index for index, _ in sent] == [2, 1, 0]
            assert all(torch.equal(x, (q, k, v)[index]) for index, x in sent)
            sent.clear()
            return super().attend(q, k, v, attention, call)

        attend_first_block = attend

    expected = model(*given)
    model.runtime = dataclasses.replace(model.runtime, sharding=Ahead())
    torch.testing.assert_close(model(*given), expected, rtol=1e-5, atol=1e-5)
