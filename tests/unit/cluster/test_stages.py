"""Whether stages should live apart: yes where a card denoises worse than it decodes, no for equals, whatever is asked of them."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanduet.cluster.stages import MARGIN, Costs, NodeCosts, plan_stages


def card(denoise: float, decode: float, count: int = 1, name: str = "card", **options: float) -> NodeCosts:
    replicas = 0 if denoise == inf else count
    return NodeCosts(name, replicas, Costs(denoise, decode), count, decode, **options)


def encoder(seconds: float = 1.0) -> NodeCosts:
    return NodeCosts("cpu", 0, Costs(inf, inf), encode_dedicated=seconds)


FAST = card(2.0, 2.5, name="fast")


def fleet(*nodes: NodeCosts) -> dict[str, NodeCosts]:
    return {f"n{index}": node for index, node in enumerate(nodes)}


def test_equal_cards_stay_together_and_are_told_why() -> None:
    plan = plan_stages(fleet(*[card(10.0, 5.0)] * 4))
    assert (plan.apart, plan.gain) == (False, 0.0)
    assert plan.together == pytest.approx(4 / 15)
    assert "equal cards gain nothing" in plan.reason


def test_one_card_or_none_stays_together() -> None:
    assert not plan_stages(fleet(FAST)).apart
    assert not plan_stages({}).apart
    assert "no node could" in plan_stages({}).reason


def test_a_card_that_cannot_denoise_decodes_for_the_others() -> None:
    plan = plan_stages(fleet(FAST, card(inf, 2.0, name="old")))
    assert plan.stages == {"n1": "decode"}
    assert plan.left == 1.0
    assert plan.rate == pytest.approx(1 / 2.0)
    assert plan.gain == pytest.approx(4.5 / 2.0 - 1)
    assert "old" in plan.reason
    assert "cannot denoise" in plan.reason
    assert "+125%" in plan.reason


def test_a_decoder_that_is_too_slow_for_all_takes_what_it_can_and_the_rest_is_decoded_where_it_is_made() -> None:
    plan = plan_stages(fleet(FAST, card(inf, 10.0, name="old")))
    assert plan.stages == {"n1": "decode"}
    assert plan.rate * 2.0 + (plan.rate - 1 / 10) * 2.5 == pytest.approx(1.0, rel=1e-6)  # the fast card is just busy
    assert plan.left * plan.rate == pytest.approx(1 / 10, rel=1e-6)


def test_a_gain_within_the_error_of_predictions_is_none() -> None:
    slow = card(inf, 400.0, name="old")
    plan = plan_stages(fleet(card(100.0, 2.0), slow))
    assert not plan.apart
    assert "best way apart would bring +" in plan.reason


def test_long_denoises_stay_together_even_beside_old_cards() -> None:
    """Fifty steps: the decode is so small a part that an old card is worth more as a slow replica."""
    assert not plan_stages(fleet(*[card(44.0, 2.3)] * 4, *[card(300.0, 15.0)] * 4)).apart


def test_old_cards_that_do_denoise_decode_where_they_lose_least_by_it() -> None:
    nodes = fleet(*[card(2.0, 2.3, name="new")] * 4, *[card(60.0, 8.0, name="old")] * 4)
    plan = plan_stages(nodes)
    assert set(plan.stages.values()) == {"decode"}
    assert all(nodes[name].name == "old" for name in plan.stages)
    assert plan.gain > MARGIN
    assert "do better at it" in plan.reason


def test_a_card_beside_the_denoise_gains_nothing_by_leaving_its_decodes() -> None:
    pair = NodeCosts("pair", 1, Costs(20.0, 5.0, overlaps=True), 2, 5.0)
    plan = plan_stages(fleet(pair, pair))
    assert not plan.apart
    assert plan.together == pytest.approx(2 / 20)


def test_encoders_help_where_the_replicas_hosts_are_slower_than_their_gpus() -> None:
    busy = card(2.0, 2.0, 8, name="8 cards", encode=9.0)
    plan = plan_stages(fleet(busy, encoder(1.0), encoder(2.0)))
    assert plan.stages == {"n1": "encode", "n2": "encode"}
    assert (plan.together, plan.rate) == (pytest.approx(8 / 9), pytest.approx(2.0))
    assert "encode prompts ahead" in plan.reason
    assert plan_stages(fleet(busy, encoder(4.0))).rate == pytest.approx(8 / 9 + 1 / 4)


def test_encoders_do_not_help_where_the_hosts_are_fast_enough() -> None:
    plan = plan_stages(fleet(card(50.0, 3.0, encode=9.0), encoder()))
    assert not plan.apart
    assert "encode fast enough" in plan.reason


def test_both_stages_may_live_apart() -> None:
    plan = plan_stages(fleet(card(2.0, 2.0, 4, encode=6.0), card(inf, 1.0, 4, name="old"), encoder(0.5)))
    assert plan.stages == {"n1": "decode", "n2": "encode"}
    assert plan.rate == pytest.approx(2.0)


def test_together_is_followed_when_it_is_asked_for() -> None:
    plan = plan_stages(fleet(FAST, card(inf, 2.0)), mode="together")
    assert (plan.apart, plan.reason) == (False, "together: asked for")


def test_apart_follows_the_labels_even_at_a_loss_and_says_so() -> None:
    nodes = fleet(card(10.0, 1.0), card(10.0, 1.0), encoder())
    plan = plan_stages(nodes, mode="apart", wishes={"n1": "decode", "n2": "encode"})
    assert plan.stages == {"n1": "decode", "n2": "encode"}
    assert plan.gain < 0
    assert "as labelled" in plan.reason
    assert "-" in plan.reason.rpartition(";")[2]


def test_apart_without_labels_is_left_to_the_rates() -> None:
    assert not plan_stages(fleet(card(10.0, 1.0), card(10.0, 1.0)), mode="apart").apart
    assert plan_stages(fleet(FAST, card(inf, 2.0)), mode="apart").apart


def test_a_node_that_is_labelled_for_whole_jobs_never_decodes() -> None:
    nodes = fleet(FAST, card(inf, 2.0), card(inf, 2.0))
    assert plan_stages(nodes, wishes={"n1": "all"}).stages == {"n2": "decode"}


def test_a_node_that_some_job_needs_is_left_out_in_every_mode() -> None:
    nodes = fleet(FAST, card(60.0, 2.0))
    assert not plan_stages(nodes, needed=frozenset({"n1"})).apart
    assert not plan_stages(nodes, needed=frozenset({"n1"}), mode="apart", wishes={"n1": "decode"}).apart


def test_a_choice_is_kept_until_another_is_clearly_better() -> None:
    nodes = fleet(FAST, card(inf, 2.0), card(inf, 2.01))
    assert plan_stages(nodes, before={"n1": "decode", "n2": "decode"}).stages == {"n1": "decode", "n2": "decode"}
    assert plan_stages(nodes).stages == {"n1": "decode"}
    slow = fleet(card(44.0, 2.3), card(300.0, 15.0))
    assert not plan_stages(slow, before={"n1": "decode"}).apart


seconds = st.floats(0.5, 500.0)
some_nodes = st.lists(
    st.builds(
        lambda denoise, decode, count, encode: card(denoise, decode, count, encode=encode),
        st.one_of(seconds, st.just(inf)), seconds, st.integers(1, 8), st.floats(0.0, 30.0),
    ),
    max_size=6,
)  # fmt: skip


@settings(max_examples=300)
@given(some_nodes, st.lists(st.builds(encoder, seconds), max_size=2))
def test_no_choice_is_ever_worse_than_together_nor_better_than_all_cards_at_once(nodes, encoders) -> None:
    found = fleet(*nodes, *encoders)
    plan = plan_stages(found)
    assert plan.rate >= plan.together * (1 - 1e-9)
    if plan.apart:
        assert plan.gain > MARGIN
        assert 0.0 <= plan.left <= 1.0
    # No schedule denoises more than all cards denoising, nor decodes more than all decoding.
    assert plan.rate <= sum(node.replicas / node.whole.denoise for node in nodes if node.replicas) * (1 + 1e-9)
    assert plan.reason
