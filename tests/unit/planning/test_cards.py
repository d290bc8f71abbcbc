"""GPUs by name: what people type, what drivers say, and what is assumed where only the memory is known."""

import pytest

from wanduet.planning.cards import CARDS, TYPICAL, card_named, typical_card
from wanduet.planning.cost import rate
from wanduet.planning.hardware import DeviceInfo, parse_hardware

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("RTX4060Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("h100", "H100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
    ],
)
def test_what_people_and_drivers_call_a_card(text: str, name: str) -> None:
    card = card_named(text)
    assert card is not None
    assert card.name == name


@pytest.mark.parametrize("text", ["", "much", "RTX 9999", "NVIDIA GeForce RTX 4090 Laptop GPU", "Apple GPU", "GPU"])
def test_other_names_are_no_card_of_the_table(text: str) -> None:
    assert card_named(text) is None


def test_every_card_is_found_by_its_own_name_and_by_no_other() -> None:
    assert [card_named(card.name) for card in CARDS] == list(CARDS)
    assert {card.name for card in CARDS} >= set(TYPICAL)


def test_hardware_by_name_by_memory_and_mixed() -> None:
    machine = parse_hardware("2 x RTX 3090 + h100, 8, ram=64GiB")
    assert [device.model for device in machine.devices] == ["RTX 3090", "RTX 3090", "H100", "RTX 3060 Ti"]
    assert [device.total_bytes // GIB for device in machine.devices] == [24, 24, 79, 8]
    assert machine.host_total_bytes == 64 * GIB
    (half,) = parse_hardware("11.5").devices
    assert (half.model, half.total_bytes) == ("RTX 3060", int(11.5 * GIB))


def test_an_unknown_card_is_taken_for_a_common_one_with_its_memory() -> None:
    sizes = [typical_card(size * GIB).total_bytes for size in (1, 8, 9, 16, 24, 48, 80, 500)]
    assert sizes == sorted(sizes)
    assert typical_card(24 * GIB).name == "RTX 3090"


def test_the_predicted_rate_is_the_cards_where_it_is_known_and_its_generations_where_not() -> None:
    def of(model: str) -> float:
        return rate(DeviceInfo("cuda:0", model, 24 * GIB, 23 * GIB, (8, 6), 82))

    assert of("NVIDIA GeForce RTX 3090") == pytest.approx(51.1, abs=0.1)
    assert of("NVIDIA RTX A6000") > 1.4 * of("NVIDIA GeForce RTX 3090")  # full rate with float32 sums
    assert of("a card from tomorrow") == pytest.approx(0.62 * 82)
