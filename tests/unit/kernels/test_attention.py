import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wanduet.errors import ConfigError
from wanduet.kernels import measurements
from wanduet.kernels.attention import backends
from wanduet.kernels.attention import choose as attention_choice
from wanduet.kernels.attention.backends import Backend, available_backends, plain_with_lse, sdpa
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.choose import Shape, choose_attention, choose_together, measured
from wanduet.kernels.measurements import CACHE_FILE, Timing

CPU = torch.device("cpu")
SHAPE = Shape(queries=64, keys=64, heads=2, head_dim=16)
CALL = AttentionCall((1, 1, 64))


class Spy:
    """A back end that counts its calls and spoils its result."""

    def __init__(self, name: str, spoil=lambda x: x, slow: float = 0.0, exact: bool = True, lse=True) -> None:
        self.calls, self.spoil, self.slow = 0, spoil, slow
        self.backend = Backend(name, self.attend, self.attend_with_lse if lse else None, exact=exact)

    def attend(self, q, k, v, call):
        self.calls += 1
        if self.slow:
            time.sleep(self.slow)
        return self.spoil(sdpa(q, k, v))

    def attend_with_lse(self, q, k, v, call):
        out, lse = plain_with_lse(q, k, v)
        return self.spoil(out), lse


def offered(*spies: Spy) -> dict[str, Backend]:
    return {"sdpa": backends.SDPA} | {spy.backend.name: spy.backend for spy in spies}


def choose(*spies: Spy, dtype=torch.float32, **given):
    return choose_attention(CPU, SHAPE, dtype, backends=offered(*spies), **given)


@pytest.fixture
def slow_sdpa(monkeypatch) -> None:
    spy = Spy("sdpa", slow=0.02)
    monkeypatch.setattr(backends, "SDPA", spy.backend)


def test_close_ones_are_chosen_by_what_they_take_in_the_long_run(monkeypatch) -> None:
    brisk, steady, slow = Spy("brisk"), Spy("steady"), Spy("slow")
    cold, warm = {"sdpa": 50.0, "brisk": 9.9, "steady": 10.0, "slow": 11.0}, {"brisk": 12.0, "steady": 10.5}
    seen = dict.fromkeys(cold, 0)

    def timed(attend, qkv, device) -> list[float]:
        name = next((spy.backend.name for spy in (brisk, steady, slow) if attend == spy.attend), "sdpa")
        seen[name] += 1
        return [cold[name] if seen[name] == 1 else warm[name]] * attention_choice.TIMED_RUNS

    monkeypatch.setattr(attention_choice, "_timed", timed)
    choice = choose(brisk, steady, slow)
    assert choice.name == "steady"
    assert [(row.name, row.milliseconds) for row in choice.table] == [
        ("steady", 10.5), ("slow", 11.0), ("brisk", 12.0), ("sdpa", 50.0)
    ]  # fmt: skip
    assert seen["brisk"] == seen["steady"] > 10 * seen["slow"] == 10


def table(**milliseconds: float | None) -> tuple[Timing, ...]:
    return tuple(Timing(name, ms, 0.001, None if ms else "wrong result") for name, ms in milliseconds.items())


def test_devices_in_step_use_the_same(monkeypatch) -> None:
    found = {name: Spy(name).backend for name in ("a", "b", "c")}
    monkeypatch.setattr(attention_choice, "available_backends", lambda _: found)

    def together(*tables: tuple[Timing, ...]) -> str:
        return choose_together(
            [(min(rows, key=lambda r: r.milliseconds or 1e9).name, rows) for rows in tables], CPU
        ).name

    assert together(table(a=1.0, b=2.0), table(a=1.5, b=1.9)) == "a"
    assert together(table(a=1.0, b=2.0), table(a=3.0, b=2.5)) == "b"  # nobody waits for a slow one
    assert together(table(a=1.0, b=2.0, c=3.0), table(a=None, b=None, c=2.0)) == "c"  # one is wrong on one of them
    assert together(table(a=1.0), table(b=1.0)) == "a"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(33, 33), (1500, 70), (5, 300)])
def test_plain_form_equals_sdpa(dtype, lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 16).to(dtype) for length in (lengths[0], lengths[1], lengths[1]))
    out, lse = plain_with_lse(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, sdpa(q, k, v), rtol=bound, atol=bound)
    assert lse.shape == (2, 3, lengths[0])
    assert lse.dtype == torch.float32


def test_log_sum_exp_joins_parts_of_the_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 2, 16)
    whole, _ = plain_with_lse(q, k, v)
    parts = [plain_with_lse(q, k[:, rows], v[:, rows]) for rows in (slice(0, 13), slice(13, 40))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    joined = sum(out * weight for (out, _), weight in zip(parts, weights, strict=True))
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)


def test_a_cpu_has_sdpa_and_measures_nothing(tmp_path: Path) -> None:
    assert list(available_backends(CPU)) == ["sdpa"]
    choice = choose_attention(CPU, SHAPE, torch.float32, cache_folder=tmp_path)
    assert choice.name == "sdpa"
    assert choice.table == ()
    assert not list(tmp_path.iterdir())


def test_the_fastest_is_chosen(slow_sdpa) -> None:
    fast, slow = Spy("fast"), Spy("slow", slow=0.05)
    choice = choose(slow, fast)
    assert choice.name == "fast"
    assert [row.name for row in choice.table] == ["fast", "sdpa", "slow"]
    q = torch.randn(1, 4, 2, 16)
    torch.testing.assert_close(choice.fn(q, q, q, CALL), sdpa(q, q, q))
    torch.testing.assert_close(choice.fn_with_lse(q, q, q, CALL), plain_with_lse(q, q, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spoil",
    [lambda x: x * 1.1, lambda x: x * float("nan"), lambda x: x.flip(1), torch.zeros_like],
    ids=["scaled", "nan", "reversed", "zeros"],
)
def test_wrong_ones_are_dropped_and_the_log_says_so(slow_sdpa, caplog, spoil, dtype) -> None:
    choice = choose(Spy("broken", spoil), dtype=dtype)
    assert choice.name == "sdpa"
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("Attention back end broken is not used: wrong result")
    assert line.endswith("sdpa runs instead.")


def test_one_that_fails_only_on_long_sequences_is_dropped(slow_sdpa, monkeypatch, caplog) -> None:
    monkeypatch.setattr(attention_choice, "CHECK_TOKENS", 20)
    spoil = lambda x: x / 0 if x.shape[1] > 50 else x  # noqa: E731
    assert choose(Spy("overflows", spoil)).name == "sdpa"
    assert "not finite at 64 tokens" in caplog.text


@pytest.mark.parametrize("package", [None, "flash-attn-4"])
def test_one_that_raises_is_dropped_in_one_line(slow_sdpa, caplog, monkeypatch, package) -> None:
    """A warning for what somebody has installed; PyTorch's own are not for all devices."""

    def raises(x):
        raise RuntimeError("no kernel image is available\nlong trace")

    monkeypatch.setattr(Backend, "version", "1.0")
    spy = Spy("absent", raises)
    spy.backend = replace(spy.backend, package=package)
    with caplog.at_level("INFO", "wanduet"):
        assert choose(spy).name == "sdpa"
    (said,) = [record for record in caplog.records if "is not used" in record.getMessage()]
    assert said.levelname == ("INFO" if package is None else "WARNING")
    assert "is not used: RuntimeError: no kernel image is available. sdpa runs instead" in said.getMessage()
    assert ("a fifth longer" in said.getMessage()) == (package is not None)
    assert "\n" not in said.getMessage()


def test_a_wrong_log_sum_exp_is_found(slow_sdpa, caplog) -> None:
    spy = Spy("halved")
    spy.backend = Backend("halved", spy.attend, lambda q, k, v, call: (sdpa(q, k, v), plain_with_lse(q, k, v)[1] / 2))
    assert choose(spy).name == "sdpa"
    assert "wrong log-sum-exp" in caplog.text


def test_approximate_ones_are_chosen_by_name_only(slow_sdpa) -> None:
    spy = Spy("approximate", lambda x: x * 1.03, exact=False, lse=False)
    assert choose(spy).name == "sdpa"
    assert spy.calls == 0
    choice = choose(spy, prefer="approximate")
    assert choice.name == "approximate"
    assert 0.02 < choice.table[0].error < 0.04
    assert choice.fn_with_lse is plain_with_lse


def test_a_named_one_that_is_absent_or_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not available here(.|\n)*auto, sdpa"):
        choose(prefer="flash-attn-9")
    with pytest.raises(ConfigError, match="wrong result"):
        choose(Spy("broken", lambda x: x * 2), prefer="broken")


@pytest.mark.parametrize(("release", "warned"), [("1.0.6", True), ("2.2.0", False)])
def test_a_release_that_made_black_videos_is_warned_of(monkeypatch, caplog, release: str, warned: bool) -> None:
    monkeypatch.setattr(backends, "version", lambda package: release)
    rough = replace(Spy("sageattention", exact=False).backend, package="sageattention")
    choose_attention(CPU, SHAPE, torch.float32, "sageattention", backends={"sageattention": rough})
    assert ("black videos" in caplog.text) == warned


@pytest.mark.parametrize("built", [True, False])
def test_flash_attention_is_tried_where_pytorch_was_built_with_it(monkeypatch, built: bool) -> None:
    """Its wheels for Windows are not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert ("sdpa_flash" in available_backends(torch.device("cuda"))) == built


def test_measured_once_and_remembered(tmp_path: Path, slow_sdpa) -> None:
    first, second = Spy("fast"), Spy("fast")
    table = choose(first, cache_folder=tmp_path).table
    again = choose(second, cache_folder=tmp_path)
    assert again.name == "fast"
    assert again.table == table
    assert (first.calls > 0, second.calls) == (True, 0)


class Failing(Spy):
    """A back end that fails as it is told."""

    problem: Exception | None = None

    def attend(self, q, k, v, call):
        self.calls += 1
        if self.problem is not None:
            raise self.problem
        return sdpa(q, k, v)


@pytest.fixture
def moment(monkeypatch):
    """What the machine is like: time, driver and packages, free memory."""
    now = {"time": 1e9, "state": "one", "free": 1000}
    monkeypatch.setattr(measurements.time, "time", lambda: now["time"])
    monkeypatch.setattr(measurements, "machine_state", lambda: now["state"])
    for module in (measurements, attention_choice):
        monkeypatch.setattr(module, "free_bytes", lambda device: now["free"])
    return now


SHORT, MISSING = torch.OutOfMemoryError("CUDA out of memory"), ImportError("No module named 'cutlass'")


@pytest.mark.parametrize(
    ("problem", "change", "tried_again"),
    [
        (MISSING, {}, False),
        (MISSING, {"time": 1e9 + 23 * 3600}, False),
        (MISSING, {"time": 1e9 + 25 * 3600}, True),
        (MISSING, {"time": 1e9 - 60}, True),  # the clock was set back
        (MISSING, {"state": "two"}, True),
        (MISSING, {"free": 9000}, False),
        (SHORT, {}, False),
        (SHORT, {"free": 1050}, False),
        (SHORT, {"free": 9000}, True),
        (SHORT, {"state": "two"}, True),
        (SHORT, {"time": 1e9 + 25 * 3600}, True),
    ],
)
def test_a_failure_is_remembered_for_a_day_or_until_something_changed(
    tmp_path: Path, slow_sdpa, moment, caplog, problem: Exception, change: dict, tried_again: bool
) -> None:
    failing, mended = Failing("fast"), Failing("fast")
    failing.problem = problem
    assert choose(failing, cache_folder=tmp_path).name == "sdpa"
    moment.update(change)
    with caplog.at_level("INFO", "wanduet"):
        caplog.clear()
        assert choose(mended, cache_folder=tmp_path).name == ("fast" if tried_again else "sdpa")
    assert (mended.calls > 0) == tried_again
    assert ("fast is not used" in caplog.text) != tried_again  # never silently


def test_one_that_fails_again_is_asked_for_another_day(tmp_path: Path, slow_sdpa, moment) -> None:
    for hours, calls in ((0, 1), (25, 1), (48, 0), (50, 1)):
        moment["time"] = 1e9 + hours * 3600
        failing = Failing("fast")
        failing.problem = MISSING
        assert choose(failing, cache_folder=tmp_path).name == "sdpa"
        assert failing.calls == calls


def test_memory_that_runs_out_while_close_ones_are_timed_costs_only_the_second_look(slow_sdpa, monkeypatch) -> None:
    real, calls = attention_choice._random_inputs, []

    def inputs(*args):
        calls.append(args)
        if len(calls) > 2 * 3:  # three back ends are checked and timed
            raise SHORT
        return real(*args)

    monkeypatch.setattr(attention_choice, "_random_inputs", inputs)
    monkeypatch.setattr(attention_choice, "_timed", lambda *_: [1.0])
    choice = choose(Spy("one"), Spy("two"))
    assert len(calls) == 7
    assert all(row.usable for row in choice.table)


@pytest.mark.parametrize("at", ["checking", "timing"])
def test_memory_that_is_short_for_all_leaves_pytorch_s_own(tmp_path, slow_sdpa, moment, monkeypatch, at: str) -> None:
    """And is no reason to do without the others for ever."""
    real, tokens = attention_choice._random_inputs, attention_choice.CHECK_TOKENS

    def inputs(shape, *rest):
        if (shape.queries == tokens) == (at == "checking"):
            raise SHORT
        return real(shape, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(attention_choice, "_random_inputs", inputs)
        assert choose(Spy("fast"), cache_folder=tmp_path).name == "sdpa"
    moment["free"] = 9000
    assert choose(Spy("fast"), cache_folder=tmp_path).name == "fast"


def test_measurements_hold_until_driver_or_packages_change(tmp_path: Path, slow_sdpa, moment) -> None:
    for change, measured_anew in (({}, True), ({"time": 2e9, "free": 1}, False), ({"state": "two"}, True)):
        moment.update(change)
        spy = Spy("fast")
        choose(spy, cache_folder=tmp_path)
        assert (spy.calls > 0) == measured_anew


def test_failures_that_earlier_versions_remembered_for_ever_are_tried_again(tmp_path: Path, slow_sdpa) -> None:
    choose(Spy("fast"), cache_folder=tmp_path)
    path = tmp_path / CACHE_FILE
    (key,) = json.loads(path.read_text())
    rows = [{"name": "sdpa", "milliseconds": 1.0, "error": 0.0, "problem": None}]
    rows.append({"name": "fast", "milliseconds": None, "error": None, "problem": "No module named 'cutlass'"})
    path.write_text(json.dumps({key: rows}))
    assert choose(Spy("fast"), cache_folder=tmp_path).name == "fast"


def test_what_is_installed_changes_the_state(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path), str(tmp_path / "nothing")])
    measurements._state_of.cache_clear()
    before = measurements.machine_state()
    (tmp_path / "cutlass-4.0.dist-info").mkdir()
    measurements._state_of.cache_clear()  # another process
    assert measurements.machine_state() != before


def test_another_version_or_shape_is_measured_anew(tmp_path: Path, slow_sdpa, monkeypatch) -> None:
    choose(Spy("fast"), cache_folder=tmp_path)
    longer = Shape(queries=64, keys=16, heads=2, head_dim=16)
    spy = Spy("fast")
    choose_attention(CPU, longer, torch.float32, backends=offered(spy), cache_folder=tmp_path)
    assert spy.calls > 0
    monkeypatch.setattr(torch, "__version__", "9.9")
    spy = Spy("fast")
    choose(spy, cache_folder=tmp_path)
    assert spy.calls > 0
    assert len(json.loads((tmp_path / CACHE_FILE).read_text())) == 3


def test_what_is_kept_of_these_versions_can_be_shown(tmp_path: Path, slow_sdpa, monkeypatch) -> None:
    spies = (Spy("fast"), Spy("wrong", spoil=lambda x: x * 1.1))
    assert measured(CPU, tmp_path, offered(*spies)) == {}
    table = choose(*spies, cache_folder=tmp_path).table
    assert measured(CPU, tmp_path, offered(*spies)) == {("float32", "64 x 64 x 2 x 16"): table}
    assert measured(CPU, tmp_path, offered(spies[0])) == {}
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert measured(CPU, tmp_path, offered(*spies)) == {}


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_cache_is_measured_anew(tmp_path: Path, slow_sdpa, content: str) -> None:
    (tmp_path / CACHE_FILE).write_text(content)
    assert choose(Spy("fast"), cache_folder=tmp_path).name == "fast"
    assert len(json.loads((tmp_path / CACHE_FILE).read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == [CACHE_FILE]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, slow_sdpa) -> None:
    (tmp_path / "file").write_text("")
    assert choose(Spy("fast"), cache_folder=tmp_path / "file").name == "fast"


def test_long_sequences_share_one_measurement() -> None:
    assert Shape(75_600, 512, 12, 128).timed == Shape(171_360, 512, 12, 128).timed == Shape(32_768, 512, 12, 128)
    assert Shape(32_760, 32_760, 12, 128).timed.queries == 32_768
    assert Shape(100, 100, 12, 128).timed.queries == 128
