"""Self-attention in 8 bits by a request or a loss budget, through the engine; a stand-in takes the place of the kernel."""

import pytest

from wanduet.engine.pipeline import Engine
from wanduet.engine.record import subject_of
from wanduet.errors import InvalidRequestError
from wanduet.family.speeds import fields_set_by
from wanduet.kernels.attention import choose
from wanduet.kernels.attention.backends import SDPA, Backend, sdpa
from wanduet.media.latents import load_latents
from wanduet.meta.prices import Prices, settings_key, store_prices
from wanduet.planning import planner
from wanduet.request import GenerationRequest
from wanduet.runtime import models

INT8 = Backend("int8", lambda q, k, v, call: sdpa(q, k, v, call) * (1 + 2**-7), None, exact=False)


@pytest.fixture
def with_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with the kernel."""
    monkeypatch.setattr(choose, "available_backends", lambda device: {one.name: one for one in (SDPA, INT8)})
    monkeypatch.setattr(planner, "check_attention", lambda *_: None)
    monkeypatch.setattr(models, "has_fast_8_bit_attention", lambda config, hardware: True)


@pytest.fixture
def priced(engine: Engine) -> None:
    """As after `wanduet price`: one set with attention in 8 bits is faster than its speed, and loses a little."""
    request = GenerationRequest(prompt="a", num_inference_steps=4)
    plan, resolved = engine.plan(request), engine.models.resolve(request)
    subject = subject_of(engine.models, plan, resolved)
    near = dict(fields_set_by("near"))
    rows = {
        settings_key(fields): {"0": {"forwards": 8, "seconds": seconds, "psnr": psnr}}
        for fields, seconds, psnr in (
            ({}, 10.0, 100.0),
            ({"quantize_attention": "int8"}, 6.0, 44.0),
            (near, 7.0, 45.0),
        )
    }
    about = {"model": subject.model, "versions": dict(subject.versions), "engine": dict(subject.engine)}
    store_prices(engine.models.checkpoint.measurements, subject, Prices(about, rows))


@pytest.mark.usefixtures("priced")
def test_a_budget_chooses_it_for_one_job_and_the_plan_and_the_record_say_so(submit, engine: Engine, with_int8) -> None:
    found = []
    for name, fields in (("budget", {"loss_budget": 43.5}), ("exact", {})):
        job = submit(name, changes=fields, save_latents=True)
        (video,) = job.result().videos
        found.append((load_latents(video.latents_path)[0], video.provenance, job.plan))
    (got, about, plan), (exact, of_exact, _) = found
    assert 0 < (got - exact).norm() / exact.norm() < 0.1
    assert (about["attention"], of_exact["attention"]) == ("int8", "sdpa")
    assert about["request"]["quantize_attention"] == "int8"
    assert "quantize_attention" not in of_exact["request"]
    choices = {choice.setting: choice for choice in plan.choices}
    assert "43.5 dB" in choices["quantize_attention"].why
    assert plan.as_dict()["price"] == {"psnr": {"worst": 44.0}, "source": "measured on this machine"}


@pytest.mark.usefixtures("priced")
def test_a_budget_does_not_choose_it_where_it_cannot_run(engine: Engine) -> None:
    assert engine.models.resolve(GenerationRequest(prompt="a", loss_budget=43.5)).quantize_attention == "off"
    with pytest.raises(InvalidRequestError, match=r"compute capability 8\.0") as refused:
        engine.plan(GenerationRequest(prompt="a", quantize_attention="int8"))
    assert refused.value.nearest == "off"
