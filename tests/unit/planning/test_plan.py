"""Plans are arithmetic: they need no GPU, load nothing, and never promise more than fits."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanduet.config import GIB, EngineConfig
from wanduet.errors import ConfigError, DoesNotFitError, InvalidRequestError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.footprint.phases import ModelMemory, text_encoder_bytes
from wanduet.planning.alternatives import alternatives
from wanduet.planning.hardware import Hardware, parse_hardware
from wanduet.planning.plan import Plan, require_fit
from wanduet.planning.planner import make_plan
from wanduet.planning.prices import has_fast_8_bit_attention
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models


@pytest.fixture(scope="module")
def memory() -> ModelMemory:
    return Models(EngineConfig(model="random:1.3b")).memory


def plan(
    memory: ModelMemory, hardware: str, size=(480, 832), frames: int = 81, strength=None, fields=None, **settings_
) -> Plan:
    given = {} if strength is None else {"input_video": "sha256:0", "strength": strength}
    given |= fields or {}
    request = GenerationRequest(prompt="x", height=size[0], width=size[1], num_frames=frames, **given)
    request = request.resolve(memory.spec)
    machine = parse_hardware(f"{hardware},ram=32GiB")
    return make_plan(request, memory, EngineConfig(model="random:1.3b", **settings_), machine)


def test_two_cards_get_a_role_each(memory) -> None:
    found = plan(memory, "2x24GiB", strategy="placed")
    assert (found.prediction.fits, found.strategy) == (True, "placed")
    assert {d.role for d in found.prediction.devices} == {"vae", "transformer"}
    assert found.transformer.device != found.vae.device
    assert found.transformer.resident_blocks == 30


def test_placed_halves_the_peak(memory) -> None:
    alone = plan(memory, "1x24GiB").prediction.peak_bytes["cuda:0"]
    found = plan(memory, "2x24GiB", strategy="placed", vram_limit=alone // 2)
    assert found.prediction.fits
    assert max(found.prediction.peak_bytes.values()) <= alone // 2


def test_two_equal_cards_share_a_video_by_themselves_and_unlike_ones_do_not(memory) -> None:
    equal, unlike = plan(memory, "2x24GiB"), plan(memory, "24GiB+12GiB")
    assert (equal.strategy, equal.group.layout.cfg, equal.group.ranks) == ("parallel", 2, ("cuda:0", "cuda:1"))
    assert (unlike.strategy, unlike.transformer.device) == ("placed", "cuda:0")
    tight = plan(memory, "2x24GiB", (1080, 1920), vram_limit=7 * GIB)
    assert (tight.prediction.fits, tight.strategy) == (True, "placed")


@pytest.mark.parametrize(
    ("hardware", "size"),
    [("1x24GiB", (480, 832)), ("1x24GiB", (720, 1280)), ("1x24GiB", (1080, 1920)), ("1x8GiB", (720, 1280)),
     ("2x8GiB", (1080, 1920)), ("1x4GiB", (480, 832))],
)  # fmt: skip
def test_what_was_promised_fits(memory, hardware, size) -> None:
    found = plan(memory, hardware, size)
    assert found.prediction.fits
    assert all(d.peak <= d.limit_bytes for d in found.prediction.devices)


def test_less_memory_means_slower_settings_then_a_refusal(memory) -> None:
    roomy, tight, tiny = (plan(memory, "1x24GiB", vram_limit=int(g * GIB)) for g in (20, 2.5, 0.5))
    assert roomy.transformer.resident_blocks > tight.transformer.resident_blocks
    assert tight.prediction.fits
    assert not tiny.prediction.fits
    request = GenerationRequest(prompt="x").resolve(memory.spec)
    with pytest.raises(DoesNotFitError, match="cuda:0 needs") as refused:
        require_fit(tiny, request)
    assert refused.value.hint


def test_8_bit_weights_take_half_the_memory_wherever_they_are(memory) -> None:
    full, small = (plan(memory, "1x24GiB", weights=name).prediction for name in ("auto", "q8"))
    saved = memory.transformer_weights("bfloat16") - replace(memory, weights="q8").transformer_weights("bfloat16")
    assert 0.48 < saved / memory.transformer_weights("bfloat16") < 0.5
    dense = 8960 * 1536 * 2  # a product converts one matrix at a time
    before, after = (one.devices[0].phases["denoise"] for one in (full, small))
    assert before - after == pytest.approx(1.01 * (saved - dense), abs=4)
    settings_ = {"vram_limit": int(2.5 * GIB)}
    full, small = (plan(memory, "1x24GiB", weights=name, **settings_) for name in ("auto", "q8"))
    assert full.transformer.resident_blocks <= small.transformer.resident_blocks
    assert small.prediction.host_bytes < full.prediction.host_bytes - 0.3 * saved
    on_host = [plan(memory, "cpu", weights=name).prediction.host_bytes for name in ("auto", "bf16", "q8")]
    assert on_host == sorted(on_host, reverse=True)
    assert len(set(on_host)) == 3


@pytest.mark.parametrize(("attention", "channels"), [("int8", 64), ("int8-fast", 128)])
def test_8_bit_attention_is_planned_with_its_codes(memory, attention: str, channels: int) -> None:
    """Of each query and key: a byte for each coded channel of a head, and two factors."""
    plain, coded = (
        plan(memory, "1x24GiB", attention=name).prediction.devices[0].phases["denoise"] for name in ("auto", attention)
    )
    assert 0.85 < (coded - plain) / (2 * 32_760 * 12 * (channels + 8)) < 1.05  # small ones fit into gaps


def test_host_memory_counts_too(memory) -> None:
    assert not plan(memory, "1x24GiB", ram_limit=GIB).prediction.fits
    assert plan(memory, "1x24GiB", ram_limit=4 * GIB).prediction.fits  # nothing is streamed there


@settings(max_examples=5, deadline=None)
@given(
    gib=st.floats(0.5, 48), cards=st.integers(1, 2), rows=st.integers(4, 60), columns=st.integers(4, 60),
    steps=st.integers(0, 30),
)  # fmt: skip
def test_a_plan_that_fits_is_within_its_limits(memory, gib, cards, rows, columns, steps) -> None:
    found = plan(memory, f"{cards}x{gib:.2f}GiB", (16 * rows, 16 * columns), 4 * steps + 1)
    within = (
        all(d.peak <= d.limit_bytes for d in found.prediction.devices)
        and found.prediction.host_bytes <= found.prediction.host_limit_bytes
    )
    assert found.prediction.fits == within
    assert set(found.as_dict()) >= {"fits", "strategy", "devices", "host_bytes", "choices", "nearest_that_fits"}


@pytest.mark.parametrize(
    ("devices", "strategy", "roles"),
    [("cpu", "single", {"cpu": "vae+transformer+text_encoder"}),
     ("vae=cuda:0,transformer=cuda:1", "placed", {"cuda:0": "vae", "cuda:1": "transformer"}),
     ("cuda:1", "single", {"cuda:1": "vae+transformer"})],
)  # fmt: skip
def test_devices_are_obeyed(memory, devices, strategy, roles) -> None:
    found = plan(memory, "2x24GiB", devices=devices)
    assert found.strategy == strategy
    assert {d.name: d.role for d in found.prediction.devices} == roles


def test_a_device_that_is_not_there_is_refused(memory) -> None:
    with pytest.raises(ConfigError, match="cuda:5"):
        plan(memory, "2x24GiB", devices="cuda:5")


def test_hardware_in_words() -> None:
    machine: Hardware = parse_hardware("24GiB+12GiB,ram=64GiB")
    assert [d.total_bytes for d in machine.devices] == [24 * GIB, 12 * GIB]
    assert machine.host_total_bytes == 64 * GIB
    for unknown in ("much", "2080 Ti"):  # no 2080 TiB
        with pytest.raises(ConfigError):
            parse_hardware(unknown)


def test_a_streamed_text_encoder_stays_below_three_gib() -> None:
    for dtype in ("float32", "bfloat16"):
        assert text_encoder_bytes(WAN_1_3B, dtype, "streamed") < 3 * GIB
    assert text_encoder_bytes(WAN_1_3B, "float32", "resident") > 21 * GIB


def test_seconds_come_from_the_work(memory) -> None:
    """The counts of benchmarks' anchors: 283, 1250 and 5857 TFLOP a forward."""
    from wanduet.planning.cost import forward_flop

    for tokens, tflop in ((32760, 283), (75600, 1250), (171360, 5857)):
        assert forward_flop(WAN_1_3B.transformer, tokens, 512) / 1e12 == pytest.approx(tflop, rel=2e-3)
    seconds = plan(memory, "1x24GiB").prediction.seconds
    assert 150 < seconds.denoise < 900  # a 3090 needs about ten minutes
    assert plan(memory, "2x24GiB").prediction.seconds.denoise == pytest.approx(seconds.denoise / 2)
    assert plan(memory, "1x24GiB", frames=161).prediction.seconds.denoise > 2 * seconds.denoise


def test_skipped_steps_are_planned_for(memory) -> None:
    """Forwards, seconds and memory; a latent of 81 frames at 480p has 8 MB."""
    exact = plan(memory, "2x24GiB", strategy="placed")
    assert exact.prediction.forwards is None
    for cache, gate, count, kept in (
        ("magcache", 1, 50, 3),
        ("magcache", 0.5, 40, 3),
        ("easycache", 1, 39, 4),
        ("off", 0.5, 75, 0),
    ):
        found = plan(memory, "2x24GiB", strategy="placed", fields={"step_cache": cache, "guidance_gate": gate})
        shown = found.as_dict()
        assert shown["predicted_forwards"] == {"count": count, "of": 100, "is_estimate": cache == "easycache"}
        assert found.prediction.seconds.denoise == pytest.approx(
            exact.prediction.seconds.denoise * count / 100, rel=0.02
        )
        assert found.prediction.seconds.step == exact.prediction.seconds.step
        device = found.transformer.device
        more = found.prediction.peak_bytes[device] - exact.prediction.peak_bytes[device]
        assert more == pytest.approx(kept * 21 * 60 * 104 * 16 * 4 * 1.01, abs=2)
        why = {choice["setting"]: choice["why"] for choice in shown["choices"]}
        assert f"{count} of 100 forwards" in why["step_cache" if cache != "off" else "guidance_gate"]


def test_sparse_attention_is_planned_for(memory) -> None:
    """Of 283 TFLOP a forward at 480p, 192 are self-attention outside the first block; 37 of 50 steps are sparse."""
    exact, sparse, fewer = (
        plan(memory, "2x24GiB", strategy="placed", fields={"sparse": share}) for share in (1.0, 0.5, 0.2)
    )
    for found, left_out in ((sparse, 0.5), (fewer, 204 / 256)):
        saved = 1 - found.prediction.seconds.denoise / exact.prediction.seconds.denoise
        assert saved == pytest.approx(left_out * 192 / 283 * 37 / 50, abs=0.01)
        assert found.prediction.seconds.step == exact.prediction.seconds.step  # a dense one
        device = found.transformer.device
        more = found.prediction.peak_bytes[device] - exact.prediction.peak_bytes[device]
        assert 5e6 < more < 15e6  # lists, scores and means of 256 blocks and 12 heads
    assert exact.prediction.forwards is None
    assert sparse.as_dict()["predicted_forwards"] == {"count": 100, "of": 100, "is_estimate": False}


@pytest.mark.parametrize(("gpu", "times"), [("h100", {"int8": 0.61, "int8-fast": 0.75}), ("RTX 4090", {})])
def test_attention_in_8_bits_is_planned_for_where_it_was_measured(memory, gpu: str, times: dict[str, float]) -> None:
    """Self-attention has 198 of the 283 TFLOP of a forward at 480p; half the keys in the last 37 of 50 steps leave 127."""
    for form in ("int8", "int8-fast"):
        exact = plan(memory, gpu).prediction.seconds
        found = plan(memory, gpu, fields={"quantize_attention": form})
        speed = times.get(form, 1)
        share = 198 / 283
        assert found.prediction.seconds.denoise / exact.denoise == pytest.approx(1 + share * (1 / speed - 1), rel=0.02)
        (why,) = (choice.why for choice in found.choices if choice.setting == "quantize_attention")
        says = f"{speed:.2f} times as fast" if times else "the seconds are those of exact attention"
        assert says in why
        half = plan(memory, gpu, fields={"sparse": 0.5}).prediction.seconds
        both = plan(memory, gpu, fields={"sparse": 0.5, "quantize_attention": form}).prediction.seconds
        assert both.denoise / half.denoise == pytest.approx(1 + 127 / 212 * (1 / speed - 1), rel=0.02)


def test_steps_at_a_lower_resolution_are_planned_for(memory) -> None:
    """Of 50 steps of 720p, so many cost what those of 480p do; with a guidance gate, the last 25 are without guidance."""

    def planned(size=(720, 1280), **fields) -> Plan:
        return plan(memory, "2x48GiB", size, strategy="placed", fields=fields)

    def step(**fields) -> tuple[float, float]:
        seconds = [planned(size, **fields).prediction.seconds.denoise / 50 for size in ((720, 1280), (480, 848))]
        return seconds[0], seconds[1]

    low, exact = planned(low_res_first=True), planned()
    (choice,) = [one for one in low.choices if one.setting == "low_res_first"]
    steps = int(re.findall("the first ([0-9]+) steps at 848x480", choice.why)[0])
    assert 25 < steps < 50
    (whole, small), (plain, plain_small) = step(), step(guidance_scale=1.0)
    found = low.prediction.seconds
    assert found.denoise == pytest.approx(steps * small + (50 - steps) * whole)
    assert found.step == exact.prediction.seconds.step  # of the whole size
    assert low.prediction.peak_bytes == exact.prediction.peak_bytes  # smaller steps need less
    gated = planned(low_res_first=True, guidance_gate=0.5).prediction.seconds
    assert gated.denoise == pytest.approx(25 * small + (steps - 25) * plain_small + (50 - steps) * plain)


def test_sparse_attention_needs_whole_heads(memory) -> None:
    """Five devices do not divide twelve heads: each would see a part of the keys."""
    fields = {"sparse": 0.5, "guidance_scale": 1.0}
    with pytest.raises(ConfigError, match="do not divide the 12 heads"):
        plan(memory, "5x24GiB", strategy="parallel", fields=fields)
    guided = plan(memory, "10x24GiB", fields={"sparse": 0.5})
    assert guided.strategy != "parallel"
    assert plan(memory, "10x24GiB").group.layout.ring == 5


@pytest.mark.parametrize(
    ("cards", "link", "unguided"),
    [("2xH100", "direct", "parallel"), ("2xRTX 6000 Ada", "direct", "parallel"), ("2x3090", "host", "placed")],
)
def test_without_guidance_cards_share_a_video_if_they_reach_each_other(memory, cards, link, unguided) -> None:
    assert parse_hardware(cards).link == link
    assert plan(memory, cards).strategy == "parallel"
    assert plan(memory, cards, fields={"guidance_scale": 1.0}).strategy == unguided


@pytest.mark.parametrize(("hardware", "fits"), [("cpu", False), ("T4", False), ("3090", True), ("h100", True)])
@pytest.mark.parametrize("name", ["int8", "int8-fast"])
def test_8_bit_attention_that_a_device_lacks_is_refused_by_the_plan(memory, hardware, fits, name) -> None:
    if fits:
        assert plan(memory, hardware, attention=name).prediction.fits
    else:
        with pytest.raises(ConfigError, match=re.escape(f"attention='{name}' needs a GPU")):
            plan(memory, hardware, attention=name)


def test_devices_need_not_divide_the_tokens(memory) -> None:
    """Three devices and 32 tokens: their parts differ by one."""
    found = plan(memory, "3x24GiB", size=(64, 64), frames=5, strategy="parallel")
    assert len(found.group.ranks) == 3
    assert found.prediction.fits


def test_a_speed_is_in_the_plan_with_what_it_loses(memory) -> None:
    assert "speed" not in plan(memory, "1x24GiB").as_dict()
    for fields, speed, price, says in (
        ({"speed": "exact"}, "exact", None, "asked for: 100 forwards a video, nothing is skipped"),
        ({"speed": "fine"}, "fine", {"mean": 25.24}, "asked for: 39 of 100 forwards"),
        ({"speed": "draft"}, "draft", None, "what it loses here is not known"),
        ({"loss_budget": 25}, "fine", {"mean": 25.24}, "the fastest that is known to keep 25 dB here: 39 of 100"),
        ({"loss_budget": 60}, "exact", None, "no faster one is known to keep 60 dB here: 100 forwards"),
    ):
        shown = plan(memory, "1x24GiB", fields=fields).as_dict()
        assert shown["speed"] == speed
        assert (shown["price"] and shown["price"]["psnr"]) == price
        why = {choice["setting"]: choice["why"] for choice in shown["choices"]}
        assert says in why["speed"]
        assert ("mean PSNR 25.2 dB (published" in why["speed"]) == (price is not None)
        if speed == "fine":
            assert why["step_cache"].startswith("set by speed fine")


def test_a_gate_needs_both_prompts_on_each_of_two_cards(memory) -> None:
    exact, gated = plan(memory, "2x24GiB"), plan(memory, "2x24GiB", fields={"guidance_gate": 0.5})
    assert exact.group.layout.cfg == gated.group.layout.cfg == 2
    text = gated.prediction.peak_bytes["cuda:0"] - exact.prediction.peak_bytes["cuda:0"]
    exchanged = 2 * 32760 * 1536 * 2  # keys and values of the sequence that they share after it
    assert 1 < text / exchanged <= 1.1 * (1 + 512 * 2 * 30 * 1536 * 2 / exchanged)


def test_an_input_video_is_planned_for(memory) -> None:
    without, found, tight = (
        plan(memory, "1x24GiB"),
        plan(memory, "1x24GiB", strength=0.5),
        plan(memory, "4GiB", strength=0.5),
    )
    assert (without.vae.encode_tiles, found.vae.encode_tiles) == (1, 1)
    assert tight.prediction.fits
    assert tight.vae.encode_tiles > 1
    assert without.prediction.devices[0].phases["encode"] == 0
    needed = memory.encode((480, 832, 81), 1, "float32") + memory.vae_encoder_weights("float32")
    assert found.prediction.devices[0].phases["encode"] > needed + memory.transformer_weights("bfloat16")
    assert found.prediction.host_bytes > without.prediction.host_bytes
    before, after = without.as_dict()["predicted_seconds"], found.as_dict()["predicted_seconds"]
    assert after["denoise"] == pytest.approx(before["denoise"] / 2, rel=1e-3)
    assert 0 < after["encode"] < 2 * after["decode"]
    assert after["total"] == pytest.approx(after["encode"] + after["denoise"] + after["decode"], abs=0.2)
    assert plan(memory, "1x24GiB", strength=1.0).as_dict() == without.as_dict()  # its pictures are not used
    assert plan(memory, "2x24GiB", strength=0.0).prediction.seconds.denoise == 0


def test_an_encode_on_the_vae_s_own_device_leaves_the_other_s_as_it_is(memory) -> None:
    found = plan(memory, "2x24GiB", strategy="placed", strength=0.5)
    phases = {device.role: device.phases for device in found.prediction.devices}
    assert phases["vae"]["encode"] > memory.encode((480, 832, 81), found.vae.encode_tiles, "float32")
    assert phases["transformer"]["encode"] < phases["transformer"]["denoise"]


def test_a_decode_that_would_not_have_its_memory_is_planned_smaller(memory, monkeypatch) -> None:
    import torch

    from wanduet.runtime.context import RunContext
    from wanduet.stages.fallback import reserve_decode

    request = GenerationRequest(prompt="x").resolve(memory.spec)
    found = plan(memory, "1x24GiB")
    asked: list[int] = []
    real = torch.empty

    def empty(*size, device=None, **options):
        if device is None or torch.device(device).type != "cuda":
            return real(*size, device=device, **options)
        asked.append(*size)
        if len(asked) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return None

    monkeypatch.setattr(torch, "empty", empty)
    notes: list[str] = []
    smaller = reserve_decode(found, request, memory, RunContext(note=notes.append))
    assert asked == sorted(asked, reverse=True)
    assert smaller.vae.tiling != found.vae.tiling
    assert "less memory is free" in notes[0]


def test_what_is_reserved_for_a_later_job_is_not_above_its_plan(memory, monkeypatch) -> None:
    import torch

    from wanduet.runtime.context import NO_JOB
    from wanduet.stages import fallback

    request = GenerationRequest(prompt="x").resolve(memory.spec)
    found = plan(memory, "1x24GiB")
    there = memory.transformer_weights("bfloat16") + memory.vae_weights("float32") + 100 * 2**20  # and workspaces
    asked: list[int] = []
    monkeypatch.setattr(fallback, "_allocated_bytes", lambda _: there)
    monkeypatch.setattr(torch, "empty", lambda size, **_: asked.append(size))
    fallback.reserve_decode(found, request, memory, NO_JOB)
    assert asked
    assert there + asked[0] <= found.prediction.devices[0].peak


def test_blocks_wait_in_a_file_where_the_host_is_small(memory) -> None:
    little = int(4.25 * GIB)
    small = plan(memory, "1x24GiB", vram_limit=int(2.5 * GIB), ram_limit=little)
    assert (small.prediction.fits, small.transformer.offload_memory) == (True, "mapped")
    assert small.prediction.host_bytes <= little
    assert plan(memory, "1x24GiB", vram_limit=int(2.5 * GIB)).transformer.offload_memory == "pinned"


@pytest.mark.parametrize("hardware", ["24GiB+2GiB", "2GiB+24GiB", "24GiB+1GiB", "2GiB+1GiB+24GiB"])
def test_a_small_card_beside_a_large_one_is_no_reason_to_refuse(memory, hardware) -> None:
    found = plan(memory, hardware, (1080, 1920))
    assert (found.prediction.fits, found.strategy) == (True, "single")
    assert found.prediction.peak_bytes.keys() == {f"cuda:{hardware.split('+').index('24GiB')}"}


def test_a_pair_that_was_asked_for_is_kept(memory) -> None:
    assert not plan(memory, "24GiB+1GiB", strategy="placed").prediction.fits
    found = plan(memory, "6GiB+3GiB", (720, 1280), strategy="placed")
    assert (found.prediction.fits, found.strategy) == (True, "placed")


def test_the_two_best_of_several_cards_are_taken(memory) -> None:
    found = plan(memory, "16GiB+8GiB+24GiB")
    assert (found.strategy, found.transformer.device, found.vae.device) == ("placed", "cuda:2", "cuda:0")
    equal = plan(memory, "4x24GiB", strategy="placed")
    assert (equal.vae.device, equal.transformer.device) == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("hardware", "size", "settings_"),
    [
        ("24GiB", (1080, 1920), {"vram_limit": int(2.6 * GIB)}),
        ("2.6GiB", (1920, 1080), {}),  # upright
        ("2.3GiB", (1024, 1024), {}),
        ("2.1GiB", (160, 3200), {}),
        ("1GiB", (96, 96), {"devices": "cuda:0"}),
        ("6GiB+6GiB", (1080, 1920), {"strategy": "parallel"}),
        ("cpu", (480, 832), {"ram_limit": 8 * GIB}),
        ("24GiB", (480, 832), {"ram_limit": 6 * GIB, "text_encoder_hold": "resident"}),
    ],
)
def test_what_is_offered_instead_is_accepted_when_asked_for(memory, hardware, size, settings_) -> None:
    found = plan(memory, hardware, size, **settings_)
    assert not found.prediction.fits
    assert found.nearest_that_fits
    for nearest in found.nearest_that_fits:
        change = {k: v for k, v in nearest.items() if not k.startswith("predicted")}
        fields = {"height": size[0], "width": size[1], "num_frames": 81} | {
            k: change.pop(k) for k in ("height", "width", "num_frames") if k in change
        }
        again = plan(
            memory, hardware, (fields["height"], fields["width"]), fields["num_frames"], **{**settings_, **change}
        )
        assert again.prediction.fits
        assert again.prediction.peak_bytes == nearest["predicted_peak_bytes"]
        upright = (fields["height"] > fields["width"]) == (size[0] > size[1])
        assert upright


def test_what_is_offered_is_legal_for_a_model_of_another_stride(memory) -> None:
    spec = replace(memory.spec, vae=replace(memory.spec.vae, dim_mult=(1, 2, 4, 4, 4), temperal_downsample=(True,) * 4))
    request = GenerationRequest(prompt="x", height=1024, width=736, num_frames=161).resolve(spec)
    offered = list(alternatives(request, EngineConfig(), spec, parse_hardware("1GiB")))
    assert {one.kind for one in offered} == {"frames", "size", "both"}  # on the CPU it would take days
    for one in offered:
        asked = one.request.as_request().resolve(spec)  # raises where it is not legal
        assert asked == one.request
        assert one.kind == "mode" or asked.num_frames * asked.height * asked.width < 161 * 1024 * 736


def test_what_is_offered_leaves_out_what_it_cannot_have(memory) -> None:
    """Smaller sizes have no smaller form that the model makes, shorter videos have."""
    request = GenerationRequest(prompt="x", height=720, width=1280, low_res_first=True).resolve(memory.spec)
    offered = list(alternatives(request, EngineConfig(), memory.spec, parse_hardware("1GiB")))
    assert {(one.kind, one.request.low_res_first) for one in offered if one.kind != "mode"} == {
        ("frames", True), ("size", False), ("both", False),
    }  # fmt: skip
    assert all(one.change.get("low_res_first") is False for one in offered if not one.request.low_res_first)


@pytest.mark.parametrize(
    "text", ["", "much", "0x24GiB", "999999x24GiB", "2x", "1MiB", "RTX 3095", "RTX 4090 Laptop", "4090x2", "²x24GiB", "9" * 400 + "GiB", "24GiB;12GiB",
             "24GiB,ram=", "+", "24GiB++24GiB"],
)  # fmt: skip
def test_hardware_that_is_none(text) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_hardware(text)
    assert refused.value.hint


@pytest.mark.parametrize("hardware", ["24GiB", "2x24GiB", "24GiB+12GiB"])
def test_later_jobs_which_find_memory_in_pieces_are_planned_for(memory, hardware, monkeypatch) -> None:
    later = plan(memory, hardware).prediction.peak_bytes
    monkeypatch.setattr("wanduet.planning.planner.LATER_JOBS_SHARE", 0.0)
    first = plan(memory, hardware).prediction.peak_bytes
    assert later.keys() == first.keys()
    assert all(1.009 < later[name] / first[name] < 1.011 for name in first)


def test_the_host_is_planned_for_weights_of_float32_that_are_read_into_bfloat16(memory) -> None:
    """5.7 GB of float32 in files, 2.7 GiB where they go: a process that reads them takes 3.5 GiB at most."""
    request = GenerationRequest(prompt="x", height=16, width=16, num_frames=1).resolve(memory.spec)
    machine = parse_hardware("cpu,ram=32GiB")
    settings_ = {"transformer_dtype": "bfloat16", "devices": "cpu"}
    read, drawn = (
        make_plan(request, memory, EngineConfig(model=model, **settings_), machine)
        for model in ("a/model", "random:1.3b")
    )
    weights = memory.transformer_weights("bfloat16")
    assert 2.6 * GIB < weights < 2.8 * GIB
    reading = read.prediction.host_bytes - drawn.prediction.host_bytes
    assert 256 * 2**20 <= reading <= 512 * 2**20
    assert weights + reading < 3.5 * GIB


def test_what_a_larger_job_has_left_is_given_back_before_a_smaller_one(monkeypatch) -> None:
    import torch

    from wanduet.runtime import release

    released: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda name: {"cuda:0": 15, "cuda:1": 3}[name])
    monkeypatch.setattr(release, "release_memory", lambda: released.append(True))
    release.trim_cache({"cuda:0": 15, "cuda:1": 9, "cpu": 0})
    assert released == []
    release.trim_cache({"cuda:0": 9, "cuda:1": 9})
    assert released == [True]


@pytest.mark.parametrize(("hardware", "format", "nearest"), [("A100", "fp8", "int8"), ("2x3090", "fp8", "int8")])
def test_products_that_a_card_lacks_are_refused(memory, hardware: str, format: str, nearest: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"cannot compute {format} products") as refused:
        plan(memory, hardware, fields={"quantize": format})
    assert (refused.value.field, refused.value.nearest) == ("quantize", nearest)


@pytest.mark.parametrize(("hardware", "format"), [("A100", "int8"), ("4090", "fp8"), ("2xh100", "fp8")])
def test_products_in_8_bits_are_planned(memory, hardware: str, format: str) -> None:
    exact, found = (plan(memory, hardware, fields={"quantize": name}) for name in ("off", format))
    (choice,) = (choice for choice in found.choices if choice.setting == "quantize")
    assert choice.value == format
    assert "180 layers" in choice.why
    assert found.prediction.seconds.denoise < exact.prediction.seconds.denoise
    more = [
        a.phases["denoise"] - b.phases["denoise"]
        for a, b in zip(found.prediction.devices, exact.prediction.devices, strict=True)
    ]
    assert all(0 < size < 0.25 * GIB for size in more)
    assert all(choice.setting != "quantize" for choice in exact.choices)


def test_attention_in_8_bits_takes_memory_and_is_refused_where_it_cannot_run(memory) -> None:
    exact, found = (plan(memory, "3090", fields={"quantize_attention": name}) for name in ("off", "int8"))
    values = {choice.setting: choice.value for choice in found.choices}
    assert (values["attention"], values["quantize_attention"]) == ("int8", "int8")
    assert found.prediction.devices[0].phases["denoise"] > exact.prediction.devices[0].phases["denoise"]
    with pytest.raises(InvalidRequestError, match="off on cuda:0") as refused:
        plan(memory, "T4", fields={"quantize_attention": "int8"})
    assert (refused.value.field, refused.value.nearest) == ("quantize_attention", "off")


@pytest.mark.parametrize(
    ("hardware", "settings", "expected"),
    [
        ("3090", {}, True),
        ("2x4090", {"devices": "cuda:1"}, True),
        ("5090", {}, True),
        ("4090", {"attention": "sdpa"}, False),
        ("4090", {"devices": "cpu"}, False),
        ("h100", {}, False),  # exact attention is faster there
        ("3090+T4", {}, False),
        ("3090+T4", {"devices": "cuda:0"}, True),
        ("cpu", {}, False),
    ],
)
def test_a_budget_may_choose_attention_in_8_bits_on_cards_that_gain_by_it(
    hardware: str, settings: dict[str, str], expected: bool
) -> None:
    assert has_fast_8_bit_attention(EngineConfig(**settings), parse_hardware(hardware)) == expected


def test_on_a_cpu_8_bits_are_no_faster_and_the_plan_says_so(memory) -> None:
    exact, found = (plan(memory, "cpu", (64, 64), 5, fields={"quantize": name}) for name in ("off", "fp8"))
    (choice,) = (choice for choice in found.choices if choice.setting == "quantize")
    assert "takes longer" in choice.why
    assert found.prediction.seconds.denoise == exact.prediction.seconds.denoise


def test_a_decode_in_bfloat16_takes_less_time_and_memory_where_it_has_matrix_units(memory) -> None:
    def both(machine: str) -> list[Plan]:
        return [plan(memory, machine, vae_dtype=dtype, text_encoder_device="cpu") for dtype in ("float32", "bfloat16")]

    exact, half = both("h100")
    assert half.prediction.seconds.decode == pytest.approx(0.58 * exact.prediction.seconds.decode)
    assert half.prediction.seconds.denoise == exact.prediction.seconds.denoise
    assert half.prediction.devices[0].phases["decode"] < 0.8 * exact.prediction.devices[0].phases["decode"]
    exact, half = both("Tesla V100")
    assert half.prediction.seconds.decode == exact.prediction.seconds.decode
