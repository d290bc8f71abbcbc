"""Settings of the whole process, set around the work of whoever needs them."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.precision import CONVOLUTIONS, EXACT, PRODUCTS, SharedSetting, convolutions_use_tf32, vae_precision
from wanduet.models.vae.model import WanVAE

WAIT = 120.0


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(products)  # takes back what the newer names have set, too
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = False


class Value:
    """A setting of the process, with what was done to it."""

    def __init__(self) -> None:
        self.now = "theirs"

    def change(self, value: str):
        before, self.now = self.now, value
        return lambda: setattr(self, "now", before)


def until_so_many_wait(setting: SharedSetting[str], count: int) -> None:
    deadline = time.monotonic() + WAIT
    while len(setting._waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_those_who_want_the_same_share_and_others_wait_in_their_order() -> None:
    value = Value()
    setting: SharedSetting[str] = SharedSetting(value.change)
    inside, go = threading.Barrier(3), threading.Event()
    order: list[str] = []

    def share() -> None:
        with setting.at("a"):
            inside.wait(WAIT)
            go.wait(WAIT)
            order.append(value.now)

    def other() -> None:
        with setting.at("b"):
            order.append(value.now)

    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(share) for _ in range(2)]
        inside.wait(WAIT)  # both are in at once
        waiting = pool.submit(other)
        until_so_many_wait(setting, 1)
        late = pool.submit(lambda: setting.at("a").__enter__())  # may not overtake the one that waits
        until_so_many_wait(setting, 2)
        assert not waiting.done()
        assert not late.done()
        go.set()
        for one in (*first, waiting, late):
            one.result(WAIT)
    assert order == ["a", "a", "b"]


def test_it_is_put_back_also_after_an_error_and_within_itself() -> None:
    value = Value()
    setting: SharedSetting[str] = SharedSetting(value.change)
    with suppress(KeyError), setting.at("a"), setting.at("a"):
        assert value.now == "a"
        raise KeyError
    assert value.now == "theirs"
    with setting.at("a"), pytest.raises(RuntimeError, match="cannot have it"), setting.at("b"):
        pass
    assert value.now == "theirs"


def test_a_setting_that_cannot_be_made_leaves_nobody_waiting() -> None:
    def fails(value: str):
        raise OSError(value)

    setting: SharedSetting[str] = SharedSetting(fails)
    for _ in range(2):
        with pytest.raises(OSError, match="a"), setting.at("a"):
            pass


@pytest.mark.parametrize("theirs", [True, False])
def test_a_program_s_own_setting_holds_before_and_after(theirs) -> None:
    torch.backends.cudnn.allow_tf32 = theirs
    torch.set_float32_matmul_precision("high")
    for ours in (True, False):
        with vae_precision(ours):
            assert convolutions_use_tf32() == torch.backends.cudnn.allow_tf32 == ours
            assert torch.get_float32_matmul_precision() == EXACT
    assert torch.backends.cudnn.allow_tf32 == theirs
    assert torch.get_float32_matmul_precision() == "high"
    with vae_precision(None):
        assert torch.backends.cudnn.allow_tf32 == theirs


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch's newer names")
@pytest.mark.parametrize("theirs", ["tf32", "ieee"])
def test_a_program_that_uses_the_newer_names_keeps_its_setting(theirs) -> None:
    torch.backends.cudnn.conv.fp32_precision = theirs
    torch.backends.cudnn.rnn.fp32_precision = {"tf32": "ieee", "ieee": "tf32"}[theirs]
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the older names cannot be read now
    for ours in (True, False):
        with CONVOLUTIONS.at(ours), PRODUCTS.at(EXACT):
            assert convolutions_use_tf32() == ours
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == theirs
    assert torch.backends.cudnn.rnn.fp32_precision != theirs
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_two_vaes_of_different_precision_that_work_at_once_each_get_theirs() -> None:
    """As two engines' are, in threads; the program's own setting is a third."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    spec = replace(WAN_1_3B.vae, base_dim=8, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    seen: dict[bool, set[tuple[bool, str]]] = {True: set(), False: set()}
    started = threading.Barrier(2)

    def decode(tf32: bool) -> None:
        vae = WanVAE(spec).requires_grad_(False)
        vae.tf32 = tf32

        def look(*_: object) -> None:
            seen[tf32].add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))

        vae.post_quant_conv.register_forward_hook(look)
        vae.decoder.conv_out.register_forward_pre_hook(look)
        vae.decoder.mid_block.attentions[0].proj.register_forward_hook(look)
        started.wait(WAIT)
        with torch.no_grad():
            for _ in vae.decode_frames(torch.zeros(1, 4, 4, 2, 2)):
                pass

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(decode, tf32) for tf32 in (True, False)]:
            one.result(WAIT)
    assert seen == {True: {(True, EXACT)}, False: {(False, EXACT)}}
    assert torch.backends.cudnn.allow_tf32 is True
    assert torch.get_float32_matmul_precision() == "high"
