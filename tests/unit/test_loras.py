"""LoRAs of a request: how they are spelled, and in which steps each is used."""

import pytest

from wanduet.errors import InvalidRequestError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.loras import Lora, loras_at
from wanduet.request import GenerationRequest, ResolvedRequest


def parse(*spelled: object) -> tuple[Lora, ...]:
    return GenerationRequest.parse(prompt="x", loras=spelled).loras or ()


@pytest.mark.parametrize(
    ("text", "name", "numbers"),
    [
        ("style.safetensors", "style.safetensors", (1, 0, 1)),
        ("style.safetensors:0.8", "style.safetensors", (0.8, 0, 1)),
        ("style.safetensors:-1", "style.safetensors", (-1, 0, 1)),
        ("style.safetensors:0", "style.safetensors", (0, 0, 1)),
        ("style.safetensors:1.5@0-0.5", "style.safetensors", (1.5, 0, 0.5)),
        ("style.safetensors:+.5@.25-1", "style.safetensors", (0.5, 0.25, 1)),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", (1, 0, 1)),
        (r"C:\loras\style.safetensors:0.8@0-0.5", r"C:\loras\style.safetensors", (0.8, 0, 0.5)),
        ("a:b.safetensors:2", "a:b.safetensors", (2, 0, 1)),
        ("12:30.safetensors", "12:30.safetensors", (1, 0, 1)),
        ("style.safetensors:strong", "style.safetensors:strong", (1, 0, 1)),
    ],
)
def test_spellings(text: str, name: str, numbers: tuple[float, ...]) -> None:
    (lora,) = parse(text)
    assert (lora.name, (lora.strength, lora.start, lora.end)) == (name, numbers)
    assert parse({"name": name, "strength": numbers[0], "start": numbers[1], "end": numbers[2]}) == (lora,)


@pytest.mark.parametrize(
    "wrong",
    ["a:11", "a:-11", "a:1@0.5-0.5", "a:1@0.5-0.2", "a:1@0-1.5", "", {"name": "a", "scale": 1}, {"strength": 1}],
)
def test_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(wrong)
    assert caught.value.field == "loras"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("a:11", "loras='a:11' is not allowed: a strength of -10 to 10, for example style.safetensors:0.8"),
        ("a:-10.5", "a strength of -10 to 10"),
        ("a:1@0.5-0.2", "loras='a:1@0.5-0.2' is not allowed: shares of the steps from 0 to 1, the smaller one first"),
        ("a:1@0-2", "for example style.safetensors:1@0-0.5"),
        ({"name": "a", "strength": 11}, "strength: at most 10"),
    ],
)
def test_a_number_out_of_range_says_what_to_write(wrong: object, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(wrong)
    assert words in str(caught.value)


def test_steps() -> None:
    loras = parse("a:1@0-0.5", "b:1@0.5-1", "c", "d:0")
    names = ["".join(lora.name for lora in loras_at(loras, step, 5)) for step in range(5)]
    assert names == ["ac", "ac", "ac", "bc", "bc"]
    assert loras_at(parse("a:1@0-0.01"), 0, 4), "a share is at least the first step"


def resolved(*loras: object) -> ResolvedRequest:
    return GenerationRequest.parse(prompt="x", seed=1, loras=loras).resolve(WAN_1_3B)


def test_a_record_has_the_hash_and_not_the_folder() -> None:
    record = resolved({"name": "/home/me/style.safetensors", "strength": 0.5, "sha256": "ab" * 32}).recorded()
    assert record["loras"] == [{"name": "style.safetensors", "strength": 0.5, "sha256": "ab" * 32}]
    assert "/home" not in repr(record)
    assert "loras" not in resolved().recorded()


def test_a_record_is_a_request_again() -> None:
    request = resolved({"name": "style.safetensors", "strength": 0.5, "end": 0.5, "sha256": "ab" * 32}, "b:2")
    again = request.as_request().resolve(WAN_1_3B)
    assert again == request
