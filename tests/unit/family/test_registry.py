from dataclasses import replace

import pytest

from wanduet.family.registry import DEFAULT_MODEL, MEMBERS, defaults_for, find_spec
from wanduet.family.spec import Member, value_problems
from wanduet.family.wan21 import WAN_1_3B


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.random_name)
def test_a_member_is_found_by_its_names_and_has_its_own_defaults(member: Member) -> None:
    assert find_spec(member.hub_id) is find_spec(member.random_name) is member.spec
    assert defaults_for(member.spec.transformer) == member.spec.defaults


def test_other_models_have_no_spec_here_and_the_default_models_defaults() -> None:
    assert find_spec("owner/model") is None
    smaller = replace(WAN_1_3B.transformer, num_layers=2)
    default = find_spec(DEFAULT_MODEL)
    assert default is not None
    assert defaults_for(smaller) == default.defaults


def test_a_config_changes_what_it_names_and_nothing_else() -> None:
    changed = WAN_1_3B.vae.with_config({"base_dim": 32, "dim_mult": [1, 2, 4, 4], "_class_name": "AutoencoderKLWan"})
    assert changed == replace(WAN_1_3B.vae, base_dim=32)
    assert value_problems(changed, WAN_1_3B.vae) == []


def test_every_wrong_value_of_a_config_is_named() -> None:
    changed = WAN_1_3B.transformer.with_config({"num_layers": 10**9, "eps": "small", "patch_size": [1, 0, 2]})
    problems = value_problems(changed, WAN_1_3B.transformer)
    assert [problem.replace("=", " ").split()[0] for problem in problems] == ["num_layers", "patch_size", "eps"]
